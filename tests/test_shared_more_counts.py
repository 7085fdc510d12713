"""Importances and results by group: what they say, what one patient weighs in them, their noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats
from training_cases import make_plan

import client.counting
from client.app import forget_sites
from client.counting import counts_of, moves
from client.prediction import outputs_of
from server import model_card
from server.model_card_page import render
from server.rounds import RoundReport
from shared import more_counts
from shared.counts import EXACT_UNIT, UNITS, Units, count_kind, count_noise
from shared.errors import ConfigError
from shared.features import encode
from shared.models import build_model, parameter_spec
from shared.more_counts import group_names, importance_scale, moves_of
from shared.plan import StudyPlan, from_table
from shared.privacy import costs_of, describe
from shared.released import ReleasedModel
from shared.statistics import Records
from simulations.run import PreparedRun, RunOptions, execute, prepare
from simulations.scenario import load_scenario

FEATURES = [
    {"name": "age", "unit": "years", "minimum": 20, "maximum": 100},
    {"name": "sex", "type": "category", "categories": ["female", "male"], "missing": "indicator"},
    {"name": "bmi", "minimum": 10, "maximum": 50},
]
MORE = {
    "release": "noised",
    "epsilon": 2.0,
    "bins": 16,
    "groups": [{"feature": "age", "edges": [40, 65]}, {"feature": "sex"}],
    "importance_clip": 0.5,
}


def plan_of(more: dict[str, Any] | None = None, **task: Any) -> StudyPlan:
    table = json.loads(make_plan(privacy={"mode": "local"}).canonical_bytes)
    table["evaluation"] = MORE | (more or {})
    table["task"] = {"label": "ill", "positive": "1", "features": FEATURES} | task
    return from_table(table, "test")


def records_of(owners: NDArray[np.int64], seed: int, plan: StudyPlan) -> Records:
    """Records with outputs and moves as wild as a model could make them."""
    random, n = np.random.default_rng(seed), len(owners)
    sex = random.integers(0, 3, n)
    inputs = np.stack(
        [random.uniform(-1, 1, n), sex == 0, sex == 1, sex == 2, random.uniform(-1, 1, n)], axis=1
    ).astype(np.float32)
    moved = random.uniform(0, 1, (n, 3)) * random.choice([1e-3, 1.0], (n, 1))
    moved[random.random((n, 3)) < 0.05] = np.nan
    labels = random.integers(0, 2, n)
    return Records(owners, labels, inputs, random.normal(0, 3, n).astype(np.float32), moved)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 99))
def test_one_patient_moves_a_release_by_at_most_its_sensitivity(
    owners: list[int], seed: int
) -> None:
    assert most_moved(owners, seed) <= 1 + 1e-12


def most_moved(owners: list[int], seed: int) -> float:
    """The most that leaving one patient out moves the release, L2, in sensitivities."""
    plan = plan_of()
    noise, kind = count_noise(plan), count_kind(plan)
    rows = np.unique(owners, return_inverse=True)[1]
    records = records_of(rows, seed, plan)
    whole, most = kind.count(plan, records, noise.unit), 0.0
    for patient in range(int(rows.max()) + 1):
        keep = rows != patient
        rest = Records(
            np.unique(rows[keep], return_inverse=True)[1],
            *(getattr(records, n)[keep] for n in ("labels", "inputs", "outputs", "moves")),
        )
        without = kind.count(plan, rest, noise.unit) if keep.any() else np.zeros_like(whole)
        most = max(most, float(np.linalg.norm(whole - without)))
    return most / noise.sensitivity


def test_a_vector_that_is_not_clipped_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the noise is sized for holds because of the clipping, not by luck."""
    owners = list(range(12))
    assert most_moved(owners, 3) <= 1
    monkeypatch.setattr(more_counts.np.linalg, "norm", only_first(np.linalg.norm))
    assert most_moved(owners, 3) > 1


def only_first(real: Any) -> Any:
    """A norm that is 0 where vectors are clipped (it asks for an axis), and right elsewhere."""
    return lambda x, *a, **k: real(x, *a, **k) * (0.0 if "axis" in k else 1.0)


