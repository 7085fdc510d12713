"""SCAFFOLD on the summed update: the paper's own formulas, step by step, and what drift costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from training_cases import make_data, make_plan

from client.noise import ChaChaRandom
from client.own_state import OwnState
from client.training import LocalTrainer
from shared.errors import ConfigError
from shared.layout import VectorLayout
from shared.models import initial_parameters
from shared.optimizers import ModelState, apply_update, initial_state
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from simulations.audits.verify import verify
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

SITES, STEPS, RATE, ALL = 4, 5, 0.1, 1.7
D = 6  # coordinates of make_plan's logistic regression
RNG = np.random.default_rng(7)
CURVES, CENTRES = RNG.uniform(0.2, 2.0, (SITES, D)), RNG.normal(size=(SITES, D))
WEIGHTS = np.array([1.0, 0.5, 0.25, 0.25])  # of sites with 40, 20, 10 and 10 patients


def plan_of(name: str, **training: object) -> StudyPlan:
    sizes = enumerate((40, 20, 10, 10))
    sites = [{"name": f"site-{i}", "expected_patients": n} for i, n in sizes]
    return make_plan(
        privacy={"mode": "none"},
        training={"local_steps": STEPS, "learning_rate": RATE, "batch_size": 4} | training,
        optimizer={"name": name, "learning_rate": ALL},
        cohort={"threshold": 3, "sites": sites},
    )


def slope(site: int, x: np.ndarray) -> np.ndarray:
    """Of a bowl of the site's own: f_i(x) = sum of curve (x - centre)^2 / 2."""
    return CURVES[site] * (x - CENTRES[site])


@dataclass
class Paper:
    """Algorithm 1 with option II, word by word, in float64; sites weigh as in the plan."""

    x: np.ndarray
    c: np.ndarray = field(default_factory=lambda: np.zeros(D))
    own: np.ndarray = field(default_factory=lambda: np.zeros((SITES, D)))

    def round(self, present: list[int]) -> None:
        share = WEIGHTS[present] / WEIGHTS[present].sum()
        moves, changes = np.zeros(D), np.zeros(D)
        for weight, i in zip(share, present, strict=True):
            y = self.x.copy()
            for _ in range(STEPS):
                y = y - RATE * (slope(i, y) - self.own[i] + self.c)
            new = self.own[i] - self.c + (self.x - y) / (STEPS * RATE)
            moves += weight * (y - self.x)
            changes += weight * (new - self.own[i])
            self.own[i] = new
        self.x = self.x + ALL * moves
        self.c = self.c + WEIGHTS[present].sum() / WEIGHTS.sum() * changes


@dataclass
class Ours:
    """The product's own pieces, with the bowls in place of patients."""

    plan: StudyPlan
    state: ModelState
    stores: list[dict[str, bytes]] = field(default_factory=lambda: [{} for _ in range(SITES)])

    def round(self, number: int, present: list[int], answering: list[int] | None = None) -> None:
        """`answering` sites train; the sum holds those of `present` alone."""
        layout = VectorLayout(self.plan, D)
        names = [f"site-{i}" for i in range(SITES)]
        updates = {}
        for i in answering or present:
            own = OwnState(layout, self.stores[i], names[i])
            start, correction = own.parameters(self.state), own.correction(self.state)
            y = start.copy()
            for _ in range(STEPS):
                y = y - np.float32(RATE) * slope(i, y).astype(np.float32)
                y = y if correction is None else y + correction / np.float32(STEPS)
            updates[i] = y - start
            own.trained(start, updates[i], correction, number)
        inside = [names[i] for i in present]
        for i in range(SITES):
            OwnState(layout, self.stores[i], names[i]).published(number, tuple(inside))
        share = WEIGHTS[present].sum() / WEIGHTS.sum()
        mean = sum(WEIGHTS[i] * updates[i] for i in present) / WEIGHTS[present].sum()
        self.state = apply_update(
            self.plan.optimizer, self.state, np.float32(mean), share=float(share)
        )


def begin(name: str) -> tuple[Ours, Paper]:
    plan, start = plan_of(name), np.linspace(-1, 1, D, dtype=np.float32)
    return Ours(plan, initial_state(plan.optimizer, start)), Paper(start.astype(float))


