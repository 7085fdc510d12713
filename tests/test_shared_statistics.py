"""Federated statistics: what they count, how far one patient moves them, what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.counts import UNITS, count_kind, count_noise, record_weights
from shared.errors import ConfigError
from shared.features import encode
from shared.plan import StudyPlan, from_table
from shared.privacy import costs_of, epsilon_of
from shared.statistics import Records, count_features, feature_cells, read_features

FEATURES = [
    {"name": "age", "minimum": 0.0, "maximum": 100.0, "missing": "indicator"},
    {"name": "sex", "type": "category", "categories": ["f", "m"], "missing": "indicator"},
    {"name": "grade", "type": "category", "categories": ["1", "2", "3"]},
    {"name": "size", "minimum": -1.0, "maximum": 3.0},
]


def make(encoding: str = "one-hot", **changes: Any) -> StudyPlan:
    table: dict[str, Any] = {
        "name": "counts",
        "task": {
            "kind": "statistics",
            "label": "ill",
            "features": FEATURES,
            "encoding": encoding,
        },
        "privacy": {"mode": "local", "epsilon": 2.0, "delta": 1e-5},
        "cohort": {
            "threshold": 4,
            "sites": [{"name": f"site-{i}", "expected_patients": 50} for i in range(4)],
        },
        "statistics": {"bins": 4},
    }
    return from_table(table | changes, "test")


def people(plan: StudyPlan, n: int, seed: int = 0) -> tuple[Records, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.where(rng.random(n) < 0.2, np.nan, rng.uniform(-20, 120, n)),
        "sex": rng.integers(-1, 2, n),
        "grade": rng.integers(0, 3, n),
        "size": rng.uniform(-1, 3, n),
    }
    labels = rng.integers(0, 2, n).astype(np.int64)
    inputs = encode(plan.task, columns)
    nothing = np.zeros(0, dtype=np.float32)
    return Records(np.arange(n), labels, inputs, nothing), columns


@pytest.mark.parametrize("encoding", ["one-hot", "drop-first"])
def test_exact_statistics_are_those_of_the_columns(encoding: str) -> None:
    plan = make(encoding)
    records, columns = people(plan, 400)
    unit = UNITS[0]
    counts = count_kind(plan).count(plan, records, unit) / unit
    age, sex, grade, size, label = read_features(plan, counts, 0.0)
    known = ~np.isnan(columns["age"])
    clipped = np.clip(columns["age"][known], 0, 100)
    assert age["present"] == known.sum()
    assert age["missing"] == 400 - known.sum()
    assert age["mean"] == pytest.approx(clipped.mean(), abs=0.01)
    assert age["standard_deviation"] == pytest.approx(clipped.std(), abs=0.02)
    assert age["histogram"] == pytest.approx(np.histogram(clipped, 4, (0, 100))[0])
    assert sex["histogram"] == [(columns["sex"] == 0).sum(), (columns["sex"] == 1).sum()]
    assert sex["missing"] == (columns["sex"] == -1).sum()
    assert grade["histogram"] == [(columns["grade"] == g).sum() for g in range(3)]
    assert size["mean"] == pytest.approx(columns["size"].mean(), abs=1e-3)
    assert label["histogram"] == [(records.labels == v).sum() for v in (0, 1)]
    assert "mean_interval" not in age


def moved(plan: StudyPlan, owners: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The most that leaving one patient out moves the counts, in sensitivities."""
    noise, layout = count_noise(plan), feature_cells(plan)

    def count(keep: np.ndarray) -> np.ndarray:
        rows = np.unique(owners[keep], return_inverse=True)[1]
        records = Records(rows, labels[keep], inputs[keep], np.zeros(0, dtype=np.float32))
        return count_features(layout, records, record_weights(rows, noise.unit))

    whole = count(np.ones(len(owners), dtype=bool))
    left = [count(owners != p) for p in np.unique(owners)]
    return max(float(np.linalg.norm(whole - one)) for one in left) / noise.sensitivity


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(0, 10_000))
def test_one_patient_moves_all_histograms_and_sums_by_the_sensitivity_at_most(
    owners: list[int], seed: int
) -> None:
    plan = make()
    rng = np.random.default_rng(seed)
    # Whatever a reader may have made of the file: far out of range, several flags at once.
    inputs = rng.choice([-5.0, -1.0, 0.0, 0.3, 1.0, 7.0], (len(owners), 9)).astype(np.float32)
    if len(set(owners)) > 1:
        assert moved(plan, np.array(owners), inputs, rng.integers(0, 2, len(owners))) <= 1


