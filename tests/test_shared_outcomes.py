"""Metrics of classes, values and survival from sums, against scikit-learn and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    roc_auc_score,
)
from training_cases import KINDS, model_plan

from shared.counts import EXACT_UNIT, count_kind, record_weights
from shared.plan import StudyPlan
from shared.statistics import Records
from shared.tasks import VALUE_STEPS, task_kind

RNG = np.random.default_rng(5)
N = 400


def read(plan: StudyPlan, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """The metrics of one patient a record, through counts as a study sums them."""
    records = Records(
        np.arange(len(labels)), labels.astype(np.int64), np.zeros((len(labels), 1), np.float32),
        outputs.astype(np.float32),
    )  # fmt: skip
    kind = count_kind(plan)
    counts = kind.count(plan, records, EXACT_UNIT)
    assert counts.shape == (kind.cells(plan),)
    return kind.read(plan, counts / EXACT_UNIT, 0.0).metrics


def plan_of(kind: str, bins: int = 256) -> StudyPlan:
    return model_plan("mlp", kind, evaluation={"release": "exact", "bins": bins},
                      privacy={"mode": "none"}, training={"sample_rate": 0.5})  # fmt: skip


def test_classes_agree_with_scikit_learn() -> None:
    labels = RNG.choice(3, N, p=[0.6, 0.3, 0.1])
    logits = RNG.normal(size=(N, 3)) + 1.5 * np.eye(3)[labels]
    found = read(plan_of("multiclass"), labels, logits)
    said = logits.argmax(axis=1)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, said))
    assert found["f1"] == pytest.approx(f1_score(labels, said, average="macro"))
    area = np.mean([roc_auc_score(labels == c, softmax[:, c]) for c in range(3)])
    assert found["auroc"] == pytest.approx(area, abs=0.005)
    assert found["count"] == N


def test_values_agree_with_scikit_learn() -> None:
    values = RNG.uniform(-1, 1, N)
    codes = np.round((values + 1) / 2 * VALUE_STEPS)
    predicted = np.clip(values + RNG.normal(size=N) * 0.3, -1.0, 1.0)
    found = read(plan_of("regression"), codes, predicted)  # the range is 0 to 50
    true, said = 25 * (values + 1), 25 * (predicted + 1)
    assert found["mse"] == pytest.approx(mean_squared_error(true, said), rel=1e-3)
    assert found["mae"] == pytest.approx(mean_absolute_error(true, said), rel=1e-3)
    assert found["r2"] == pytest.approx(r2_score(true, said), abs=1e-3)


def survival_case() -> tuple[np.ndarray, np.ndarray]:
    """Codes of 4 intervals, and logits of hazards that know something of them."""
    codes = RNG.choice(9, N, p=[0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.25])
    logits = RNG.normal(size=(N, 4)) - 1.0 - 0.3 * (codes[:, None] // 2)
    return codes, logits


def test_concordance_agrees_with_counting_pairs() -> None:
    codes, logits = survival_case()
    risk = 1 - np.prod(1 / (1 + np.exp(logits)), axis=1)
    good, pairs = 0.0, 0
    for i, j in itertools.permutations(range(N), 2):
        if codes[i] % 2 and codes[i] // 2 < codes[j] // 2:
            pairs += 1
            good += float(risk[i] > risk[j]) + 0.5 * float(risk[i] == risk[j])
    found = read(plan_of("survival", bins=1024), codes, logits)
    assert found["c_index"] == pytest.approx(good / pairs, abs=0.003)
    assert abs(found["c_index"] - 0.5) > 0.05


def test_brier_agrees_with_weighing_each_patient() -> None:
    codes, logits = survival_case()
    ends, events = codes // 2, codes % 2
    lengths = np.diff([0.0, *KINDS["survival"]["intervals"]])
    followed = [1.0]
    for k in range(4):
        died = int(((ends == k) & (events == 1)).sum())
        left = int(((ends == k) & (events == 0)).sum())
        followed.append(followed[-1] * (1 - left / (int((ends >= k).sum()) - died)))
    survives = np.cumprod(1 / (1 + np.exp(logits)), axis=1)
    scores = []
    for k in range(4):
        total = 0.0
        for i in range(N):
            if events[i] and ends[i] <= k:
                total += survives[i, k] ** 2 / followed[ends[i]]
            elif ends[i] > k:
                total += (1 - survives[i, k]) ** 2 / followed[k + 1]
        scores.append(total / N)
    found = read(plan_of("survival", bins=1024), codes, logits)
    expected = float(np.dot(scores, lengths) / lengths.sum())
    assert found["integrated_brier"] == pytest.approx(expected, rel=0.01)


def test_a_survival_model_that_knows_nothing_is_a_coin() -> None:
    codes, _ = survival_case()
    assert read(plan_of("survival"), codes, np.zeros((N, 4)))["c_index"] == 0.5


@given(st.data())
def test_a_patient_moves_all_counts_together_by_at_most_what_is_accounted(
    data: st.DataObject,
) -> None:
    plan = plan_of(data.draw(st.sampled_from(sorted(KINDS))), bins=8)
    kind, task = count_kind(plan), task_kind(plan.task)
    outputs, records = task.outputs(plan.task), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    owners = np.append(rng.integers(0, 3, 10), [3] * records)
    labels = rng.integers(0, task.codes(plan.task), len(owners))
    said = rng.normal(size=(len(owners), outputs)).astype(np.float32) * 10
    said = said[:, 0] if outputs == 1 else said

    def counts(rows: np.ndarray) -> np.ndarray:
        _, renumbered = np.unique(owners[rows], return_inverse=True)
        inputs = np.zeros((len(rows), 1), np.float32)
        return kind.count(plan, Records(renumbered, labels[rows], inputs, said[rows]), EXACT_UNIT)

    moved = counts(np.arange(len(owners))) - counts(np.flatnonzero(owners != 3))
    most = EXACT_UNIT * math.sqrt(kind.blocks(plan))
    assert np.linalg.norm(moved.astype(np.float64)) <= most + 1e-6
    assert record_weights(owners, EXACT_UNIT)[owners == 3].sum() == EXACT_UNIT
