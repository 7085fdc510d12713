"""Probes of released counts, and of what the large regimes miss, find faults and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from client.noise import ChaChaRandom
from shared.plan import StudyPlan
from simulations.audits.count_probes import count_checks
from simulations.audits.edge_probes import edge_checks, granularity_check
from simulations.audits.faults import attempt, small_plan
from simulations.audits.faults_counts import COUNTED
from simulations.audits.faults_kit import Fault, seeded
from simulations.audits.faults_second import SECOND
from simulations.audits.regimes import Effort, Setting, setting_of
from simulations.audits.site_probe import changed, system_randomness

QUICK = Effort(30, 15, 30, 8)
SURE = 1e-6


@pytest.fixture(autouse=True)
def _repeated() -> Iterator[None]:
    """The sites' own randomness repeats: what is asserted of p values is not left to chance."""
    with system_randomness(5):
        yield


def setting(plan: StudyPlan, seed: int = 1) -> Setting:
    return setting_of(plan, np.random.default_rng(seed), QUICK)


def test_counts_of_a_statistics_study_raise_no_alarm() -> None:
    assert attempt(None, "statistics", 2.0, seed=1, quick=True).found == ()


@pytest.mark.slow
@pytest.mark.parametrize("fault", COUNTED, ids=lambda fault: fault.name)
def test_a_fault_in_what_is_counted_is_found(fault: Fault) -> None:
    """In the study that counts alone, which is quick; `faults --counts` has the other modes."""
    assert attempt(fault, "statistics", 2.0, seed=3, quick=True).found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_counts_beside_training_are_looked_at_too(mode: str) -> None:
    plan = small_plan(mode, 8.0, counts=True)
    where = setting(plan)
    rng = np.random.default_rng(2)
    clean, _ = count_checks(plan, where, rng, QUICK)
    assert min(c.p for c in clean if c.p is not None) > 1e-5
    assert {"count-noise-independent-of-training", "count-sensitivity"} <= {c.name for c in clean}
    halved = next(f for f in COUNTED if "half" in f.name)
    with seeded(halved, mode):
        broken = {c.name: c.p for c in count_checks(plan, where, rng, QUICK)[0]}
    assert (broken["count-noise-scale"] or 0) < SURE
    assert (broken["count-sensitivity"] or 0) == 1.0


def test_what_the_second_set_of_faults_showed_is_found_now() -> None:
    where = setting(small_plan("local", 8.0))
    assert min(c.p for c in edge_checks(where) if c.p is not None) > 1e-5
    for name, check in (
        ("keys of 16 bits", "keys-fresh"),
        ("the last site adds half its noise", "noise-scale-sites"),
        ("drawn again while nobody is in", "empty-draws"),
    ):
        fault = next(f for f in SECOND if f.name == name)
        with seeded(fault, "local"):
            found = {c.name: c.p for c in edge_checks(where)}
        assert (found[check] or 0) < SURE, name


def test_coarse_noise_is_told_from_fine_noise() -> None:
    noise = ChaChaRandom(bytes(32)).gaussian(10_000)
    assert granularity_check(noise, 1.0, 1e-6).p == 1.0
    half = noise.astype(np.float16).astype(np.float64)
    assert (granularity_check(half, 1.0, 1e-6).p or 0) < SURE
    # What leaves in whole numbers of a thousandth is no finer than that, and need not be.
    grid = np.rint(noise.astype(np.float64) * 1000) / 1000
    assert granularity_check(grid, 1.0, 1e-3).p == 1.0
    assert (granularity_check(np.rint(grid * 100) / 100, 1.0, 1e-3).p or 0) < SURE


def test_a_plan_with_noised_counts_can_be_audited() -> None:
    """Its longer twin keeps the training's noise, and leaves the counts out."""
    plan = small_plan("local", 8.0, counts=True)
    assert setting(plan).step_plan.evaluation.release == "none"
    assert setting(changed(plan, evaluation={"every": 0})).told == setting(plan).told
