"""The sensitivity guard: measures, before a study touches data, that its training keeps C.

Differential privacy rests on one fact: removing a patient moves the sum before noise by at most
the clip norm C. Libraries do not ensure it; a norm, a loss or a layout that mixes records breaks
it without any error. So each site runs the plan's own training path on made-up patients,
outliers among them, with the noise off, leaves one patient out at a time, and refuses the study
when the sum moves too far, or when a patient's part of it depends on who else is there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from client.engines import EngineName
from client.noise import ChaChaRandom
from client.training import BuildModel, LocalTrainer
from shared.config import require
from shared.errors import SensitivityError
from shared.models import build_model, input_shape, read_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.tasks import RecordLosses, task_kind

SENSITIVITY_LIMIT = 1 + 1e-4  # times C; the rest is float32 rounding
DEPENDENCE_LIMIT = 1e-4  # times C
TURN_LIMIT = 1e-2  # times C; more than a turn of rounding does, see `check_sensitivity`
ATTEMPTS = 3
NOISE_LIMIT = 0.06  # relative; seven standard errors of the measurement
_NOISE_COORDINATES = 8192
_NO_CLIPPING = 1e30

Frozen = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Measurement:
    """What leaving one patient out did, the worst over all patients.

    Attributes:
        sensitivity: How far the sum moved, in units of the clip norm; at most 1 is promised.
        dependence: How far that move is from the patient's sum alone, in the same unit; 0 where
            no patient's part depends on another's.
        largest: The largest patient's sum alone, in the same unit; near 0 the model stood still.
    """

    sensitivity: float
    dependence: float
    largest: float


@dataclass(frozen=True)
class GuardReport:
    """A passed check; its numbers concern made-up patients and may be shown to anyone."""

    model: str
    clip_norm: float
    patients: int
    records: int
    sensitivity: float
    dependence: float
    noise_scale: float


def check_sensitivity(
    plan: StudyPlan,
    device: str = "auto",
    *,
    engine: EngineName = "auto",
    build: BuildModel = build_model,
    record_losses: RecordLosses | None = None,
    trainer: type[LocalTrainer] = LocalTrainer,
) -> GuardReport:
    """Measure the plan's training path; return only if the promise holds.

    Two parameter vectors and three clip norms are tried, from one that clips every patient to
    one that clips none, since a fault may hide at either end. Noise is checked apart: what
    leaves an empty draw must spread by noise_multiplier C / divisor.

    Kernels round a batch and a single record differently. Where a value lies within rounding of
    the turn of a ReLU or of a tie of two maxima, that decides which way the gradient goes, at this
    parameter vector and hardly at another; a layer that mixes records does so at any. A dependence
    of that size is therefore measured again at other vectors, and refused if it is there at each.

    Args:
        plan: A plan of a private mode.
        device: As for `LocalTrainer`, and `engine`, too; use those that will train.
        build: The model factory, `record_losses` the loss, `trainer` the class: the shipped
            ones, unless a test injects a faulty one.

    Raises:
        SensitivityError: the promise does not hold, or could not be measured.
        ConfigError: mode none has nothing to guard; or the plan or model is refused outright.
    """
    require(plan.privacy.mode != "none", "privacy is off: there is no sensitivity to guard")
    site = plan.cohort.names[0]
    rate = plan.training.sample_rate or 1.0
    divisor = rate * plan.cohort.expected_patients(site)

    def new_trainer(data: PatientDataset, noise: float = 0.0) -> LocalTrainer:
        return trainer(
            plan, site, data, noise, device, engine=engine,
            build=build, record_losses=record_losses, measuring=True,
        )  # fmt: skip

    data = made_up_patients(plan)
    try:
        whole = new_trainer(data)
        before = _frozen_of(whole)
        start = read_parameters(build(plan))

        def measured(attempt: int) -> list[Measurement]:
            settings = _settings(plan, whole, start, divisor, attempt)

            def sums_of(part: PatientDataset) -> list[FlatVector]:
                one = new_trainer(part)
                everyone = np.arange(part.patient_count)
                return [
                    one.gradient(at, everyone, _stream(plan), clip_norm=clip) * np.float32(divisor)
                    for at, clip in settings
                ]

            found = leave_one_out(sums_of, data, [clip for _, clip in settings])
            if plan.training.max_records_per_patient > 1:
                # Engines take a shorter way where every patient has one record: measure it, too.
                settings = settings[-1:]
                found += leave_one_out(sums_of, _first_records(data), [settings[0][1]])
            return found

        attempts = [measured(0)]
        while _may_be_rounding(attempts[-1]) and len(attempts) < ATTEMPTS:
            attempts.append(measured(len(attempts)))
        noise_scale = _noise_scale(plan, new_trainer(data, 1.0), divisor)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise SensitivityError(
            f"model {plan.model.name!r}: per-patient gradients could not be measured "
            f"({type(error).__name__}: {error}). Change the model or the loss."
        ) from error
    _judge_frozen(plan, before, _frozen_of(whole))
    found = [m for attempt in attempts for m in attempt]
    worst = Measurement(
        max(m.sensitivity for m in found),
        _dependence(attempts[-1]),
        max(m.largest for m in found),
    )
    _judge(plan, worst, noise_scale)
    return GuardReport(
        model=plan.model.name,
        clip_norm=plan.privacy.promise[2],
        patients=data.patient_count,
        records=len(data.inputs),
        sensitivity=worst.sensitivity,
        dependence=worst.dependence,
        noise_scale=noise_scale,
    )


def _dependence(found: Sequence[Measurement]) -> float:
    return max(m.dependence for m in found)


def _may_be_rounding(found: Sequence[Measurement]) -> bool:
    return DEPENDENCE_LIMIT < _dependence(found) <= TURN_LIMIT


def leave_one_out(
    sums_of: Callable[[PatientDataset], Sequence[FlatVector]],
    data: PatientDataset,
    clip_norms: Sequence[float],
) -> list[Measurement]:
    """Compare the sums before noise of a dataset and of its neighbours.

    Args:
        sums_of: The training path: from a dataset to one sum, float32 (d,), per clip norm.
        data: At least two patients.
        clip_norms: C of each sum, in order.

    Returns:
        One measurement per clip norm. A sum that is not finite measures as infinity.
    """
    full = sums_of(data)
    rows: list[list[tuple[float, float, float]]] = [[] for _ in clip_norms]
    everyone = np.arange(data.patient_count)
    for patient in everyone:
        without = sums_of(data.select(np.delete(everyone, patient)))
        alone = sums_of(data.select(everyone[patient : patient + 1]))
        for i, clip in enumerate(clip_norms):
            moved = full[i].astype(np.float64) - without[i]
            rows[i].append(
                (_norm(moved) / clip, _norm(moved - alone[i]) / clip, _norm(alone[i]) / clip)
            )
    return [Measurement(*(max(column) for column in zip(*r, strict=True))) for r in rows]


def made_up_patients(plan: StudyPlan) -> PatientDataset:
    """Eight patients of the plan's shape, 1 to 4 records each, the same for every site.

    Three are uniform in the input range; the others are extreme: all at the top, all at the
    bottom, one value that stands out, a fine checkerboard, and one a thousand times out of range.
    """
    shape = input_shape(plan)
    draw = np.random.default_rng(list(hashlib.sha256(b"fedward-guard/1").digest()))
    spike = np.full(shape, -1.0)
    spike.flat[spike.size // 2] = 1.0
    checkers = (np.indices(shape).sum(axis=0) % 2) * 2.0 - 1.0
    most = plan.training.max_records_per_patient
    kinds: list[Callable[[], NDArray[np.float64]]] = [
        lambda: draw.uniform(-1, 1, shape),
        lambda: draw.uniform(-1, 1, shape),
        lambda: draw.uniform(-1, 1, shape),
        lambda: np.ones(shape),
        lambda: -np.ones(shape),
        lambda: spike,
        lambda: checkers,
        lambda: 1000 * draw.uniform(-1, 1, shape),
    ]
    counts = [min(c, most) for c in (1, 2, 1, 1, 2, 1, 1, 4)]
    inputs = np.stack([kind() for kind, count in zip(kinds, counts, strict=True)
                       for _ in range(count)]).astype(np.float32)  # fmt: skip
    patients = np.repeat(np.arange(len(kinds)), counts)
    codes = task_kind(plan.task).codes(plan.task)
    labels = (np.arange(len(patients)) % 3 == 0) + (np.arange(len(patients)) // 3 * 2) % codes
    labels = np.minimum(labels, codes - 1).astype(np.int64)
    return PatientDataset(inputs, labels, patients, tuple(f"made-up-{i}" for i in range(8)))


def _first_records(data: PatientDataset) -> PatientDataset:
    rows = np.array([records[0] for records in data.records_of])
    return PatientDataset(
        data.inputs[rows], data.labels[rows], np.arange(len(rows)), data.patient_ids
    )


def _settings(
    plan: StudyPlan, whole: LocalTrainer, initial: FlatVector, divisor: float, attempt: int
) -> list[tuple[FlatVector, float]]:
    """(parameters, clip norm) pairs: the plan's own, one that clips all, one that clips half.

    Attempts after number 0 take other vectors near the plan's own and away from it.
    """
    stream = _stream(plan, attempt)
    away = 2 * initial + np.float32(0.1) * stream.gaussian(len(initial))
    if attempt:
        initial = initial + np.float32(0.01) * stream.gaussian(len(initial))
    norms = [
        _norm(whole.gradient(away, np.array([i]), _stream(plan), clip_norm=_NO_CLIPPING)) * divisor
        for i in range(whole.data.patient_count)
    ]
    moving = [n for n in norms if 0 < n < math.inf]
    if not moving:
        raise SensitivityError(
            f"model {plan.model.name!r}: no made-up patient moves it, so nothing can be "
            "measured. Its gradient is zero or not finite; change the model or the loss."
        )
    return [
        (initial, plan.privacy.promise[2]),
        (away, 0.5 * min(moving)),
        (away, float(np.median(moving))),
    ]


def _noise_scale(plan: StudyPlan, noisy: LocalTrainer, divisor: float) -> float:
    """Measured spread of what leaves empty draws, over noise_multiplier C / divisor."""
    stream, nobody = _stream(plan), np.zeros(0, dtype=np.int64)
    start = read_parameters(noisy.module)
    draws = -(-_NOISE_COORDINATES // len(start))
    values = np.concatenate([noisy.gradient(start, nobody, stream) for _ in range(draws)])
    spread = math.sqrt(float(np.mean(values.astype(np.float64) ** 2)))
    return spread * divisor / plan.privacy.promise[2]


def _judge(plan: StudyPlan, worst: Measurement, noise_scale: float) -> None:
    name, sensitivity, dependence = plan.model.name, worst.sensitivity, worst.dependence
    if not sensitivity <= SENSITIVITY_LIMIT:
        raise SensitivityError(
            f"model {name!r}: leaving one patient out moves the sum before noise by "
            f"{sensitivity:.4g} times the clip norm; at most 1 keeps the promise. A norm over "
            "the batch, a loss that averages over records, or a layer that mixes them does this; "
            "use parts that see one record at a time, such as GroupNorm."
        )
    if not dependence <= DEPENDENCE_LIMIT:
        raise SensitivityError(
            f"model {name!r}: a patient's part of the sum changes by {dependence:.4g} times the "
            f"clip norm with who else is in the batch; at most {DEPENDENCE_LIMIT:g} is rounding. "
            "Divide by public constants, and compute each record's loss from that record alone."
        )
    if worst.largest < 0.5:
        raise SensitivityError(f"model {name!r}: the made-up patients hardly move it; no proof.")
    if not abs(noise_scale - 1) <= NOISE_LIMIT:
        raise SensitivityError(
            f"model {name!r}: what leaves carries {noise_scale:.3f} times the noise that is "
            "accounted for; it must be 1."
        )


def _judge_frozen(plan: StudyPlan, before: Frozen, after: Frozen) -> None:
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            raise SensitivityError(
                f"model {plan.model.name!r}: its frozen {name} changes as it sees patients, and "
                "what is frozen is neither clipped nor noised. Keep no state there."
            )


def _frozen_of(trainer: LocalTrainer) -> Frozen:
    named = trainer.module.named_parameters()
    return {name: p.detach().clone() for name, p in named if not p.requires_grad}


def _stream(plan: StudyPlan, attempt: int = 0) -> ChaChaRandom:
    return ChaChaRandom(hashlib.sha256(plan.canonical_bytes + bytes(attempt)).digest())


def _norm(vector: NDArray[np.floating]) -> float:
    size = float(np.linalg.norm(vector.astype(np.float64)))
    return size if math.isfinite(size) else math.inf
