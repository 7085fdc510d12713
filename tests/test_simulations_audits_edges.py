"""What the audit looks at beside the large regimes: it stays silent, and sees what is broken."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.run
from client.clipping import PatientClipper
from client.consent import Books
from client.noise import ChaChaRandom
from client.own_state import OwnState
from client.run import SiteRun
from client.training import LocalTrainer
from shared import counts, more_counts, privacy
from shared.models import initial_parameters
from shared.plan import StudyPlan
from shared.secagg import transcript
from simulations.audits.canaries import candidates
from simulations.audits.edge_probes import _first_and_last, pairs_check
from simulations.audits.faults import small_plan
from simulations.audits.faults_kit import Fault, seeded
from simulations.audits.faults_third import THIRD
from simulations.audits.implementation import FIRST
from simulations.audits.measure import Check
from simulations.audits.own_state_probes import control_checks, own_layer_checks
from simulations.audits.regimes import Effort, Setting, setting_of
from simulations.audits.sampling_probes import Decoded, _along, untied
from simulations.audits.site_probe import (
    ProbedSite,
    missing_on_charges,
    plain,
    system_randomness,
    write_probed_sites,
)

FAR = 1e-4
PATCHED = (
    ChaChaRandom, PatientClipper, LocalTrainer, SiteRun, OwnState, Books, client.run, counts,
    more_counts, privacy, transcript,
)  # fmt: skip


def _named(part: str) -> Fault:
    return next(f for f in THIRD if part in f.name)


def _setting(own: StudyPlan, seed: int) -> Setting:
    return setting_of(plain(own), np.random.default_rng(seed), Effort(8, 4, 8, 3))


def _least(checks: list[Check]) -> float:
    return min(c.p for c in checks if c.p is not None)


@pytest.mark.parametrize("fault", THIRD, ids=lambda f: f.name)
def test_a_fault_of_the_third_set_patches_the_product_and_is_taken_out_again(fault: Fault) -> None:
    def state() -> list[dict[str, Any]]:
        return [dict(vars(place)) for place in PATCHED]

    mode, before = fault.modes[0], state()
    with seeded(fault, mode):
        assert state() != before
    assert state() == before
    if fault.plan:
        assert fault.plan(small_plan(mode, 8.0)) != small_plan(mode, 8.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_gaussian_pairs_are_fine_and_few_rays_or_rings_are_not(rng: np.random.Generator) -> None:
    for _ in range(10):
        fine = pairs_check(3.0 * rng.standard_normal((240, 31)), 3.0, 1e-6)
        assert _least([fine]) > FIRST
    radius, angle = rng.rayleigh(3.0, (240, 16)), rng.uniform(0, 2 * np.pi, (240, 16))
    rays = np.rint(angle / (2 * np.pi) * 1024) * (2 * np.pi / 1024)
    rings = np.rint(radius * 100) / 100
    for a, r in ((rays, radius), (angle, rings)):
        found = pairs_check(np.hstack([r * np.cos(a), r * np.sin(a)]), 3.0, 1e-6)
        assert _least([found]) < FAR


def test_noise_that_grows_with_a_patients_draws_is_seen(rng: np.random.Generator) -> None:
    drawn = (rng.random((240, 15)) < 0.5).astype(np.float64)
    nobody = np.zeros((240, 4), dtype=np.int64)
    for tie, low, high in ((0.0, FIRST, 1.0), (0.5, 0.0, FAR)):
        rest = rng.chisquare(16, 240) / 16 + tie * drawn[:, 3]
        found = untied(Decoded(drawn, np.ones(15), rest, 16, rest[:, None], rest, nobody), "")
        assert low <= _least([found]) <= high


def test_noise_that_spares_the_sum_or_points_along_it_is_seen(rng: np.random.Generator) -> None:
    normal, nobody = rng.standard_normal((2, 240)), np.zeros((240, 4), dtype=np.int64)
    drawn = np.ones((240, 3))
    for along, low, high in (
        (normal[0], FIRST, 1.0),
        (0.5 * normal[0], 0.0, FAR),
        (np.maximum(*normal), 0.0, FAR),
    ):
        found = _along(Decoded(drawn, np.ones(3), normal[1], 16, normal.T, along, nobody), "")
        assert low <= _least([found]) <= high


def test_own_layers_carry_their_noise() -> None:
    silent = _named("own layers")
    assert silent.plan is not None
    own = silent.plan(small_plan("distributed", 8.0))
    with system_randomness(3):
        assert _least(own_layer_checks(own, _setting(own, 3))) > FAR
        with seeded(silent, "distributed"):
            assert _least(own_layer_checks(own, _setting(own, 4))) < 1e-9


def test_a_control_variate_is_made_of_noised_steps() -> None:
    clean = _named("control variates")
    assert clean.plan is not None
    own = clean.plan(small_plan("local", 8.0))
    with system_randomness(3):
        assert _least(control_checks(_setting(own, 3))) > FAR
        with seeded(clean, "local"):
            assert _least(control_checks(_setting(own, 4))) < 1e-9


def test_a_quiet_last_round_is_seen() -> None:
    own = small_plan("distributed", 1.0)
    with system_randomness(3), seeded(_named("last round"), "distributed"):
        assert _least([_first_and_last(_setting(own, 4))]) < 1e-9


def test_who_is_on_no_charge_and_what_fills_an_idle_cell_are_seen(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    idle = _named("idle cell")
    assert idle.plan is not None
    plan = plain(idle.plan(small_plan("local", 8.0)))
    data, name = candidates(plan, 12, rng, labelled=True), plan.cohort.names[0]
    others = replace(data, patient_ids=tuple(f"other-{i}" for i in range(12)))
    for number, parts in enumerate(((), ("idle cell", "on no charge"))):
        folders = write_probed_sites(tmp_path / str(number), plan, data, tested=others)
        with contextlib.ExitStack() as faults:
            for part in parts:
                faults.enter_context(seeded(_named(part), "local"))
            probe = ProbedSite(folders[name], plan, "run", initial_parameters(plan), None)
            cells = probe.release().counts
            assert missing_on_charges(probe, data, "training") == bool(parts)
            assert np.any(cells) == bool(parts)
            probe.close()
