"""Local training: the noise and the divisor of a step, and rounds that leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from training_cases import DIVISOR, KEY, clipped_sum, make_data, make_plan, patient_gradients

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer, choose_device
from shared.errors import ConfigError
from shared.models import build_model, initial_parameters, load_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from shared.tasks import binary_losses

# --- noise, divisor, sampling ---------------------------------------------------------------


def noise_of(
    plan: StudyPlan, data: PatientDataset, sigma: float, random: ChaChaRandom
) -> FlatVector:
    """What one full-batch step adds to the exact update, undone by learning rate and divisor."""
    trainer = LocalTrainer(plan, "site-0", data, sigma, "cpu")
    start = initial_parameters(plan)
    update = trainer.train_round(start, random, 1).update.astype(np.float64)
    exact = clipped_sum(plan, data).astype(np.float64)
    rate = plan.training.learning_rate
    return (-update / rate * 20 - exact).astype(np.float32)  # sample rate 1: the divisor is 20


WIDE = make_plan(
    "mlp",
    model={"hidden": [4000]},
    training={"sample_rate": 1.0, "learning_rate": 4.0},
    privacy={"clip_norm": 0.5},
)


def test_what_leaves_carries_noise_of_exactly_sigma_c_over_the_divisor() -> None:
    sigma, clip = 1.7, 0.5
    noise = noise_of(WIDE, make_data(WIDE, 20), sigma, ChaChaRandom(KEY))
    assert len(noise) > 25_000
    assert noise.std() == pytest.approx(sigma * clip, rel=0.03)
    assert stats.kstest(noise / (sigma * clip), "norm").pvalue > 1e-4
    assert stats.kstest(noise / (sigma * clip * 1.05), "norm").pvalue < 1e-4  # 5 % is seen


def test_every_coordinate_and_every_step_gets_noise_of_its_own() -> None:
    # WIDE is (4000, 5) weights, 4000 biases, (1, 4000) weights, 1 bias.
    noise = noise_of(WIDE, make_data(WIDE, 20), 1.0, ChaChaRandom(KEY))[:28_000]
    assert np.abs(np.corrcoef(noise.reshape(7, 4000))[np.triu_indices(7, 1)]).max() < 0.08
    trainer = LocalTrainer(WIDE, "site-0", make_data(WIDE, 3), 1.0, "cpu")
    random, nobody = ChaChaRandom(KEY), np.zeros(0, dtype=np.int64)
    steps = [trainer.gradient(initial_parameters(WIDE), nobody, random) for _ in range(3)]
    assert np.abs(np.corrcoef(steps)[np.triu_indices(3, 1)]).max() < 0.04


def test_the_noise_does_not_depend_on_how_many_patients_there_are() -> None:
    # A divisor of n q differs between neighbours; with it, the noise that 10 patients send would
    # be twice that of 20.
    ten = noise_of(WIDE, make_data(WIDE, 10), 1.0, ChaChaRandom(KEY))
    twenty = noise_of(WIDE, make_data(WIDE, 20), 1.0, ChaChaRandom(KEY))
    np.testing.assert_allclose(ten, twenty, atol=1e-4)


def test_one_global_seed_at_two_sites_gives_different_noise() -> None:
    data, noises = make_data(WIDE, 5), []
    for site in ("north", "south"):
        torch.manual_seed(0)
        noises.append(noise_of(WIDE, data, 1.0, ChaChaRandom(simulation_key(0, site))))
    assert abs(np.corrcoef(noises)[0, 1]) < 0.05


def test_a_round_trained_again_gets_other_noise_and_a_run_can_be_repeated() -> None:
    plan = make_plan(training={"sample_rate": 1.0})
    start, data = initial_parameters(plan), make_data(plan)
    trainer = LocalTrainer(plan, "site-0", data, 1.0, "cpu")
    random = ChaChaRandom(KEY)
    first, again = (trainer.train_round(start, random, 1).update for _ in range(2))
    assert not np.array_equal(first, again)
    fresh = LocalTrainer(plan, "site-0", data, 1.0, "cpu")
    assert np.array_equal(fresh.train_round(start, ChaChaRandom(KEY), 1).update, first)


def test_an_empty_draw_is_a_step_of_noise_alone() -> None:
    plan = make_plan("cnn", image=16, training={"sample_rate": 1e-9, "local_steps": 3})
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
    result = trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    assert result.steps == 3
    assert result.log.patients_drawn == (0, 0, 0)
    assert result.log.records_seen == 0
    spread = 0.5 * np.sqrt(3) / (1e-9 * 20)
    assert result.update.std() == pytest.approx(spread, rel=0.05)


def test_a_site_without_patients_still_sends_noise() -> None:
    plan = make_plan()
    shape = (0, 5)
    empty = PatientDataset(
        np.zeros(shape, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), ()
    )
    trainer = LocalTrainer(plan, "site-0", empty, 1.0, "cpu")
    result = trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    assert np.abs(result.update).min() > 0


@pytest.mark.parametrize("patients", [1, 49, 98, 103])
def test_every_step_is_taken_and_patients_are_drawn_at_the_plans_rate(patients: int) -> None:
    # A loader of length int(1 / (1 / L)) takes one step less than meant at L = 49, 98, 103.
    plan = make_plan(training={"sample_rate": 1 / patients, "local_steps": 400})
    trainer = LocalTrainer(plan, "site-0", make_data(plan, patients), 1.0, "cpu")
    result = trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    assert result.steps == len(result.log.patients_drawn) == trainer.steps_taken == 400
    assert np.mean(result.log.patients_drawn) == pytest.approx(1, abs=0.25)
    if patients > 1:
        assert len(set(result.log.patients_drawn)) > 2  # Poisson: the size is random


# --- rounds ---------------------------------------------------------------------------------


class RoundInterruptedError(Exception):
    """Stands for a timeout, a full memory, a killed worker."""


@pytest.mark.parametrize("where", ["loss", "backward", "noise", "step"])
def test_an_interrupted_round_leaves_nothing_behind(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("mlp", training={"sample_rate": 1.0, "momentum": 0.9, "local_steps": 2})
    data, start = make_data(plan, 12), initial_parameters(plan)
    calls, armed = 0, False

    def trip() -> None:
        nonlocal calls
        calls += 1
        if armed and calls == 2:
            raise RoundInterruptedError

    class Tripwire(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            trip()
            return grads[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 32), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            if where == "backward":
                hidden = Tripwire.apply(hidden)
            logits: Tensor = self.head(hidden)
            return logits.squeeze(1)

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        if where == "loss":
            trip()
        return binary_losses(logits, labels)

    def new_trainer() -> LocalTrainer:
        return LocalTrainer(
            plan, "site-0", data, 1.0, "cpu",
            max_physical_records=5, build=lambda _: Model(), record_losses=losses,
        )  # fmt: skip

    trainer = new_trainer()
    calls, armed = 0, True
    owner, name = {"noise": (ChaChaRandom, "gaussian"), "step": (torch.optim.SGD, "step")}.get(
        where, (None, "")
    )
    if owner is not None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: (trip(), real(*a))[1])
    with pytest.raises(RoundInterruptedError):
        trainer.train_round(start, ChaChaRandom(KEY), 1)
    armed = False
    after = trainer.train_round(start, ChaChaRandom(KEY), 1)
    clean = new_trainer().train_round(start, ChaChaRandom(KEY), 1)
    assert np.array_equal(after.update, clean.update)


def test_rounds_start_from_a_fresh_optimiser_and_leave_the_start_alone() -> None:
    plan = make_plan(training={"momentum": 0.9, "local_steps": 4})
    data, start = make_data(plan), initial_parameters(plan)
    start.setflags(write=False)
    used, fresh = (LocalTrainer(plan, "site-0", data, 1.0, "cpu") for _ in range(2))
    used.train_round(start, ChaChaRandom(bytes(32)), 1)
    again = used.train_round(start, ChaChaRandom(KEY), 2).update
    assert np.array_equal(again, fresh.train_round(start, ChaChaRandom(KEY), 2).update)


def test_local_steps_are_sgd_with_momentum_decay_and_the_proximal_pull_after_the_noise() -> None:
    plan = make_plan(
        training={
            "sample_rate": 1.0, "local_steps": 3, "learning_rate": 0.3, "momentum": 0.6,
            "weight_decay": 0.1, "proximal_mu": 0.4,
        },
        optimizer={"name": "fedprox"},
    )  # fmt: skip
    data, start = make_data(plan), initial_parameters(plan)
    trainer = LocalTrainer(plan, "site-0", data, 0.8, "cpu")
    update = trainer.train_round(start, ChaChaRandom(KEY), 5).update
    probe = LocalTrainer(plan, "site-0", data, 0.8, "cpu")
    stream = ChaChaRandom(KEY).fresh_child("round 5")
    w, velocity = start.copy(), np.zeros_like(start)
    for _ in range(3):
        g = probe.gradient(w, np.arange(20), stream)
        velocity = 0.6 * velocity + g + 0.4 * (w - start) + 0.1 * w
        w = w - np.float32(0.3) * velocity
    np.testing.assert_allclose(update, w - start, atol=1e-5)


def test_divergence_is_an_error_not_a_vector_of_nan() -> None:
    plan = make_plan(training={"learning_rate": 1e30, "local_steps": 9, "weight_decay": 1.0})
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
    with pytest.raises(ConfigError, match=r"diverged in round 2.*Lower learning_rate"):
        trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 2)


# --- mode none ------------------------------------------------------------------------------


def test_without_privacy_it_is_ordinary_mini_batch_training() -> None:
    plan = make_plan(
        "mlp",
        privacy={"mode": "none"},
        training={"batch_size": 6, "local_steps": 3, "momentum": 0.5},
    )
    data, start = make_data(plan, records_each=[2] * 7), initial_parameters(plan)
    trainer = LocalTrainer(plan, "site-0", data, None, "cpu", max_physical_records=4)
    random, seen = ChaChaRandom(KEY), []
    records = np.concatenate(data.records_of)
    w = start
    for round_no in (1, 2):
        model = build_model(plan)
        load_parameters(model, w)
        sgd = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
        for step in range(3 * (round_no - 1), 3 * round_no):
            order = ChaChaRandom(KEY).child(f"epoch {step // 3}").permutation(14)
            rows = records[order[6 * (step % 3) : 6 * (step % 3) + 6]]
            seen.append(rows)
            sgd.zero_grad()
            labels = torch.from_numpy(data.labels[rows].astype(np.float32))
            torch.autograd.backward(
                binary_losses(model(torch.from_numpy(data.inputs[rows])), labels).mean()
            )
            sgd.step()
        update = trainer.train_round(w, random, round_no).update
        want = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        np.testing.assert_allclose(w + update, want, atol=1e-6)
        w = w + update
    assert [len(rows) for rows in seen] == [6, 6, 2, 6, 6, 2]
    for epoch in (seen[:3], seen[3:]):
        assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(14))
    assert not np.array_equal(seen[0], seen[3])


def test_poisson_without_privacy_is_the_private_step_without_clipping_and_noise() -> None:
    plan = make_plan("mlp", privacy={"mode": "none"}, training={"sample_rate": 0.5})
    data, start = make_data(plan, records_each=[1, 2, 3, 4]), initial_parameters(plan)
    trainer = LocalTrainer(plan, "site-0", data, None, "cpu", max_physical_records=3)
    got = trainer.gradient(start, np.arange(4), ChaChaRandom(KEY))
    want = np.sum(patient_gradients(plan, data, start), axis=0) / DIVISOR
    np.testing.assert_allclose(got, want, atol=1e-6)


# --- what a trainer refuses, and scores -----------------------------------------------------


@pytest.mark.parametrize("noise", [None, 0.0, -1.0])
def test_no_private_round_without_noise(noise: float | None) -> None:
    plan = make_plan()
    with pytest.raises(ConfigError, match="needs a noise_multiplier above 0"):
        LocalTrainer(plan, "site-0", make_data(plan), noise, "cpu")


def test_a_measuring_trainer_trains_no_round_and_only_it_changes_the_clip_norm() -> None:
    plan = make_plan()
    start, random = initial_parameters(plan), ChaChaRandom(KEY)
    measuring = LocalTrainer(plan, "site-0", make_data(plan), 0.0, "cpu", measuring=True)
    with pytest.raises(ConfigError, match="trains no round"):
        measuring.train_round(start, random, 1)
    training = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
    with pytest.raises(ConfigError, match="clip norm"):
        training.gradient(start, np.arange(2), random, clip_norm=9.0)


def test_what_does_not_fit_the_plan_is_refused() -> None:
    plan = make_plan()
    with pytest.raises(ConfigError, match=r"shape \(4,\); the plan's have \(5,\)"):
        LocalTrainer(plan, "site-0", make_data(make_plan(features=4)), 1.0, "cpu")
    with pytest.raises(ConfigError, match="no site 'elsewhere'"):
        LocalTrainer(plan, "elsewhere", make_data(plan), 1.0, "cpu")
    with pytest.raises(ConfigError, match="max_physical_records is 0"):
        LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu", max_physical_records=0)
    off = make_plan(privacy={"mode": "none"}, training={"batch_size": 4})
    with pytest.raises(ConfigError, match="privacy is off"):
        LocalTrainer(off, "site-0", make_data(off), 1.0, "cpu")
    with pytest.raises(ConfigError, match="valid: auto, cpu, cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() -> None:
    with pytest.raises(ConfigError, match="no usable GPU"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("model", "image"), [("mlp", None), ("cnn", 32), ("resnet18", 32)])
def test_a_gpu_gives_the_same_update(model: str, image: int | None) -> None:
    plan = make_plan(model, image=image)
    data, start = make_data(plan, records_each=[1, 2, 3, 1]), initial_parameters(plan)
    updates = [
        LocalTrainer(plan, "site-0", data, 1.0, device)
        .train_round(start, ChaChaRandom(KEY), 1)
        .update
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(updates[0], updates[1], atol=1e-4)


def test_scores_are_the_models_logits_whatever_the_batch() -> None:
    plan = make_plan("cnn", image=16)
    data = make_data(plan, 9)
    trainer = LocalTrainer(plan, "site-0", data, 1.0, "cpu", max_physical_records=4)
    parameters = initial_parameters(plan) * 2
    model = build_model(plan)
    load_parameters(model, parameters)
    with torch.no_grad():
        want = model(torch.from_numpy(data.inputs)).numpy()
    trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    np.testing.assert_allclose(trainer.predict(parameters, data.inputs), want, atol=1e-5)
    assert trainer.predict(parameters, data.inputs[:0]).shape == (0,)


def blobs(plan: StudyPlan, patients: int, seed: int) -> PatientDataset:
    """Noisy images, half of them with one small bright blob anywhere."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.15, (patients, 1, 32, 32))
    labels = rng.integers(0, 2, patients)
    y, x = np.mgrid[0:32, 0:32]
    for i in np.flatnonzero(labels):
        cy, cx = rng.uniform(4, 28, 2)
        images[i, 0] += 0.8 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8)
    return PatientDataset(
        images.clip(-1, 1).astype(np.float32),
        labels.astype(np.int64),
        np.arange(patients),
        tuple(f"p{i}" for i in range(patients)),
    )


@pytest.mark.slow
def test_the_cnn_finds_a_small_blob_under_differential_privacy() -> None:
    plan = make_plan(
        "cnn",
        image=32,
        training={
            "rounds": 12, "local_steps": 10, "sample_rate": 0.1,
            "learning_rate": 0.2, "momentum": 0.8,
        },
        cohort={
            "threshold": 3,
            "sites": [{"name": f"site-{i}", "expected_patients": 600} for i in range(3)],
        },
    )  # fmt: skip
    sigma = noise_multiplier_of(plan)
    assert sigma is not None
    trainer = LocalTrainer(plan, "site-0", blobs(plan, 600, 0), sigma, "cpu")
    w, random = initial_parameters(plan), ChaChaRandom(KEY)
    for round_no in range(1, 13):
        w = w + trainer.train_round(w, random, round_no).update
    test = blobs(plan, 400, 1)
    scores = trainer.predict(w, test.inputs)
    wins = stats.mannwhitneyu(scores[test.labels == 1], scores[test.labels == 0]).statistic
    positives = int(test.labels.sum())
    assert wins / (positives * (400 - positives)) > 0.9
