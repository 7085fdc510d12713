"""Tests of hypotheses that probes share: each returns a p-value, valid where nothing is wrong.

Exact where an exact law is at hand; else a normal approximation to a sum of many terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from simulations.audits.finding import Chart, Table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One measured property, before it is judged.

    Attributes:
        name: Short and stable.
        claim: What should hold.
        statistic: What `value` is.
        p: Probability of something as extreme where the claim holds; None: not testable.
        value: The measured value; `expected`: what it should be.
        interval: Two-sided, 99 %.
        note: For the reader.
    """

    name: str
    claim: str
    statistic: str
    p: float | None
    value: float | None = None
    expected: float | None = None
    interval: tuple[float, float] | None = None
    note: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    assumptions: tuple[str, ...] = field(default=())


def two_sided(z: float) -> float:
    """p of a standard normal value."""
    return float(2 * stats.norm.sf(abs(z)))


def two_sided_all(z: Floats) -> Floats:
    """p of each standard normal value."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def smallest(ps: Sequence[float] | Floats, tests: int | None = None) -> float:
    """p of the smallest of several p-values, whatever their dependence (Bonferroni).

    What is not a number counts as 0: a release that cannot be measured is no Gaussian sum.
    """
    values = np.nan_to_num(np.asarray(ps, dtype=np.float64), nan=0.0)
    if values.size == 0:
        return 1.0
    return float(min(1.0, np.min(values) * (tests or values.size)))


def scale_p(energy: float | Floats, count: float | Floats) -> Floats:
    """p that the mean square of `count` standard normal values is as far from 1; two-sided."""
    dof = np.asarray(count, dtype=np.float64)
    total = np.asarray(energy, dtype=np.float64) * dof
    p = 2 * np.minimum(stats.chi2.sf(total, dof), stats.chi2.cdf(total, dof))
    return np.asarray(np.minimum(p, 1.0))


def scale_interval(energy: float, count: float, confidence: float = 0.99) -> tuple[float, float]:
    """Interval of a standard deviation from the mean square of `count` normal values."""
    if count < 1:
        return 0.0, math.inf
    low, high = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], count)
    return math.sqrt(energy * count / low), math.sqrt(energy * count / high)


def correlation_p(r: float | Floats, count: int) -> Floats:
    """p of the cosine of two independent Gaussian vectors of `count` coordinates; two-sided."""
    cosine = np.clip(np.abs(np.asarray(r, dtype=np.float64)), 0.0, 1.0)
    return np.asarray(stats.beta.sf(cosine**2, 0.5, max(count - 1, 1) / 2))


def dispersion_p(energies: Floats, sizes: float | Floats) -> float:
    """p that mean squares of `sizes` normal values spread as much as they do; two-sided."""
    size = np.broadcast_to(np.asarray(sizes, dtype=np.float64), energies.shape)
    squares = (energies - 1) ** 2 * size / 2
    spread = np.sum(2 + 12 / size)  # variance of each square
    return two_sided(float((squares.sum() - energies.size) / math.sqrt(spread)))


def lag_ps(rows: Floats, most: int | None = None) -> Floats:
    """p of the correlation of rows that are l apart, for every lag l from 1; rows (n, m)."""
    n, m = rows.shape
    lags = min(n - 1, most or n - 1)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(rows, size, axis=0)
    sums = np.fft.irfft(np.sum(np.abs(spectrum) ** 2, axis=1), size)[1 : lags + 1]
    z = sums / np.sqrt(m * (n - np.arange(1, lags + 1)))
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def pair_ps(rows: Floats) -> tuple[float, float]:
    """p of the closest pair of rows, and p of all pairs' correlations together; rows (n, m)."""
    n, m = rows.shape
    if n < 2 or m < 2:
        return 1.0, 1.0
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    above = np.triu_indices(n, 1)
    r = (unit @ unit.T)[above]
    closest = smallest([float(correlation_p(float(np.abs(r).max()), m))], tests=len(r))
    variance = 2 * (m - 1) / (m**2 * (m + 2))
    z = (float(np.sum(r**2)) - len(r) / m) / math.sqrt(len(r) * variance)
    return closest, float(stats.norm.sf(z)) if len(r) >= 30 else 1.0


def rate_interval(hits: int, trials: int, confidence: float = 0.99) -> tuple[float, float]:
    """Clopper and Pearson's interval of a chance."""
    if trials == 0:
        return 0.0, 1.0
    low, high = stats.binomtest(hits, trials).proportion_ci(confidence, "exact")
    return float(low), float(high)
