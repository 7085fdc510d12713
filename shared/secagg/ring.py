"""Real vectors as integers modulo 2^bits, so that masked ones can be added exactly.

A coordinate in [-clip_range, clip_range] becomes an integer in [-limit, limit] by unbiased
stochastic rounding. `limit` leaves room for the sum over all sites: it cannot wrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, ProtocolError
from shared.secagg.prg import Keystream

RingVector = npt.NDArray[np.uint32]
RealVector = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Bits = Literal[16, 24, 32]
Reader = Callable[[RingVector], None]

CHUNK = 32 * 1024
"""Coordinates handled at once: 128 KiB of 32-bit words, which stay in the second-level cache."""

_FIXED_POINT_BITS = 30
_MAX_ROUNDING_BITS = 16


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits, shared by at most `sites` contributors.

    Args:
        bits: 16, 24 or 32; also the bits of one coordinate on the wire.
        sites: Contributors N, 2..255.
    """

    bits: int
    sites: int

    def __post_init__(self) -> None:
        """Raises ConfigError when bits or sites are out of range."""
        if self.bits not in (16, 24, 32):
            raise ConfigError(f"a ring has 16, 24 or 32 bits, not {self.bits}")
        if not 2 <= self.sites <= 255:
            raise ConfigError(f"{self.sites} sites: a ring is shared by 2 to 255")

    @property
    def payload_bits(self) -> int:
        """Bits of one site's signed integer: bits - ceil(log2(sites + 1))."""
        return self.bits - self.sites.bit_length()

    @property
    def limit(self) -> int:
        """Largest magnitude of one site's integer, 2^(payload_bits - 1)."""
        return 1 << (self.payload_bits - 1)

    @property
    def modulus_mask(self) -> np.uint32:
        """All ones below 2^bits."""
        return np.uint32((1 << self.bits) - 1)

    def quantise(self, values: RealVector, *, clip_range: float, key: bytes) -> RingVector:
        """Round reals to ring integers, unbiased: the expectation is the clipped value.

        Args:
            values: float32, shape (d,). Beyond +-clip_range is clipped; NaN counts as zero.
            clip_range: Largest magnitude that is represented, > 0.
            key: 32 secret bytes, for this vector alone; they decide the rounding.

        Returns:
            uint32, shape (d,), below 2^bits; negatives as two's complement.
        """
        out = np.empty(len(values), np.uint32)
        read = Quantised(values, self, clip_range=clip_range, key=key).reader(0)
        for start in range(0, len(out), CHUNK):
            read(out[start : start + CHUNK])
        out &= self.modulus_mask
        return out

    def dequantise(self, total: RingVector, *, clip_range: float) -> RealVector:
        """Turn the sum of at most `sites` quantised vectors back into reals: float32 (d,)."""
        out = np.empty(len(total), np.float32)
        scale = np.float64(clip_range / self.limit)
        np.multiply(self.signed(total), scale, out=out, casting="unsafe")
        return out

    def signed(self, total: RingVector) -> npt.NDArray[np.int32]:
        """Read ring integers as signed ones, -2^(bits-1) .. 2^(bits-1) - 1: int32 (d,)."""
        unused = 32 - self.bits
        return (total << np.uint32(unused)).view(np.int32) >> np.int32(unused)

    def lanes(self, max_count: int) -> int:
        """Coordinates that one count up to `max_count` takes."""
        return max(1, -(-max_count.bit_length() // self.payload_bits))

    def counts_to_lanes(self, counts: Counts, *, max_count: int) -> RingVector:
        """Write non-negative integers as digits of payload_bits, so that sums never wrap.

        A digit is below 2^payload_bits, and `sites` of them stay below 2^bits.

        Args:
            counts: int64, shape (m,), within 0..max_count.
            max_count: The plan's bound; sites * max_count < 2^63.

        Returns:
            uint32, shape (m * lanes,), lowest digit of a count first.

        Raises:
            ConfigError: a count or the bound is out of range.
        """
        self._check_max_count(max_count)
        if counts.size and (counts.min() < 0 or counts.max() > max_count):
            raise ConfigError(f"a count is outside 0..{max_count}, the plan's bound")
        shifts = np.arange(self.lanes(max_count), dtype=np.int64) * self.payload_bits
        digits = (counts[:, np.newaxis] >> shifts) & ((1 << self.payload_bits) - 1)
        return digits.astype(np.uint32).reshape(-1)

    def lanes_to_counts(self, total: RingVector, *, max_count: int) -> Counts:
        """Read the summed digits back: int64 (m,), each at most sites * max_count.

        Raises:
            ProtocolError: the vector is not whole counts, or a sum is beyond what honest sites
                can reach (someone sent more than `max_count`).
        """
        self._check_max_count(max_count)
        lanes = self.lanes(max_count)
        if len(total) % lanes:
            raise ProtocolError(f"{len(total)} digits are not whole counts of {lanes} digits")
        shifts = np.arange(lanes, dtype=np.int64) * self.payload_bits
        digits = total.reshape(-1, lanes).astype(np.int64)
        if digits.size and digits.max() > self.sites * ((1 << self.payload_bits) - 1):
            raise ProtocolError("a digit of a summed count is larger than all sites can make it")
        counts: Counts = (digits << shifts).sum(axis=1)
        if counts.size and (counts.min() < 0 or counts.max() > self.sites * max_count):
            raise ProtocolError(f"a summed count is above {self.sites} sites times {max_count}")
        return counts

    def to_wire(self, vector: RingVector) -> bytes:
        """Pack uint32 (d,) into bits/8 bytes each, little endian."""
        out = bytearray(len(vector) * self.bits // 8)
        pack(vector, np.frombuffer(out, np.uint8), self.bits)
        return bytes(out)

    def from_wire(self, wire: bytes, length: int) -> RingVector:
        """Unpack `to_wire`: uint32, shape (length,).

        Raises:
            ProtocolError: not exactly length * bits / 8 bytes.
        """
        if len(wire) != length * self.bits // 8:
            raise ProtocolError(
                f"masked vector has {len(wire)} bytes, not {length} x {self.bits // 8}"
            )
        out = np.zeros(length, np.uint32)
        cells = out.view(np.uint8).reshape(-1, 4)
        cells[:, : self.bits // 8] = np.frombuffer(wire, np.uint8).reshape(-1, self.bits // 8)
        return out

    def _check_max_count(self, max_count: int) -> None:
        if not 0 < max_count * self.sites < 1 << 62:
            raise ConfigError(f"counts up to {max_count} over {self.sites} sites do not fit int64")


class Quantised:
    """A real vector that is quantised chunk by chunk while it is masked.

    Gives the very integers of `Ring.quantise`, without a quantised copy in memory.
    """

    def __init__(
        self,
        values: RealVector,
        ring: Ring,
        *,
        clip_range: float,
        key: bytes,
        weight: float = 1.0,
    ) -> None:
        """See `Ring.quantise`; values are multiplied by `weight` before they are clipped.

        Raises:
            ConfigError: clip_range or weight is not a finite number in range.
        """
        if not (np.isfinite(clip_range) and clip_range > 0 and np.isfinite(weight)):
            raise ConfigError(
                f"clip range {clip_range} must be positive and weight {weight} finite"
            )
        if values.dtype != np.float32 or values.ndim != 1:
            raise ConfigError(f"a vector is float32 (d,), not {values.dtype} {values.shape}")
        self.length = len(values)
        self._values = values
        self._key = key
        # Fixed point: `rounding_bits` below the integer, then drop them with a random carry.
        self._rounding_bits = min(_MAX_ROUNDING_BITS, _FIXED_POINT_BITS + 1 - ring.payload_bits)
        self._top = np.float32(ring.limit << self._rounding_bits)
        self._factor = np.float32(weight * float(self._top) / clip_range)

    def reader(self, start: int) -> Reader:
        """A function that fills the next coordinates from `start`, a multiple of CHUNK, on."""
        stream = Keystream(self._key, offset=start * 2)
        position = start
        real = np.empty(CHUNK, np.float32)
        words = np.empty(CHUNK // 2, np.uint32)

        def read(out: RingVector) -> None:
            nonlocal position
            n = len(out)
            fixed = real[:n]
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(self._values[position : position + n], self._factor, out=fixed)
            position += n
            np.clip(fixed, -self._top, self._top, out=fixed)
            fixed[np.isnan(fixed)] = 0
            np.rint(fixed, out=fixed)
            integers = out.view(np.int32)
            np.copyto(integers, fixed, casting="unsafe")
            stream.read_into(words)
            half = CHUNK // 2
            keep = np.uint32((1 << self._rounding_bits) - 1)
            carry = (words & keep).view(np.int32)
            integers[:half] += carry[: min(n, half)]
            carry = (words >> np.uint32(32 - self._rounding_bits)).view(np.int32)
            integers[half:] += carry[: max(0, n - half)]
            np.right_shift(integers, self._rounding_bits, out=integers)

        return read


def pack(vector: RingVector, out: npt.NDArray[np.uint8], bits: int) -> None:
    """Write the low `bits` of every word to `out`, little endian."""
    size = bits // 8
    cells = vector.astype("<u4", copy=False).view(np.uint8)
    for byte in range(size):
        out[byte::size] = cells[byte::4]
