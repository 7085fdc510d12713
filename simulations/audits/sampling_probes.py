"""Properties of who takes part: rate, independence, and how much one patient can add.

The draws are read back from what left, with the noise turned down: each release is taken apart
into the patients' known clipped gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from simulations.audits.canaries import Canaries
from simulations.audits.finding import Table
from simulations.audits.measure import (
    Check,
    Floats,
    rate_interval,
    smallest,
    two_sided,
    two_sided_all,
)

SLACK = 2e-3
"""Of a patient's part: float32 and the ring's rounding may move it so far."""

ENERGY_SLACK = 0.03
MOST_APART = 128
ALONG_SLACK = 0.1
"""Of a deviation of turned down noise: rounding may shift the noise along a sum so far."""


@dataclass(frozen=True)
class Decoded:
    """Releases taken apart.

    Attributes:
        parts: How often each patient's clipped gradient is in each release, (releases, patients).
        deviations: Standard deviation that the noise gives each part, (patients,).
        rest: Mean square, over the noise's, of what no patient explains, (releases,).
        spare: Dimensions of that rest.
        apart: What no patient explains, by coordinate, of at most `MOST_APART` coordinates.
        along: The noise along the sum of who took part, over its deviation; (releases with any,).
        labels: (site, run, process, time) of each release.
    """

    parts: Floats
    deviations: Floats
    rest: Floats
    spare: int
    apart: Floats
    along: Floats
    labels: NDArray[np.int64]

    @property
    def drawn(self) -> Floats:
        """1.0 where a patient took part."""
        return (self.parts > 0.5).astype(np.float64)


def decode(
    sums: NDArray[np.float32], canaries: Canaries, noise: float, labels: NDArray[np.int64]
) -> Decoded:
    """Take releases apart by least squares.

    Args:
        sums: Released sums in units of the clip norm, (releases, d).
        canaries: Whom they are sums of.
        noise: Standard deviation of their noise, in the same unit.
    """
    basis, triangle = np.linalg.qr(canaries.clipped.T.astype(np.float64))
    inverse = np.linalg.inv(triangle)
    inside = sums.astype(np.float64) @ basis
    parts = inside @ inverse.T
    spare = sums.shape[1] - len(canaries.clipped)
    outside = np.sum(sums.astype(np.float64) ** 2, axis=1) - np.sum(inside**2, axis=1)
    rest = np.maximum(outside, 0.0) / (max(spare, 1) * noise**2)
    deviations = noise * np.sqrt(np.sum(inverse**2, axis=1))
    clean = (parts > 0.5).astype(np.float64) @ canaries.clipped.astype(np.float64)
    size = np.linalg.norm(clean, axis=1)
    some = size > noise
    along = np.sum((sums[some] - clean[some]) * clean[some], axis=1) / (size[some] * noise)
    columns = np.unique(np.linspace(0, sums.shape[1] - 1, MOST_APART // 2).astype(int))
    columns = np.union1d(columns, np.arange(min(sums.shape[1], MOST_APART // 2)))
    apart = sums[:, columns].astype(np.float64) - inside @ basis[columns].T
    return Decoded(parts, deviations, rest, spare, apart, along, labels)


def contribution_checks(d: Decoded, canaries: Canaries, prefix: str = "") -> list[Check]:
    """What one patient adds: the own clipped gradient, once, whoever else takes part."""
    return [
        _whole(d, canaries, prefix),
        _largest(d, canaries, prefix),
        _unexplained(d, prefix),
        untied(d, prefix),
        _along(d, prefix),
    ]


def _whole(d: Decoded, canaries: Canaries, prefix: str) -> Check:
    error = np.abs(d.parts - d.drawn)
    p = smallest(2 * stats.norm.sf(np.maximum(error - SLACK, 0.0) / d.deviations).reshape(-1))
    drift = np.array([
        np.mean((d.parts - d.drawn)[d.drawn[:, i] == on, i]) if np.any(d.drawn[:, i] == on) else 0.0
        for i in range(d.parts.shape[1]) for on in (0.0, 1.0)
    ])  # fmt: skip
    count = np.array([np.sum(d.drawn[:, i] == on) for i in range(d.parts.shape[1])
                      for on in (0.0, 1.0)])  # fmt: skip
    spread = np.repeat(d.deviations, 2) / np.sqrt(np.maximum(count, 1))
    drift_p = smallest(2 * stats.norm.sf(np.maximum(np.abs(drift) - SLACK, 0.0) / spread))
    rows = tuple(
        (
            f"canary {i}",
            round(float(canaries.norms[i]), 4),
            int(d.drawn[:, i].sum()),
            round(float(d.parts[d.drawn[:, i] > 0, i].mean()), 4) if d.drawn[:, i].any() else None,
            round(float(d.parts[:, i].max()), 4),
        )
        for i in range(len(canaries.norms))
    )
    columns = ("patient", "gradient over C", "draws", "part when drawn", "largest part")
    return Check(
        f"{prefix}contribution-whole",
        "a release is a sum of whole clipped per-patient gradients, each at most once",
        "largest distance of a patient's part from 0 or 1",
        smallest([p, drift_p]),
        float(error.max()),
        0.0,
        tables=(Table("What each patient adds", columns, rows),),
        note="A part of 2 is a patient counted twice; parts between say that clipping depends on "
        "other patients, works by layer, or is absent.",
    )


def _largest(d: Decoded, canaries: Canaries, prefix: str) -> Check:
    size = np.minimum(canaries.norms, 1.0)
    moved = d.parts * size
    over = (moved - 1 - SLACK) / np.maximum(d.deviations * size, 1e-12)
    counts = d.drawn.sum(axis=0)
    means = np.sum(moved * d.drawn, axis=0) / np.maximum(counts, 1)
    worst = int(means.argmax())
    margin = 3.3 * float(d.deviations[worst] * size[worst] / math.sqrt(max(counts[worst], 1.0)))
    return Check(
        f"{prefix}sensitivity",
        "no patient moves a release by more than the clip norm",
        "part of the patient that moves a release the most, mean over draws, over the clip norm",
        smallest(stats.norm.sf(np.maximum(over, 0.0)).reshape(-1)) if over.max() > 0 else 1.0,
        float(means[worst]),
        1.0,
        (float(means[worst]) - margin, float(means[worst]) + margin),
    )


def _unexplained(d: Decoded, prefix: str) -> Check:
    if d.spare < 1:
        return Check(f"{prefix}explained", "nothing else is in a release", "", None)
    total = d.rest * d.spare
    low = stats.chi2.cdf(total / (1 - ENERGY_SLACK), d.spare)
    high = stats.chi2.sf(total / (1 + ENERGY_SLACK), d.spare)
    mean, count = float(d.rest.mean()), d.spare * len(d.rest)
    overall = min(
        stats.chi2.cdf(mean * count / (1 - ENERGY_SLACK), count),
        stats.chi2.sf(mean * count / (1 + ENERGY_SLACK), count),
    )
    return Check(
        f"{prefix}explained",
        "beside the patients' clipped gradients and the noise nothing is in a release",
        "mean square of the rest over the noise's",
        smallest([smallest(2 * np.minimum(low, high)), 2 * float(overall)]),
        mean,
        1.0,
    )


def untied(d: Decoded, prefix: str) -> Check:
    """Who is drawn does not show in the noise: not each patient, nor how many, in no coordinate."""
    name, claim = f"{prefix}noise-independent-of-draws", "the noise tells nothing of who was drawn"
    if d.spare < 1 or len(d.rest) < 2:
        return Check(name, claim, "", None)
    noise = np.column_stack([d.rest, np.abs(d.apart)])
    drawn = np.column_stack([d.drawn, d.drawn.sum(axis=1)])
    ranks = [stats.rankdata(v, axis=0) for v in (noise, drawn)]
    noise, drawn = (v - v.mean(axis=0) for v in ranks)
    lengths = [np.maximum(np.linalg.norm(v, axis=0), 1e-9) for v in (noise, drawn)]
    r = (noise / lengths[0]).T @ (drawn / lengths[1])
    ps = two_sided_all(r * math.sqrt(len(noise) - 1))
    return Check(
        name, claim,
        "largest rank correlation of the noise's size with a patient's draws or their number",
        smallest([smallest(ps[0]), smallest(ps.reshape(-1))]),
        float(np.abs(r).max(initial=0.0)), 0.0,
    )  # fmt: skip


def _along(d: Decoded, prefix: str) -> Check:
    """Noise blurs the clean sum's own direction, too, and does not point where it points."""
    count = len(d.along)
    energy = float(np.mean(d.along**2)) if count else 1.0
    mean = float(np.mean(d.along)) if count else 0.0
    low = float(stats.chi2.cdf(energy * count, count)) if count else 1.0
    pull = two_sided(max(abs(mean) - ALONG_SLACK, 0.0) * math.sqrt(count))
    return Check(
        f"{prefix}noise-along-sums",
        "along the clean sum there is as much noise as elsewhere, and it leans neither way",
        "mean of the noise along the clean sum, over its standard deviation",
        smallest([low, pull]), mean, 0.0,
        note=f"Mean square of that noise over the accounted one: {energy:.3f}.",
    )  # fmt: skip


