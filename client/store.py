"""A site's durable key-value state of one run: what must never happen twice is on disk first.

One SQLite file per run. Beside the state it holds the run's evidence, records that are only ever
added to. Every message is handled inside one transaction that commits before the
reply leaves, so that after a crash the site either never acted or still knows that it did.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

# A value of the same length is overwritten where it lies; REPLACE would erase it first.
_PUT = "INSERT INTO item VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"


def connect(path: Path, *, durable: bool) -> sqlite3.Connection:
    """Open a site's SQLite file in write-ahead mode.

    Args:
        path: The file; its folder must exist.
        durable: Wait for the disk at every commit (synchronous=FULL); simulations do not.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    # Vectors are megabytes: in pages of 16 KiB they are written in half the time.
    connection.execute("PRAGMA page_size=16384")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
    connection.execute("PRAGMA secure_delete=ON")
    return connection


_EVIDENCE = (
    "CREATE TABLE IF NOT EXISTS evidence"
    " (number INTEGER PRIMARY KEY, hash BLOB UNIQUE, record BLOB)"
)
_KEEP = "INSERT INTO evidence (hash, record) VALUES (?, ?) ON CONFLICT (hash) DO NOTHING"


class RunStore(MutableMapping[str, bytes]):
    """Bytes by name, kept in memory and on disk, written in all-or-nothing transactions."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._db = connect(path, durable=durable)
        self._db.execute("CREATE TABLE IF NOT EXISTS item (name TEXT PRIMARY KEY, value BLOB)")
        self._db.execute(_EVIDENCE)
        self._pending: list[bytes] = []
        self._items: dict[str, bytes] = {}
        self._touched: set[str] = set()
        self._generation = -1
        self.refresh()

    def refresh(self) -> bool:
        """Read the disk again if another process wrote since; true if it did."""
        current = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if current == self._generation:
            return False
        rows = self._db.execute("SELECT name, value FROM item")
        self._items = {name: bytes(value) for name, value in rows}
        self._touched.clear()
        self._generation = current
        return True

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit every change made inside on a clean exit; forget them all on an error."""
        before = dict(self._items)
        try:
            yield
            self._write()
        except BaseException:
            self._items = before
            raise
        finally:
            self._touched.clear()
            self._pending.clear()

    def keep(self, record: bytes) -> None:
        """Add a record of evidence to the open transaction; a known one changes nothing."""
        self._pending.append(record)

    def evidence(self) -> tuple[bytes, ...]:
        """All records of evidence, oldest first, those of the open transaction included."""
        rows = self._db.execute("SELECT record FROM evidence ORDER BY number")
        return tuple(dict.fromkeys([*(bytes(row[0]) for row in rows), *self._pending]))

    def _write(self) -> None:
        if not self._touched and not self._pending:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for name in self._touched:
                if name in self._items:
                    self._db.execute(_PUT, (name, self._items[name]))
                else:
                    self._db.execute("DELETE FROM item WHERE name = ?", (name,))
            for record in self._pending:
                self._db.execute(_KEEP, (hashlib.sha256(record).digest(), record))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def __getitem__(self, name: str) -> bytes:
        return self._items[name]

    def __setitem__(self, name: str, value: bytes) -> None:
        self._items[name] = value
        self._touched.add(name)

    def __delitem__(self, name: str) -> None:
        del self._items[name]
        self._touched.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def close(self) -> None:
        """Release the file."""
        self._db.close()


class Prefixed(MutableMapping[str, bytes]):
    """The part of a store whose names start with a prefix, under names without it."""

    def __init__(self, inner: MutableMapping[str, bytes], prefix: str) -> None:
        self._inner, self._prefix = inner, prefix

    def __getitem__(self, name: str) -> bytes:
        return self._inner[self._prefix + name]

    def __setitem__(self, name: str, value: bytes) -> None:
        self._inner[self._prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self._inner[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        cut = len(self._prefix)
        return (name[cut:] for name in self._inner if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