@pytest.mark.parametrize("unit", UNITS)
def test_rounding_is_within_a_patients_unit(unit: int) -> None:
    for features in (1, 3, 30, 200):
        scale = importance_scale(features, unit)
        assert math.hypot(scale + math.sqrt(features) / 2, scale) <= unit or scale == 0


def test_cells_blocks_and_sensitivity_grow_with_what_is_released() -> None:
    bare, full = plan_of({"groups": [], "importance_clip": 0.0}), plan_of()
    assert count_kind(bare).cells(bare) == 32
    assert count_kind(full).cells(full) == 32 + 4 * 3 + 4 * 3 + 3 + 1
    assert count_noise(bare).sensitivity == count_noise(bare).unit
    assert count_noise(full).sensitivity == pytest.approx(math.sqrt(4) * count_noise(full).unit)
    # One release costs what it did: its noise grew with it.
    assert costs_of(full)["evaluation"] == costs_of(bare)["evaluation"]
    assert "results by age, results by sex, the importance of each feature" in describe(full)


def test_a_plan_without_them_keeps_its_hash() -> None:
    bare = plan_of({"groups": [], "importance_clip": 0.0})
    assert b"importance_clip" not in bare.canonical_bytes
    assert b"groups" not in bare.canonical_bytes
    assert bare.sha256 != plan_of().sha256


@pytest.mark.parametrize(
    ("more", "task", "what"),
    [
        ({"groups": [{"feature": "height"}]}, {}, "need a binary task with that feature"),
        ({"groups": [{"feature": "age"}]}, {}, "need edges"),
        ({"groups": [{"feature": "sex", "edges": [1]}]}, {}, "have no edges"),
        ({"groups": [{"feature": "age", "edges": [10]}]}, {}, "within its plausible range"),
        ({"groups": [{"feature": "age", "edges": [65, 40]}]}, {}, "must rise"),
        ({"release": "none", "epsilon": None}, {}, "nothing is released"),
        ({"importance_clip": -1.0}, {}, "importance_clip is -1"),
        ({}, {"kind": "multiclass", "classes": ["a", "b", "c"]}, "binary task"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: dict[str, Any], task: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        plan_of(more, **task)


def test_groups_are_told_apart_at_their_edges() -> None:
    plan = plan_of()
    assert group_names(plan, plan.evaluation.groups[0]) == (
        "below 40 years", "40 to 65 years", "65 years or more"
    )  # fmt: skip
    assert group_names(plan, plan.evaluation.groups[1]) == ("female", "male", "missing")
    ages = np.array([39.9, 40.0, 64.9, 65.0, 90.0])
    columns = {"age": ages, "sex": np.array([0, 1, -1, 0, 1]), "bmi": np.full(5, 20.0)}
    inputs = encode(plan.task, columns)
    outputs = np.array([1, 1, -1, -1, 1], dtype=np.float32)
    labels = np.array([1, 0, 0, 1, 1])
    records = Records(np.arange(5), labels, inputs, outputs, np.zeros((5, 3)))
    kind = count_kind(plan)
    found = kind.read(plan, kind.count(plan, records, EXACT_UNIT) / EXACT_UNIT, 0.0)
    age, sex = found.groups
    assert [g["patients"] for g in age["groups"]] == [1, 2, 2]
    assert [g["patients"] for g in sex["groups"]] == [2, 2, 1]
    assert age["groups"][2]["recall"] == 0.5
    assert age["groups"][1]["specificity"] == 0.5
    assert "specificity" not in age["groups"][0]  # nobody well there


def test_an_importance_is_the_mean_move_of_the_answer() -> None:
    plan = plan_of({"importance_clip": 10.0})
    weights = np.array([2.0, 0.0, 0.0, 0.0, -1.0, 0.3], dtype=np.float32)
    model = ReleasedModel(
        replace(plan, model=replace(plan.model, name="logistic", hidden=())), weights, ""
    )
    records = records_of(np.arange(50), 7, plan)
    outputs = outputs_of(model, records.inputs)
    moved = moves_of(plan.task, records.inputs, outputs, lambda x: outputs_of(model, x))
    x = records.inputs.astype(np.float64)
    full = 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 4] + 0.3)))
    without_age = 1 / (1 + np.exp(-(-x[:, 4] + 0.3)))
    np.testing.assert_allclose(moved[:, 0], np.abs(full - without_age), atol=1e-6)
    assert moved[:, 1].max() == 0
    kind = count_kind(plan)
    counts = kind.count(plan, replace(records, moves=moved), EXACT_UNIT) / EXACT_UNIT
    found = {e["name"]: e["value"] for e in kind.read(plan, counts, 0.0).importances}
    assert list(found) == ["age", "bmi", "sex"]
    assert found["age"] == pytest.approx(moved[:, 0].mean(), abs=2e-3)
    assert found["sex"] == 0


