"""Counts of the plan's own task, whatever its kind: what one patient moves, and the noise for it.

The releases of a whole site are looked at on a binary stand-in (count_probes.py), whose counts
the auditor can compute alone. Here the rule by which the plan counts is given hostile records:
answers of any size, not-a-numbers, many records a patient. The auditor needs the layout alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from client.counting import counts_of, noisy_counts
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from shared.counts import count_kind, count_noise
from shared.models import input_shape
from shared.more_counts import group_cells, importance_cells
from shared.outcomes import VALUE_CELLS
from shared.plan import StudyPlan
from shared.privacy import count_noise_multiplier
from shared.tasks import task_kind
from simulations.audits.count_probes import site_deviation
from simulations.audits.measure import Check, scale_interval, scale_p

PEOPLE, TRIALS, NOISY = 24, 6, 64
_RECORDS = (1, 1, 2, 3, 7)
_COUNTED = 0.3  # of a patient's weight: seven records in as many cells still move more


def own_count_checks(plan: StudyPlan, rng: np.random.Generator) -> list[Check]:
    """What a release of the plan's own counts holds, for a plan that learns and releases them."""
    return [_moves(plan, rng), _noise(plan, rng)]


def auditors_blocks(plan: StudyPlan) -> list[int]:
    """Cells of each block in which one patient weighs 1 at most, in the order of a release."""
    bins, task = plan.evaluation.bins, plan.task
    classes, intervals = len(task.classes), len(task.intervals)
    own = {
        "binary": [2 * bins],
        "multiclass": [2 * bins] * classes + [classes**2],
        "regression": [1] * VALUE_CELLS,
        "survival": [(2 * intervals + 1) * bins] * intervals,
    }[task.kind]
    more = [group_cells(plan, group) for group in plan.evaluation.groups]
    importances = importance_cells(plan)
    return own + more + ([importances] if importances else [])


def hostile(
    plan: StudyPlan, rng: np.random.Generator
) -> tuple[PatientDataset, NDArray[np.float32], NDArray[np.float64]]:
    """Patients of 1 to 7 records, what a model might say of them, and how features move it."""
    owners = np.repeat(np.arange(PEOPLE), rng.choice(_RECORDS, PEOPLE)).astype(np.int64)
    inputs = rng.uniform(-1, 1, (len(owners), *input_shape(plan))).astype(np.float32)
    kind = task_kind(plan.task)
    labels = rng.integers(0, kind.codes(plan.task), len(owners))
    labels[::5] = kind.codes(plan.task) - 1  # the ends of a range weigh most
    width = kind.outputs(plan.task)
    outputs = rng.normal(0, 10 ** rng.uniform(-1, 2), (len(owners), width))
    strange = np.array([0.0, 1e30, -1e30, np.inf, -np.inf, np.nan])
    at = rng.random(outputs.shape) < 0.3
    outputs[at] = rng.choice(strange, int(at.sum()))
    moved = rng.uniform(0, 1, (len(owners), len(plan.task.features)))
    moved[::3] = 1.0
    moved[1::7] = np.nan
    people = tuple(f"canary-{i}" for i in range(PEOPLE))
    answers = outputs.astype(np.float32)
    answers = answers[:, 0] if plan.task.kind in ("binary", "regression") else answers
    if not plan.evaluation.importance_clip:
        moved = np.zeros((0, 0))
    return PatientDataset(inputs, labels, owners, people), answers, moved


def _moves(plan: StudyPlan, rng: np.random.Generator) -> Check:
    """Leave one patient out at a time."""
    noise, blocks = count_noise(plan), auditors_blocks(plan)
    ends = np.cumsum(blocks)
    single, whole, least = 0.0, 0.0, math.inf
    if ends[-1] != count_kind(plan).cells(plan):
        return _layout(int(ends[-1]), count_kind(plan).cells(plan))
    for _ in range(TRIALS):
        data, answers, moved = hostile(plan, rng)
        everyone = counts_of(plan, data, answers, noise, moved)
        for absent in range(PEOPLE):
            rest = np.flatnonzero(data.patients != absent)
            left = data.select(np.delete(np.arange(PEOPLE), absent))
            those = moved[rest] if len(moved) else moved
            change = everyone - counts_of(plan, left, answers[rest], noise, those)
            parts = np.split(change.astype(np.float64), ends[:-1])
            norms = [float(np.linalg.norm(part)) / noise.unit for part in parts]
            joint = math.hypot(*norms)
            single, whole, least = max(single, *norms), max(whole, joint), min(least, joint)
    limit = math.sqrt(len(blocks))
    counted = least > _COUNTED
    return Check(
        "own-count-sensitivity",
        "one patient, with whatever records and answers, moves each block of the plan's own "
        "counts by at most one patient's weight",
        "largest move of a block when a patient is left out, over the accounted one",
        1.0 if max(single, whole / limit) <= 1 + 1e-9 and counted else 0.0,
        max(single, whole / limit), 1.0,
        note="" if counted else "A patient was not counted at all.",
    )  # fmt: skip


def _layout(audited: int, released: int) -> Check:
    return Check(
        "own-count-sensitivity",
        "a release holds the cells that the plan names and no others",
        "cells of a release",
        0.0, float(released), float(audited),
    )  # fmt: skip


def _noise(plan: StudyPlan, rng: np.random.Generator) -> Check:
    """What is added to a release of the plan's own size, against the auditor's own figure."""
    noise, told = count_noise(plan), count_noise_multiplier(plan) or 0.0
    deviation = site_deviation(plan, told, noise.unit, len(auditors_blocks(plan)))
    data, answers, moved = hostile(plan, rng)
    clean = counts_of(plan, data, answers, noise, moved)
    key = ChaChaRandom(rng.bytes(32))
    seen = np.stack([noisy_counts(clean, noise, key) - clean for _ in range(NOISY)])
    z = seen / (deviation * noise.unit)
    energy = float(np.mean(z**2))
    low, high = scale_interval(energy, z.size)
    return Check(
        "own-count-noise",
        "noise on the plan's own counts has the scale that was accounted for, over all blocks",
        "standard deviation of a cell's noise, over the accounted one",
        float(scale_p(energy, z.size)), math.sqrt(energy), 1.0, interval=(low, high),
    )  # fmt: skip
