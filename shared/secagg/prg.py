"""Keystreams: a 32-byte key as an endless row of uniform bytes, readable from any place.

ChaCha20 by default (RFC 8439 with nonce zero and the block counter from zero); AES-256 in counter
mode (NIST SP 800-38A, counter from zero) where FIPS is required. A key makes one stream, so the
nonce is fixed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from shared.errors import ProtocolError

Prg = Literal["chacha20", "aes-256-ctr"]

KEY_BYTES = 32

CHUNK = 32 * 1024
"""Coordinates handled at once: 128 KiB of 32-bit words, which stay in the second-level cache."""

_ZEROS = memoryview(bytes(4 * CHUNK))


class Keystream:
    """Reads one key's stream in order, from a byte offset on."""

    def __init__(self, key: bytes, *, offset: int = 0, prg: Prg = "chacha20") -> None:
        """Raises ProtocolError when the key is not 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ProtocolError(f"keystream key has {len(key)} bytes, not {KEY_BYTES}")
        block, skipped = divmod(offset, 64 if prg == "chacha20" else 16)
        self._context = _cipher(key, block, prg)
        if skipped:
            self._context.update(_ZEROS[:skipped])

    def read_into(self, out: npt.NDArray[np.generic]) -> None:
        """Fill a C-contiguous array with the next bytes.

        Raises:
            ValueError: more than 4 * CHUNK bytes, which would leave the cache.
        """
        if out.nbytes > len(_ZEROS):
            raise ValueError(f"{out.nbytes} bytes at once; at most {len(_ZEROS)}")
        # XOR with zeros gives the keystream; OpenSSL runs without the interpreter's lock.
        self._context.update_into(_ZEROS[: out.nbytes], out.view(np.uint8).data)


def _cipher(key: bytes, block: int, prg: Prg) -> CipherContext:
    if prg == "chacha20":
        # OpenSSL's 16-byte nonce is the block counter, little endian, then the RFC's nonce.
        counter = block.to_bytes(8, "little") + bytes(8)
        return Cipher(algorithms.ChaCha20(key, counter), None).encryptor()
    return Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(16, "big"))).encryptor()
