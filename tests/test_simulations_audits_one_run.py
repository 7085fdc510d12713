"""Attack bounds stay below an honest claim, come near it, and refute a false one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from client.clipping import PatientClipper
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.plan import StudyPlan
from simulations.audits import neighbour, one_run
from simulations.audits.bounds import (
    Mechanism,
    curve_bound,
    declared_bound,
    error_rates,
    gaussian_bound,
    least_false_positives,
    most_power,
    one_run_bound,
)
from simulations.audits.faults import small_plan
from simulations.audits.faults_kit import patched
from simulations.audits.finding import AuditOptions, AuditTarget, Finding
from simulations.audits.site_probe import changed

CLAIMED = Mechanism(1.899, 1.0, 10, 1e-5)


def plan(rate: float, steps: int, mode: str = "local") -> StudyPlan:
    training = {"rounds": steps, "local_steps": 1, "sample_rate": rate, "spare_rounds": 0}
    return changed(small_plan(mode, 8.0), training=training, privacy={"delta": 1e-5})


def bounds_of(mechanism: Mechanism, real: Mechanism, seed: int, m: int = 2000) -> list[float]:
    """All bounds on an ideal mechanism `real` that claims to be `mechanism`."""
    rng = np.random.default_rng([seed, 77])
    inside = rng.random(m) < 0.5
    sums = real.noise * rng.standard_normal((real.steps, m))
    sums[:, inside] += rng.random((real.steps, int(inside.sum()))) < real.rate
    scores = one_run.scores_of(sums.astype(np.float32), mechanism)
    thresholds = one_run.thresholds_of(mechanism, rng, 4000).tolist()
    rates = error_rates(scores, inside, thresholds, 0.05)
    return [
        one_run_bound(scores, inside, mechanism.delta, 0.05),
        curve_bound(scores, inside, mechanism, 0.05),
        gaussian_bound(rates, mechanism.delta),
        declared_bound(rates, mechanism),
    ]


def test_bounds_of_an_honest_mechanism_stay_below_its_epsilon() -> None:
    found = np.array([bounds_of(CLAIMED, CLAIMED, seed) for seed in range(8)])
    assert (found <= CLAIMED.epsilon).all()
    assert (found.mean(axis=0) > [2.0, 3.5, 6.0, 6.0]).all()


def test_bounds_refute_a_mechanism_with_half_the_noise() -> None:
    found = bounds_of(CLAIMED, CLAIMED.with_noise(CLAIMED.noise / 2), seed=1, m=4000)
    assert found[2] > CLAIMED.epsilon
    assert found[3] > CLAIMED.epsilon


def test_the_best_test_and_its_inverse_agree() -> None:
    for rate in (1e-3, 0.02, 0.3):
        power = most_power(CLAIMED, rate)
        assert rate < power < 1
        assert least_false_positives(CLAIMED, power) == pytest.approx(rate, rel=0.02)


def attack(target: StudyPlan, seed: int) -> dict[str, Finding]:
    findings = one_run.run(AuditTarget(target), AuditOptions(seed=seed, quick=True))
    assert {f.probe for f in findings} == {"one_run"}  # the family's name, which the report uses
    return {f.name: f for f in findings}


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_one_run_of_the_product_comes_near_its_claim_and_not_above(mode: str) -> None:
    found = attack(plan(1.0, 10, mode), seed=3)
    assert all(f.verdict == "not refuted" for f in found.values())
    assert (found["declared"].value or 0) > 5.5
    interval = found["component"].interval
    assert interval is not None
    assert 7.0 < interval[0] < 8.0 < interval[1] < 9.0


def test_one_run_refutes_a_product_with_little_noise() -> None:
    original = PatientClipper.finish_step

    def quiet(self: PatientClipper, random: ChaChaRandom) -> None:
        claimed = self.noise_multiplier
        self.noise_multiplier = 0.5 * float(claimed)
        original(self, random)
        self.noise_multiplier = claimed

    with patched(PatientClipper, "finish_step", quiet):
        found = attack(plan(1.0, 10), seed=4)
    assert found["declared"].verdict == "violated"
    assert found["component"].verdict == "violated"


@pytest.fixture
def divided_by_the_true_count() -> Iterator[None]:
    """The divisor of Opacus: int(n q), from the data."""

    def divisor(self: LocalTrainer, site_name: str) -> float:
        return float(max(1, int(self.data.patient_count * (self.plan.training.sample_rate or 1))))

    with patched(LocalTrainer, "public_divisor", divisor):
        yield


def tell_apart() -> Finding:
    return neighbour.run(AuditTarget(small_plan("local", 1.0)), AuditOptions(seed=3, quick=True))[0]


def test_neighbours_cannot_be_told_apart() -> None:
    assert tell_apart().verdict == "not refuted"


@pytest.mark.usefixtures("divided_by_the_true_count")
def test_neighbours_are_told_apart_where_the_divisor_counts_patients() -> None:
    found = tell_apart()
    assert found.verdict == "violated"
    assert (found.value or 0) > 0.75
