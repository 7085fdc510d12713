"""The discrete Gaussian: against its exact probabilities, on the fast and on the exact path."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy import stats

from client.discrete import _MARGIN, _uniform, discrete_gaussian
from client.noise import ChaChaRandom

ALPHA = 1e-6


def stream(label: str) -> ChaChaRandom:
    return ChaChaRandom(hashlib.sha256(label.encode()).digest())


def p_value(draws: np.ndarray, deviation: float) -> float:
    """Chi-square of the draws against the exact distribution, rare values put together."""
    reach = int(8 * deviation) + 2
    values = np.arange(-reach, reach + 1)
    weight = np.exp(-(values.astype(float) ** 2) / (2 * deviation**2))
    expected = len(draws) * weight / weight.sum()
    often = expected >= 10
    observed = np.array([(draws == v).sum() for v in values[often]], dtype=float)
    observed = np.append(observed, len(draws) - observed.sum())
    expected = np.append(expected[often], len(draws) - expected[often].sum())
    if expected[-1] < 10:
        observed[-2] += observed[-1]
        expected[-2] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("deviation", [0.5, 0.7, 1.0, 2.5, 7.3, 20.0])
def test_draws_follow_the_exact_probabilities(deviation: float) -> None:
    draws = discrete_gaussian(stream(f"fast {deviation}"), deviation, 200_000)
    assert p_value(draws, deviation) > ALPHA


def test_a_rounded_continuous_gaussian_would_be_found_out() -> None:
    draws = np.rint(stream("rounded").gaussian(200_000).astype(float) * 0.7).astype(np.int64)
    assert p_value(draws, 0.7) < ALPHA


def test_zero_counted_from_both_sides_would_be_found_out() -> None:
    draws = discrete_gaussian(stream("zero"), 1.0, 200_000)
    twice = np.concatenate([draws, draws[draws == 0]])
    assert p_value(twice, 1.0) < ALPHA


@pytest.mark.parametrize("deviation", [0.7, 2.5, 1000.25])
def test_the_exact_path_gives_the_same_distribution(deviation: float) -> None:
    """With a huge margin float64 decides almost nothing; the digits do."""
    draws = discrete_gaussian(stream(f"exact {deviation}"), deviation, 3000, margin=1.0)
    if deviation < 10:
        assert p_value(draws, deviation) > ALPHA
    else:
        assert stats.kstest(draws / deviation, "norm").pvalue > ALPHA


def exact_uniform(word: int) -> Decimal:
    return (Decimal(word) + Decimal("0.5")) / Decimal(2**64)


@pytest.mark.parametrize("deviation", [0.5, 20.0, 1000.25, 3e5, 2.0**26])
def test_float64_errs_by_an_eighth_of_the_margin_at_most(deviation: float) -> None:
    """What float64 decides, it decides rightly: checked with 60 digits where a boundary matters."""
    scale = math.floor(deviation) + 1
    words = np.append(stream("margin").words(500), np.array([1 << 42, 2**63, 2**64 - 1], np.uint64))
    value = -scale * np.log(_uniform(words))
    size = np.floor(value).astype(np.int64)
    exponent = np.square(size - deviation * deviation / scale) * (0.5 / (deviation * deviation))
    with localcontext() as context:
        context.prec = 60
        square = Decimal(deviation) ** 2
        for word, near, whole, chance in zip(
            words.tolist(), value.tolist(), size.tolist(), np.exp(-exponent).tolist(), strict=True
        ):
            true = -Decimal(scale) * exact_uniform(word).ln()
            assert abs(Decimal(near) - true) <= scale * Decimal(_MARGIN) / 8
            true = (-((whole - square / scale) ** 2) / (2 * square)).exp()
            assert abs(Decimal(chance) - true) <= Decimal(_MARGIN) * true / 8


@pytest.mark.parametrize("deviation", [1000.25, 3e5])
def test_wide_noise_has_its_moments_and_shape(deviation: float) -> None:
    draws = discrete_gaussian(stream(f"wide {deviation}"), deviation, 400_000) / deviation
    n = len(draws)
    assert abs(draws.mean()) < 5 / np.sqrt(n)
    assert abs(draws.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert stats.kstest(draws, "norm").pvalue > ALPHA


def test_one_stream_never_repeats_and_two_keys_differ() -> None:
    one = stream("one")
    first, second = (discrete_gaussian(one, 500.0, 5000) for _ in range(2))
    other = discrete_gaussian(stream("other"), 500.0, 5000)
    again = discrete_gaussian(stream("one"), 500.0, 5000)
    np.testing.assert_array_equal(first, again)
    for a, b in ((first, second), (first, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(5000)
