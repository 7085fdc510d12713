"""Local training: what a step's gradient is, and that nothing else can slip into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from training_cases import make_data, make_plan

from client.clipping import RecordGradients
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer, binary_losses, choose_device, physical_batches
from shared.errors import ConfigError, SensitivityError
from shared.models import build_model, initial_parameters, load_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan

KEY = bytes(range(32))
DIVISOR = 0.5 * 20  # sample_rate times expected_patients of make_plan


def clipped_sum(
    plan: StudyPlan, data: PatientDataset, start: FlatVector | None = None, most: int | None = None
) -> FlatVector:
    """The sum before noise over all patients, as the trainer computes it."""
    trainer = LocalTrainer(
        plan, "site-0", data, 0.0, "cpu", max_physical_records=most, measuring=True
    )
    everyone = np.arange(data.patient_count)
    start = initial_parameters(plan) if start is None else start
    divisor = np.float32((plan.training.sample_rate or 1) * 20)
    return trainer.gradient(start, everyone, ChaChaRandom(KEY)) * divisor


def patient_gradients(plan: StudyPlan, data: PatientDataset, start: FlatVector) -> list[FlatVector]:
    """Each patient's gradient by one ordinary backward pass: the definition."""
    model = build_model(plan)
    load_parameters(model, start)
    gradients = []
    for rows in data.records_of:
        model.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(
            model(torch.from_numpy(data.inputs[rows])),
            torch.from_numpy(data.labels[rows].astype(np.float32)),
            reduction="none",
        )
        torch.autograd.backward(losses.mean())
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).numpy().copy())
    return gradients


# --- the sum before noise -------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize(
    ("model", "image"), [("logistic", None), ("mlp", None), ("cnn", 16), ("resnet18", 16)]
)
def test_the_sum_is_the_per_patient_definition(model: str, image: int | None, clip: float) -> None:
    plan = make_plan(model, image=image, model={"width": 8}, privacy={"clip_norm": clip})
    data = make_data(plan, records_each=[1, 3, 2, 1, 5])
    start = initial_parameters(plan)
    want = np.zeros(len(start))
    for g in patient_gradients(plan, data, start):
        want += g * min(1.0, clip / np.linalg.norm(g))
    got = clipped_sum(plan, data, start)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.linalg.norm(want))


@given(st.lists(st.integers(1, 6), max_size=30), st.integers(1, 10))
def test_physical_batches_cover_all_in_order_and_split_nobody(counts: list[int], most: int) -> None:
    runs = physical_batches(np.array(counts, dtype=np.int64), most)
    assert list(itertools.chain(*(counts[r] for r in runs))) == counts
    for r in runs:
        assert sum(counts[r]) <= most or len(counts[r]) == 1
        assert counts[r]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 20))
def test_the_physical_batch_never_changes_the_result(counts: list[int], most: int) -> None:
    plan = make_plan("mlp", privacy={"clip_norm": 0.1})
    data = make_data(plan, records_each=counts)
    whole = clipped_sum(plan, data, most=1000)
    np.testing.assert_allclose(clipped_sum(plan, data, most=most), whole, atol=1e-6)


def test_memory_is_bounded_by_the_physical_batch() -> None:
    sizes: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            logits: Tensor = self.linear(x)
            return logits.squeeze(1)

    plan = make_plan(training={"sample_rate": 1.0})
    data = make_data(plan, records_each=[1, 2, 6, 1, 1, 1, 1, 1, 1])
    trainer = LocalTrainer(
        plan, "site-0", data, 1.0, "cpu", max_physical_records=4, build=lambda _: Watched()
    )
    sizes.clear()
    trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    assert sizes == [3, 6, 4, 2]  # the patient with six records is alone, and whole


@pytest.mark.parametrize(("model", "image"), [("logistic", None), ("resnet18", 224)])
def test_the_default_physical_batch_shrinks_with_the_model(model: str, image: int | None) -> None:
    plan = make_plan(model, image=image, model={"width": 64 if image else 16})
    trainer = LocalTrainer(plan, "site-0", make_data(plan, 1), 1.0, "cpu")
    gradient_bytes = 4 * sum(p.numel() for p in trainer.module.parameters())
    assert 1 <= trainer._max_records <= 512
    assert trainer._max_records * gradient_bytes <= 1 << 30


