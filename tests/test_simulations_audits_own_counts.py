"""Counts of every kind of task: what breaks a patient's weight or its noise is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared import counts, more_counts, outcomes
from shared.counts import COUNTS
from shared.evaluation_plan import GroupPlan
from shared.plan import StudyPlan
from simulations.audits.count_probes import count_checks
from simulations.audits.implementation import parts_of
from simulations.audits.own_counts import own_count_checks
from simulations.audits.regimes import Effort, setting_of
from simulations.audits.site_probe import changed, plain, system_randomness
from simulations.scenario import load_scenario

SURE = 1e-6


def counting(name: str, mode: str = "local", **more: Any) -> StudyPlan:
    """A bundled study that releases noised counts."""
    chosen = [f"privacy.mode={mode}", "privacy.epsilon=8"]
    noised = {"release": "noised", "epsilon": 2.0, "bins": 16}
    return changed(load_scenario(name, chosen).plan, evaluation=noised | more)


def people() -> StudyPlan:
    """With results by group and importances beside the scores."""
    return counting("heart", groups=(GroupPlan("sex"),), importance_clip=0.5)


def found(plan: StudyPlan, seed: int = 1) -> dict[str, float]:
    counts.count_noise.cache_clear()
    checks = own_count_checks(plan, np.random.default_rng(seed))
    return {check.name: check.p if check.p is not None else 1.0 for check in checks}


STUDIES: dict[str, Callable[[], StudyPlan]] = {
    "binary": lambda: counting("breast_cancer"),
    "multiclass": lambda: counting("heart_severity"),
    "regression": lambda: counting("diabetes", "distributed"),
    "survival": lambda: counting("tcga_brca"),
    "groups": people,
}


@pytest.mark.parametrize("study", STUDIES)
def test_the_product_as_it_is_raises_no_alarm(study: str) -> None:
    for seed in range(5):
        assert min(found(STUDIES[study](), seed).values()) > 1e-5


def whole_records(owners: Any, unit: int) -> Any:
    """Each record weighs as much as a patient."""
    return np.full(len(owners), unit, dtype=np.int64)


def errors_of_any_size(predicted: Any, values: Any, weights: Any, owners: Any) -> Any:
    """An error is not cut to the plan's range."""
    safe = np.clip(np.nan_to_num(predicted.astype(np.float64)), -1e4, 1e4)
    whole = np.ones_like(safe)
    parts = [whole, whole, whole, np.abs(safe - values) / 2, (safe - values) ** 2 / 4]
    return np.array([np.rint((part * weights).sum()) for part in parts]).astype(np.int64)


def twice_where_it_died(logits: Any, codes: Any, weights: Any, bins: int) -> Any:
    """Events weigh double."""
    return outcomes_count_survival(logits, codes, weights * (1 + codes % 2), bins)


outcomes_count_survival = outcomes.count_survival


def unclipped(plan: StudyPlan, records: Any, unit: int) -> Any:
    """A patient's vector of importances has any norm."""
    generous = changed(plan, evaluation={"importance_clip": 1e-3})
    return count_importances(generous, replace(records, moves=records.moves), unit) * 3


count_importances = more_counts.count_importances

FAULTS: dict[str, tuple[str, object, str, object, str]] = {
    "records weigh as patients": (
        "multiclass", counts, "record_weights", whole_records, "own-count-sensitivity",
    ),
    "records weigh as patients in groups": (
        "groups", counts, "record_weights", whole_records, "own-count-sensitivity",
    ),
    "errors of any size": (
        "regression", outcomes, "count_values", errors_of_any_size, "own-count-sensitivity",
    ),
    "events weigh double": (
        "survival", outcomes, "count_survival", twice_where_it_died, "own-count-sensitivity",
    ),
    "importances are not clipped": (
        "groups", more_counts, "count_importances", unclipped, "own-count-sensitivity",
    ),
    "one block is accounted for, of many": (
        "multiclass", COUNTS, "multiclass",
        replace(COUNTS["multiclass"], blocks=lambda plan: 1), "own-count-noise",
    ),
    "a block less than there are": (
        "survival", COUNTS, "survival",
        replace(COUNTS["survival"], blocks=lambda plan: len(plan.task.intervals) - 1),
        "own-count-noise",
    ),
    "a cell more than the plan names": (
        "regression", COUNTS, "regression",
        replace(COUNTS["regression"], cells=lambda plan: 6), "own-count-sensitivity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_a_task_counts_is_found(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    study, place, name, value, check = FAULTS[fault]
    plan = STUDIES[study]()
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, value)
    else:
        monkeypatch.setattr(place, name, value)
    assert found(plan)[check] < SURE
    monkeypatch.undo()
    counts.count_noise.cache_clear()


@pytest.mark.slow
def test_a_plan_with_groups_and_importances_can_be_audited() -> None:
    """The stand-in leaves them out; they are looked at above."""
    rng, effort = np.random.default_rng(2), Effort(20, 10, 20, 8)
    plan = plain(people())
    with system_randomness(2):
        checks, _ = count_checks(plan, setting_of(plan, rng, effort), rng, effort)
    assert min(c.p for c in checks if c.p is not None) > 1e-5
    assert "own counts" in [part[0] for part in parts_of(people(), plan, rng, effort)]
