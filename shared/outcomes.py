"""Counts and metrics of tasks with more than two answers: classes, values, survival.

As for two classes (shared/metrics.py), a site turns its test patients into cells of whole numbers,
each patient weighing at most `unit` in each block of cells; metrics come from the sums alone. Noise
in the sums shows in the metrics; intervals are computed for two classes only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.metrics import read_binary, score_histogram

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]


# Classes: for each class a histogram of its score against "is it that class", and the confusions.


def class_cells(classes: int, bins: int) -> int:
    """Cells of one release of a multi-class task; its blocks are `classes` + 1."""
    return classes * 2 * bins + classes * classes


def count_classes(
    logits: NDArray[np.float32], labels: Counts, weights: Counts, classes: int, bins: int
) -> Counts:
    """Shape (class_cells,): histograms class by class, then confusions [true, predicted]."""
    safe = np.nan_to_num(logits.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    blocks = []
    for c in range(classes):
        rest = np.logaddexp.reduce(np.delete(safe, c, axis=1), axis=1)
        own = (labels == c).astype(np.int64)
        blocks.append(score_histogram((safe[:, c] - rest).astype(np.float32), own, bins, weights))
    place = labels * classes + safe.argmax(axis=1)
    confusions = np.bincount(place, weights=weights, minlength=classes * classes)
    return np.concatenate([*blocks, confusions.astype(np.int64)])


def read_classes(counts: Reals, classes: int, bins: int) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall), F1 and AUROC as means over classes (one against
    the rest), from summed counts in patients."""
    split = classes * 2 * bins
    table = np.maximum(counts[split:].reshape(classes, classes), 0.0)
    histograms = np.split(counts[:split], classes)
    areas = [read_binary(h, 0.0).metrics.get("auroc") for h in histograms]
    right, true, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    seen = true > 0
    found: dict[str, float] = {"count": float(table.sum())}
    known = [a for a in areas if a is not None]
    if known:
        found["auroc"] = float(np.mean(known))
    if seen.any():
        found["accuracy"] = float(right.sum() / table.sum())
        found["balanced_accuracy"] = float(np.mean(right[seen] / true[seen]))
        found["f1"] = float(np.mean(2 * right[seen] / (true[seen] + said[seen])))
    return found


# Values: sums of 1, u, u^2, |e| / 2 and e^2 / 4, each from 0 to one unit a patient: u = (y + 1) / 2
# is the label's share of its range, e the error in half ranges, clipped to 2.

VALUE_CELLS = 5


def count_values(
    predicted: NDArray[np.float32], values: Reals, weights: Counts, owners: Counts
) -> Counts:
    """Shape (VALUE_CELLS,), from predictions and label values in [-1, 1].

    Rounded once for each patient, whose records come to at most `unit`: so does the whole number.
    """
    safe = np.nan_to_num(predicted.astype(np.float64), nan=0.0)
    error, share = np.clip(safe - values, -2.0, 2.0), (values + 1) / 2
    parts = [np.ones_like(share), share, share**2, np.abs(error) / 2, error**2 / 4]
    sums = [np.rint(np.bincount(owners, weights=part * weights)).sum() for part in parts]
    return np.array(sums, dtype=np.int64)


def read_values(counts: Reals, half_range: float) -> dict[str, float]:
    """MSE and MAE in the label's own unit, and R2, from summed counts in patients."""
    n, shares, squares, absolute, squared = counts.tolist()
    if n <= 0:
        return {"count": 0.0}
    mse, spread = max(4 * squared / n, 0.0), 4 * (squares / n - (shares / n) ** 2)
    found = {
        "count": float(n),
        "mse": mse * half_range**2,
        "mae": max(2 * absolute / n, 0.0) * half_range,
    }
    if spread > 0:
        found["r2"] = 1 - mse / spread
    return found


# Survival: for each horizon k a histogram [label code, predicted risk of the event by its end].


def survival_cells(intervals: int, bins: int) -> int:
    """Cells of one release of a survival task; its blocks are `intervals`."""
    return intervals * (2 * intervals + 1) * bins


def count_survival(
    logits: NDArray[np.float32], codes: Counts, weights: Counts, bins: int
) -> Counts:
    """Shape (survival_cells,): [horizon, code, bin of the predicted risk by that horizon]."""
    safe = np.nan_to_num(logits.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    intervals = safe.shape[1]
    risk = -np.expm1(-np.cumsum(np.logaddexp(0.0, safe), axis=1))
    place = np.minimum((risk * bins).astype(np.int64), bins - 1)
    size = 2 * intervals + 1
    blocks = [
        np.bincount(codes * bins + place[:, k], weights=weights, minlength=size * bins)
        for k in range(intervals)
    ]
    return np.concatenate(blocks).astype(np.int64)


def read_survival(counts: Reals, lengths: Reals, bins: int) -> dict[str, float]:
    """Concordance and integrated Brier score from summed counts in patients.

    Concordance (Harrell et al. 1982) is that of the risk by the last horizon; a pair counts if one
    patient's event lies in an earlier interval than the end of the other's follow-up, ties of risk
    count one half. The Brier score (Graf et al., Statistics in Medicine 18, 1999) weighs by the
    probability of being still followed, from the sums themselves, and is averaged over time.

    Args:
        counts: float64, shape (survival_cells,).
        lengths: Of the grid's intervals, shape (intervals,).
        bins: Of the risk.
    """
    intervals = len(lengths)
    table = np.maximum(counts.reshape(intervals, 2 * intervals + 1, bins), 0.0)
    found: dict[str, float] = {"count": float(table[-1].sum())}
    events, ends = table[-1][1::2], _by_end(table[-1])
    later = ends[::-1].cumsum(axis=0)[::-1]  # follow-up ends in interval j or after
    wins, ties, pairs = 0.0, 0.0, 0.0
    for j in range(intervals):
        others = later[j + 1]
        below = np.concatenate([[0.0], others.cumsum()[:-1]])
        wins += float(events[j] @ below)
        ties += float(events[j] @ others)
        pairs += float(events[j].sum() * others.sum())
    if pairs > 0:
        found["c_index"] = (wins + 0.5 * ties) / pairs
    brier = _brier(table, bins)
    if brier is not None:
        found["integrated_brier"] = float(brier @ lengths / lengths.sum())
    return found


def _by_end(table: Reals) -> Reals:
    """Events and leavers of each interval together, and last those who stay past the grid."""
    last = len(table) - 1
    both = np.concatenate([table, np.zeros((1, table.shape[1]))])
    sums: Reals = both.reshape(last // 2 + 1, 2, -1).sum(axis=1)
    return sums


def _brier(table: Reals, bins: int) -> Reals | None:
    """Brier score at the end of each interval, weighted against censoring."""
    intervals = len(table)
    whole = table[-1].sum(axis=1)
    died, left = whole[1::2], whole[0::2]
    staying = 1.0
    followed = [1.0]  # probability of being followed up to the end of interval k - 1
    for k in range(intervals):
        at_risk = died[k:].sum() + left[k:].sum() - died[k]
        staying *= 1 - left[k] / at_risk if at_risk > 0 else 0.0
        followed.append(staying)
    if whole.sum() <= 0 or followed[-1] <= 0:
        return None
    risk = (np.arange(bins) + 0.5) / bins
    scores = []
    for k in range(intervals):
        gone = sum(table[k][2 * j + 1] / followed[j] for j in range(k + 1))
        still = (table[k][2 * k + 2 :].sum(axis=0)) / followed[k + 1]
        scores.append(float(gone @ (1 - risk) ** 2 + still @ risk**2) / whole.sum())
    return np.array(scores)
