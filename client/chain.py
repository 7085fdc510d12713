"""Append-only records of a site: each line chained by sha256 to the one before, and signed.

The ledger and the journal have this form. A line that was changed, removed, added or moved no
longer follows from the one before it, and nobody without the site's key can extend a chain. What
no chain notices alone is that its last lines were cut off; a head that others keep shows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.store import connect
from shared.config import canonical_json
from shared.errors import ConfigError, FedwardError, ProtocolError
from shared.identity import Identity, fingerprint, verify

START = bytes(32)
Row = tuple[int, str, bytes, bytes]
"""Number, canonical JSON, link, signature."""

_TABLE = """
CREATE TABLE IF NOT EXISTS event (
    number INTEGER PRIMARY KEY,
    body TEXT NOT NULL, chain BLOB NOT NULL, signature BLOB NOT NULL
);
"""


@dataclass(frozen=True)
class ChainKind:
    """What tells one chain from another.

    Attributes:
        schema: Goes into every link.
        context: Of the signatures.
        name: In messages, such as "the ledger".
        remedy: What to do about a broken one.
        error: Class of the error.
    """

    schema: str
    context: str
    name: str
    remedy: str
    error: type[FedwardError]


def link(schema: str, previous: bytes, body: bytes) -> bytes:
    """The next link, 32 bytes."""
    return hashlib.sha256(schema.encode() + previous + body).digest()


def check_rows(
    kind: ChainKind, rows: Iterator[Row], public: bytes, *, every_signature: bool = True
) -> int:
    """Check rows of a chain, of the file or of an export; returns how many there are.

    Args:
        kind: Which chain.
        rows: Oldest first.
        public: The site's identity, 32 bytes.
        every_signature: False checks the last one alone, which covers the whole chain.

    Raises:
        kind.error: a row does not follow from the one before it, or is not signed.
    """
    chain, count, signature = START, 0, b""
    for number, body, found, signature in rows:
        chain, count = link(kind.schema, chain, body.encode()), count + 1
        if chain != found or number != count:
            raise kind.error(
                f"{kind.name}'s line {number} does not follow from the one before it: a line was "
                f"changed or removed. {kind.remedy}"
            )
        if every_signature:
            _check_signature(kind, public, chain, signature, number)
    if count and not every_signature:
        _check_signature(kind, public, chain, signature, count)
    return count


def _check_signature(
    kind: ChainKind, public: bytes, chain: bytes, signature: bytes, number: int
) -> None:
    try:
        verify(public, kind.context, chain, signature, who=f"line {number}")
    except ProtocolError:
        raise kind.error(
            f"{kind.name}'s line {number} is not signed by this site: it was written by somebody "
            f"else. {kind.remedy}"
        ) from None


class ChainFile:
    """A chain in an SQLite file; several processes may append to it."""

    def __init__(
        self, path: Path, kind: ChainKind, identity: Identity, *, clock: Callable[[], float]
    ) -> None:
        """Open the file, or begin an empty one.

        Raises:
            ConfigError: it cannot be opened, or is something else.
        """
        self._kind, self._identity, self._clock = kind, identity, clock
        self._path = path
        with self._readable():
            self._db = connect(path, durable=True)
            self._db.executescript(_TABLE)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path} cannot be read or written ({error}). Check the disk's room and the "
                "file's permissions; nothing leaves this site without a record."
            ) from None

    def append(self, fields: dict[str, Any]) -> None:
        """Add a line, with the time; on disk when this returns.

        Raises:
            ConfigError: it cannot be written.
        """
        with self._readable():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._insert(canonical_json({**fields, "time": round(self._clock(), 3)}))
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _insert(self, body: bytes) -> None:
        last = self._db.execute(
            "SELECT number, chain FROM event ORDER BY number DESC LIMIT 1"
        ).fetchone() or (0, START)
        chain = link(self._kind.schema, bytes(last[1]), body)
        row = (last[0] + 1, body.decode(), chain, self._identity.sign(self._kind.context, chain))
        self._db.execute("INSERT INTO event VALUES (?, ?, ?, ?)", row)

    def rows(self, after: int = 0) -> Iterator[Row]:
        """Lines whose number is above `after`, oldest first."""
        with self._readable():
            found = self._db.execute(
                "SELECT number, body, chain, signature FROM event WHERE number > ? ORDER BY number",
                (after,),
            ).fetchall()
        for number, body, chain, signature in found:
            yield number, body, bytes(chain), bytes(signature)

    def close(self) -> None:
        """Release the file."""
        self._db.close()


def export_rows(rows: Iterator[Row], path: Path, *, schema: str, site: str, public: bytes) -> int:
    """Write a chain as text to a new file, a header and one JSON object a line; how many lines.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give a new file.") from None
    count = 0
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        head = {"schema": schema, "site": site, "public": public.hex()}
        file.write(json.dumps(head) + "\n")
        for number, body, chain, signature in rows:
            line = {"number": number, "body": body, "chain": chain.hex()}
            file.write(json.dumps(line | {"signature": signature.hex()}) + "\n")
            count += 1
    return count


def check_exported(
    path: Path, kind: ChainKind, expected_fingerprint: str, *, schema: str
) -> tuple[int, frozenset[bytes]]:
    """Check a file that `export_rows` wrote.

    Args:
        path: The file.
        kind: Which chain it must hold.
        expected_fingerprint: Of the site, as it was read over the phone; never from the file.
        schema: Of the export.

    Returns:
        How many lines it has, and every head that the chain ever had.

    Raises:
        ConfigError: not such a file.
        kind.error: another site's, or a line was changed, removed, added or moved.
    """
    heads: list[bytes] = []

    def rows() -> Iterator[Row]:
        for record in records[1:]:
            heads.append(bytes.fromhex(record["chain"]))
            yield record["number"], record["body"], heads[-1], bytes.fromhex(record["signature"])

    try:
        text = path.read_text(encoding="utf-8")
        records: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        public = bytes.fromhex(records[0]["public"])
        if records[0]["schema"] != schema:
            raise ValueError(records[0]["schema"])
        if fingerprint(public) != expected_fingerprint:
            raise kind.error(
                f"{path} is signed by {fingerprint(public)}, not by {expected_fingerprint}."
            )
        return check_rows(kind, rows(), public), frozenset(heads)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not an export of {kind.name} ({type(error).__name__}: {error})."
        ) from None
