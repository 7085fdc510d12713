"""Does a site's update ever lie open behind the TLS, or in the SuperLink's database?

In every play the known updates of every site are looked for in everything that passes the middle of
the connections, and in whatever the database's files held while the study ran. One play has sites
that do not mask, whose updates must be found: a search that finds nothing proves nothing else.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import FedwardError

WINDOW = 24
"""Bytes of an update that are looked for at a time: 8 coordinates of 24 bits."""


def windows(update: bytes) -> Iterator[bytes]:
    """Pieces of an update; not those that hold one value only, which are everywhere."""
    for start in range(0, len(update) - WINDOW + 1, WINDOW):
        piece = update[start : start + WINDOW]
        if len(set(piece)) > WINDOW // 2:
            yield piece


def places(known: Mapping[str, Iterable[bytes]], seen: Mapping[str, Iterable[bytes]]) -> set[str]:
    """Where some piece of some site's update was found: names of `seen`."""
    pieces = {p for updates in known.values() for update in updates for p in windows(update)}
    if not pieces:
        raise FedwardError("there is no update to look for")
    begins = np.zeros(1 << 16, dtype=bool)
    begins[[int.from_bytes(p[:2], "little") for p in pieces]] = True
    return {name for name, texts in seen.items() if any(_holds(t, pieces, begins) for t in texts)}


def _holds(text: bytes, pieces: set[bytes], begins: NDArray[np.bool_]) -> bool:
    """Whether any piece lies anywhere in a text; `begins` has the first two bytes of each piece.

    One pass over the text, however many pieces: a long study has thousands.
    """
    for shift in (0, 1):
        if len(text) < WINDOW:
            return False
        pairs = np.frombuffer(text, "<u2", (len(text) - shift) // 2, shift)
        for place in 2 * np.flatnonzero(begins[pairs]) + shift:
            if text[place : place + WINDOW] in pieces:
                return True
    return False


PAGE, OVERLAP = 1 << 14, 2 * WINDOW
LOOK_S = 0.1


@dataclass
class DatabaseWatch:
    """Keeps whatever a database's files hold, as long as it runs; each piece of them once."""

    database: Path
    pieces: list[bytes] = field(default_factory=list)
    _known: set[bytes] = field(default_factory=set)
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def look(self) -> None:
        """Keep what is new."""
        for file in self.database.parent.glob(f"{self.database.name}*"):
            try:
                found = file.stat()
                stamp = (found.st_mtime_ns, found.st_size)
                if self._stamps.get(file) == stamp:
                    continue
                self._stamps[file] = stamp
                self._keep(file.read_bytes())
            except OSError:
                continue  # SQLite took the file away

    def _keep(self, state: bytes) -> None:
        for start in range(0, len(state), PAGE):
            piece = state[start : start + PAGE + OVERLAP]
            digest = hashlib.sha256(piece).digest()
            if digest not in self._known:
                self._known.add(digest)
                self.pieces.append(piece)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look ten times a second within the block, and once at its end."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(LOOK_S):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.look()