def test_model_and_control_variates_are_the_papers_whoever_is_there() -> None:
    ours, paper = begin("scaffold")
    cohorts = [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    for number, present in enumerate(cohorts, 1):
        ours.round(number, present)
        paper.round(present)
        np.testing.assert_allclose(ours.state.parameters, paper.x, atol=1e-5)
        common = ours.state.first_moment / (-STEPS * RATE)
        np.testing.assert_allclose(common, paper.c, atol=1e-5)
        for i, store in enumerate(ours.stores):
            kept = np.frombuffer(store.get("control variate", bytes(4 * D)), "<f4")
            np.testing.assert_allclose(kept / (-STEPS * RATE), paper.own[i], atol=1e-5)
    assert np.abs(paper.own).max() > 0.5  # at the optimum the common one is 0, these are not


def test_a_site_that_was_left_out_of_the_sum_keeps_its_old_control_variate() -> None:
    ours, paper = begin("scaffold")
    ours.round(1, [0, 1, 2, 3])
    paper.round([0, 1, 2, 3])
    ours.round(2, [0, 1, 2], answering=[0, 1, 2, 3])  # the last one trained and dropped out
    paper.round([0, 1, 2])
    ours.round(3, [0, 1, 2, 3])
    paper.round([0, 1, 2, 3])
    np.testing.assert_allclose(ours.state.parameters, paper.x, atol=1e-5)


def test_it_finds_the_optimum_that_drifting_averages_miss() -> None:
    total = (WEIGHTS[:, None] * CURVES).sum(0)
    best = (WEIGHTS[:, None] * CURVES * CENTRES).sum(0) / total
    missed = {}
    for name in ("fedavg", "scaffold"):
        ours, _ = begin(name)
        for number in range(1, 80):
            ours.round(number, [0, 1, 2, 3])
        missed[name] = float(np.abs(ours.state.parameters - best).max())
    assert missed["scaffold"] < 1e-3
    assert missed["fedavg"] > 30 * missed["scaffold"]


def test_the_shares_in_a_sum_follow_from_its_public_contributors() -> None:
    """As `advance` computes them, on every site and at the server alike."""
    plan = plan_of("scaffold")
    layout, state = VectorLayout(plan, D), initial_state(plan.optimizer, np.zeros(D, np.float32))
    total = np.zeros(layout.length, dtype=np.uint32)
    moved = ModelState(state.parameters, np.ones(D, np.float32), state.second_moment, 0)
    kept = layout.advance(moved, total, ("site-0", "site-3")).first_moment
    np.testing.assert_allclose(kept, 1 - 1.25 / 2.0, atol=1e-3)
    whole = layout.advance(moved, total, plan.cohort.names).first_moment
    np.testing.assert_allclose(whole, 0.0, atol=1e-3)


def corrected(correction: FlatVector | None) -> FlatVector:
    plan = make_plan(training={"local_steps": 4, "learning_rate": 1e-6})
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
    start = initial_parameters(plan)
    return trainer.train_round(start, ChaChaRandom(bytes(32)), 1, correction=correction).update


def test_a_rounds_steps_add_up_to_the_correction_beside_their_noised_gradients() -> None:
    wanted = np.linspace(-0.2, 0.3, D, dtype=np.float32)
    np.testing.assert_allclose(corrected(wanted) - corrected(None), wanted, atol=1e-6)


def test_control_variates_are_made_of_noised_updates_alone() -> None:
    """With the noise turned up, they are noise: nothing of a patient enters beside it."""
    plan = make_plan(training={"local_steps": 3}, optimizer={"name": "scaffold"})
    layout, state = VectorLayout(plan, D), initial_state(plan.optimizer, initial_parameters(plan))
    controls = []
    for patients in (1, 20):
        store: dict[str, bytes] = {}
        own = OwnState(layout, store, "site-0")
        trainer = LocalTrainer(plan, "site-0", make_data(plan, patients), 1e6, "cpu")
        start = own.parameters(state)
        done = trainer.train_round(start, ChaChaRandom(bytes(32)), 1)
        own.trained(start, done.update, own.correction(state), 1)
        own.published(1, plan.cohort.names)
        controls.append(np.frombuffer(store["control variate"], "<f4"))
        np.testing.assert_array_equal(controls[-1], done.update)
    spread = float(controls[0].std())
    assert spread > 1e4
    assert float(np.abs(controls[0]).max()) < 6 * spread


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"privacy": {"mode": "distributed"}}, "take mode 'local'"),
        ({"training": {"momentum": 0.5}}, "momentum 0"),
    ],
)
def test_what_it_cannot_correct_is_refused(
    sections: dict[str, dict[str, object]], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(optimizer={"name": "scaffold"}, **sections)


def test_a_private_study_with_it_learns_and_verifies(tmp_path: Path) -> None:
    overrides = ["optimizer.name=scaffold", "training.rounds=6", "privacy.epsilon=8.0"]
    out = tmp_path / "run"
    results = execute(
        prepare(load_scenario("breast_cancer", overrides), RunOptions(out=out)), lambda report: None
    )
    assert results["final"]["metrics"]["auroc"] > 0.9
    assert not verify(out).violated  # the model is computed again from the published sums