def draw_checks(d: Decoded, rate: float, prefix: str = "") -> list[Check]:
    """How patients are drawn: each on its own, in every step, with the accounted rate."""
    checks = [_rate(d, rate, prefix)]
    if rate < 1:
        checks += [_even(d, rate, prefix), _alone(d, rate, prefix), _fresh(d, rate, prefix)]
    return checks


def _rate(d: Decoded, rate: float, prefix: str) -> Check:
    hits, trials = int(d.drawn.sum()), d.drawn.size
    each = [stats.binomtest(int(column.sum()), len(column), rate).pvalue for column in d.drawn.T]
    whole = stats.binomtest(hits, trials, rate).pvalue
    return Check(
        f"{prefix}sampling-rate",
        "every patient is drawn with the accounted rate",
        "draws over chances",
        smallest([float(whole), smallest(each)]),
        hits / trials,
        rate,
        rate_interval(hits, trials),
    )


def _even(d: Decoded, rate: float, prefix: str) -> Check:
    """Counts by patient and by step spread as sums of independent draws do, no more, no less."""
    n, patients = d.drawn.shape
    unit = rate * (1 - rate)
    by_patient = np.sum((d.drawn.sum(axis=0) - n * rate) ** 2) / (n * unit)
    by_step = np.sum((d.drawn.sum(axis=1) - patients * rate) ** 2) / (patients * unit)
    excess = (1 - 6 * unit) / unit  # of one draw's kurtosis
    return Check(
        f"{prefix}sampling-poisson",
        "the number drawn varies as independent draws make it vary (Poisson sampling)",
        "variance of the number drawn in a step, over that of independent draws",
        smallest([
            _square_p(float(by_patient), patients, 2 + excess / n),
            _square_p(float(by_step), n, 2 + excess / patients),
        ]),
        float(by_step) / n,
        1.0,
    )  # fmt: skip


