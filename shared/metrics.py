"""Metrics of a binary classifier from summed histograms of its scores, and what noise does to them.

A site counts its test patients' scores per class and bin, a patient's records sharing the weight
of one; the counts travel inside the secure sum; every metric is computed from the sums. AUROC is
the Mann-Whitney statistic with ties inside a bin counted one half; with 256 bins it is within
0.005 of the exact one.

Where the counts carry noise of known spread, each metric comes with the interval of the values
that the same counts could have had without it. Sampling of test patients is not in it.

recall, precision, F1, accuracy, specificity, Brier   Fieller's interval: each is the ratio of two
    linear sums, and "numerator - r denominator" is normal with known spread at the true r
balanced accuracy   MOVER: from the intervals of its two halves, which share no cell
AUROC               the same idea: sum over bins of positives times (negatives below - r negatives)
    has mean 0 at the true r, and a variance that is estimated without bias from the noisy counts
calibration error   the triangle inequality, and concentration of a sum of normal magnitudes;
    holds at least as often as stated

Sources: Fieller, JRSS B 16 (1954); Zou and Donner, Statistics in Medicine 27 (2008), for MOVER;
Boucheron, Lugosi, Massart, "Concentration Inequalities" (2013), theorem 5.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95
_Z = 1.959964  # of LEVEL, two-sided
_AREAS = np.linspace(0.0, 1.0, 2001)


@dataclass(frozen=True)
class Reading:
    """What summed counts say: metrics, and where noise hides them, their intervals at `LEVEL`.

    A metric that is undefined (one class only, or counts that are noise alone) is left out.
    `features` are a study's statistics, as results.json has them; `importances` and `groups` what
    an evaluation released beside the scores.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    features: tuple[dict[str, Any], ...] = ()
    importances: tuple[dict[str, Any], ...] = ()
    groups: tuple[dict[str, Any], ...] = ()


def score_histogram(
    logits: NDArray[np.float32], labels: Counts, bins: int, weights: Counts | None = None
) -> Counts:
    """Count scores per class and bin.

    Args:
        logits: float32, shape (n,); a NaN counts as 0, that is, undecided.
        labels: int64, shape (n,), 0 or 1.
        bins: Even number of bins; the middle edge lies at probability 1/2.
        weights: int64, shape (n,), what each record counts; 1 where left out.

    Returns:
        int64, shape (2 * bins,): the negatives' bins, then the positives'.
    """
    safe = np.nan_to_num(logits.astype(np.float64), nan=0.0)
    index = np.searchsorted(_edges(bins), safe, side="right")
    # Sums of whole numbers below 2^53 are exact in float64.
    return np.bincount(labels * bins + index, weights=weights, minlength=2 * bins).astype(np.int64)


def _edges(bins: int) -> Reals:
    """Inner edges over logits: fine near 0, where weak models score, coarse in the tails."""
    spread = np.linspace(-1, 1, bins + 1)[1:-1]
    edges: Reals = np.sinh(6 * spread) / np.sinh(6) * 20
    return edges


def _probabilities(bins: int) -> Reals:
    """The score that stands for each bin: its middle."""
    edges = _edges(bins)
    middle = (np.concatenate([[edges[0]], edges]) + np.concatenate([edges, [edges[-1]]])) / 2
    scores: Reals = 1 / (1 + np.exp(-middle))
    return scores


def read_binary(counts: Reals, deviation: float) -> Reading:
    """The metrics of a summed score histogram whose every cell carries independent normal noise.

    Args:
        counts: float64, shape (2 * bins,), in patients; noise may make them negative.
        deviation: Standard deviation of a cell's noise, in patients; 0 gives no intervals.

    Returns:
        auroc, accuracy, balanced_accuracy, recall, specificity, precision, f1, brier and ece within
        [0, 1], each with an interval, and count. What is undefined (one class only) is left out.
    """
    forms = _Forms(counts.reshape(2, -1), deviation)
    found = {name: forms.ratio(*parts) for name, parts in forms.ratios().items()}
    found |= {"balanced_accuracy": forms.balanced(found.get("recall"), found.get("specificity"))}
    found |= {"auroc": forms.auroc(), "ece": forms.calibration()}
    known = {name: value for name, value in found.items() if value is not None}
    metrics = {name: point for name, (point, _) in known.items()}
    metrics["count"] = max(float(counts.sum()), 0.0)
    return Reading(
        metrics, {n: interval for n, (_, interval) in known.items()} if deviation else {}
    )


_Known = tuple[float, Interval]


def fieller(over: Reals, under: Reals, table: Reals, deviation: float) -> _Known | None:
    """A ratio of two weighted sums of noisy cells, and its interval at `LEVEL`.

    Args:
        over: Weights of the numerator, the table's shape.
        under: Weights of the denominator.
        table: Cells, each with independent normal noise.
        deviation: Its standard deviation.

    Returns:
        None where the denominator is not above 0; an unbounded interval where it may be 0.
    """
    a, b = float((over * table).sum()), float((under * table).sum())
    if b <= 0:
        return None
    slack = (_Z * deviation) ** 2
    square = b * b - slack * float((under**2).sum())
    if square <= 0:
        return a / b, (-math.inf, math.inf)
    middle = (a * b - slack * float((over * under).sum())) / square
    rest = (a * a - slack * float((over**2).sum())) / square
    half = math.sqrt(max(middle * middle - rest, 0.0))
    return a / b, (middle - half, middle + half)


