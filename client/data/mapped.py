"""Arrays that are larger than memory: in a file, of which only what is looked at is read.

A mapped array is numpy's own `memmap`, copy-on-write: the file never changes. The operating system
keeps what was read as long as it has room; `release` hands it back at once, so that a process that
draws records for hours holds a batch and no more.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

IN_MEMORY = 64 << 20
"""Bytes up to which a reader's records stay in memory."""

PIECE = 4 << 20  # values that are looked at at once

Records = NDArray[np.float32]


class Spool:
    """Records that arrive one after another, in memory while they are few, then in a file.

    The file has no name and goes with the process; it lies where the operating system keeps
    temporary files (TMPDIR), which must not be memory itself.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._most, self._size = in_memory, 0
        self._parts: list[Records] = []
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def add(self, records: Records) -> None:
        """Append records, shape (n, ...), all of one shape; they may be changed afterwards."""
        kept = np.array(records, dtype=np.float32, order="C")
        self._shape, self._count = kept.shape[1:], self._count + len(kept)
        self._size += kept.nbytes
        self._parts.append(kept)
        if self._file is None and self._size > self._most:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `array`
        if self._file is not None:
            for part in self._parts:
                self._file.write(part.data)
            self._parts.clear()

    def array(self) -> Records:
        """All records, float32, shape (count, ...); mapped where they are many. Asked for once."""
        if self._file is None:
            empty = np.zeros((0, *self._shape), dtype=np.float32)
            return np.concatenate(self._parts) if self._parts else empty
        self._file.flush()
        found = np.memmap(self._file, np.float32, "c", shape=(self._count, *self._shape))
        self._file.close()  # the mapping goes on
        return found

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def map_records(path: Path, offset: int, shape: tuple[int, ...]) -> Records:
    """Float32 records that begin somewhere in a file."""
    return np.memmap(path, np.dtype("<f4"), "c", offset=offset, shape=shape)


def release(records: NDArray[np.generic]) -> None:
    """Hand a mapped array's memory back; arrays in memory stay."""
    mapping = getattr(records, "_mmap", None)
    if isinstance(mapping, mmap.mmap):
        mapping.madvise(mmap.MADV_DONTNEED)


def pieces_of(count: int, shape: tuple[int, ...]) -> list[slice]:
    """`count` records of one shape, cut into runs of few enough values to look at at once."""
    each = max(1, PIECE // max(1, math.prod(shape)))
    return [slice(start, start + each) for start in range(0, count, each)]


def all_finite(records: Records) -> bool:
    """Whether every value is finite, piece by piece."""
    for piece in pieces_of(len(records), records.shape[1:]):
        if not np.isfinite(records[piece]).all():
            return False
        release(records)
    return True


def taken(records: Records, rows: NDArray[np.int64]) -> Records:
    """The records of some rows: in memory, or where many are mapped, in a file again."""
    if not isinstance(records, np.memmap):
        return records[rows]
    spool = Spool()
    for piece in pieces_of(len(rows), records.shape[1:]):
        spool.add(records[rows[piece]])
        release(records)
    return spool.array() if len(rows) else records[:0]
