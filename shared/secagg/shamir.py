"""Shamir secret sharing over GF(2^8), for many byte strings at once.

Every byte is shared on its own with a random polynomial; site number i holds the value at x = i.
Any `threshold` shares give the secret; fewer say nothing about it. Both directions multiply secret
bytes by *public* constants only, which is a fixed pattern of shifts and XORs: no table is ever
indexed by a secret, so the memory access pattern is the same for every secret.

Source: Shamir, "How to share a secret", CACM 1979; field polynomial of FIPS 197, section 4.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, ProtocolError
from shared.secagg.keys import Random

Bytes = npt.NDArray[np.uint8]

MAX_POINTS = 255
_REDUCTION = 0x1B  # x^8 = x^4 + x^3 + x + 1


def split(secrets: Bytes, threshold: int, points: int, random: Random = os.urandom) -> Bytes:
    """Share m secrets of L bytes among `points` sites.

    Args:
        secrets: uint8, shape (m, L).
        threshold: Shares needed to recover, 1..points.
        points: Sites, at most 255: GF(2^8) has no more non-zero points.
        random: Gives the uniform bytes of the polynomials.

    Returns:
        uint8, shape (points, m, L); row i is the share at x = i + 1.

    Raises:
        ConfigError: threshold or points out of range.
    """
    if not 1 <= threshold <= points:
        raise ConfigError(f"threshold {threshold} is not within 1..{points} sites")
    if points > MAX_POINTS:
        raise ConfigError(
            f"{points} sites cannot share a secret over GF(2^8); at most {MAX_POINTS} can. "
            "Split the study into regions."
        )
    secrets = _matrix(secrets)
    size = (threshold - 1, *secrets.shape)
    coefficients = np.frombuffer(random(int(np.prod(size))), np.uint8).reshape(size)
    polynomial = np.concatenate([secrets[np.newaxis], coefficients])
    return _combine_rows(_powers(points, threshold), polynomial)


def combine(shares: Mapping[int, Bytes], threshold: int) -> Bytes:
    """Recover secrets from shares by site number x.

    The `threshold` lowest numbers are used. A wrong share gives wrong secrets, not an error: check
    shares against their tags before, and the result against its commitment after.

    Args:
        shares: x (1..255) -> uint8, shape (m, L), the same for all.

    Returns:
        uint8, shape (m, L).

    Raises:
        ProtocolError: fewer than `threshold` shares, a point out of 1..255, or shapes that differ.
    """
    if len(shares) < threshold or threshold < 1:
        raise ProtocolError(f"{len(shares)} shares are too few; {threshold} are needed")
    points = sorted(shares)[:threshold]
    rows = [_matrix(shares[x]) for x in points]
    if any(row.shape != rows[0].shape for row in rows):
        raise ProtocolError("shares of one secret differ in shape")
    weights = np.array([lagrange_at_zero(tuple(points))], np.uint8)
    recovered: Bytes = _combine_rows(weights, np.stack(rows))[0]
    return recovered


@lru_cache(maxsize=64)
def lagrange_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Weights w with secret = XOR of w_i * share_i, for distinct points x in 1..255.

    Raises:
        ProtocolError: a point is zero (it would be the secret itself), too large, or given twice.
    """
    if len(set(points)) != len(points) or not all(0 < x <= MAX_POINTS for x in points):
        raise ProtocolError(f"share numbers must be distinct and within 1..{MAX_POINTS}")
    powers, logs = (table.tolist() for table in _public_tables())
    exponents = (sum(logs[y] - logs[x ^ y] for y in points if y != x) for x in points)
    return tuple(powers[exponent % 255] for exponent in exponents)


def multiply(a: int, b: int) -> int:
    """Product in GF(2^8). Branches on its arguments: for public numbers only."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= 0x100 | _REDUCTION
        b >>= 1
    return product


@lru_cache(maxsize=1)
def _public_tables() -> tuple[Bytes, Bytes]:
    """Powers of the generator 3, and logarithms; for share numbers, which are public."""
    powers, logs = np.ones(255, np.uint8), np.zeros(256, np.uint8)
    for exponent in range(1, 255):
        powers[exponent] = multiply(int(powers[exponent - 1]), 3)
        logs[powers[exponent]] = exponent
    return powers, logs


def _powers(points: int, threshold: int) -> Bytes:
    """x^j in row x - 1 and column j."""
    powers, logs = _public_tables()
    exponents = np.outer(logs[1 : points + 1].astype(np.int64), np.arange(threshold)) % 255
    return powers[exponents]


def _combine_rows(public: Bytes, secret: Bytes) -> Bytes:
    """Matrix product over GF(2^8): public (r, t) times secret (t, m, L) -> (r, m, L).

    With s_j * 2^b prepared for all b, a product by the public constant c is the XOR of those b
    that are set in c.
    """
    doubled = np.empty((8, *secret.shape), np.uint8)
    doubled[0] = secret
    for b in range(1, 8):
        high_bit = doubled[b - 1] >> 7
        doubled[b] = (doubled[b - 1] << 1) ^ (high_bit * np.uint8(_REDUCTION))
    bits = (public[:, np.newaxis, :] >> np.arange(8, dtype=np.uint8)[:, np.newaxis]) & 1
    product = np.empty((len(public), *secret.shape[1:]), np.uint8)
    for row, chosen in enumerate(bits.astype(bool)):
        np.bitwise_xor.reduce(doubled[chosen], axis=0, out=product[row])
    return product


def _matrix(array: Bytes) -> Bytes:
    if array.dtype != np.uint8 or array.ndim != 2:
        raise ProtocolError(f"secrets and shares are uint8 (m, L), not {array.dtype} {array.shape}")
    return array