# --- the unit is the patient ----------------------------------------------------------------


def with_many_records(plan: StudyPlan, many: int) -> tuple[PatientDataset, PatientDataset]:
    """Ten patients and an eleventh with `many` like records; and the ten without."""
    others = make_data(plan, 10)
    inputs = np.concatenate([others.inputs, np.ones((many, 5), dtype=np.float32)])
    labels = np.concatenate([others.labels, np.zeros(many, dtype=np.int64)])
    patients = np.concatenate([others.patients, np.full(many, 10)])
    return PatientDataset(inputs, labels, patients, (*others.patient_ids, "many")), others


def test_a_patient_with_many_records_moves_the_sum_by_at_most_c() -> None:
    clip = 0.1
    plan = make_plan(privacy={"clip_norm": clip}, training={"max_records_per_patient": 40})
    data, others = with_many_records(plan, 40)
    moved = np.linalg.norm(clipped_sum(plan, data) - clipped_sum(plan, others))
    assert 0.99 * clip < moved <= clip * (1 + 1e-4)
    # The same records as patients of their own: what a row-wise unit would let through.
    rows = PatientDataset(
        data.inputs, data.labels, np.arange(50), tuple(f"row-{i}" for i in range(50))
    )
    assert np.linalg.norm(clipped_sum(plan, rows) - clipped_sum(plan, others)) > 39 * clip


def test_records_past_the_plans_limit_are_unused() -> None:
    plan = make_plan(training={"max_records_per_patient": 3})
    data, _ = with_many_records(plan, 9)
    changed = PatientDataset(
        np.where(np.arange(19)[:, None] < 13, data.inputs, np.float32(-1)),
        data.labels,
        data.patients,
        data.patient_ids,
    )
    assert np.array_equal(clipped_sum(plan, data), clipped_sum(plan, changed))


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


# --- faults in data, model, loss ------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1e10, 1.0, 0.0), (1e10, -1e10, 0.0)])
def test_a_non_finite_gradient_counts_as_zero(weights: tuple[float, float, float]) -> None:
    plan = make_plan(features=2)
    start = np.array(weights, dtype=np.float32)
    good = make_data(plan, 6)
    # The logit is infinite and the gradient's norm overflows; or it is inf - inf, not a number.
    huge = np.full((2, 2), 3e38, dtype=np.float32)
    both = PatientDataset(
        np.concatenate([good.inputs[:3], huge, good.inputs[3:]]),
        np.concatenate([good.labels[:3], np.zeros(2, np.int64), good.labels[3:]]),
        np.array([0, 1, 2, 3, 3, 4, 5, 6]),
        tuple(f"p{i}" for i in range(7)),
    )
    for most in (3, 100):
        total = clipped_sum(plan, both, start, most)
        assert np.isfinite(total).all()
        np.testing.assert_allclose(total, clipped_sum(plan, good, start), atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(1, 3), padding=(0, 2), bias=False),
        nn.Conv2d(3, 4, 3, dilation=(2, 1)),
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 6, 3, groups=3),
    ],
)
def test_convolutions_give_each_records_own_gradient(layer: nn.Conv2d) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 9, 8, generator=rng)
    weights = torch.randn(layer(x).shape, generator=rng)
    want = []
    for i in range(4):
        layer.zero_grad()
        torch.autograd.backward((layer(x[i : i + 1]) * weights[i]).sum())
        want.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    layer.zero_grad()
    hooked = RecordGradients(layer, x[:1])
    hooked.backward((hooked(x) * weights).sum())
    for j, p in enumerate(layer.parameters()):
        expected = torch.stack([w[j] for w in want])
        torch.testing.assert_close(p.grad_sample, expected)  # type: ignore[attr-defined]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits.squeeze(1)


