"""Mode distributed, whole studies: as accurate as pooled data, and the noise is really there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from client.app import forget_sites
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.share import noisy_integers
from client.training import LocalTrainer
from server.rounds import RoundReport
from shared.distributed import NoiseShare, noise_share
from shared.layout import VectorLayout
from shared.models import initial_parameters
from shared.plan import OptimizerPlan
from simulations.grid import Delivery, Direction
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario

OVERRIDES = ("privacy.mode=distributed", "training.rounds=25", "evaluation.bins=64")


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario("breast_cancer", OVERRIDES)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    forget_sites()


def run(scenario: Scenario, out: Path, *, baselines: bool = False, **faults: Any) -> dict[str, Any]:
    options = RunOptions(out=out, baselines=baselines, insecure_reproducible=True, **faults)
    return execute(prepare(scenario, options), lambda report: None)


def test_a_distributed_study_is_as_good_as_pooled_data_under_the_same_epsilon(
    scenario: Scenario, tmp_path: Path
) -> None:
    results = run(scenario, tmp_path / "run", baselines=True)
    ours = results["final"]["metrics"]["auroc"]
    assert abs(ours - results["baselines"]["pooled_dp"]["metrics"]["auroc"]) < 0.02
    for site in results["privacy"]["sites"].values():
        assert site["steps"] == 25
        assert site["epsilon"] <= results["privacy"]["target_epsilon"] < site["epsilon_alone"]


def test_with_the_most_dropouts_in_every_round_the_promised_noise_is_still_there(
    scenario: Scenario, tmp_path: Path
) -> None:
    """Variance of published sums of sites without any signal, one of four dropping each round."""
    plan = replace(
        scenario.plan,
        training=replace(scenario.plan.training, rounds=40, learning_rate=1e-9),
        evaluation=replace(scenario.plan.evaluation, release="none"),
    )
    parameters = len(initial_parameters(plan))
    share = noise_share(plan, parameters)
    layout = VectorLayout(plan, parameters)
    sums = []
    for round_no in range(400):
        total = np.zeros(layout.length, dtype=np.uint32)
        for site in ("city", "county", "rural"):  # the university has dropped out
            random = ChaChaRandom(bytes(31) + b"x").child(f"{site} {round_no}")
            nothing = np.zeros(parameters, dtype=np.float32)
            total += layout.pack_integers(
                noisy_integers(nothing, share, random), np.zeros(0, dtype=np.int64)
            )
        sums.append(layout.ring.signed(total & layout.ring.modulus_mask))
    values = np.concatenate(sums).astype(float)
    # Three shares, of which one may be a colluder's: the two others must carry the promise.
    variance = values.var() * share.honest / 3
    promised = (share.noise_multiplier * share.sensitivity) ** 2
    low, high = np.array(stats.chi2.interval(1 - 1e-6, len(values))) / len(values)
    assert low < variance / promised < high
    halved = (values / 2).var() * share.honest / 3
    assert not low < halved / promised < high


def lose_rural(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
    """One of four sites' contributions is lost in every round: the most that the plan tolerates."""
    lost = site == "rural" and action == "train.round" and direction is Direction.TO_SERVER
    return Delivery(() if lost else (body,))


def test_dropouts_up_to_the_limit_in_every_round_do_not_stop_a_study(
    scenario: Scenario, tmp_path: Path
) -> None:
    results = run(scenario, tmp_path / "run", faults=lose_rural)
    asked = [r for r in results["rounds"] if "rural" in r["cohort"]]
    assert asked
    assert all(r["dropped"] == ["rural"] for r in asked)
    assert results["final"]["metrics"]["auroc"] > 0.9


@pytest.mark.parametrize(("shares", "enough"), [(1.0, True), (0.5, False)])
def test_a_whole_study_with_the_most_dropouts_publishes_the_promised_noise(
    scenario: Scenario,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shares: float,
    enough: bool,
) -> None:
    """Real rounds at a model that stands still: what differs between their sums is noise alone."""
    training = replace(scenario.plan.training, learning_rate=1e-12, sample_rate=1.0, rounds=40)
    plan = replace(
        scenario.plan,
        training=training,
        evaluation=replace(scenario.plan.evaluation, release="none"),
    )
    layout = VectorLayout(plan, len(initial_parameters(plan)))
    share = noise_share(plan, layout.parameters)
    published: dict[bytes, np.ndarray] = {}

    def note(self: VectorLayout, total: np.ndarray, contributors: tuple[str, ...]) -> np.ndarray:
        assert len(contributors) == 3
        published[total.tobytes()] = self.ring.signed(total[: self.parameters])
        return update_of(self, total, contributors)

    def send(total: np.ndarray, right: NoiseShare, random: ChaChaRandom) -> np.ndarray:
        return noisy_integers(total, replace(right, deviation=shares * right.deviation), random)

    update_of = VectorLayout.update_of
    monkeypatch.setattr(VectorLayout, "update_of", note)
    monkeypatch.setattr("client.run.noisy_integers", send)
    run(replace(scenario, plan=plan), tmp_path / "run", faults=lose_rural)
    sums = np.stack(list(published.values())).astype(float)
    assert len(sums) == 40
    freedom = sums.size - sums.shape[1]
    # Of three shares, two are promised to be honest.
    variance = np.square(sums - sums.mean(axis=0)).sum() * share.honest / 3
    promised = (share.noise_multiplier * share.sensitivity) ** 2
    low, high = variance / promised / stats.chi2.ppf([1 - 5e-7, 5e-7], freedom)
    assert (high >= 1) == enough
    assert low < shares**2 < high


