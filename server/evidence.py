"""The server's part of a run's evidence: kept as the run goes on, written when it ends.

The server signs nothing here that counts: every record holds the sites' own signatures. Its record
and the sites' exports say the same, and an auditor holds them against each other.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from shared.errors import ProtocolError
from shared.evidence import DealsSeen, EpochOpened, PublishedSum, log_entry
from shared.messages import decode, encode, kind_of
from shared.secagg.messages import Abort, Activation, Descriptor, Result

_LENGTH = struct.Struct("<I")


class Recorder(Protocol):
    """Where the study loop leaves its records."""

    def keep(self, record: bytes) -> None:
        """Keep one record; one that is known changes nothing."""

    def publish(self, result: bytes) -> None:
        """Keep the sum of a published result."""


class NoRecord:
    """Keeps nothing; for benchmarks and tests of the loop alone."""

    def keep(self, record: bytes) -> None:
        """Drop it."""

    def publish(self, result: bytes) -> None:
        """Drop it."""


class Spool:
    """Records in memory, published sums on disk: they can be larger than memory.

    Args:
        folder: Of the spooled sums; a temporary file that nobody else sees where None.
        keep_sums: Whether sums are kept at all.
    """

    def __init__(self, folder: Path | None = None, *, keep_sums: bool = True) -> None:
        """Begin empty."""
        self._records: dict[bytes, None] = {}
        self._sums: dict[int, tuple[int, int]] = {}
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # until close
        self._keep_sums = keep_sums

    def keep(self, record: bytes) -> None:
        """Keep one record; one that is known changes nothing."""
        self._records.setdefault(record)

    def publish(self, result: bytes) -> None:
        """Keep the sum of a published result; an abort has none."""
        if not self._keep_sums or kind_of(result) is Abort:
            return
        published = decode(Result, result)
        round_no = decode(Descriptor, published.descriptor).round
        at = self._file.seek(0, 2)
        self._file.write(published.total)
        self._sums[round_no] = (at, len(published.total))

    @property
    def records(self) -> tuple[bytes, ...]:
        """What was kept, in order."""
        return tuple(self._records)

    def sums(self) -> Iterator[bytes]:
        """The published sums as `PublishedSum` records, in the order of the rounds."""
        for round_no, (at, size) in sorted(self._sums.items()):
            self._file.seek(at)
            yield encode(PublishedSum(round_no, self._file.read(size)))

    def close(self) -> None:
        """Remove the spooled sums."""
        self._file.close()


def along(records: tuple[bytes, ...], final: bytes) -> tuple[bytes, ...]:
    """The records without rounds that the history up to `final` (T, 32 bytes) does not hold.

    A server that stopped between publishing a round and telling anyone aborts that round when it
    goes on; its first record of the round led nowhere.

    Raises:
        ProtocolError: no round of the records leads to `final`.
    """
    records = _without_idle_epochs(records)
    entries = [log_entry(record) for record in records]
    starts = _epoch_starts(records)
    by_after = {e.transcript: i for i, e in enumerate(entries) if e is not None}
    wanted: set[int] = set()
    at = final
    while at in by_after:
        place = by_after[at]
        entry = entries[place]
        assert entry is not None  # noqa: S101  # by_after holds such places alone
        wanted.add(place)
        what = decode(Descriptor, entry.descriptor)
        at = what.transcript
        if at not in by_after:  # the first round of an epoch
            at = starts.get(what.session, at)
    if not wanted:
        raise ProtocolError("the server's record of the run does not lead to its end")
    return tuple(r for i, r in enumerate(records) if entries[i] is None or i in wanted)


def _epoch_starts(records: tuple[bytes, ...]) -> dict[bytes, bytes]:
    """The history that each epoch goes on from, by the hash of its session."""
    opened = (decode(EpochOpened, r) for r in records if kind_of(r) is EpochOpened)
    return {epoch.session: epoch.start for epoch in opened}


def _without_idle_epochs(records: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Leave out the set-up of epochs in which no round ended: a server that was killed."""
    used = {
        decode(Descriptor, entry.descriptor).session
        for entry in (log_entry(record) for record in records)
        if entry is not None
    }
    kept, idle = [], False
    for record in records:
        kind = kind_of(record)
        if kind is EpochOpened:
            idle = decode(EpochOpened, record).session not in used
        elif kind not in (DealsSeen, Activation):
            idle = False
        if not idle:
            kept.append(record)
    return tuple(kept)
