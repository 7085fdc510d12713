"""Distributed noise: sizes against their definition, and epsilon against the exact divergence."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.distributed import (
    FLOAT_SLACK,
    SMOOTHING,
    NoiseShare,
    divisor,
    largest_coordinate,
    noise_share,
)
from shared.errors import ConfigError
from shared.model_plan import ModelPlan
from shared.plan import (
    CohortPlan,
    OptimizerPlan,
    PrivacyPlan,
    SecureSumPlan,
    SitePlan,
    StudyPlan,
    TrainingPlan,
)
from shared.privacy import epsilon_of
from shared.secagg.ring import Ring
from shared.task_plan import FeaturePlan, TaskPlan


def plan_of(
    sites: int = 4,
    threshold: int = 3,
    colluders: int = 1,
    *,
    bits: int = 24,
    sigma: float | None = None,
    **secure_sum: float,
) -> StudyPlan:
    return StudyPlan(
        name="study",
        task=TaskPlan(label="y", features=(FeaturePlan("x", minimum=0, maximum=1),)),
        model=ModelPlan("logistic"),
        training=TrainingPlan(rounds=20, local_steps=1, learning_rate=0.5, sample_rate=0.2),
        privacy=PrivacyPlan(
            "distributed",
            epsilon=4.0 if sigma is None else 1e6,
            delta=1e-5,
            clip_norm=1.0,
            noise_multiplier=sigma,
        ),
        cohort=CohortPlan(
            tuple(SitePlan(f"s{i:03}", 100) for i in range(sites)), threshold, colluders
        ),
        secure_sum=SecureSumPlan(bits=bits, **secure_sum),  # type: ignore[arg-type]
    )


COHORTS = [(3, 3, 1), (4, 3, 1), (10, 8, 2), (100, 90, 10)]


@pytest.mark.parametrize("cohort", COHORTS)
@pytest.mark.parametrize("parameters", [2, 31, 10_000])
def test_honest_shares_alone_carry_the_promised_noise(
    cohort: tuple[int, int, int], parameters: int
) -> None:
    plan = plan_of(*cohort, bits=32)
    share = noise_share(plan, parameters)
    assert share.honest == cohort[1] - cohort[2]
    assert share.of(share.honest) >= share.noise_multiplier * (1 - 1e-12)
    assert share.of(share.honest - 1) < share.noise_multiplier
    assert share.alone < share.noise_multiplier
    assert share.sensitivity >= plan.privacy.promise[2] * share.scale + math.sqrt(parameters)


@pytest.mark.parametrize("cohort", COHORTS)
@pytest.mark.parametrize("bits", [24, 32])
def test_the_ring_holds_all_sites_at_their_clamp_with_twelve_deviations_of_noise(
    cohort: tuple[int, int, int], bits: int
) -> None:
    sites = cohort[0]
    share = noise_share(plan_of(*cohort, bits=bits), 1000)
    extreme = sites * share.clamp + 12 * math.sqrt(sites) * share.deviation
    assert extreme < 2 ** (bits - 1)
    assert extreme > 0.9 * 2 ** (bits - 1)  # nothing is given away, either
    assert Ring(bits, sites).bits == bits


def test_a_ring_that_is_too_small_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"too small.*secure_sum.bits = 32"):
        noise_share(plan_of(10, 8, 2, bits=16), 26_000)
    with pytest.raises(ConfigError, match="too small"):
        noise_share(plan_of(100, 90, 10, bits=24), 10_000_000)
    noise_share(plan_of(100, 90, 10, bits=32), 1_000_000)


def test_only_a_distributed_plan_has_shares() -> None:
    plan = plan_of()
    local = replace(plan, privacy=replace(plan.privacy, mode="local"))
    with pytest.raises(ConfigError, match="no distributed noise"):
        noise_share(local, 10)


@pytest.mark.parametrize(
    ("field", "value"), [("local_steps", 5), ("momentum", 0.9), ("weight_decay", 0.1)]
)
def test_a_distributed_round_is_one_plain_step(field: str, value: float) -> None:
    plan = plan_of()
    with pytest.raises(ConfigError, match=field):
        replace(plan, training=replace(plan.training, **{field: value}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"fedprox"):
        replace(
            plan,
            training=replace(plan.training, proximal_mu=0.1),
            optimizer=OptimizerPlan(name="fedprox"),
        )


def test_divisor_and_clamp_are_public_constants() -> None:
    plan = plan_of()
    assert divisor(plan, ("s000", "s002")) == pytest.approx(0.2 * 200)
    assert largest_coordinate(plan) == pytest.approx(0.2 * 100)


@given(
    st.integers(1, 40).map(float),
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
)
def test_rounding_adds_at_most_root_d_to_the_sensitivity(
    scale: float, seed: int, dimension: int
) -> None:
    """The step that PRIVACY.md proves: |rint(s a) - rint(s b)| <= s |a - b| + sqrt(d)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=dimension)
    move = rng.normal(size=dimension)
    b = a + move / np.linalg.norm(move)
    moved = np.linalg.norm(np.rint(scale * a) - np.rint(scale * b))
    assert moved <= scale + math.sqrt(dimension) + 1e-9


