"""Server optimisers: against plain formulas, and the same bits everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shared.optimizers import ModelState, apply_update, initial_state
from shared.plan import OptimizerPlan
from shared.study import state_from_bytes, state_to_bytes

START = np.array([1.0, -2.0, 0.5], dtype=np.float32)
UPDATES = [
    np.array([0.1, -0.2, 0.3], dtype=np.float32),
    np.array([-0.3, 0.0, 0.2], dtype=np.float32),
]


def run(plan: OptimizerPlan) -> ModelState:
    state = initial_state(plan, START)
    for update in UPDATES:
        state = apply_update(plan, state, update)
    return state


def reference(plan: OptimizerPlan) -> np.ndarray:
    """Reddi et al. 2021, algorithm 2, coordinate by coordinate in float64."""
    x = START.astype(float)
    m, v = np.zeros(3), np.full(3, plan.tau**2)
    for u in UPDATES:
        d = u.astype(float)
        if plan.name in ("fedavg", "fedprox"):
            m = plan.momentum * m + d
            x = x + plan.learning_rate * m
            continue
        m = plan.beta1 * m + (1 - plan.beta1) * d
        for i in range(3):
            square = d[i] ** 2
            if plan.name == "fedadagrad":
                v[i] += square
            elif plan.name == "fedadam":
                v[i] = plan.beta2 * v[i] + (1 - plan.beta2) * square
            else:
                v[i] -= (1 - plan.beta2) * square * np.sign(v[i] - square)
        x = x + plan.learning_rate * m / (np.sqrt(v) + plan.tau)
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad"])
def test_two_steps_agree_with_the_paper(name: str, momentum: float) -> None:
    plan = OptimizerPlan(name=name, learning_rate=0.3, momentum=momentum, tau=1e-3)  # type: ignore[arg-type]
    np.testing.assert_allclose(run(plan).parameters, reference(plan), rtol=2e-6)


def test_the_four_rules_differ() -> None:
    results = {
        name: run(OptimizerPlan(name=name, learning_rate=0.1)).parameters.tobytes()  # type: ignore[arg-type]
        for name in ("fedavg", "fedadam", "fedyogi", "fedadagrad")
    }
    assert len(set(results.values())) == 4


def test_without_momentum_nothing_is_kept_but_the_model() -> None:
    state = run(OptimizerPlan(name="fedavg"))
    assert (len(state.first_moment), len(state.second_moment)) == (0, 0)
    again = state_from_bytes(state_to_bytes(state))
    assert again.digest() == state.digest()
    assert len(state_to_bytes(state)) == len(state_to_bytes(run(OptimizerPlan(momentum=0.5)))) - 12


def test_everything_stays_float32_and_the_input_is_untouched() -> None:
    plan = OptimizerPlan(name="fedyogi")
    state = initial_state(plan, START)
    before = state.parameters.copy()
    after = apply_update(plan, state, UPDATES[0])
    assert {after.parameters.dtype, after.first_moment.dtype, after.second_moment.dtype} == {
        np.dtype(np.float32)
    }
    np.testing.assert_array_equal(state.parameters, before)
    assert after.round_no == 1


def test_the_digest_covers_every_part_of_the_state() -> None:
    state = run(OptimizerPlan(name="fedadam"))
    digests = {state.digest()}
    for field in ("parameters", "first_moment", "second_moment"):
        parts = {
            "parameters": state.parameters,
            "first_moment": state.first_moment,
            "second_moment": state.second_moment,
        }
        flipped = parts[field].copy()
        flipped[-1] = np.nextafter(flipped[-1], np.float32(9))
        digests.add(ModelState(**(parts | {field: flipped}), round_no=state.round_no).digest())
    digests.add(
        ModelState(
            state.parameters, state.first_moment, state.second_moment, state.round_no + 1
        ).digest()
    )
    assert len(digests) == 5


def test_the_digest_is_a_fixed_function_of_the_numbers() -> None:
    """All machines must agree: this value was computed from the byte layout by hashlib alone."""
    state = initial_state(OptimizerPlan(momentum=0.9), START)
    raw = b"fedward-model/1" + (0).to_bytes(8, "little")
    raw += (3).to_bytes(8, "little") + START.astype("<f4").tobytes()
    raw += (3).to_bytes(8, "little") + bytes(12)
    raw += (0).to_bytes(8, "little")
    assert state.digest() == hashlib.sha256(raw).digest()
