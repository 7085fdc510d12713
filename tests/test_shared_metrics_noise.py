"""What noise does to metrics: intervals that cover what the counts say without it."""

from __future__ import annotations

import numpy as np
import pytest

from shared.metrics import LEVEL, Interval, read_binary, score_histogram

RUNS = 600
ALL = {
    "auroc", "accuracy", "balanced_accuracy", "recall", "specificity", "precision", "f1",
    "brier", "ece",
}  # fmt: skip


def cohort(patients: int, positives: float, spread: float, bins: int) -> np.ndarray:
    rng = np.random.default_rng(patients)
    labels = (rng.random(patients) < positives).astype(np.int64)
    logits = ((labels - 0.5) * spread + rng.normal(size=patients)).astype(np.float32)
    return score_histogram(logits, labels, bins)


def coverage(exact: np.ndarray, noise: float, claimed: float) -> dict[str, float]:
    """How often each metric's interval holds the exact value, under fresh noise."""
    rng = np.random.default_rng(1)
    truth = read_binary(exact.astype(np.float64), 0.0).metrics
    hits = dict.fromkeys(ALL, 0)
    for _ in range(RUNS):
        seen = read_binary(exact + rng.normal(0, noise, exact.shape), claimed)
        for name in ALL:
            low, high = seen.intervals.get(name, (0.0, 1.0))
            hits[name] += low - 1e-9 <= truth[name] <= high + 1e-9
    return {name: count / RUNS for name, count in hits.items()}


@pytest.mark.parametrize(
    ("patients", "positives", "spread", "bins", "noise"),
    [(143, 0.4, 3.0, 16, 2.0), (143, 0.4, 1.0, 8, 4.0), (2000, 0.1, 1.5, 32, 3.0)],
)
def test_intervals_cover_the_exact_value_as_often_as_they_say(
    patients: int, positives: float, spread: float, bins: int, noise: float
) -> None:
    held = coverage(cohort(patients, positives, spread, bins), noise, noise)
    # Three standard errors of 600 runs are 0.027.
    assert all(share >= LEVEL - 0.03 for share in held.values()), held
    for exact in ("recall", "accuracy", "f1", "brier"):
        assert held[exact] <= LEVEL + 0.03, held  # Fieller's is exact, not merely safe


def test_noise_that_is_larger_than_claimed_is_noticed_by_this_very_check() -> None:
    held = coverage(cohort(143, 0.4, 3.0, 16), noise=4.0, claimed=2.0)
    assert held["recall"] < 0.85
    assert held["accuracy"] < 0.85
    assert held["auroc"] < 0.9


def test_without_noise_there_is_no_interval_and_the_values_are_exact() -> None:
    exact = cohort(300, 0.5, 1.0, 64)
    reading = read_binary(exact.astype(float), 0.0)
    assert reading.intervals == {}
    negatives, positives = exact.reshape(2, -1)
    right = negatives[:32].sum() + positives[32:].sum()
    assert reading.metrics["accuracy"] == right / exact.sum()
    assert reading.metrics["recall"] == positives[32:].sum() / positives.sum()
    almost = read_binary(exact.astype(float), 1e-6)
    for name, (low, high) in almost.intervals.items():
        assert low == pytest.approx(reading.metrics[name], abs=1e-3)
        assert high == pytest.approx(reading.metrics[name], abs=1e-3)


def test_counts_that_are_noise_alone_say_nothing() -> None:
    rng = np.random.default_rng(0)
    wide: list[Interval] = []
    for _ in range(50):
        reading = read_binary(rng.normal(0, 5, 32), 5.0)
        assert all(0 <= v <= 1 for n, v in reading.metrics.items() if n != "count")
        wide += [reading.intervals[n] for n in ("accuracy", "recall") if n in reading.intervals]
    assert wide
    assert np.mean([high - low for low, high in wide]) > 0.8


def test_more_noise_gives_wider_intervals() -> None:
    exact = cohort(500, 0.4, 1.5, 16).astype(float)
    for name in ALL:
        widths = []
        for noise in (0.5, 2.0, 8.0):
            low, high = read_binary(exact, noise).intervals[name]
            widths.append(high - low)
        assert widths[0] <= widths[1] <= widths[2], name
        assert widths[0] < widths[2], name
