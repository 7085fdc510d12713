"""The sensitivity guard: shipped models pass, every known silent breach is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional
from training_cases import make_data, make_plan, model_plan

import client.clipping
from client.clipping import PatientClipper
from client.data.dataset import PatientDataset, RecordRows
from client.guard import Measurement, check_sensitivity, leave_one_out, made_up_patients
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.errors import ConfigError, SensitivityError
from shared.models import BUILDERS, load_parameters, starting_point
from shared.parameters import FlatVector
from shared.tasks import binary_losses

BREACH = "leaving one patient out|with who else is in the batch"


# --- what passes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        (name, clip)
        for name in sorted(set(BUILDERS) - {"none"})
        for clip in (1e-3, 1e3)
        if clip < 1 or not name.startswith("resnet")  # the largest ones once
    ],
)
def test_every_shipped_model_passes_at_any_clip_norm(name: str, clip: float) -> None:
    width = 8 if name in ("ft-transformer", "vit") else 4  # their least
    plan = model_plan(name, model={"width": width}, privacy={"clip_norm": clip})
    report = check_sensitivity(plan, "cpu")
    assert 0.5 < report.sensitivity <= 1 + 1e-4
    assert report.dependence <= 1e-4
    assert report.noise_scale == pytest.approx(1, abs=0.06)
    assert report.patients == 8
    assert report.records > report.patients


def test_the_check_is_the_same_at_every_site_and_every_time() -> None:
    plan = make_plan("mlp")
    assert check_sensitivity(plan, "cpu") == check_sensitivity(plan, "cpu")


def test_the_made_up_patients_hold_outliers_and_several_records() -> None:
    data = made_up_patients(make_plan("cnn", image=16))
    assert np.abs(data.inputs).max() > 100
    assert {len(rows) for rows in data.records_of} == {1, 2, 4}
    assert set(data.labels.tolist()) == {0, 1}
    one = made_up_patients(make_plan(training={"max_records_per_patient": 1}))
    assert {len(rows) for rows in one.records_of} == {1}


def test_without_privacy_there_is_nothing_to_guard() -> None:
    off = make_plan(privacy={"mode": "none"}, training={"batch_size": 4})
    with pytest.raises(ConfigError, match="privacy is off"):
        check_sensitivity(off, "cpu")


# --- faulty models --------------------------------------------------------------------------


class Faulty(nn.Module):
    """A perceptron that does something to the batch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

    def mix(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(torch.tanh(self.first(x))))
        return logits.squeeze(1)


class CentredByBatch(Faulty):
    def mix(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(dim=0)


class BatchNormWithoutAModule(Faulty):
    def mix(self, hidden: Tensor) -> Tensor:
        return (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()


class ScaledByBatchSize(Faulty):
    def mix(self, hidden: Tensor) -> Tensor:
        return hidden * len(hidden) ** 0.5


class NeighbourhoodPooling(Faulty):
    """Records as the nodes of a graph: each row also sees the row before it."""

    def mix(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.roll(1, dims=0)


class Counting(Faulty):
    """State outside the parameters: what came before changes what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def mix(self, hidden: Tensor) -> Tensor:
        self.seen += len(hidden)
        return hidden * self.seen


class Detached(Faulty):
    """No parameter gets a gradient: nothing would be measured."""

    def mix(self, hidden: Tensor) -> Tensor:
        return hidden * 0


class HeadFrozenOut(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


class FlattenedSteps(nn.Module):
    """(records * steps, 1) through a Linear: rows that are not records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps: Tensor = self.linear(x.reshape(-1, 1))
        return steps.reshape(len(x), -1).sum(dim=1)


def started(module: nn.Module) -> nn.Module:
    load_parameters(module, starting_point(module, 0))
    return module


def check(module: Callable[[], nn.Module], **faults: Any) -> None:
    check_sensitivity(make_plan(), "cpu", build=lambda _: started(module()), **faults)


def test_the_same_model_without_a_fault_passes() -> None:
    check(Faulty)


@pytest.mark.parametrize(
    "module",
    [CentredByBatch, BatchNormWithoutAModule, ScaledByBatchSize, NeighbourhoodPooling, Counting],
)
def test_models_that_mix_records_are_caught(module: type[nn.Module]) -> None:
    with pytest.raises(SensitivityError, match=BREACH):
        check(module)


def test_flattened_sequences_are_caught() -> None:
    with pytest.raises(SensitivityError, match="first dimension"):
        check(FlattenedSteps)


def test_flattened_sequences_are_caught_by_measurement_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Opacus as it is: rows as they come, each clipped as if it were a record.
    monkeypatch.setattr(client.clipping, "_by_patient", lambda sample, *_: sample)
    with pytest.raises(SensitivityError, match="leaving one patient out"):
        check(FlattenedSteps, engine="hooks")


@pytest.mark.parametrize("module", [HeadFrozenOut, Detached])
def test_a_model_that_hardly_learns_proves_nothing_or_passes_honestly(
    module: type[nn.Module],
) -> None:
    if module is HeadFrozenOut:
        with pytest.raises(SensitivityError, match="no made-up patient moves it"):
            check(module)
    else:
        check(module)  # the head's bias still learns, and is clipped


class FrozenBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        for p in self.norm.parameters():
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.first(x))))
        return logits.squeeze(1)


