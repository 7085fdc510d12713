"""Add and remove masks: the hot path of a round.

A mask is the keystream of a 32-byte key, read as little-endian words. It is made in chunks that
stay in cache and is added at once, so that no mask is ever held in memory as a whole.
Rings of 24 and 32 bits use 32-bit words, rings of 16 bits 16-bit words. Words of a 24-bit ring are
reduced modulo 2^24, which keeps them uniform; a quarter of the keystream is unused, and that is
cheaper than unpacking three-byte words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shared.errors import ProtocolError
from shared.secagg.prg import Keystream, Prg
from shared.secagg.ring import CHUNK, Reader, RingVector


class Source(Protocol):
    """A vector that is made chunk by chunk, such as `ring.Quantised`."""

    length: int

    def reader(self, start: int) -> Reader:
        """A function that fills the next coordinates from `start`, a multiple of CHUNK, on."""


def add_masks(
    accumulator: RingVector,
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
        accumulator: uint32, shape (d,), C-contiguous. Ends below 2^bits.
        plus, minus: 32-byte keys; one mask each.
        bits: 16, 24 or 32.
        source: If given, its coordinates replace what the accumulator held.
        offset: Coordinate of the whole vector where the accumulator begins, for checking a part.
        threads: 1 or 2.

    Raises:
        ProtocolError: a key is not 32 bytes.
    """
    word = np.uint16 if bits == 16 else np.uint32
    start_byte = offset * np.dtype(word).itemsize
    streams = [
        (Keystream(key, offset=start_byte, prg=prg), operation)
        for keys, operation in ((plus, np.add), (minus, np.subtract))
        for key in keys
    ]
    if source is not None and (offset or source.length != len(accumulator)):
        raise ProtocolError(f"source of {source.length} coordinates for {len(accumulator)}")
    read = source.reader(0) if source is not None else None
    mask = np.empty(CHUNK, word)
    for start in range(0, len(accumulator), CHUNK):
        part = accumulator[start : start + CHUNK]
        if read is not None:
            read(part)
        words = mask[: len(part)]
        for stream, operation in streams:
            stream.read_into(words)
            operation(part, words, out=part)
        part &= np.uint32((1 << bits) - 1)
