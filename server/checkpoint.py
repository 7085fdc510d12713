"""A study's checkpoint: a server that is killed at any moment goes on from it.

    FOLDER/checkpoint.bin     where the study stands; replaced whole after every round
    FOLDER/underway.bin       what the open round has asked the sites to sign, before they are asked
    FOLDER/reports.bin        one record a round, appended
    FOLDER/result-N.bin       the N-th published result, while a site may still need it
    FOLDER/vector-N-K.bin     masked vectors of the last sum, until it is rechecked

Whatever is named by checkpoint.bin is on disk before it; what is not named by it is ignored. Only
what the server saw anyway is in these files: masked vectors, sums, signatures, opened keys. All
are typed records (shared/messages.py); nothing in them can run.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from server.outcome import RoundReport
from shared.errors import ConfigError, ProtocolError
from shared.messages import (
    U32,
    U64,
    Blob,
    ByName,
    Fixed,
    Flag,
    Many,
    Maybe,
    Nested,
    Real,
    Text,
    decode,
    encode,
    message,
)
from shared.study import EpochTerms

_LENGTH = struct.Struct("<I")
_NAMES = Many(Text())


@dataclass(frozen=True, slots=True)
class SavedSite:
    """What the server knows of one site's progress."""

    activation: Annotated[bytes | None, Maybe(Blob())]
    seen: Annotated[int, U64]
    misses: Annotated[int, U32]
    wait: Annotated[int, U32]


@dataclass(frozen=True, slots=True)
class SavedTraffic:
    """One phase's messages and bytes."""

    messages: Annotated[int, U64]
    bytes_up: Annotated[int, U64]
    bytes_down: Annotated[int, U64]
    largest: Annotated[int, U64]


@message(0x0310)
@dataclass(frozen=True, slots=True)
class SavedStudy:
    """Where a study stands between two rounds.

    Attributes:
        round_no: The last round that ended, or 0.
        finished: Rounds that ended with a sum.
        aborts: Rounds that ended without.
        published: Results and aborts published so far.
        kept: How many of the last ones a site may still need.
        reports_bytes: The part of reports.bin that counts.
        vectors: Of which published result the vector files are; 0 for none.
        model: Model and optimiser state, `study.state_to_bytes`.
        relay: The relay's snapshot, without vectors.
        terms: The epoch; `tried` is the highest number that any attempt has used, plus one.
    """

    run_id: Annotated[str, Text()]
    plan_sha256: Annotated[bytes, Fixed(32)]
    round_no: Annotated[int, U32]
    finished: Annotated[int, U32]
    aborts: Annotated[int, U32]
    published: Annotated[int, U64]
    kept: Annotated[int, U32]
    reports_bytes: Annotated[int, U64]
    vectors: Annotated[int, U64]
    model: Annotated[bytes, Blob()]
    relay: Annotated[bytes, Blob()]
    terms: Annotated[EpochTerms, Nested(EpochTerms)]
    tried: Annotated[int, U32]
    sites: Annotated[Mapping[str, SavedSite], ByName(Nested(SavedSite))]
    traffic: Annotated[Mapping[str, SavedTraffic], ByName(Nested(SavedTraffic))]


@message(0x0311)
@dataclass(frozen=True, slots=True)
class SavedReport:
    """A `RoundReport`; counts are little-endian float64."""

    round_no: Annotated[int, U32]
    model_round: Annotated[int, U32]
    trained: Annotated[bool, Flag()]
    cohort: Annotated[tuple[str, ...], _NAMES]
    contributors: Annotated[tuple[str, ...], _NAMES]
    dropped: Annotated[tuple[str, ...], _NAMES]
    reason: Annotated[bytes, Blob()]
    counts: Annotated[bytes, Blob()]
    wall_s: Annotated[float, Real()]
    inputs_s: Annotated[float, Real()]
    bytes_up: Annotated[int, U64]
    bytes_down: Annotated[int, U64]


@dataclass(frozen=True)
class Loaded:
    """Everything that a resumed study starts from; `results` are those that are `kept`."""

    saved: SavedStudy
    reports: tuple[RoundReport, ...]
    results: tuple[bytes, ...]
    vectors: tuple[bytes, ...]
    underway: bytes