OVERRIDES = [
    "training.rounds=4", "training.local_steps=2", "evaluation.release=noised",
    "evaluation.epsilon=8", "evaluation.every=0", "evaluation.bins=16",
    "evaluation.importance_clip=0.5",
    'evaluation.groups=[{feature = "mean radius", edges = [12, 16]}]',
]  # fmt: skip


def play(out: Path) -> tuple[PreparedRun, dict[str, Any], RoundReport]:
    options = RunOptions(out=out, device="cpu", insecure_reproducible=True)
    run = prepare(load_scenario("breast_cancer", OVERRIDES), options)
    reports: list[RoundReport] = []
    try:
        results = execute(run, reports.append)
    finally:
        forget_sites()
    return run, results, reports[-1]


def exact_cells(run: PreparedRun) -> NDArray[np.float64]:
    """The released model's cells over all hospitals, in patients and without noise."""
    plan = run.plan
    spec = parameter_spec(build_model(plan))
    model = ReleasedModel(plan, spec.flatten(load_file(run.options.out / "model.safetensors")), "")
    noise = count_noise(plan)
    exact = np.zeros(count_kind(plan).cells(plan))
    for hospital in run.hospitals:
        outputs = outputs_of(model, hospital.test.inputs)
        moved = moves(plan, hospital.test, outputs, lambda x: outputs_of(model, x))
        exact += counts_of(plan, hospital.test, outputs, noise, moved) / noise.unit
    return exact


def carries(left: NDArray[np.float64]) -> bool:
    """Whether the noise is as large as promised, in the scores' cells and in the others alike."""
    low, high = np.array(stats.chi2.interval(1 - 1e-4, len(left))) / len(left)
    return bool(low < left.var() < high)


def halved(counts: Units, noise: Any, random: Any) -> Units:
    return counts + client.counting.discrete_gaussian(random, noise.deviation / 2, len(counts))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, halved])
def test_a_study_releases_them_with_the_promised_noise_and_charges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Units] | None
) -> None:
    if fault is not None:
        monkeypatch.setattr("client.run.noisy_counts", fault)
    run, results, last = play(tmp_path / "run")
    exact, spread = exact_cells(run), count_noise(run.plan).spread(len(last.contributors))
    left = (last.counts - exact) / spread  # noise, in its own deviations
    assert carries(left[32:]) is (fault is None)
    spent = [site["evaluation"]["epsilon"] for site in results["privacy"]["sites"].values()]
    assert all(0 < epsilon <= 8 for epsilon in spent)
    importances = results["final"]["importances"]
    assert len(importances) == 30
    true = {
        e["name"]: e["value"] for e in count_kind(run.plan).read(run.plan, exact, 0).importances
    }
    within = [e["interval"][0] <= true[e["name"]] <= e["interval"][1] for e in importances]
    assert sum(within) >= 25  # of 30; 28.5 are expected
    card = json.loads((tmp_path / "run" / "model-card.json").read_text())
    schema = json.loads(Path(model_card.__file__).with_name("model_card.schema.json").read_text())
    jsonschema.validate(card, schema)
    assert card["importances"] == importances
    assert card["fairness"]["groups"][0]["groups"][0]["name"] == "below 12 mm"
    assert "By mean radius" in render(card)
    assert "not released" not in render(card)
