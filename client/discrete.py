"""Discrete Gaussian noise from ChaCha20 bits, vectorised, exact to within 2^-100 a draw.

Rejection from a discrete Laplace distribution (Canonne, Kairouz and Steinke, "The Discrete
Gaussian for Differential Privacy", NeurIPS 2020, algorithms 2 and 3), with one change: where a
decision is clear at float64 precision it is taken there; where it is not (about one draw in a
million) more bits are drawn and it is taken with 60 decimal digits. So the speed is numpy's and
the distribution is not float64's.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from client.noise import ChaChaRandom
from shared.config import require

_PIECE = 1 << 14  # proposals at a time: their arrays stay in a core's cache, twice as fast
_DIGITS = 60
_EXTRA_BITS = 192
_MARGIN = 2.0**-36
"""Relative distance from a boundary below which float64 does not decide."""

Integers = NDArray[np.int64]


def discrete_gaussian(
    random: ChaChaRandom, deviation: float, count: int, *, margin: float = _MARGIN
) -> Integers:
    """Draw integers x with probability proportional to exp(-x^2 / (2 deviation^2)).

    Args:
        random: The site's stream; the draws are secret.
        deviation: Parameter of the distribution, 0.5 to 2^26; nearly its standard deviation.
        count: How many.
        margin: For tests: a larger one sends more draws down the exact path.

    Returns:
        int64, shape (count,), independent.
    """
    require(0.5 <= deviation <= 2**26, f"a deviation of {deviation:g} is outside 0.5 to 2^26")
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        # About two draws in three are accepted.
        wanted = min(int((count - filled) * 1.6) + 16, _PIECE)
        accepted = _accepted(random, deviation, wanted, margin)[: count - filled]
        out[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return out


def _accepted(random: ChaChaRandom, deviation: float, count: int, margin: float) -> Integers:
    """Draws of a discrete Laplace, thinned to the Gaussian."""
    scale = math.floor(deviation) + 1
    size = _geometric(random, scale, count, margin)
    negative = (random.words(count) >> np.uint64(63)).astype(bool)
    proposed = ~(negative & (size == 0))  # or zero would come twice as often
    centre = deviation * deviation / scale
    distance = size.astype(np.float64) - centre
    exponent: NDArray[np.float64] = np.square(distance) / (2 * deviation * deviation)
    keep = proposed & _happens(random, size, exponent, (deviation, scale), margin)
    draws: Integers = np.where(negative, -size, size)[keep]
    return draws


def _geometric(random: ChaChaRandom, scale: int, count: int, margin: float) -> Integers:
    """floor(-scale ln U): x with probability proportional to exp(-x / scale), x >= 0."""
    words = random.words(count)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-64
    value = -scale * np.log(uniform)
    # The interval of all U with these 64 bits, and float64's own error.
    reach = scale * (2.0**-64 / uniform) + np.abs(value) * 2.0**-50 + scale * margin
    whole = np.floor(value)
    unclear = (np.floor(value - reach) != whole) | (np.floor(value + reach) != whole)
    size: Integers = whole.astype(np.int64)
    for index in np.flatnonzero(unclear).tolist():
        size[index] = _exact_geometric(random, int(words[index]), scale)
    return size


def _exact_geometric(random: ChaChaRandom, word: int, scale: int) -> int:
    with localcontext() as context:
        context.prec = _DIGITS
        return int(-Decimal(scale) * _longer(random, word).ln())


def _happens(
    random: ChaChaRandom,
    size: Integers,
    exponent: NDArray[np.float64],
    shape: tuple[float, int],
    margin: float,
) -> NDArray[np.bool_]:
    """True with probability exp(-exponent), where exponent = (size - d^2/s)^2 / (2 d^2)."""
    words = random.words(len(size))
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-64
    chance = np.exp(-exponent)
    unclear = np.abs(uniform - chance) <= 2.0**-63 + margin * (chance + uniform)
    happens: NDArray[np.bool_] = uniform < chance
    for index in np.flatnonzero(unclear).tolist():
        happens[index] = _exact_happens(random, int(words[index]), int(size[index]), shape)
    return happens


def _exact_happens(random: ChaChaRandom, word: int, size: int, shape: tuple[float, int]) -> bool:
    with localcontext() as context:
        context.prec = _DIGITS
        square = Decimal(shape[0]) * Decimal(shape[0])
        exponent = (Decimal(size) - square / shape[1]) ** 2 / (2 * square)
        return _longer(random, word) < (-exponent).exp()


def _longer(random: ChaChaRandom, word: int) -> Decimal:
    """The uniform number whose first 64 bits are `word`, with 192 bits more; never 0."""
    more = int.from_bytes(random.bytes(_EXTRA_BITS // 8), "little")
    return Decimal(2 * ((word << _EXTRA_BITS) + more) + 1) / Decimal(2 << (64 + _EXTRA_BITS))
