"""The server optimiser, computed alike by every site and the server from the published sum.

Only IEEE 754 operations that every machine rounds alike (+, -, *, /, sqrt on float32 arrays) are
used, so that all agree bit for bit on the next model and its hash. Sources: FedAvg, McMahan et
al., AISTATS 2017; FedAdam, FedYogi, FedAdagrad, Reddi et al., ICLR 2021, algorithm 2 (no bias
correction). FedProx (Li et al., MLSys 2020) changes local training alone: here it is FedAvg.

SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1, option II) needs no second vector: with
option II a site's new control variate is a function of its own update and the common one, so the
common one follows from the summed update. Both are kept as updates over a round's local steps
(-K eta c in the paper's words): client/own_state.py has the site's half.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from shared.parameters import FlatVector
from shared.plan import OptimizerPlan


@dataclass(frozen=True)
class ModelState:
    """The global model with the optimiser's memory after `round_no` finished rounds.

    Attributes:
        parameters: float32, shape (d,).
        first_moment: float32, shape (d,), FedAvg's momentum buffer and SCAFFOLD's common control
            variate too; (0,) where there is none.
        second_moment: float32, shape (d,); shape (0,) where the optimiser has none.
        round_no: Rounds whose sums have been applied, 0 for the plan's starting point.
        clip_norm: float32, shape (1,), where the plan adapts it and a round moved it; else (0,).
    """

    parameters: FlatVector
    first_moment: FlatVector
    second_moment: FlatVector
    round_no: int
    clip_norm: FlatVector = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def digest(self) -> bytes:
        """sha256 over round, parameters, moments, clip norm: what all sites must agree on."""
        h = hashlib.sha256(b"fedward-model/1" + self.round_no.to_bytes(8, "little"))
        for part in (self.parameters, self.first_moment, self.second_moment):
            h.update(len(part).to_bytes(8, "little"))
            h.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
        h.update(self.clip_norm.astype("<f4").tobytes())
        return h.digest()


def initial_state(plan: OptimizerPlan, parameters: FlatVector) -> ModelState:
    """The state before the first round; all moments zero, the second one tau^2."""
    adaptive = plan.name in ("fedadam", "fedyogi", "fedadagrad")
    zero = np.zeros_like(parameters)
    first = zero if adaptive or plan.momentum or plan.name == "scaffold" else zero[:0]
    start = np.float32(plan.tau) * np.float32(plan.tau)
    second = np.full_like(parameters, start) if adaptive else zero[:0]
    return ModelState(parameters.astype(np.float32, copy=True), first, second, 0)


def apply_update(
    plan: OptimizerPlan, state: ModelState, update: FlatVector, *, share: float = 1.0
) -> ModelState:
    """One server step with the averaged update.

    Args:
        plan: Which optimiser, with its constants.
        state: The model that the sites started from.
        update: float32, shape (d,): weighted mean of (local model - start).
        share: Of all sites' weight, how much is in the mean; SCAFFOLD alone asks.

    Returns:
        The next state; `state` is unchanged.
    """
    lr = np.float32(plan.learning_rate)
    if plan.name == "scaffold":
        common = state.first_moment + np.float32(share) * (update - state.first_moment)
        moved = state.parameters + lr * update
        return ModelState(moved, common, state.second_moment, state.round_no + 1)
    if plan.name in ("fedavg", "fedprox"):
        first, step = state.first_moment, lr * update
        if plan.momentum:
            first = np.float32(plan.momentum) * first + update
            step = lr * first
        return ModelState(state.parameters + step, first, state.second_moment, state.round_no + 1)
    b1 = np.float32(plan.beta1)
    moment = b1 * state.first_moment + (np.float32(1) - b1) * update
    second = _second_moment(plan, state.second_moment, update)
    step = lr * moment / (np.sqrt(second) + np.float32(plan.tau))
    return ModelState(_f32(state.parameters + step), moment, _f32(second), state.round_no + 1)


def _second_moment(plan: OptimizerPlan, v: FlatVector, update: FlatVector) -> FlatVector:
    square = update * update
    rest = np.float32(1) - np.float32(plan.beta2)
    if plan.name == "fedadagrad":
        return v + square
    if plan.name == "fedadam":
        return np.float32(plan.beta2) * v + rest * square
    return v - rest * square * np.sign(v - square)


def _f32(vector: np.ndarray) -> FlatVector:
    return np.asarray(vector, dtype=np.float32)