def test_frozen_batch_norm_passes_opacus_and_is_refused_here_by_name() -> None:
    assert ModuleValidator.validate(FrozenBatchNorm(), strict=False) == []  # the trap
    with pytest.raises(ConfigError, match="norm is a BatchNorm1d"):
        check_sensitivity(make_plan(), "cpu", build=lambda _: FrozenBatchNorm())


def test_tied_and_unused_parameters_are_refused() -> None:
    class Tied(Faulty):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(5, 8)
            self.second.weight = self.first.weight

    class Unused(Faulty):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="are tied"):
        check_sensitivity(make_plan(), "cpu", build=lambda _: Tied())
    with pytest.raises(SensitivityError, match="every parameter once"):
        check(Unused)


# --- faulty losses --------------------------------------------------------------------------


def class_weighted_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """CrossEntropyLoss(weight=...) averages by the batch's summed weights."""
    weights = torch.where(labels > 0, 3.0, 1.0)
    return binary_losses(logits, labels) * weights / weights.sum()


def broadcast_column(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets of shape (B, 1) against logits (B,): every label meets every logit."""
    pairs = functional.binary_cross_entropy_with_logits(
        logits.expand(len(labels), -1), labels[:, None].expand(-1, len(labels)), reduction="none"
    )
    return pairs.mean(dim=1)


def pairwise_auc(logits: Tensor, labels: Tensor) -> Tensor:
    """Each positive against the batch's mean negative."""
    negatives = (logits * (1 - labels)).sum() / (1 - labels).sum().clamp(min=1)
    return functional.softplus(negatives - logits) * labels + binary_losses(logits, labels)


def mean_over_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    return binary_losses(logits, labels) / len(labels)


@pytest.mark.parametrize(
    "losses", [class_weighted_mean, broadcast_column, pairwise_auc, mean_over_the_batch]
)
def test_losses_that_depend_on_other_records_are_caught(
    losses: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(SensitivityError, match=BREACH):
        check_sensitivity(make_plan(), "cpu", record_losses=losses)


def test_a_constant_class_weight_is_no_fault() -> None:
    check_sensitivity(
        make_plan(),
        "cpu",
        record_losses=lambda z, y: binary_losses(z, y) * torch.where(y > 0, 3.0, 1.0),
    )


# --- faulty trainers ------------------------------------------------------------------------


class DividesByTrueCount(LocalTrainer):
    """Opacus' expected_batch_size: int(n q)."""

    def public_divisor(self, site_name: str) -> float:
        return max(1, int(self.data.patient_count * 0.5))


class DividesByHalfTheDeclared(LocalTrainer):
    def public_divisor(self, site_name: str) -> float:
        return super().public_divisor(site_name) / 2


class CountsRecordsNotPatients(LocalTrainer):
    def _accumulate(self, patients: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        for patient in patients:
            for row in self._records_of[patient]:
                one = self._records_of
                alone = np.ones(len(one), dtype=np.int64)
                self._records_of = RecordRows(np.array([row]), alone * 0, alone)
                super()._accumulate(np.array([patient]), np.array([1]))
                self._records_of = one


class ScalesTheLoss(LocalTrainer):
    """Not a breach: a constant factor, before clipping."""

    def _losses(self, inputs: Tensor, rows: Tensor) -> Tensor:
        return super()._losses(inputs, rows) * 2


class KeepsGradients(LocalTrainer):
    """What an interrupted round left flows into the next."""

    def _begin(self, start: FlatVector) -> None:
        kept = [getattr(p, "kept", 0) for p in self._parameters]
        super()._begin(start)
        self._kept = kept

    def _gradient(self, batch: NDArray[np.int64], random: ChaChaRandom) -> int:
        read = super()._gradient(batch, random)
        for p, kept in zip(self._parameters, self._kept, strict=True):
            assert p.grad is not None
            p.kept = p.grad.clone()  # type: ignore[attr-defined]
            p.grad += kept
        return read


@pytest.mark.parametrize(
    "trainer",
    [DividesByTrueCount, DividesByHalfTheDeclared, CountsRecordsNotPatients, KeepsGradients],
)
def test_trainers_that_break_the_promise_are_caught(trainer: type[LocalTrainer]) -> None:
    with pytest.raises(SensitivityError, match=BREACH):
        check_sensitivity(make_plan(), "cpu", trainer=trainer)


class Leaning(LocalTrainer):
    """Patients count a little less together than alone, at some parameter vectors."""

    size = 5e-4

    def leans_at(self, start: FlatVector) -> bool:
        return True

    def gradient(self, start: FlatVector, patients: NDArray[np.int64], *args: Any, **more: Any):
        found = super().gradient(start, patients, *args, **more)
        together = len(patients) > 1 and self.leans_at(start)
        return found * np.float32(1 - self.size if together else 1)


def turning_at(vectors: int, size: float = Leaning.size) -> tuple[type[Leaning], list[bytes]]:
    """A trainer that leans at the first so many vectors it is measured at, and those vectors."""
    seen: list[bytes] = []

    class Turning(Leaning):
        def leans_at(self, start: FlatVector) -> bool:
            if start.tobytes() not in seen:
                seen.append(start.tobytes())
            return seen.index(start.tobytes()) < vectors

    Turning.size = size
    return Turning, seen


def test_a_turn_of_rounding_at_one_vector_is_no_fault_and_the_same_at_every_vector_is() -> None:
    """A sound CNN was refused for one ReLU that turned where a plan's vectors happened to be."""
    for vectors, measured in [(0, 2), (1, 4), (2, 4), (4, 6)]:
        trainer, seen = turning_at(vectors)
        assert check_sensitivity(make_plan(), "cpu", trainer=trainer).dependence <= 1e-4
        assert len(seen) == measured
    trainer, seen = turning_at(6)
    with pytest.raises(SensitivityError, match="with who else is in the batch"):
        check_sensitivity(make_plan(), "cpu", trainer=trainer)
    assert len(seen) == 6


def test_more_than_a_turn_of_rounding_is_refused_at_once() -> None:
    trainer, seen = turning_at(1, 0.02)
    with pytest.raises(SensitivityError, match="with who else is in the batch"):
        check_sensitivity(make_plan(), "cpu", trainer=trainer)
    assert len(seen) == 2


def test_a_scaled_loss_is_no_fault() -> None:
    check_sensitivity(make_plan(), "cpu", trainer=ScalesTheLoss)


@pytest.mark.parametrize("scale", [0.0, 0.9, 1.5])
def test_wrong_noise_is_caught(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = PatientClipper.finish_step

    def faulty(self: PatientClipper, random: ChaChaRandom) -> None:
        kept, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier * scale
        finish(self, random)
        self.noise_multiplier = kept

    monkeypatch.setattr(PatientClipper, "finish_step", faulty)
    with pytest.raises(SensitivityError, match="times the noise that is accounted for"):
        check_sensitivity(make_plan(), "cpu")


def test_clipping_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_up(self: PatientClipper) -> None:
        for p in self.params:
            p.summed_grad = p.grad_sample.sum(dim=0)

    monkeypatch.setattr(PatientClipper, "_clip", add_up)
    with pytest.raises(SensitivityError, match="leaving one patient out"):
        check_sensitivity(make_plan(privacy={"clip_norm": 1e-3}), "cpu", engine="hooks")


def test_norms_of_millions_at_once_are_too_small_and_pieces_are_not() -> None:
    # Why PatientClipper hands Opacus pieces: float32 sums of squares lose what they add.
    row = torch.randn(1, 3_000_000, generator=torch.Generator().manual_seed(0)) ** 3
    p = nn.Parameter(torch.zeros(3_000_000))
    sgd = torch.optim.SGD([p], lr=1.0)
    clipper = PatientClipper(sgd, noise_multiplier=0.0, max_grad_norm=1.0, divisor=1.0)
    clipper.begin_step()
    p.grad_sample = row.clone()  # type: ignore[attr-defined]
    clipper.add_patients(torch.zeros(1, dtype=torch.int64), 1)
    exact = float(row.double().norm())
    clipped = float(p.summed_grad.double().norm())  # type: ignore[attr-defined]
    assert abs(clipped - 1) < 5e-6
    whole = float(row.norm(2, dim=-1))
    assert exact / whole - 1 > 1e-5  # clipping by this norm would let more than C through


# --- other engines, by the same measurement -------------------------------------------------


def ghost_sum(target_shape: str) -> Callable[[PatientDataset], list[FlatVector]]:
    """Opacus' ghost clipping on logits (B, 1) or (B,), noise off, loss mean, one step."""

    def sums_of(data: PatientDataset) -> list[FlatVector]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        inputs = torch.from_numpy(data.inputs)
        targets = torch.from_numpy(data.labels.astype(np.float32))[:, None]
        batches = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(inputs, targets), batch_size=len(inputs)
        )
        engine = PrivacyEngine()
        ghost, optimizer, criterion, _ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=batches,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode="ghost",
            criterion=nn.BCEWithLogitsLoss(),
        )
        optimizer.expected_batch_size = 1
        optimizer.zero_grad()
        inputs = inputs.requires_grad_(True)
        logits = ghost(inputs)
        if target_shape == "squeezed":
            loss = criterion(logits.squeeze(1), targets.squeeze(1))
        else:
            loss = criterion(logits, targets)
        loss.backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [torch.cat(parts).detach().numpy().copy()]

    return sums_of


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_ghost_clipping_with_column_targets_is_seen_to_break_the_promise() -> None:
    data = make_data(make_plan(), 12)
    loud = PatientDataset(data.inputs * 50, data.labels, data.patients, data.patient_ids)
    (column,) = leave_one_out(ghost_sum("column"), loud, [1.0])
    (squeezed,) = leave_one_out(ghost_sum("squeezed"), loud, [1.0])
    assert column.sensitivity > 5
    assert squeezed.sensitivity <= 1 + 1e-4


def test_leave_one_out_measures_a_known_breach_exactly() -> None:
    data = make_data(make_plan(), 4)

    def fair(part: PatientDataset) -> list[FlatVector]:
        return [np.array([part.patient_count], np.float32)]

    def mean(part: PatientDataset) -> list[FlatVector]:
        return [np.array([7.0], np.float32)]  # whoever is there

    assert leave_one_out(fair, data, [2.0]) == [Measurement(0.5, 0.0, 0.5)]
    assert leave_one_out(mean, data, [2.0]) == [Measurement(0.0, 3.5, 3.5)]


def test_a_sum_that_is_not_finite_measures_as_infinity() -> None:
    data = make_data(make_plan(), 3)

    def broken(part: PatientDataset) -> list[FlatVector]:
        return [np.array([np.nan if part.patient_count == 3 else 0.0], np.float32)]

    assert leave_one_out(broken, data, [1.0])[0].sensitivity == np.inf


def test_an_error_inside_the_path_is_a_refusal() -> None:
    class Broken(Faulty):
        def mix(self, hidden: Tensor) -> Tensor:
            return hidden.view(7, -1)

    with pytest.raises(SensitivityError, match="could not be measured"):
        check(Broken)