class _Forms:
    """Linear and bilinear forms of one noisy histogram, shape (2, bins): negatives, positives."""

    def __init__(self, table: Reals, deviation: float) -> None:
        self._table, self._variance = table, deviation**2
        self._bins = table.shape[1]
        self._score = _probabilities(self._bins)

    def ratios(self) -> dict[str, tuple[Reals, Reals]]:
        """Numerator and denominator of each ratio, as weights of the cells."""
        low = np.arange(self._bins) < self._bins // 2
        none, all_ = np.zeros(self._bins), np.ones(self._bins)
        everyone = np.stack([all_, all_])
        tp, fp = np.stack([none, 1.0 * ~low]), np.stack([1.0 * ~low, none])
        tn, fn = np.stack([1.0 * low, none]), np.stack([none, 1.0 * low])
        squares = np.stack([self._score**2, (1 - self._score) ** 2])
        return {
            "accuracy": (tp + tn, everyone),
            "recall": (tp, tp + fn),
            "specificity": (tn, tn + fp),
            "precision": (tp, tp + fp),
            "f1": (2 * tp, 2 * tp + fp + fn),
            "brier": (squares, everyone),
        }

    def ratio(self, over: Reals, under: Reals) -> _Known | None:
        """A ratio of two linear sums, between 0 and 1."""
        found = fieller(over, under, self._table, math.sqrt(self._variance))
        if found is None:
            return None
        point, (low, high) = found
        return _share(point), (_share(low), _share(high))

    def balanced(self, recall: _Known | None, specificity: _Known | None) -> _Known | None:
        """The mean of recall and specificity."""
        if recall is None or specificity is None:
            return None
        halves = (recall, specificity)
        point = sum(value for value, _ in halves) / 2
        below = math.hypot(*(value - low for value, (low, _) in halves)) / 2
        above = math.hypot(*(high - value for value, (_, high) in halves)) / 2
        return point, (_share(point - below), _share(point + above))

    def auroc(self) -> _Known | None:
        """The area under the curve; None where one class was not seen."""
        negatives, positives = self._table
        pairs = float(negatives.sum() * positives.sum())
        if negatives.sum() <= 0 or positives.sum() <= 0:
            return None
        wins = np.tril(np.ones((self._bins, self._bins)), -1) + 0.5 * np.eye(self._bins)
        point = _share(float(positives @ wins @ negatives) / pairs)
        if not self._variance:
            return point, (point, point)
        inside = _AREAS[self._may_be(wins)]
        low, high = (float(inside[0]), float(inside[-1])) if len(inside) else (point, point)
        return point, (min(low, point), max(high, point))

    def _may_be(self, wins: Reals) -> NDArray[np.bool_]:
        """Which of `_AREAS` the counts without noise may have: |form| <= z deviations."""
        negatives, positives = self._table
        below, above = wins @ negatives, positives @ wins
        size = wins.size * (_AREAS - 0.5) ** 2 + float(((wins - 0.5) ** 2).sum())
        moved = self._bins * (negatives.sum() * _AREAS) ** 2 + float((below**2).sum())
        moved += self._bins * (positives.sum() * _AREAS) ** 2 + float((above**2).sum())
        moved -= 2 * _AREAS * float(negatives.sum() * below.sum() + positives.sum() * above.sum())
        form = float(positives @ below) - _AREAS * float(negatives.sum() * positives.sum())
        least = self._variance**2 * size
        inside: NDArray[np.bool_] = form**2 <= _Z**2 * np.maximum(
            self._variance * moved - least, least
        )
        return inside

    def calibration(self) -> _Known | None:
        """Expected calibration error over ten equal bins of the score."""
        negatives, positives = self._table
        total = float(self._table.sum())
        if total <= 0:
            return None
        tenth = np.minimum((self._score * 10).astype(np.int64), 9)
        gaps = positives * (1 - self._score) - negatives * self._score
        weights = (1 - self._score) ** 2 + self._score**2
        gap = np.bincount(tenth, weights=gaps, minlength=10)
        noise = self._variance * np.bincount(tenth, weights=weights, minlength=10)
        point = float(np.sqrt(np.maximum(gap**2 - noise, 0.0)).sum())
        # Each of the two bounds below fails with chance 1/40 at most.
        reach = math.sqrt(2 / math.pi) * float(np.sqrt(noise).sum())
        reach += math.sqrt(2 * math.log(40) * float(noise.sum()))
        doubt = 2.2414 * math.sqrt(self._variance * self._table.size)
        size = float(np.abs(gap).sum())
        low = max(size - reach, 0.0) / (total + doubt)
        high = (size + reach) / (total - doubt) if total > doubt else 1.0
        return _share(point / total), (_share(low), _share(high))


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)
