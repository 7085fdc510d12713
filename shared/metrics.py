"""Metrics of a binary classifier from summed histograms of its scores.

A site counts its test patients' scores per bin and class; the counts travel inside the secure
sum; every metric is computed from the sums. AUROC is the Mann-Whitney statistic with ties inside
a bin counted one half; with the default 256 bins it is within 0.005 of the exact one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError

Counts = NDArray[np.int64]


def score_histogram(logits: NDArray[np.float32], labels: Counts, bins: int) -> Counts:
    """Count scores per class and bin.

    Args:
        logits: float32, shape (n,); a NaN counts as 0, that is, undecided.
        labels: int64, shape (n,), 0 or 1.
        bins: Even number of bins; the middle edge lies at probability 1/2.

    Returns:
        int64, shape (2 * bins,): the negatives' bins, then the positives'.
    """
    safe = np.nan_to_num(logits.astype(np.float64), nan=0.0)
    index = np.searchsorted(_edges(bins), safe, side="right")
    return np.bincount(labels * bins + index, minlength=2 * bins).astype(np.int64)


def _edges(bins: int) -> NDArray[np.float64]:
    """Inner edges over logits: fine near 0, where weak models score, coarse in the tails."""
    spread = np.linspace(-1, 1, bins + 1)[1:-1]
    edges: NDArray[np.float64] = np.sinh(6 * spread) / np.sinh(6) * 20
    return edges


def binary_metrics(counts: Counts) -> dict[str, float]:
    """AUROC and threshold metrics (at probability 1/2) from a summed score histogram.

    Args:
        counts: int64, shape (2 * bins,), as `score_histogram` gives, or a sum of such.

    Returns:
        auroc, accuracy, balanced_accuracy, recall, specificity, precision, f1, brier, ece,
        count. A metric that is undefined (one class only) is left out.

    Raises:
        ConfigError: no patient was counted.
    """
    negatives, positives = counts.reshape(2, -1).astype(np.float64)
    n0, n1 = float(negatives.sum()), float(positives.sum())
    if n0 + n1 == 0:
        raise ConfigError("no test patient was counted; give at least one site a test part")
    half = len(negatives) // 2
    tn, fn = float(negatives[:half].sum()), float(positives[:half].sum())
    fp, tp = n0 - tn, n1 - fn
    metrics = {"accuracy": (tp + tn) / (n0 + n1), "count": n0 + n1}
    metrics |= _calibration(negatives, positives)
    if n1 > 0:
        metrics["recall"] = tp / n1
        metrics["f1"] = 2 * tp / (2 * tp + fp + fn)
    if tp + fp > 0:
        metrics["precision"] = tp / (tp + fp)
    if n0 > 0:
        metrics["specificity"] = tn / n0
    if n0 > 0 and n1 > 0:
        metrics["balanced_accuracy"] = (tp / n1 + tn / n0) / 2
        below = np.cumsum(negatives) - negatives
        metrics["auroc"] = float((positives * (below + negatives / 2)).sum() / (n0 * n1))
    return metrics


def _calibration(
    negatives: NDArray[np.float64], positives: NDArray[np.float64]
) -> dict[str, float]:
    """Brier score and expected calibration error (ten equal bins) at the bins' mid scores."""
    edges = _edges(len(negatives))
    middle = (np.concatenate([[edges[0]], edges]) + np.concatenate([edges, [edges[-1]]])) / 2
    probability = 1 / (1 + np.exp(-middle))
    total = negatives + positives
    brier = (positives * (1 - probability) ** 2 + negatives * probability**2).sum() / total.sum()
    tenth = np.minimum((probability * 10).astype(np.int64), 9)
    gap = np.bincount(tenth, weights=positives - total * probability, minlength=10)
    return {"brier": float(brier), "ece": float(np.abs(gap).sum() / total.sum())}
