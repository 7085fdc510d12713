"""Add and remove masks: the hot path of a round.

A mask is the keystream of a 32-byte key, read as little-endian words. It is made in chunks that
stay in cache and is added at once, so that no mask is ever held in memory as a whole; a vector that
is still real is quantised, masked and packed chunk by chunk in the same loop.

Rings of 24 and 32 bits use 32-bit words, rings of 16 bits 16-bit words. Words of a 24-bit ring are
reduced modulo 2^24, which keeps them uniform: a quarter of the keystream is unused, and that costs
less than unpacking three-byte words.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.secagg.prg import CHUNK, Keystream, Prg
from shared.secagg.ring import Reader, RingVector, RunningSum
from shared.secagg.wire import pack


class Source(Protocol):
    """A vector that is made chunk by chunk, such as `ring.Quantised`."""

    @property
    def length(self) -> int:
        """Coordinates d."""

    def reader(self, start: int) -> Reader:
        """A function that fills the next coordinates from `start`, a multiple of CHUNK, on."""


def add_masks(
    accumulator: RunningSum,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    bits: int,
    *,
    source: Source | None = None,
    offset: int = 0,
    threads: int = 1,
    prg: Prg = "chacha20",
) -> None:
    """Add the masks of `plus` and subtract those of `minus` modulo 2^bits, in place.

    Args:
        accumulator: uint32, shape (d,), C-contiguous; ends below 2^bits. Without a source it may be
            `Ring.zeros`, uint16 in a ring of 16 bits.
        plus, minus: 32-byte keys; one mask each.
        bits: 16, 24 or 32.
        source: If given, its coordinates replace what the accumulator held.
        offset: Coordinate of the whole vector where the accumulator begins, for checking a part.
        threads: 1 or 2; the result is the same.

    Raises:
        ConfigError: the source has another length than the accumulator, or comes with an offset.
        ProtocolError: a key is not 32 bytes.
    """
    if source is not None and (offset or source.length != len(accumulator)):
        raise ConfigError(f"source of {source.length} coordinates for {len(accumulator)}")
    modulus_mask = np.uint32((1 << bits) - 1)

    def add_range(start: int, stop: int) -> None:
        masks = _Masks(plus, minus, bits, offset + start, prg)
        read = source.reader(start) if source is not None else None
        for begin in range(start, stop, CHUNK):
            part = accumulator[begin : min(begin + CHUNK, stop)]
            if read is not None:
                read(cast(RingVector, part))
            masks.add_to(part)
            if bits == 24:
                part &= modulus_mask

    _in_threads(add_range, len(accumulator), threads)


def masked_wire(
    source: Source,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    bits: int,
    *,
    threads: int = 1,
    prg: Prg = "chacha20",
) -> bytes:
    """Make, mask and pack a vector in one pass: the bytes of `Ring.to_wire` after `add_masks`.

    Nothing of the vector's length is held in memory but `source`'s own values and the result,
    length * bits / 8 bytes. Arguments and errors as for `add_masks`.
    """
    # A BytesIO is filled in place and, once no array looks into it, handed out without a copy.
    out = io.BytesIO(bytes(source.length * bits // 8))
    packed = np.frombuffer(out.getbuffer(), np.uint8)

    def masks(start: int) -> _Masks:
        return _Masks(plus, minus, bits, start, prg)

    _mask_into(packed, source, masks, bits, threads)
    del packed
    return out.getvalue()


def _mask_into(
    packed: npt.NDArray[np.uint8],
    source: Source,
    masks_from: Callable[[int], _Masks],
    bits: int,
    threads: int,
) -> None:
    size = bits // 8

    def mask_range(start: int, stop: int) -> None:
        masks = masks_from(start)
        read = source.reader(start)
        words = np.empty(CHUNK, np.uint32)
        for begin in range(start, stop, CHUNK):
            part = words[: min(CHUNK, stop - begin)]
            read(part)
            masks.add_to(part)
            pack(part, packed[begin * size : (begin + len(part)) * size], bits)

    _in_threads(mask_range, source.length, threads)


class VectorSource:
    """A ring vector that exists already, as a `Source`."""

    def __init__(self, vector: RingVector) -> None:
        """`vector`: uint32, shape (d,); must not change until it is masked."""
        self._vector = vector

    @property
    def length(self) -> int:
        """Coordinates d."""
        return len(self._vector)

    def reader(self, start: int) -> Reader:
        """See `Source`."""
        position = start

        def read(out: RingVector) -> None:
            nonlocal position
            out[:] = self._vector[position : position + len(out)]
            position += len(out)

        return read


class _Masks:
    """The masks of many keys from one coordinate on; owns its scratch, for one thread."""

    def __init__(
        self, plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int, prg: Prg
    ) -> None:
        if bits not in (16, 24, 32):
            raise ConfigError(f"a ring has 16, 24 or 32 bits, not {bits}")
        word = np.dtype("<u2" if bits == 16 else "<u4")
        offset = start * word.itemsize
        self._plus = [Keystream(key, offset=offset, prg=prg) for key in plus]
        self._minus = [Keystream(key, offset=offset, prg=prg) for key in minus]
        self._mask = np.empty(CHUNK, word)
        self._narrow = np.empty(CHUNK, np.uint16) if bits == 16 else None

    def add_to(self, part: RunningSum) -> None:
        """Add the next words of all masks; of a 24-bit ring the top byte is left undefined."""
        if self._narrow is None or part.dtype == self._narrow.dtype:
            self._add(part)
            return
        narrow = self._narrow[: len(part)]
        np.copyto(narrow, part, casting="unsafe")
        self._add(narrow)
        np.copyto(part, narrow)

    def _add(self, part: npt.NDArray[Any]) -> None:
        mask = self._mask[: len(part)]
        for stream in self._plus:
            stream.read_into(mask)
            np.add(part, mask, out=part)
        for stream in self._minus:
            stream.read_into(mask)
            np.subtract(part, mask, out=part)


def _in_threads(work: Callable[[int, int], None], length: int, threads: int) -> None:
    """Call work(start, stop) on disjoint ranges that cover `length` and begin at whole chunks."""
    if threads < 1:
        raise ConfigError(f"{threads} threads: at least 1 is needed")
    chunks = -(-length // CHUNK)
    ends = [min(length, chunks * (i + 1) // threads * CHUNK) for i in range(threads)]
    ranges = [(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if a < b]
    if len(ranges) < 2:
        for start, stop in ranges:
            work(start, stop)
        return
    with ThreadPoolExecutor(len(ranges)) as pool:
        for done in [pool.submit(work, start, stop) for start, stop in ranges]:
            done.result()
