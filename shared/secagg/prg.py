"""Keystreams: a 32-byte key as an endless row of uniform bytes, readable from any place.

ChaCha20 by default (RFC 8439 with the nonce zero and the block counter from zero);
AES-256 in counter mode where FIPS is required. A key is for one stream, so the nonce is fixed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from shared.errors import ProtocolError

Prg = Literal["chacha20", "aes-256-ctr"]

KEY_BYTES = 32
_ZEROS = bytes(128 * 1024)


class Keystream:
    """Reads one key's stream in order, from a byte offset on."""

    def __init__(self, key: bytes, *, offset: int = 0, prg: Prg = "chacha20") -> None:
        """Raises ProtocolError when the key is not 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ProtocolError(f"keystream key has {len(key)} bytes, not {KEY_BYTES}")
        block_bytes = 64 if prg == "chacha20" else 16
        block, skipped = divmod(offset, block_bytes)
        self._context = _cipher(key, block, prg)
        if skipped:
            self._context.update(_ZEROS[:skipped])

    def read_into(self, out: npt.NDArray[np.generic]) -> None:
        """Fill a C-contiguous array with the next ``out.nbytes`` bytes."""
        buffer = out.view(np.uint8)
        for start in range(0, len(buffer), len(_ZEROS)):
            piece = buffer[start : start + len(_ZEROS)]
            self._context.update_into(_ZEROS[: len(piece)], piece.data)


def _cipher(key: bytes, block: int, prg: Prg) -> CipherContext:
    if prg == "chacha20":
        # OpenSSL's 16-byte nonce is the block counter, little endian, and the RFC's nonce.
        counter = block.to_bytes(8, "little") + bytes(8)
        return Cipher(algorithms.ChaCha20(key, counter), None).encryptor()
    return Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(16, "big"))).encryptor()