def released(share: NoiseShare, sites: int) -> np.ndarray:
    """Exact probabilities of the summed shares of `sites` sites, over -reach .. reach."""
    reach = int(40 * share.deviation)
    values = np.arange(-reach, reach + 1, dtype=float)
    one = np.exp(-(values**2) / (2 * share.deviation**2))
    one /= one.sum()
    return reduce(np.convolve, [one] * sites)


def delta_of(noise: np.ndarray, shift: int, rate: float, epsilon: float, steps: int) -> float:
    """Exact hockey-stick divergence, the worse of both directions, of `steps` sampled releases."""
    without = np.pad(noise, (shift, shift))
    moved = np.roll(without, shift)
    with_patient = (1 - rate) * without + rate * moved
    p, q = with_patient, without
    for _ in range(steps - 1):
        p, q = np.outer(p, with_patient).ravel(), np.outer(q, without).ravel()
    factor = math.exp(epsilon)
    return max(
        float(np.maximum(p - factor * q, 0).sum()), float(np.maximum(q - factor * p, 0).sum())
    )


def small_share(sigma: float, honest: int, sensitivity: float = 6.0) -> NoiseShare:
    """Shares in a ring so coarse that discreteness would show if it could."""
    deviation = math.sqrt(((sigma * sensitivity) ** 2 + SMOOTHING**2) / honest)
    return NoiseShare(4, 100, sensitivity, deviation, honest, sigma)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("honest", [2, 3, 6])
@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_epsilon_bounds_the_exact_divergence_of_the_summed_shares(
    sigma: float, honest: int, rate: float
) -> None:
    share = small_share(sigma, honest)
    noise = released(share, honest)
    for delta in (1e-2, 1e-4, 1e-6):
        epsilon = epsilon_of(sigma, rate, 1, delta)
        assert delta_of(noise, 6, rate, epsilon, 1) <= delta * (1 + 1e-9)


def test_epsilon_bounds_two_steps_as_well() -> None:
    share = small_share(1.0, 2, 3.0)
    noise = released(share, 2)
    keep = np.flatnonzero(noise > 1e-18)
    noise = noise[keep[0] : keep[-1] + 1]
    for delta in (1e-2, 1e-4):
        epsilon = epsilon_of(1.0, 0.3, 2, delta)
        assert delta_of(noise, 3, 0.3, epsilon, 2) <= delta * (1 + 1e-9)


@pytest.mark.parametrize("missing", [1, 2])
def test_with_fewer_honest_shares_than_counted_on_the_bound_is_broken(missing: int) -> None:
    """The positive control: the same check fails when the noise is not there."""
    share = small_share(1.0, 4)
    noise = released(share, 4 - missing)
    epsilon = epsilon_of(1.0, 0.2, 1, 1e-4)
    assert delta_of(noise, 6, 0.2, epsilon, 1) > 1e-4


def test_without_room_for_rounding_the_bound_is_broken() -> None:
    """A sensitivity that forgets sqrt(d) is too small: a patient can move the integers further."""
    a, b = np.full(100, 0.5 - 1e-9), np.full(100, 0.5 + 1e-9)
    moved = float(np.linalg.norm(np.rint(a) - np.rint(b)))
    assert moved == 10.0
    assert moved > np.linalg.norm(a - b) + 9
    assert FLOAT_SLACK > 1e-4
