"""A site's counts of its test patients as integers, with its part of the noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from client.discrete import discrete_gaussian
from client.noise import ChaChaRandom
from shared.counts import CountNoise, Units, count_kind
from shared.more_counts import moves_of
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.statistics import Records


def moves(
    plan: StudyPlan,
    data: PatientDataset,
    outputs: FlatVector,
    predict: Callable[[NDArray[np.float32]], FlatVector],
) -> NDArray[np.float64]:
    """How far each feature moves the model's answer, where the plan releases that; else empty."""
    if not plan.evaluation.importance_clip:
        return np.zeros((0, 0))
    return moves_of(plan.task, data.inputs, outputs, predict)


def counts_of(
    plan: StudyPlan,
    data: PatientDataset,
    outputs: FlatVector,
    noise: CountNoise,
    moved: NDArray[np.float64],
) -> Units:
    """What one release counts of these patients, in units and without noise; it stays here.

    Args:
        plan: The approved study.
        data: The patients.
        outputs: What the model says of each record.
        noise: From `count_noise`.
        moved: From `moves`.

    Returns:
        int64, shape (cells,). A patient's records share the weight of one.
    """
    records = Records(data.patients, data.labels, data.inputs, outputs, moved)
    return count_kind(plan).count(plan, records, noise.unit)


def clamped_cells(counts: Units, noise: CountNoise) -> int:
    """Cells that hold more than there is room for, and will be cut; for the site's own log."""
    return int(np.count_nonzero(np.abs(counts) > noise.clamp))


def noisy_counts(counts: Units, noise: CountNoise, random: ChaChaRandom) -> Units:
    """Clamp, and add this site's noise, in this order; nothing but reduction follows.

    Args:
        counts: From `counts_of`.
        noise: From `count_noise`; without deviation the counts stay exact (simulations).
        random: The site's stream.
    """
    whole = np.clip(counts, -noise.clamp, noise.clamp)
    if not noise.deviation:
        return whole
    return whole + discrete_gaussian(random, noise.deviation, len(whole))
