"""Counts of patients: what one patient may move, and the noise that is sized for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_cases import make_plan

from shared.counts import UNITS, count_kind, count_noise, record_weights
from shared.distributed import SMOOTHING
from shared.errors import ConfigError
from shared.evaluation_plan import EvaluationPlan
from shared.plan import StudyPlan
from shared.privacy import costs_of, count_releases_of, epsilon_of
from shared.secagg.ring import Ring
from shared.statistics import Records

NOISED = {"release": "noised", "epsilon": 2.0, "bins": 16}


def noised_plan(mode: str = "local", **sections: Any) -> StudyPlan:
    return make_plan(
        privacy={"mode": mode}, evaluation=NOISED | sections.pop("more", {}), **sections
    )


def scored(owners: list[int], seed: int) -> Records:
    rng = np.random.default_rng(seed)
    n = len(owners)
    return Records(
        np.array(owners, dtype=np.int64),
        rng.integers(0, 2, n).astype(np.int64),
        np.zeros((n, 5), dtype=np.float32),
        rng.normal(0, 3, n).astype(np.float32),
    )


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.sampled_from(UNITS))
def test_every_patient_weighs_exactly_one_unit(owners: list[int], unit: int) -> None:
    known = {o: i for i, o in enumerate(sorted(set(owners)))}
    rows = np.array([known[o] for o in owners])
    weights = record_weights(rows, unit)
    assert np.bincount(rows, weights=weights).tolist() == [unit] * len(known)
    for patient in range(len(known)):
        own = weights[rows == patient]
        assert own.max() - own.min() <= 1


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 99))
def test_one_patient_moves_the_histograms_by_at_most_one_unit_in_all(
    owners: list[int], seed: int
) -> None:
    assert moved_by_one_patient(owners, seed) <= 1.0 + 1e-12


def moved_by_one_patient(owners: list[int], seed: int, *, once: bool = True) -> float:
    """The most that leaving one patient out moves the counts, L2, in sensitivities."""
    plan = noised_plan()
    noise, kind = count_noise(plan), count_kind(plan)
    ids = sorted(set(owners))
    rows = np.array([ids.index(o) for o in owners])
    records = scored(rows.tolist(), seed)
    if not once:  # the fault: every record counts as a patient
        records = replace(records, owners=np.arange(len(rows)))
    whole = kind.count(plan, records, noise.unit)
    most = 0.0
    for patient in range(len(ids)):
        keep = rows != patient
        left = Records(
            np.unique(records.owners[keep], return_inverse=True)[1],
            records.labels[keep],
            records.inputs[keep],
            records.outputs[keep],
        )
        without = kind.count(plan, left, noise.unit) if keep.any() else np.zeros_like(whole)
        most = max(most, float(np.linalg.norm(whole - without)))
    return most / noise.sensitivity


def test_counting_a_patient_twice_breaks_the_bound_that_the_noise_is_sized_for() -> None:
    records = [0, 1, 1, 1, 1, 2]
    assert moved_by_one_patient(records, 0) <= 1
    assert moved_by_one_patient(records, 0, once=False) > 1


@pytest.mark.parametrize(("mode", "honest"), [("local", 1), ("distributed", 3)])
def test_the_noise_keeps_the_promise_for_the_sites_it_counts_on(mode: str, honest: int) -> None:
    plan = noised_plan(mode)
    noise, event = count_noise(plan), costs_of(plan)["evaluation"]
    assert noise.honest == honest
    # The honest sites' shares together, less the smoothing, are the promised multiple.
    together = math.sqrt(honest * noise.deviation**2 - SMOOTHING**2) / noise.sensitivity
    assert together == pytest.approx(event.noise_multiplier, rel=1e-12)
    assert event.sample_rate == 1.0
    assert event.steps == count_releases_of(plan) == 10
    assert epsilon_of(event.noise_multiplier, 1.0, 10, 1e-5) <= 2.0
    assert noise.alone <= event.noise_multiplier * (1 + 1e-12)
    assert (noise.alone < event.noise_multiplier * 0.99) is (mode == "distributed")


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_counts_and_noise_never_wrap(bits: int) -> None:
    plan = noised_plan("distributed", secure_sum={"bits": bits, "clip_range": 0.01})
    noise, sites = count_noise(plan), len(plan.cohort.sites)
    most = sites * noise.clamp + 12 * math.sqrt(sites) * noise.deviation
    assert most < 1 << (bits - 1)
    assert noise.deviation >= 2 * SMOOTHING
    assert noise.clamp >= 100 * noise.unit
    Ring(bits, sites)


def test_a_ring_that_is_too_small_is_refused_with_the_way_out() -> None:
    plan = noised_plan(secure_sum={"bits": 16})
    sites = tuple(replace(s, expected_patients=100_000) for s in plan.cohort.sites)
    with pytest.raises(ConfigError, match=r"Take secure_sum.bits = 24 or 32"):
        count_noise(replace(plan, cohort=replace(plan.cohort, sites=sites)))


def test_releases_are_counted_as_they_happen() -> None:
    for release in ("noised", "exact"):
        for every in (0, 1, 3, 10, 50):
            budget = {"epsilon": 1.0} if release == "noised" else {}
            plan = EvaluationPlan(release=release, every=every, **budget)  # type: ignore[arg-type]
            due = [done for done in range(11) if plan.is_due(done, 10)]
            assert plan.releases(10) == len(due)
            assert 10 in due
            assert (0 in due) is (release == "exact" and every > 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"release": "noised"}, "needs epsilon"),
        ({"release": "exact", "epsilon": 1.0}, "epsilon is for release 'noised'"),
        ({"release": "noised", "epsilon": -1.0}, "epsilon must be above 0"),
        ({"release": "noised", "epsilon": 1.0, "delta": 0.5}, "at most 0.01"),
        ({"bins": 9}, "even"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EvaluationPlan(**changes)


def test_noise_that_breaks_its_promise_is_refused() -> None:
    plan = noised_plan(more={"noise_multiplier": 0.5})
    with pytest.raises(ConfigError, match="Use at least"):
        costs_of(plan)


def test_spare_rounds_are_paid_for_beforehand() -> None:
    plain, spare = noised_plan(), noised_plan(training={"spare_rounds": 3})
    assert count_releases_of(spare) == count_releases_of(plain) + 3
    assert (
        costs_of(spare)["evaluation"].noise_multiplier
        > costs_of(plain)["evaluation"].noise_multiplier
    )
