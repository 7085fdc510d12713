"""Noised evaluation through the real apps: the noise is in what is published, and it is charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats

import client.counting
from client.app import forget_sites
from client.data.dataset import PatientDataset
from server.rounds import RoundReport
from shared.counts import EXACT_UNIT, Units, count_kind, count_noise
from shared.models import build_model, parameter_spec
from shared.privacy import costs_of, epsilon_of
from simulations.baselines import exact_counts
from simulations.grid import Delivery, Direction, FaultHook, no_faults
from simulations.run import PreparedRun, RunOptions, execute, prepare
from simulations.scenario import load_scenario

BINS = 512
OVERRIDES = (
    "training.rounds=2",
    "training.local_steps=1",
    "training.spare_rounds=1",
    "evaluation.release=noised",
    "evaluation.epsilon=3",
    "evaluation.delta=1e-5",
    "evaluation.every=1",
    f"evaluation.bins={BINS}",
)


@dataclass
class Played:
    """A finished run: its record, its rounds, and where it lies."""

    run: PreparedRun
    results: dict[str, Any]
    reports: list[RoundReport]
    out: Path

    def residual(self) -> np.ndarray:
        """What the last published counts hold beside the exact ones, in patients."""
        last = self.reports[-1]
        spec = parameter_spec(build_model(self.run.plan))
        model = spec.flatten(load_file(self.out / "model.safetensors"))
        bins = self.run.plan.evaluation.bins
        exact = sum(
            exact_counts(self.run.plan, model, h.test, "cpu", bins) / EXACT_UNIT
            for h in self.run.hospitals
            if h.name in last.contributors
        )
        return np.asarray(last.counts - exact)


def play(out: Path, mode: str, faults: FaultHook = no_faults, *more: str) -> Played:
    scenario = load_scenario("breast_cancer", [*OVERRIDES, f"privacy.mode={mode}", *more])
    options = RunOptions(out=out, device="cpu", faults=faults, insecure_reproducible=True)
    run = prepare(scenario, options)
    reports: list[RoundReport] = []
    try:
        return Played(run, execute(run, reports.append), reports, out)
    finally:
        forget_sites()


def carries(played: Played) -> bool:
    """Whether the published counts carry the noise that their patients were promised."""
    noise, sites = count_noise(played.run.plan), len(played.reports[-1].contributors)
    residual = played.residual()
    low, high = np.array(stats.chi2.interval(1 - 1e-6, len(residual))) / len(residual)
    return bool(low < residual.var() / noise.spread(sites) ** 2 < high)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_published_counts_carry_the_promised_noise(tmp_path: Path, mode: str) -> None:
    played = play(tmp_path / "run", mode)
    assert carries(played)
    assert abs(played.residual().mean()) < 6 * played.residual().std() / np.sqrt(2 * BINS)


def silent(counts: Units, noise: Any, random: Any) -> Units:
    del random
    return np.clip(counts, -noise.clamp, noise.clamp)


def halved(counts: Units, noise: Any, random: Any) -> Units:
    return counts + client.counting.discrete_gaussian(random, noise.deviation / 2, len(counts))


@pytest.mark.parametrize("fault", [silent, halved])
def test_a_site_that_forgets_its_noise_or_halves_it_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Units]
) -> None:
    monkeypatch.setattr("client.run.noisy_counts", fault)
    assert not carries(play(tmp_path / "run", "local"))


def twice(plan: Any, data: PatientDataset, outputs: Any, noise: Any, moved: Any) -> Units:
    return 2 * count_kind(plan).count(
        plan, client.counting.Records(data.patients, data.labels, data.inputs, outputs), noise.unit
    )


def test_a_patient_who_counts_twice_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = (no_faults, "evaluation.epsilon=12")  # so that a second count stands above the noise
    honest = play(tmp_path / "honest", "local", *loud)
    monkeypatch.setattr("client.run.counts_of", twice)
    doubled = play(tmp_path / "doubled", "local", *loud)
    # Along the exact counts lies what a second count adds; the noise is alike in all directions.
    spread = count_noise(honest.run.plan).spread(4)
    assert abs(honest.residual() @ exact_direction(honest)) < 5 * spread
    assert doubled.residual() @ exact_direction(doubled) > 8 * spread


def exact_direction(played: Played) -> np.ndarray:
    """Unit vector along the exact counts."""
    exact = np.asarray(played.reports[-1].counts - played.residual())
    return np.asarray(exact / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Both modes differ in noise alone; one site's answer of the last round is lost."""

    def lose(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal turns
        up = direction is Direction.TO_SERVER
        if site == "rural" and action == "train.round" and up:
            turns += 1
            if turns == 3:
                return Delivery(())
        return Delivery((body,))

    turns = 0
    return play(
        tmp_path_factory.mktemp("dropout") / "run", "distributed", lose, "evaluation.bins=16"
    )


def test_counts_come_from_those_who_contributed(shared_run: Played) -> None:
    assert shared_run.reports[-1].contributors == ("city", "county", "university")
    assert carries(shared_run)


def ledger_lines(played: Played, site: str, kind: str) -> list[dict[str, Any]]:
    path = played.out / "evidence" / "sites" / site / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    bodies = [json.loads(line["body"]) for line in lines]
    return [body for body in bodies if body["kind"] == kind]


def test_each_release_is_charged_to_the_test_patients_alone(shared_run: Played) -> None:
    plan = shared_run.run.plan
    event = costs_of(plan)["evaluation"]
    assert event.steps == 3  # after both rounds, and one spare
    for site in plan.cohort.names:
        charges = ledger_lines(shared_run, site, "charge")
        counted = [c for c in charges if c["used_for"] == "evaluation"]
        trained = [c for c in charges if c["used_for"] == "training"]
        assert [c["round_no"] for c in trained] == [1, 2]
        assert [c["round_no"] for c in counted] == [2, 3]  # the start is not worth it
        assert {c["noise_multiplier"] for c in counted} == {event.noise_multiplier}
        assert {c["sample_rate"] for c in counted} == {1.0}
        (approved,) = ledger_lines(shared_run, site, "approved")
        parts = approved["parts"]
        assert {c["population"] for c in counted} == {parts["evaluation"]["population"]}
        assert {c["population"] for c in trained} == {parts["training"]["population"]}
        assert parts["evaluation"]["population"] != parts["training"]["population"]
        assert parts["evaluation"]["steps"] == 3


def test_receipts_and_results_state_the_cost_beside_that_of_training(shared_run: Played) -> None:
    plan, privacy = shared_run.run.plan, shared_run.results["privacy"]
    sigma = costs_of(plan)["evaluation"].noise_multiplier
    assert privacy["evaluation"] == {"target_epsilon": 3.0, "delta": 1e-5, "level": 0.95}
    for site in privacy["sites"].values():
        counted = site["evaluation"]
        assert counted["releases"] == 2
        assert counted["epsilon"] == epsilon_of(sigma, 1.0, 2, 1e-5) <= 3.0
        assert counted["epsilon_alone"] > counted["epsilon"]


def test_the_record_has_noisy_metrics_and_marks_the_exact_ones(shared_run: Played) -> None:
    final = shared_run.results["final"]
    assert final["exact"] is False
    assert final["metrics"] != final["exact_metrics"]
    low, high = final["intervals"]["accuracy"]
    assert low <= final["exact_metrics"]["accuracy"] <= high
    assert shared_run.results["rounds"][0]["intervals"]
    assert any("simulated" in w for w in shared_run.results["warnings"])