class Checkpoints:
    """Writes and reads the checkpoint of one study in one folder."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """`durable` waits for the disk at every write; a simulation does not."""
        self.folder, self._durable = folder, durable

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint; a study killed before its first one starts over."""
        return self._state.exists()

    def append_reports(self, reports: Iterable[RoundReport], at: int) -> int:
        """Write rounds' reports behind the first `at` bytes; returns where the next one goes."""
        return self._append(self._reports, [encode(_saved_report(r)) for r in reports], at)

    def keep_result(self, number: int, result: bytes) -> None:
        """Write the `number`-th published result."""
        self._replace(self._result(number), result)

    def keep_vectors(self, number: int, vectors: Iterable[bytes]) -> None:
        """Write the masked vectors behind the `number`-th published result."""
        for place, vector in enumerate(vectors):
            self._replace(self.folder / f"vector-{number}-{place}.bin", vector)

    def note_underway(self, data: bytes) -> None:
        """Write what the open round is about to ask the sites to sign."""
        self._replace(self._underway, data)

    def save(self, study: SavedStudy) -> None:
        """Replace the checkpoint; from here on a restart goes on from this one."""
        self._replace(self._state, encode(study))
        self._underway.unlink(missing_ok=True)
        first = study.published - study.kept
        for file in self.folder.glob("*-*.bin"):
            kind, number = file.stem.split("-")[:2]
            stale = int(number) < first if kind == "result" else int(number) != study.vectors
            if stale:
                file.unlink()

    def load(self) -> Loaded:
        """Read the checkpoint back.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        try:
            saved = decode(SavedStudy, self._state.read_bytes())
            first = saved.published - saved.kept
            return Loaded(
                saved=saved,
                reports=tuple(
                    _report(decode(SavedReport, raw))
                    for raw in self._read(self._reports, saved.reports_bytes)
                ),
                results=tuple(self._result(n).read_bytes() for n in range(first, saved.published)),
                vectors=tuple(self._read_vectors(saved.vectors)),
                underway=self._underway.read_bytes() if self._underway.exists() else b"",
            )
        except (OSError, ProtocolError, struct.error) as error:
            raise ConfigError(
                f"the checkpoint in {self.folder} cannot be read ({error}). Restore the folder "
                "from a backup of this very run, or begin a new run; the sites charge it anew."
            ) from error

    @property
    def _state(self) -> Path:
        return self.folder / "checkpoint.bin"

    @property
    def _underway(self) -> Path:
        return self.folder / "underway.bin"

    @property
    def _reports(self) -> Path:
        return self.folder / "reports.bin"

    def _result(self, number: int) -> Path:
        return self.folder / f"result-{number}.bin"

    def _append(self, path: Path, records: list[bytes], at: int) -> int:
        if not records:
            return at
        data = b"".join(_LENGTH.pack(len(record)) + record for record in records)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(at)
            file.seek(at)
            file.write(data)
            file.flush()
            self._sync(file.fileno())
        return at + len(data)

    def _read(self, path: Path, size: int) -> Iterator[bytes]:
        raw = path.read_bytes()[:size] if size else b""
        if len(raw) != size:
            raise ProtocolError(f"{path.name} has {len(raw)} bytes of {size}")
        at = 0
        while at < size:
            (length,) = _LENGTH.unpack_from(raw, at)
            at += _LENGTH.size
            yield raw[at : at + length]
            at += length

    def _read_vectors(self, number: int) -> Iterator[bytes]:
        place = 0
        while number and (file := self.folder / f"vector-{number}-{place}.bin").exists():
            yield file.read_bytes()
            place += 1

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a file whole: a crash leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            self._sync(file.fileno())
        partial.replace(path)
        if self._durable:
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _sync(self, file: int) -> None:
        if self._durable:
            os.fsync(file)


def _saved_report(report: RoundReport) -> SavedReport:
    return SavedReport(
        round_no=report.round_no,
        model_round=report.model_round,
        trained=report.trained,
        cohort=report.cohort,
        contributors=report.contributors,
        dropped=report.dropped,
        reason=report.reason.encode(),
        counts=report.counts.astype("<f8").tobytes(),
        wall_s=report.wall_s,
        inputs_s=report.inputs_s,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
    )


def _report(saved: SavedReport) -> RoundReport:
    return RoundReport(
        round_no=saved.round_no,
        model_round=saved.model_round,
        trained=saved.trained,
        cohort=saved.cohort,
        contributors=saved.contributors,
        dropped=saved.dropped,
        reason=saved.reason.decode(),
        counts=np.frombuffer(saved.counts, "<f8").astype(np.float64),
        wall_s=saved.wall_s,
        inputs_s=saved.inputs_s,
        bytes_up=saved.bytes_up,
        bytes_down=saved.bytes_down,
    )
