"""Ring integers on the wire: 2, 3 or 4 bytes each, little endian."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]


def pack(words: npt.NDArray[Any], out: Packed, bits: int) -> None:
    """Write the low `bits` of every 32-bit word to `out`, which has len(words) * bits / 8 bytes."""
    size = bits // 8
    cells = words.astype("<u4", copy=False).view(np.uint8)
    if size == 4:
        out[:] = cells
        return
    for byte in range(size):
        out[byte::size] = cells[byte::4]


def unpack(packed: Packed, out: npt.NDArray[np.uint32], bits: int) -> None:
    """Read `pack`'s bytes into `out`; above `bits` the words may hold anything."""
    if bits != 24:
        out[:] = packed.view(f"<u{bits // 8}")
        return
    # Four bytes are read at every third; the fourth, foreign one is above the ring's bits.
    count = len(out) - 1
    if count > 0:
        out[:-1] = np.ndarray((count,), "<u4", packed.data, 0, (3,))
    if count >= 0:
        out[-1] = int.from_bytes(packed[-3:].tobytes(), "little")
