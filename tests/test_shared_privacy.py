"""Accounting: against closed forms and Opacus' accountants; calibration keeps its promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import optimize, stats
from training_cases import make_plan

from shared.errors import ConfigError
from shared.privacy import (
    GRID,
    PrivacyEvent,
    calibrate,
    describe,
    epsilon_of,
    epsilon_of_events,
    noise_multiplier_of,
    steps_of,
)


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Exact epsilon of unsampled Gaussian steps (Balle and Wang, ICML 2018, theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def excess(epsilon: float) -> float:
        upper = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(upper - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 1), (2.0, 10), (20.0, 300)])
def test_without_sampling_epsilon_is_the_closed_form(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(sigma, steps, 1e-5)
    ours = epsilon_of(sigma, 1.0, steps, 1e-5)
    assert exact <= ours <= exact + 0.005  # an upper bound, and a tight one


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.8, 0.05, 100), (1.0, 0.01, 1000), (2.0, 0.2, 1000)]
)
def test_opacus_accountants_agree(sigma: float, rate: float, steps: int) -> None:
    ours = epsilon_of(sigma, rate, steps, 1e-5)
    epsilons: dict[Any, float] = {}
    for accountant in (PRVAccountant(), RDPAccountant()):
        accountant.history = [(sigma, rate, steps)]
        epsilons[type(accountant)] = accountant.get_epsilon(delta=1e-5)
    # PRV adds its own error bound of 0.01; RDP is looser, never tighter.
    assert ours <= epsilons[PRVAccountant] <= ours + 0.03
    assert epsilons[PRVAccountant] < epsilons[RDPAccountant]


def test_epsilon_is_that_of_the_librarys_accountant_to_the_bit() -> None:
    kinds = [(0.9, 0.1, 30), (1.2, 1.0, 2), (0.9, 0.2, 5)]
    accountant = PLDAccountant(value_discretization_interval=GRID)
    for sigma, rate, steps in sorted(kinds):
        step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        accountant.compose(dp_event.SelfComposedDpEvent(step, steps))
    events = [PrivacyEvent(*kind) for kind in kinds]
    assert epsilon_of_events(events, 1e-5) == accountant.get_epsilon(1e-5)


def test_accounting_twenty_rounds_one_by_one_hides_most_of_the_cost() -> None:
    one_round = epsilon_of(1.0, 0.05, 5, 1e-5)
    all_rounds = epsilon_of(1.0, 0.05, 100, 1e-5)
    assert all_rounds > 1.5 * one_round
    events = [PrivacyEvent(1.0, 0.05, 5)] * 20
    assert epsilon_of_events(events, 1e-5) == all_rounds


def test_different_events_compose_in_any_order() -> None:
    events = [PrivacyEvent(1.0, 0.1, 20), PrivacyEvent(3.0, 0.5, 10), PrivacyEvent(1.0, 0.1, 5)]
    together = epsilon_of_events(events, 1e-5)
    assert together == epsilon_of_events(events[::-1], 1e-5)
    alone = [epsilon_of_events([e], 1e-5) for e in events]
    assert max(alone) < together < sum(alone)


def test_no_steps_cost_nothing() -> None:
    assert epsilon_of_events([], 1e-5) == 0.0
    assert epsilon_of(1.0, 0.1, 0, 1e-5) == 0.0


@settings(deadline=None, max_examples=8)
@given(
    st.floats(0.3, 20), st.sampled_from([1e-6, 1e-5, 1e-3]), st.floats(0.02, 1), st.integers(1, 200)
)
def test_calibration_keeps_the_promise_and_a_thousandth_less_breaks_it(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate(epsilon, delta, rate, steps)
    assert round(sigma * 1000) == pytest.approx(sigma * 1000, abs=1e-6)
    assert epsilon_of(sigma, rate, steps, delta) <= epsilon
    assert epsilon_of(sigma - 0.001, rate, steps, delta) > epsilon


@given(st.floats(0.7, 5), st.floats(0.05, 0.5))
@settings(deadline=None, max_examples=5)
def test_more_steps_or_patients_cost_more_and_more_noise_less(sigma: float, rate: float) -> None:
    base = epsilon_of(sigma, rate, 50, 1e-5)
    assert epsilon_of(sigma, rate, 60, 1e-5) > base
    assert epsilon_of(sigma, min(1.0, rate * 1.2), 50, 1e-5) > base
    assert epsilon_of(sigma * 1.1, rate, 50, 1e-5) < base
    assert epsilon_of(sigma, rate, 50, 1e-6) > base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1, 10, 1e-5), "noise_multiplier"),
        ((math.nan, 0.1, 10, 1e-5), "noise_multiplier"),
        ((1.0, 0.0, 10, 1e-5), "sample_rate"),
        ((1.0, 1.01, 10, 1e-5), "sample_rate"),
        ((1.0, 0.1, -1, 1e-5), "steps"),
        ((1.0, 0.1, 10, 0.0), "delta"),
        ((1.0, 0.1, 10, 1.0), "delta"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[float, float, int, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        epsilon_of(*arguments)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_calibration_refuses_an_epsilon_that_is_no_promise(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate(epsilon, 1e-5, 0.1, 10)


def test_a_plan_without_multiplier_gets_one_for_all_its_steps() -> None:
    plan = make_plan(training={"rounds": 10, "local_steps": 3})
    sigma = noise_multiplier_of(plan)
    assert sigma == calibrate(8.0, 1e-5, 0.5, 30)
    longer = noise_multiplier_of(make_plan(training={"rounds": 20, "local_steps": 3}))
    assert longer is not None
    assert sigma is not None
    assert longer > sigma


def test_rounds_that_may_be_trained_again_are_paid_for_beforehand() -> None:
    spare = make_plan(training={"rounds": 10, "spare_rounds": 5, "local_steps": 3})
    assert steps_of(spare) == 45
    assert noise_multiplier_of(spare) == calibrate(8.0, 1e-5, 0.5, 45)


def test_a_plan_whose_multiplier_breaks_its_promise_is_refused() -> None:
    enough = noise_multiplier_of(make_plan())
    assert enough is not None
    assert noise_multiplier_of(make_plan(privacy={"noise_multiplier": enough})) == enough
    too_little = make_plan(privacy={"noise_multiplier": enough - 0.001})
    with pytest.raises(ConfigError, match=rf"promises 8 .* at least {enough:g}"):
        noise_multiplier_of(too_little)


def test_the_description_states_unit_relation_and_sampling() -> None:
    text = describe(make_plan())
    for word in ("patient", "add or remove", "Poisson", "k times", "PLD"):
        assert word in text
    off = make_plan(privacy={"mode": "none"}, training={"batch_size": 4})
    assert noise_multiplier_of(off) is None
    assert describe(off).startswith("No privacy")
