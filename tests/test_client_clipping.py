"""The sum before noise: patients clipped once, whatever the batch, the records or the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from training_cases import DIVISOR, KEY, clipped_sum, make_data, make_plan, patient_gradients

from client.clipping import HookedGradients, RecordGradients
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.training import LocalTrainer, physical_batches
from shared.errors import SensitivityError
from shared.models import initial_parameters, load_parameters
from shared.plan import StudyPlan
from shared.tasks import binary_losses

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


def test_physical_batches_are_about_equally_long() -> None:
    # One record each: 67 in batches of at most 64 are not 64 and 3.
    assert physical_batches(np.ones(67, dtype=np.int64), 64) == [slice(0, 34), slice(34, 67)]
    assert physical_batches(np.ones(64, dtype=np.int64), 64) == [slice(0, 64)]


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
        (Column, r"outputs of shape \(\d+, 1\)"),
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
    trainer = LocalTrainer(
        plan, "site-0", make_data(plan, 1), 1.0, "cpu", engine="hooks", build=lambda _: module
    )
    engine, clipper = trainer._engine, trainer._clipper
    assert isinstance(engine, HookedGradients)
    assert clipper is not None
    hooked = engine.hooked
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
