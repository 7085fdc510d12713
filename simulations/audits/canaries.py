"""Made-up patients whose gradients the auditor computes alone, by one ordinary backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from client.data.dataset import PatientDataset
from shared.config import require
from shared.models import (
    build_model,
    initial_parameters,
    input_shape,
    load_parameters,
    trained,
)
from shared.parameters import FlatVector, ParameterSpec
from shared.plan import StudyPlan

SATURATED = 64.0
"""A logit at which float32's sigmoid is exactly 1: a positive record has no gradient at all."""

STRENGTHS = np.array([1.0, 0.3, 1.0, 3.0, 0.05, 1.0, 20.0, 1.0])
"""Of patients' records, in turn: 1 fills the plan's range."""

MOST_VALUES = 1 << 27
"""Numbers in a matrix of gradients, at most."""


@dataclass(frozen=True)
class Canaries:
    """Patients with known gradients at one start.

    Attributes:
        data: The patients.
        clipped: What each should add to the sum, in units of the clip norm, float32 (patients, d).
        norms: Norm of each patient's gradient before clipping, in the same unit.
    """

    data: PatientDataset
    clipped: NDArray[np.float32]
    norms: NDArray[np.float64]


def gradients(plan: StudyPlan, start: FlatVector, data: PatientDataset) -> NDArray[np.float32]:
    """Each patient's gradient: the mean of its records', float32 (patients, d); the definition."""
    model = build_model(plan)
    load_parameters(model, start)
    model.train()
    parameters = list(trained(model).values())
    rows = []
    for records in data.records_of:
        used = records[: plan.training.max_records_per_patient]
        losses = functional.binary_cross_entropy_with_logits(
            model(torch.from_numpy(data.inputs[used])),
            torch.from_numpy(data.labels[used].astype(np.float32)),
        )
        found = torch.autograd.grad(losses, parameters)
        rows.append(torch.cat([g.reshape(-1) for g in found]).numpy())
    return np.stack(rows)


def candidates(
    plan: StudyPlan,
    count: int,
    rng: np.random.Generator,
    *,
    tame: bool = False,
    labelled: bool = False,
) -> PatientDataset:
    """Unlike patients of the plan's shape: both labels, 1 to 3 records, faint to far too strong.

    Args:
        tame: All records positive and none out of range, so that one start saturates them all.
        labelled: One record each, in range, with labels of both kinds.
    """
    most = plan.training.max_records_per_patient
    counts = [1 if labelled else min(most, 1 + i % 3) for i in range(count)]
    owners = np.repeat(np.arange(count), counts).astype(np.int64)
    shape = input_shape(plan)
    strengths = np.where(tame or labelled, 1.0, STRENGTHS[owners % len(STRENGTHS)])
    inputs = np.stack([s * _record(shape, rng) for s in strengths])
    if tame and len(shape) == 1:
        inputs[:, shape[0] // 2 :] = 0.0  # coordinates that no gradient reaches
    labels = ((rng.random(len(owners)) < 0.5) | tame).astype(np.int64)
    names = tuple(f"canary-{i}" for i in range(count))
    return PatientDataset(inputs.astype(np.float32), labels, owners, names)


def _record(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    noise = rng.uniform(-1, 1, shape)
    if len(shape) == 1:
        sparse = rng.random(shape) < rng.choice([0.3, 1.0])
        return np.asarray(noise * sparse)
    waves = rng.uniform(0.1, 3.0, 2)
    rows, columns = np.indices(shape[1:])
    stripes = np.sin(waves[0] * rows + waves[1] * columns + rng.uniform(0, 6))
    centre = rng.uniform(0, shape[1:])
    away = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2
    spot = np.exp(-away / rng.uniform(2, 40)) * np.ones(shape)
    parts = rng.dirichlet(np.ones(3))
    return np.asarray(parts[0] * noise + parts[1] * stripes + parts[2] * (2 * spot - 1))


def distinct_canaries(
    plan: StudyPlan,
    start: FlatVector,
    most: int,
    rng: np.random.Generator,
    *,
    tame: bool = False,
) -> Canaries:
    """Up to `most` patients whose clipped gradients can be told apart in any sum of them.

    From a pool, the patient that the others explain least is taken next (pivoted Cholesky).
    """
    wanted = max(1, min(most, len(start) // 2))
    pool = max(wanted, min(5 * wanted, MOST_VALUES // len(start)))
    data = candidates(plan, pool, rng, tame=tame)
    clipped, norms = _clipped(plan, gradients(plan, start, data))
    rest, chosen = clipped.astype(np.float64), list[int]()
    for _ in range(wanted):
        energy = np.sum(rest**2, axis=1)
        best = int(energy.argmax())
        if chosen and energy[best] < 2e-3:
            break
        chosen.append(best)
        axis = rest[best] / np.sqrt(energy[best])
        rest -= np.outer(rest @ axis, axis)
    order = np.sort(np.array(chosen))
    return Canaries(data.select(order), clipped[order], norms[order])


def kinds(
    plan: StudyPlan, start: FlatVector, patients: int, rng: np.random.Generator
) -> tuple[Canaries, NDArray[np.int64]]:
    """Many patients of few kinds, so that every sum of them lies in a space of few dimensions.

    Returns:
        The kinds (one canary each), and the kind of each of `patients` patients.
    """
    basis = distinct_canaries(plan, start, min(3, max(1, len(start) // 8)), rng, tame=True)
    kind = np.arange(patients) % basis.data.patient_count
    return basis, kind


def repeated(basis: Canaries, kind: NDArray[np.int64]) -> PatientDataset:
    """One patient per entry of `kind`, each with that kind's records."""
    parts = [basis.data.records_of[k] for k in kind.tolist()]
    rows = np.concatenate(parts)
    owners = np.repeat(np.arange(len(kind)), [len(p) for p in parts]).astype(np.int64)
    names = tuple(f"patient-{i}" for i in range(len(kind)))
    return PatientDataset(basis.data.inputs[rows], basis.data.labels[rows], owners, names)


def live_start(plan: StudyPlan) -> FlatVector:
    """The plan's own start, its last bias moved so that the two labels pull unequally."""
    start = initial_parameters(plan)
    start[-1] += np.float32(1.0)
    return start


def saturated_start(plan: StudyPlan, data: PatientDataset) -> FlatVector:
    """A start at which a positive record has exactly no gradient: what leaves is noise alone.

    Raises:
        ConfigError: the model's last parameter is not the bias of its logit.
    """
    start = initial_parameters(plan)
    start[-1] += np.float32(SATURATED)
    largest = np.abs(gradients(plan, start, data)).max()
    require(
        largest == 0.0, "the model's last parameter is not its logit's bias; nothing is saturated"
    )
    return start


def tensor_of(spec: ParameterSpec) -> NDArray[np.int64]:
    """Which tensor each coordinate of the flat vector belongs to, int64 (d,)."""
    return np.repeat(np.arange(len(spec.sizes)), spec.sizes)


def _clipped(
    plan: StudyPlan, found: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    norms = np.linalg.norm(found.astype(np.float64), axis=1) / plan.privacy.promise[2]
    scale = plan.privacy.promise[2] * np.maximum(norms, 1.0)
    return (found / scale[:, None]).astype(np.float32), norms
