"""Discrete Gaussian noise from ChaCha20 bits, vectorised, exact to within 2^-100 a draw.

Rejection from a discrete Laplace distribution (Canonne, Kairouz and Steinke, "The Discrete
Gaussian for Differential Privacy", NeurIPS 2020, algorithms 2 and 3), with one change: where a
decision is clear at float64 precision it is taken there; where it is not (one draw in a million
or fewer up to a deviation of 10^6, one in 20,000 at 2^26) more bits are drawn and it is taken with
60 decimal digits. So the speed is numpy's and the distribution is not float64's.
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
_MARGIN = 2.0**-41
"""Relative distance from a boundary below which float64 does not decide; it errs by 2^-44."""

_RARE = np.uint64(1 << 42)
"""Words below this make draws that float64 does not decide: one in four million."""

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
    signs = np.frombuffer(random.bytes(-(-count // 8)), np.uint8)
    negative = np.unpackbits(signs, count=count).view(np.bool_)
    centre = deviation * deviation / scale
    distance = size.astype(np.float64)
    distance -= centre
    exponent = np.square(distance, out=distance)
    exponent *= 0.5 / (deviation * deviation)
    keep = _happens(random, size, exponent, (deviation, scale), margin)
    keep &= ~negative | (size > 0)  # or zero would come twice as often
    size *= 1 - 2 * negative.view(np.int8)
    draws: Integers = size[keep]
    return draws


def _geometric(random: ChaChaRandom, scale: int, count: int, margin: float) -> Integers:
    """floor(-scale ln U): x with probability proportional to exp(-x / scale), x >= 0."""
    words = random.words(count)
    value = _uniform(words)
    np.log(value, out=value)
    value *= -scale
    whole = np.floor(value)
    value -= whole  # exact; a boundary is 0 or 1
    np.abs(np.subtract(value, 0.5, out=value), out=value)
    # A word stands for 2^-64 of all U, which moves ln U by less than 2^-42 unless U is rare.
    unclear = (value > 0.5 - scale * margin) | (words < _RARE)
    size: Integers = whole.astype(np.int64)
    for index in np.flatnonzero(unclear).tolist():
        size[index] = _exact_geometric(random, int(words[index]), scale)
    return size


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The middle of the numbers in (0, 1) whose first 64 bits are each word."""
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-64
    return uniform


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
    uniform, chance = _uniform(words), np.exp(-exponent)
    happens: NDArray[np.bool_] = uniform < chance
    reach = margin * (chance + uniform)
    reach += 2.0**-63
    unclear = np.abs(uniform - chance) <= reach
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