def _square_p(total: float, count: int, variance: float) -> float:
    """Two-sided p of a sum of squares of standardised values; gamma with the right variance."""
    shape, scale = 2 * count / (2 * variance), variance
    low, high = (
        stats.gamma.cdf(total, shape, scale=scale),
        stats.gamma.sf(total, shape, scale=scale),
    )
    return float(min(1.0, 2 * min(low, high)))


def _alone(d: Decoded, rate: float, prefix: str) -> Check:
    """No patient's draw tells of another's, nor of the same patient's in other steps."""
    z = (d.drawn - rate) / math.sqrt(rate * (1 - rate))
    ps = []
    for sequence in _sequences(d.labels):
        part = z[sequence]
        for lag in range(1, min(25, len(part) - 1)):
            products = part[lag:] * part[:-lag]
            if products.size * rate**2 >= 20:
                ps.append(two_sided(float(products.sum() / math.sqrt(products.size))))
    n, patients = z.shape
    if patients > 1 and n * rate**2 >= 20:
        cross = (z.T @ z)[np.triu_indices(patients, 1)] / math.sqrt(n)
        ps.append(smallest(2 * stats.norm.sf(np.abs(cross))))
    return Check(
        f"{prefix}sampling-independent",
        "a patient's draw tells nothing of other patients' draws or of other steps",
        "smallest p of correlations over steps and over patients",
        smallest(ps),
    )


def _fresh(d: Decoded, rate: float, prefix: str) -> Check:
    """Sites, runs and restarts do not repeat each other's draws."""
    z = (d.drawn - rate) / math.sqrt(rate * (1 - rate))
    ps = []
    for place in range(3):
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, label in enumerate(d.labels.tolist()):
            key = tuple(v for i, v in enumerate(label) if i != place)
            groups.setdefault(key, []).append(row)
        products = [z[g[0]] * z[other] for g in groups.values() for other in g[1:]]
        if products and len(products) * z.shape[1] * rate**2 >= 20:
            total = np.concatenate(products)
            ps.append(two_sided(float(total.sum() / math.sqrt(total.size))))
    return Check(
        f"{prefix}sampling-fresh",
        "sites, runs and restarted processes draw independently",
        "smallest p of correlations of draws at the same step",
        smallest(ps) if ps else None,
        note="" if ps else "Too few draws coincide at this rate to compare them.",
    )


def _sequences(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    keys = [tuple(label[:2]) for label in labels.tolist()]
    return [np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)]
