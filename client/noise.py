"""A site's randomness: one ChaCha20 keystream behind noise, Poisson draws and shuffles.

Torch's generators are not used: they are not cryptographic, two sites that set the same global
seed would add the same noise, and their float32 normals never pass 5.77 standard deviations.
Here every number comes from a 32-byte key, which a hospital draws from its operating system and
never stores. A simulation hands in keys of its own, so that a run can be repeated.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from shared.config import require

_CHUNK_PAIRS = 1 << 14  # 2^15 normals at a time stay in a core's cache


_forks = [0]
"""How many forks lie between the program's start and this process."""


def _count_fork() -> None:
    _forks[0] += 1


os.register_at_fork(after_in_child=_count_fork)


class ChaChaRandom:
    """A stream of random numbers from one key; no number is ever handed out twice.

    Args:
        key: 32 uniform bytes; one site, one study, shared with nobody.
        renewed: In a forked process take a new key from the operating system: parent and child
            hold the same key, and would else draw the same noise.

    Raises:
        ConfigError: the key is not 32 bytes.

    Source: RFC 8439, section 2.4 (ChaCha20); the block counter starts at 0 and the nonce is 0,
    since a key serves one stream only.
    """

    def __init__(self, key: bytes, *, renewed: bool = False) -> None:
        require(len(key) == 32, f"a random key has {len(key)} bytes; it must have 32")
        self._renewed = renewed
        self._begin(key)

    def _begin(self, key: bytes) -> None:
        self._key, self._born = key, _forks[0]
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._uses: dict[str, int] = {}

    def _follow_fork(self) -> None:
        if self._renewed and self._born != _forks[0]:
            self._begin(os.urandom(32))

    @classmethod
    def from_system(cls) -> ChaChaRandom:
        """A stream from the operating system's randomness; what a hospital uses."""
        return cls(os.urandom(32), renewed=True)

    def child(self, label: str) -> ChaChaRandom:
        """The independent stream of `label`: the same key and label give the same stream."""
        self._follow_fork()
        key = hmac.digest(self._key, b"fedward-random/1 " + label.encode(), "sha256")
        return ChaChaRandom(key, renewed=self._renewed)

    def fresh_child(self, label: str) -> ChaChaRandom:
        """An independent stream that this object has not handed out before.

        A second use of a label gives another stream, so a round that is trained again, from
        whatever model, never repeats the noise of the first attempt.
        """
        use = self._uses.get(label, 0)
        self._uses[label] = use + 1
        return self.child(f"{label} / use {use}")

    def bytes(self, length: int) -> bytes:
        """The next `length` bytes of the keystream."""
        self._follow_fork()
        return self._stream.update(bytes(length))

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` uniform 64-bit words (little-endian)."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8").astype(np.uint64, copy=False)

    def gaussian(self, count: int) -> NDArray[np.float32]:
        """Independent standard normal numbers, float32, shape (count,).

        The radius comes from 64 bits, so values up to 9.4 occur with their true probability;
        the angle comes from 32. The values are float32, so their last bits could tell a little
        about what they were added to (Mironov, CCS 2012); what a site sends is therefore rounded
        to the ring's coarse integers, which is no full proof against it.

        Source: Box and Muller, "A note on the generation of random normal deviates", Annals of
        Mathematical Statistics 29 (1958).
        """
        out = np.empty(2 * ((count + 1) // 2), dtype=np.float32)
        for start in range(0, len(out), 2 * _CHUNK_PAIRS):
            _box_muller(self, out[start : start + 2 * _CHUNK_PAIRS])
        return out[:count]

    def sample(self, count: int, rate: float) -> NDArray[np.int64]:
        """A Poisson sample of range(count): each index is drawn on its own with chance `rate`.

        Returns:
            Sorted int64 indices, shape (drawn,); the number drawn is random and may be 0.
        """
        require(0 <= rate <= 1, f"a sample rate is {rate:g}; valid: 0 to 1")
        if rate == 1:
            return np.arange(count, dtype=np.int64)
        limit = np.uint64(int(math.ldexp(rate, 64)))
        return np.flatnonzero(self.words(count) < limit).astype(np.int64, copy=False)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniform order of range(count), int64, shape (count,)."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64, copy=False)


def simulation_key(seed: int, site_name: str) -> bytes:
    """The key of one site of a simulated study; different for every seed and every site.

    For simulations only: anyone who knows the seed can subtract the noise.
    """
    return hashlib.sha256(f"fedward-simulation/1 {seed} {site_name}".encode()).digest()


def _box_muller(random: ChaChaRandom, out: NDArray[np.float32]) -> None:
    """Fill `out`, of even length, with normals in place."""
    pairs = len(out) // 2
    # (k + 1/2) / 2^64 lies in (0, 1]; its logarithm is finite, and in float64 fine-grained
    # both near 0 (the tails) and near 1 (the centre).
    radius = random.words(pairs).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-64
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    length = radius.astype(np.float32)
    angle = np.frombuffer(random.bytes(4 * pairs), dtype="<u4").astype(np.float32)
    angle *= np.float32(2 * math.pi / 2**32)
    np.multiply(length, np.cos(angle), out=out[:pairs])
    np.multiply(length, np.sin(angle), out=out[pairs:])
