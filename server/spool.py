"""A run's evidence on disk as it goes on, so that a ServerApp that is killed loses none of it.

FOLDER/records.bin   records, each after its length
FOLDER/results.bin   published results, likewise

A record that a crash cut short is cut off when the run goes on; the round that it belonged to is
then aborted, and its record comes again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from server.evidence import Spool

_LENGTH = struct.Struct("<I")


class DurableSpool(Spool):
    """A `Spool` whose records are on disk when `keep` and `publish` return."""

    def __init__(self, folder: Path, *, keep_sums: bool = True, durable: bool = True) -> None:
        """Begin with what the folder holds; `durable` waits for the disk at every record."""
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, keep_sums=keep_sums)
        self._durable = durable
        self._log, self._results = folder / "records.bin", folder / "results.bin"
        for record in _frames(self._log):
            super().keep(record)
        for result in _frames(self._results):
            super().publish(result)

    def keep(self, record: bytes) -> None:
        """Keep one record; one that is known changes nothing."""
        if record not in self._records:
            self._append(self._log, record)
            super().keep(record)

    def publish(self, result: bytes) -> None:
        """Keep the sum of a published result; an abort has none."""
        if self._keep_sums:
            self._append(self._results, result)
            super().publish(result)

    def _append(self, path: Path, record: bytes) -> None:
        with path.open("ab") as file:
            file.write(_LENGTH.pack(len(record)) + record)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())


def _frames(path: Path) -> Iterator[bytes]:
    """The whole records of a file; half a one at its end is cut off."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size, whole = path.stat().st_size, 0
        while whole + _LENGTH.size <= size:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if whole + _LENGTH.size + length > size:
                break
            yield file.read(length)
            whole += _LENGTH.size + length
        file.truncate(whole)
