"""Metrics from summed histograms, against scikit-learn on the raw scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from training_cases import make_plan

from shared.counts import exact_metrics
from shared.errors import ConfigError
from shared.metrics import read_binary, score_histogram


def binary_metrics(counts: np.ndarray) -> dict[str, float]:
    """The metrics of a histogram without noise."""
    return read_binary(counts.astype(np.float64), 0.0).metrics


def scores(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 400)
    logits = ((labels - 0.5) * spread + rng.normal(size=400) * spread).astype(np.float32)
    return logits, labels


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.5, 2.0, 8.0]))
def test_metrics_agree_with_scikit_learn(seed: int, spread: float) -> None:
    logits, labels = scores(seed, spread)
    ours = binary_metrics(score_histogram(logits, labels, 256))
    decided = logits >= 0
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(labels, logits), abs=5e-3)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, decided))
    assert ours["recall"] == pytest.approx(sk.recall_score(labels, decided))
    assert ours["precision"] == pytest.approx(sk.precision_score(labels, decided))
    assert ours["f1"] == pytest.approx(sk.f1_score(labels, decided))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, decided))
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(labels, probability), abs=1e-2)


@given(st.integers(0, 1000), st.integers(1, 399))
def test_summed_histograms_equal_the_histogram_of_all(seed: int, cut: int) -> None:
    logits, labels = scores(seed, 1.0)
    whole = score_histogram(logits, labels, 64)
    parts = score_histogram(logits[:cut], labels[:cut], 64)
    parts = parts + score_histogram(logits[cut:], labels[cut:], 64)
    np.testing.assert_array_equal(whole, parts)


def test_ece_is_zero_for_a_calibrated_and_large_for_a_boastful_model() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200_000).astype(np.float32) * 2
    labels = (rng.random(200_000) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    honest = binary_metrics(score_histogram(logits, labels, 256))["ece"]
    boastful = binary_metrics(score_histogram(logits * 3, labels, 256))["ece"]
    assert honest < 0.01
    assert boastful > 0.05


def test_one_class_has_no_auroc_and_nobody_has_no_metrics() -> None:
    logits = np.array([0.3, -0.2], dtype=np.float32)
    only_negative = binary_metrics(score_histogram(logits, np.zeros(2, dtype=np.int64), 16))
    assert "auroc" not in only_negative
    assert only_negative["accuracy"] == 0.5
    with pytest.raises(ConfigError, match="no test patient"):
        exact_metrics(make_plan(), np.zeros(512))


def test_non_finite_scores_are_counted_not_lost() -> None:
    logits = np.array([np.nan, np.inf, -np.inf], dtype=np.float32)
    counts = score_histogram(logits, np.array([1, 1, 0]), 16)
    assert counts.sum() == 3
    assert counts[0] == 1
    assert counts[-1] == 1
