"""Public random numbers that are the same to the bit on every machine: from a plan's seed.

For what all sites must draw alike, such as a model's starting point; nothing here is secret.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

_BITS = 24  # of each number: as many as float32 holds exactly


class PublicStream:
    """Numbers from a ChaCha20 keystream, independent of torch, numpy and their versions.

    Args:
        purpose: Streams of one seed with different purposes are independent.
        seed: From the plan.
    """

    def __init__(self, purpose: str, seed: int) -> None:
        key = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def centred(self, count: int) -> NDArray[np.float64]:
        """Uniform multiples of 2^-23 in [-1, 1), shape (count,); exact in float32."""
        return self._words(count).astype(np.float64) * 2.0 ** (1 - _BITS) - 1.0

    def below(self, bound: int) -> int:
        """A whole number from 0 up to below `bound`, uniform up to bound 2^-24."""
        return int(self._words(1)[0]) * bound >> _BITS

    def sample(self, population: int, count: int) -> list[int]:
        """`count` different numbers below `population`, in random order (Fisher and Yates)."""
        deck = list(range(population))
        for i in range(count):
            j = i + self.below(population - i)
            deck[i], deck[j] = deck[j], deck[i]
        return deck[:count]

    def _words(self, count: int) -> NDArray[np.uint32]:
        words = np.frombuffer(self._stream.update(bytes(4 * count)), dtype="<u4")
        return (words >> (32 - _BITS)).astype(np.uint32)
