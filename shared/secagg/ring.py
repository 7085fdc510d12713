"""Real vectors as integers modulo 2^bits, so that masked ones can be added exactly.

A coordinate in [-clip_range, clip_range] becomes an integer in [-limit, limit] by unbiased
stochastic rounding. `limit` leaves room for the sum over all sites: it cannot wrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, ProtocolError
from shared.secagg.prg import CHUNK, Keystream
from shared.secagg.wire import pack, unpack

RingVector = npt.NDArray[np.uint32]
RunningSum = npt.NDArray[np.uint16 | np.uint32]
RealVector = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Buffer = bytes | bytearray | memoryview
Reader = Callable[[RingVector], None]

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
        """2^bits - 1: all ones below the modulus."""
        return np.uint32((1 << self.bits) - 1)

    def zeros(self, length: int) -> RunningSum:
        """An empty sum for `add_wire`, (length,): uint16 in a ring of 16 bits, else uint32."""
        if self.bits == 16:
            return np.zeros(length, np.uint16)
        return np.zeros(length, np.uint32)

    def quantise(
        self, values: RealVector, *, clip_range: float, key: bytes, weight: float = 1.0
    ) -> RingVector:
        """Round reals to ring integers, unbiased: the expectation is the clipped value.

        Args:
            values: float32, shape (d,); multiplied by `weight` first. Beyond +-clip_range is
                clipped; NaN counts as zero.
            clip_range: Largest magnitude that is represented, > 0.
            key: 32 secret bytes, for this vector alone; they decide the rounding.

        Returns:
            uint32, shape (d,), below 2^bits; negatives as two's complement.

        Raises:
            ConfigError: see `Quantised`.
        """
        read = Quantised(values, self, clip_range=clip_range, key=key, weight=weight).reader(0)
        out = np.empty(len(values), np.uint32)
        for start in range(0, len(out), CHUNK):
            part = out[start : start + CHUNK]
            read(part)
            part &= self.modulus_mask
        return out

    def dequantise(self, total: RingVector, *, clip_range: float) -> RealVector:
        """Turn the sum of at most `sites` quantised vectors back into reals: float32 (d,)."""
        out = np.empty(len(total), np.float32)
        unused = 32 - self.bits
        shifted = np.empty(min(CHUNK, len(total)), np.uint32)
        # Shifted up, the sign is in its place; the power of two goes into the scale, exactly.
        scale = np.float64(clip_range / self.limit) * 2.0**-unused
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            up = np.left_shift(part, np.uint32(unused), out=shifted[: len(part)]).view(np.int32)
            np.multiply(up, scale, out=out[start : start + CHUNK], casting="unsafe")
        return out

    def signed(self, total: RingVector) -> npt.NDArray[np.int32]:
        """Read ring integers as signed ones, -2^(bits-1) .. 2^(bits-1) - 1: int32 (d,)."""
        unused = 32 - self.bits
        shifted = np.left_shift(total, np.uint32(unused)).view(np.int32)
        return np.right_shift(shifted, np.int32(unused), out=shifted)

    def lanes(self, max_count: int) -> int:
        """Coordinates that one count up to `max_count` takes."""
        return max(1, -(-max_count.bit_length() // self.payload_bits))

    def counts_to_lanes(self, counts: Counts, *, max_count: int) -> RingVector:
        """Write non-negative integers as digits of payload_bits, so that sums never wrap.

        A digit is below 2^payload_bits, and `sites` of them stay below 2^bits.

        Args:
            counts: int64, shape (m,), within 0..max_count.
            max_count: The plan's bound; sites * max_count < 2^62.

        Returns:
            uint32, shape (m * lanes,), lowest digit of a count first.

        Raises:
            ConfigError: a count or the bound is out of range.
        """
        shifts = self._digit_shifts(max_count)
        if counts.size and (counts.min() < 0 or counts.max() > max_count):
            raise ConfigError(
                f"a count is outside 0..{max_count}, the plan's bound; a new plan can raise it"
            )
        digits = (counts[:, np.newaxis] >> shifts) & ((1 << self.payload_bits) - 1)
        return digits.astype(np.uint32).reshape(-1)

    def lanes_to_counts(self, total: RingVector, *, max_count: int) -> Counts:
        """Read the summed digits back: int64 (m,), each at most sites * max_count.

        Raises:
            ProtocolError: the vector is not whole counts, or a sum is beyond what honest sites
                can reach, so someone sent more than the plan allows.
        """
        shifts = self._digit_shifts(max_count)
        if len(total) % len(shifts):
            raise ProtocolError(f"{len(total)} digits are not whole counts of {len(shifts)}")
        digits = total.reshape(-1, len(shifts)).astype(np.int64)
        if digits.size and digits.max() > self.sites * ((1 << self.payload_bits) - 1):
            raise ProtocolError("a digit of a summed count is larger than all sites can make it")
        counts: Counts = np.left_shift(digits, shifts).sum(axis=1)
        if counts.size and counts.max() > self.sites * max_count:
            raise ProtocolError(f"a summed count is above {self.sites} sites times {max_count}")
        return counts

    def to_wire(self, vector: RunningSum) -> bytes:
        """Pack integers (d,) into bits/8 bytes each, little endian."""
        size = self.bits // 8
        out = np.empty(len(vector) * size, np.uint8)
        for start in range(0, len(vector), CHUNK):
            part = vector[start : start + CHUNK]
            pack(part, out[start * size : (start + len(part)) * size], self.bits)
        return out.tobytes()

    def from_wire(self, wire: Buffer, length: int) -> RingVector:
        """Unpack `to_wire`: uint32, shape (length,).

        Raises:
            ProtocolError: not exactly length * bits / 8 bytes.
        """
        out = np.zeros(length, np.uint32)
        self.add_wire(out, wire)
        return out

    def add_wire(self, total: RunningSum, wire: Buffer) -> None:
        """Add a packed vector to `total`, (d,), in place and modulo 2^bits; fastest on `zeros`.

        Raises:
            ProtocolError: not exactly d * bits / 8 bytes.
        """
        size = self.bits // 8
        if len(wire) != len(total) * size:
            raise ProtocolError(f"masked vector has {len(wire)} bytes, not {len(total)} x {size}")
        if total.itemsize == size:  # words of the ring's own width wrap by themselves
            total += np.frombuffer(wire, f"<u{size}")
            return
        packed = np.frombuffer(wire, np.uint8)
        scratch = np.empty(CHUNK, np.uint32)
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            words = scratch[: len(part)]
            unpack(packed[start * size : (start + len(part)) * size], words, self.bits)
            part += words
            part &= self.modulus_mask

    def _digit_shifts(self, max_count: int) -> Counts:
        if not 0 < max_count * self.sites < 1 << 62:
            raise ConfigError(f"counts up to {max_count} over {self.sites} sites do not fit int64")
        return np.arange(self.lanes(max_count), dtype=np.int64) * self.payload_bits


class Quantised:
    """A real vector that is quantised chunk by chunk while it is masked.

    Gives the very integers of `Ring.quantise`, without a quantised copy in memory. The value is
    first rounded to a fixed point number with up to 16 bits below the integer (in a 32-bit ring,
    to about float32's own precision); these bits are then dropped after adding as many uniform
    bits, which makes the expectation exact.
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
        """Arguments as for `Ring.quantise`; `values` must not change until it is masked.

        Raises:
            ConfigError: values are not float32 (d,), clip_range not positive, weight not finite.
        """
        if not (np.isfinite(clip_range) and clip_range > 0 and np.isfinite(weight)):
            raise ConfigError(f"clip range {clip_range} must be positive, weight {weight} finite")
        if values.dtype != np.float32 or values.ndim != 1:
            raise ConfigError(f"a vector is float32 (d,), not {values.dtype} {values.shape}")
        self.length = len(values)
        self._values = values
        self._key = key
        self._bits = min(_MAX_ROUNDING_BITS, _FIXED_POINT_BITS + 1 - ring.payload_bits)
        self._top = np.float32(ring.limit << self._bits)
        factor = weight * float(self._top) / clip_range
        if abs(factor) > float(np.finfo(np.float32).max):
            raise ConfigError(f"clip range {clip_range} is too small for weight {weight}")
        self._factor = np.float32(factor)

    def reader(self, start: int) -> Reader:
        """A function that fills the next coordinates from `start`, a multiple of CHUNK, on.

        Each call of the function fills CHUNK coordinates, the last one the rest; words are exact
        modulo 2^32. One reader is for one thread.
        """
        carries = Keystream(self._key, offset=start * 2)
        fixed = np.empty(CHUNK, np.float32)
        flags = np.empty(CHUNK, np.bool_)
        words = np.empty(CHUNK // 2, np.uint32)
        position = start

        def read(out: RingVector) -> None:
            nonlocal position
            values = self._values[position : position + len(out)]
            position += len(out)
            self._to_fixed_point(values, fixed[: len(out)], flags[: len(out)])
            integers = out.view(np.int32)
            np.copyto(integers, fixed[: len(out)], casting="unsafe")
            carries.read_into(words)
            self._drop_bits(integers, words)

        return read

    def _to_fixed_point(
        self, values: RealVector, fixed: RealVector, flags: npt.NDArray[np.bool_]
    ) -> None:
        """Scale, clip and round `values` into `fixed`; NaN becomes zero."""
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(values, self._factor, out=fixed)
        np.clip(fixed, -self._top, self._top, out=fixed)
        if np.not_equal(fixed, fixed, out=flags).any():
            fixed[flags] = 0
        np.rint(fixed, out=fixed)

    def _drop_bits(self, integers: npt.NDArray[np.int32], words: RingVector) -> None:
        """Round the fixed point numbers; each uniform word serves two of them."""
        half = len(words)
        low, high = integers[:half], integers[half:]
        carry = np.bitwise_and(words, np.uint32((1 << self._bits) - 1)).view(np.int32)
        low += carry[: len(low)]
        carry = np.right_shift(words, np.uint32(32 - self._bits), out=words).view(np.int32)
        high += carry[: len(high)]
        np.right_shift(integers, np.int32(self._bits), out=integers)