def test_the_sensitivity_is_reached_and_counting_records_as_patients_passes_it() -> None:
    plan = make()
    inputs = np.ones((6, 9), dtype=np.float32)
    inputs[:, [1, 4]] = 0.0  # nothing is missing
    labels, owners = np.ones(6, dtype=np.int64), np.array([0, 0, 0, 1, 2, 3])
    assert moved(plan, owners, inputs, labels) == pytest.approx(1.0)
    layout, noise = feature_cells(plan), count_noise(plan)
    nothing = np.zeros(0, dtype=np.float32)
    records = Records(np.arange(6), labels, inputs, nothing)
    every = count_features(layout, records, record_weights(np.arange(6), noise.unit))
    rest = Records(np.arange(3), labels[3:], inputs[3:], nothing)
    without = count_features(layout, rest, record_weights(np.arange(3), noise.unit))
    assert np.linalg.norm(every - without) > 2.9 * noise.sensitivity


def test_the_noise_is_sized_for_all_blocks_jointly() -> None:
    plan = make()
    noise, event = count_noise(plan), costs_of(plan)["statistics"]
    assert feature_cells(plan).blocks == 3 + 1 + 1 + 3 + 1
    assert noise.sensitivity == pytest.approx(3.0 * noise.unit)
    assert noise.deviation >= event.noise_multiplier * noise.sensitivity
    assert (event.sample_rate, event.steps) == (1.0, 1)
    assert epsilon_of(event.noise_multiplier, 1.0, 1, 1e-5) <= 2.0
    assert set(costs_of(plan)) == {"statistics"}


def test_intervals_of_means_and_counts_cover_what_is_there_without_noise() -> None:
    plan = make()
    records, _ = people(plan, 300)
    unit = UNITS[0]
    exact = count_kind(plan).count(plan, records, unit) / unit
    truth = read_features(plan, exact, 0.0)
    rng = np.random.default_rng(0)
    held: dict[tuple[str, str], int] = {}
    for _ in range(400):
        for true, seen in zip(
            truth, read_features(plan, exact + rng.normal(0, 6, len(exact)), 6.0), strict=True
        ):
            for key in ("present", "missing", "mean"):
                if key in true:
                    low, high = seen.get(f"{key}_interval", (-math.inf, math.inf))
                    name = (str(true["name"]), key)
                    held[name] = held.get(name, 0) + (low <= true[key] <= high)
    assert len(held) == 9
    # 0.95 less three standard errors of 400 runs.
    assert all(count >= 400 * 0.917 for count in held.values()), held


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"name": "logistic"}}, "kind 'statistics' has none"),
        (
            {"training": {"rounds": 3, "local_steps": 1, "learning_rate": 1.0}},
            "rounds asks for a round of training",
        ),
        ({"evaluation": {"release": "exact"}}, "has no model"),
        ({"statistics": {"bins": 1}}, "bins is 1"),
        (
            {
                "task": {
                    "kind": "statistics",
                    "label": "y",
                    "features": [{**FEATURES[0], "missing": "midpoint"}],
                }
            },
            "would count missing values as measured",
        ),
        (
            {
                "task": {
                    "kind": "statistics",
                    "label": "y",
                    "image": {"channels": 1, "height": 8, "width": 8},
                }
            },
            "not images",
        ),
        ({"task": {"label": "y", "features": FEATURES}}, r"\[model\] is missing"),
    ],
)
def test_a_plan_that_mixes_counting_and_learning_is_refused(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(**changes)