class Flattened(nn.Module):
    """Five time steps of one value, folded into the batch: rows that are not records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps: Tensor = self.linear(x.reshape(-1, 1))
        return steps.reshape(len(x), 5).sum(dim=1)


class Column(nn.Module):
    """Logits of shape (records, 1), which broadcast against labels (records,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits


class OneRowForAll(nn.Module):
    """A layer that sees one row for all records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(5, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x) + self.shift(torch.ones(1, 1))
        return logits.squeeze(1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Unused, "Use every parameter once"),
        (OneRowForAll, "Use every parameter once"),
        (Flattened, "keep the records as the first dimension"),
        (Column, r"logits of shape \(\d+, 1\)"),
    ],
)
def test_models_whose_gradients_are_not_per_record_are_refused(
    build: Callable[[], nn.Module], message: str
) -> None:
    plan = make_plan(training={"sample_rate": 1.0})
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu", build=lambda _: build())
    d = sum(p.numel() for p in trainer.module.parameters())
    with pytest.raises(SensitivityError, match=message):
        trainer.train_round(np.ones(d, dtype=np.float32), ChaChaRandom(KEY), 1)


def test_opacus_alone_takes_the_flattened_rows_for_records() -> None:
    # What the check above stands against: 5 rows a record, each clipped on its own.
    plan = make_plan(training={"sample_rate": 1.0}, privacy={"clip_norm": 0.01})
    module = Flattened()
    trainer = LocalTrainer(plan, "site-0", make_data(plan, 1), 1.0, "cpu", build=lambda _: module)
    hooked, clipper = trainer._hooked, trainer._clipper
    assert hooked is not None
    assert clipper is not None
    hooked.backward(hooked(torch.ones(1, 5)).sum())
    clipper.clip_and_accumulate()
    moved = torch.cat([p.summed_grad.flatten() for p in module.parameters()]).norm()  # type: ignore[attr-defined]
    assert moved > 4.9 * 0.01


@pytest.mark.parametrize(
    "losses",
    [
        lambda z, y: binary_losses(z, y).mean(),
        lambda z, y: binary_losses(z, y).sum(),
        lambda z, y: binary_losses(z, y)[:, None],
        lambda z, y: functional.softplus(z[:, None] - z[None, :]) * y[:, None],
    ],
    ids=["mean", "sum", "column", "pairs"],
)
def test_losses_that_are_not_one_per_record_are_refused(
    losses: Callable[[Tensor, Tensor], Tensor],
) -> None:
    plan = make_plan(training={"sample_rate": 1.0})
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu", record_losses=losses)
    with pytest.raises(SensitivityError, match="own loss"):
        trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)


class Shared(nn.Module):
    """One layer used twice: both uses belong to the record."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return logits.squeeze(1)


def test_a_layer_used_twice_is_clipped_once() -> None:
    plan = make_plan(privacy={"clip_norm": 0.05})
    data = make_data(plan, 1)
    module = Shared()
    trainer = LocalTrainer(plan, "site-0", data, 0.0, "cpu", build=lambda _: module, measuring=True)
    start = np.full(36, 0.3, dtype=np.float32)
    got = trainer.gradient(start, np.array([0]), ChaChaRandom(KEY)) * DIVISOR
    plain = Shared()
    load_parameters(plain, start)
    labels = torch.from_numpy(data.labels.astype(np.float32))
    torch.autograd.backward(binary_losses(plain(torch.from_numpy(data.inputs)), labels).sum())
    want = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).numpy()
    np.testing.assert_allclose(got, want * 0.05 / np.linalg.norm(want), rtol=1e-4, atol=1e-6)


# --- rounds ---------------------------------------------------------------------------------


class RoundInterruptedError(Exception):
    """Stands for a timeout, a full memory, a killed worker."""


@pytest.mark.parametrize("where", ["loss", "backward", "noise", "step"])
def test_an_interrupted_round_leaves_nothing_behind(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("mlp", training={"sample_rate": 1.0, "momentum": 0.9, "local_steps": 2})
    data, start = make_data(plan, 12), initial_parameters(plan)
    calls, armed = 0, True

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