@pytest.mark.parametrize("optimizer", ["fedadam", "fedavg"])
def test_a_distributed_step_takes_any_server_optimiser(
    scenario: Scenario, tmp_path: Path, optimizer: str
) -> None:
    """Adam, and SGD with momentum: every site computes the same model, and it learns."""
    plan = scenario.plan
    settings = OptimizerPlan(name="fedadam", learning_rate=0.1)
    if optimizer == "fedavg":
        settings = OptimizerPlan(momentum=0.9, learning_rate=0.2)
    results = run(replace(scenario, plan=replace(plan, optimizer=settings)), tmp_path / "run")
    assert results["final"]["metrics"]["auroc"] > 0.9


def test_a_patient_whose_gradient_is_not_a_number_changes_nothing_that_shows(
    scenario: Scenario,
) -> None:
    """The site sends as always; the broken patient counts as zero, like one that was not drawn."""
    plan = replace(scenario.plan, training=replace(scenario.plan.training, sample_rate=1.0))
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(6, 30)).astype(np.float32)
    labels = np.array([0, 1, 0, 1, 0, 1])
    broken = inputs.copy()
    broken[5] = 3e38  # overflows in the first product
    data = [
        PatientDataset(x, y, np.arange(len(y)), tuple(map(str, range(len(y)))))
        for x, y in ((broken, labels), (inputs[:5], labels[:5]))
    ]
    sums = [
        LocalTrainer(plan, "city", part, 1.0, "cpu")
        .clipped_sum(initial_parameters(plan), ChaChaRandom(bytes(32)), 1)
        .update
        for part in data
    ]
    assert all(np.isfinite(s).all() for s in sums)
    assert np.linalg.norm(sums[0] - sums[1]) <= plan.privacy.promise[2] * (1 + 1e-4)
    share = noise_share(plan, len(sums[0]))
    for total in (*sums, np.full(len(sums[0]), np.nan, dtype=np.float32)):
        sent = noisy_integers(total, share, ChaChaRandom(bytes(32)))
        assert sent.dtype == np.int64
        assert np.abs(sent).max() < 2**23


def test_the_published_sum_steps_by_the_mean_gradient(scenario: Scenario) -> None:
    """Without noise a distributed round is ordinary gradient descent on all sites' patients."""
    plan = scenario.plan
    start = initial_parameters(plan)
    layout, share = VectorLayout(plan, len(start)), noise_share(plan, len(start))
    gradients = {n: np.full(len(start), i + 1.0) for i, n in enumerate(plan.cohort.names)}
    total = np.zeros(layout.length, dtype=np.uint32)
    for gradient in gradients.values():
        whole = np.rint(gradient * share.scale).astype(np.int64)
        total += layout.pack_integers(whole, np.zeros(layout.counts, dtype=np.int64))
    update = layout.update_of(total & layout.ring.modulus_mask, plan.cohort.names)
    batch = 0.3 * sum(s.expected_patients for s in plan.cohort.sites)
    expected = -plan.training.learning_rate * (1 + 2 + 3 + 4) / batch
    np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_a_scenario_has_values_of_its_own_for_the_mode() -> None:
    local, shared = load_scenario("breast_cancer").plan, load_scenario("breast_cancer", OVERRIDES)
    assert local.training.local_steps > 1 == shared.plan.training.local_steps
    assert shared.plan.training.rounds == 25
    assert shared.plan.cohort == local.cohort


def test_a_site_sends_its_own_share_of_the_noise_and_not_the_whole(
    scenario: Scenario, tmp_path: Path
) -> None:
    share = noise_share(scenario.plan, 31)
    assert share.alone == pytest.approx(share.noise_multiplier / math.sqrt(share.honest), rel=1e-6)
    reports: list[RoundReport] = []
    execute(
        prepare(scenario, RunOptions(out=tmp_path / "run", insecure_reproducible=True)),
        reports.append,
    )
    assert [r.round_no for r in reports] == list(range(1, 27))
