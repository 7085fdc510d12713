"""What a study counts of its patients, and the noise that goes on it.

Counts are sums of whole numbers: each patient has the weight of `unit` in each block of cells, and
the patient's records share it, so one patient moves a release by at most unit sqrt(blocks) in L2,
over all its histograms jointly. Discrete Gaussian noise is added to these integers before they
are masked, in full at each site in mode `local`, in shares in mode `distributed`. The argument is
in shared/PRIVACY.md, section "Counts".

A task kind has one row in `COUNTS`: how many cells, which blocks, how records are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared import more_counts, outcomes
from shared.distributed import SMOOTHING, WRAP_DEVIATIONS
from shared.errors import ConfigError
from shared.metrics import Reading, read_binary, score_histogram
from shared.plan import StudyPlan
from shared.privacy import count_noise_multiplier
from shared.statistics import Records, count_features, feature_cells, read_features
from shared.tasks import values_of

Units = NDArray[np.int64]

EXACT_UNIT = 5040
UNITS = (EXACT_UNIT, 840, 120, 60, 24, 12)
"""Ring units of one patient, finest first: many numbers of records divide them."""

ROOM = 4
"""A cell of one site has room for so many times the patients that the largest site declared."""

MAX_TEST_PATIENTS = 1_000_000
"""Test patients that one site may count in one cell where counts are exact."""


@dataclass(frozen=True)
class CountKind:
    """How one kind of task counts.

    Attributes:
        cells: Numbers in one release.
        blocks: Groups of cells in each of which a patient weighs at most 1 (in L2).
        count: (plan, records, unit) -> int64, shape (cells,).
        read: (counts in patients, standard deviation of a cell's noise) -> what they say.
    """

    cells: Callable[[StudyPlan], int]
    blocks: Callable[[StudyPlan], int]
    count: Callable[[StudyPlan, Records, int], Units]
    read: Callable[[StudyPlan, NDArray[np.float64], float], Reading]


def record_weights(owners: Units, unit: int) -> Units:
    """What each record counts: a patient's records share exactly `unit`, as evenly as it divides.

    >>> record_weights(np.array([0, 1, 1, 1]), 10).tolist()
    [10, 4, 3, 3]
    """
    order = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(owners), dtype=np.int64)
    rank[order] = np.arange(len(owners)) - np.repeat(starts, sizes)
    each, rest = np.divmod(unit, np.maximum(sizes, 1))
    weights: Units = each[owners] + (rank < rest[owners])
    return weights


def _count_scores(plan: StudyPlan, records: Records, unit: int) -> Units:
    weights = record_weights(records.owners, unit)
    return score_histogram(records.outputs, records.labels, plan.evaluation.bins, weights)


def _count_features(plan: StudyPlan, records: Records, unit: int) -> Units:
    weights = record_weights(records.owners, unit)
    return count_features(feature_cells(plan), records, weights)


def _read_features(plan: StudyPlan, counts: NDArray[np.float64], deviation: float) -> Reading:
    return Reading({}, {}, read_features(plan, counts, deviation))


def _count_classes(plan: StudyPlan, records: Records, unit: int) -> Units:
    weights = record_weights(records.owners, unit)
    classes, bins = len(plan.task.classes), plan.evaluation.bins
    return outcomes.count_classes(records.outputs, records.labels, weights, classes, bins)


def _count_values(plan: StudyPlan, records: Records, unit: int) -> Units:
    weights = record_weights(records.owners, unit)
    values = values_of(records.labels.astype(np.float64))
    return outcomes.count_values(records.outputs, values, weights, records.owners)


def _half_range(plan: StudyPlan) -> float:
    return ((plan.task.maximum or 0.0) - (plan.task.minimum or 0.0)) / 2


def _count_survival(plan: StudyPlan, records: Records, unit: int) -> Units:
    weights = record_weights(records.owners, unit)
    return outcomes.count_survival(records.outputs, records.labels, weights, plan.evaluation.bins)


def _lengths(plan: StudyPlan) -> NDArray[np.float64]:
    return np.diff(np.array([0.0, *plan.task.intervals]))


COUNTS: dict[str, CountKind] = {
    "statistics": CountKind(
        cells=lambda plan: feature_cells(plan).cells,
        blocks=lambda plan: feature_cells(plan).blocks,
        count=_count_features,
        read=_read_features,
    ),
    "multiclass": CountKind(
        cells=lambda plan: outcomes.class_cells(len(plan.task.classes), plan.evaluation.bins),
        blocks=lambda plan: len(plan.task.classes) + 1,
        count=_count_classes,
        read=lambda plan, counts, deviation: Reading(
            outcomes.read_classes(counts, len(plan.task.classes), plan.evaluation.bins)
        ),
    ),
    "regression": CountKind(
        cells=lambda plan: outcomes.VALUE_CELLS,
        blocks=lambda plan: outcomes.VALUE_CELLS,
        count=_count_values,
        read=lambda plan, counts, deviation: Reading(
            outcomes.read_values(counts, _half_range(plan))
        ),
    ),
    "survival": CountKind(
        cells=lambda plan: outcomes.survival_cells(len(plan.task.intervals), plan.evaluation.bins),
        blocks=lambda plan: len(plan.task.intervals),
        count=_count_survival,
        read=lambda plan, counts, deviation: Reading(
            outcomes.read_survival(counts, _lengths(plan), plan.evaluation.bins)
        ),
    ),
    "binary": CountKind(
        cells=lambda plan: 2 * plan.evaluation.bins,
        blocks=lambda plan: 1,
        count=_count_scores,
        read=lambda plan, counts, deviation: read_binary(counts, deviation),
    ),
}


def count_kind(plan: StudyPlan) -> CountKind:
    """How the plan's task counts; ConfigError where it has no counts."""
    kind = COUNTS.get(plan.task.kind)
    if kind is None:
        raise ConfigError(f"task {plan.task.kind!r} has no counts yet; use release = 'none'")
    evaluation = plan.evaluation
    return _with_more(kind) if evaluation.groups or evaluation.importance_clip else kind


def _with_more(kind: CountKind) -> CountKind:
    """The counts of a kind of task, and behind them those of shared/more_counts.py."""

    def cells(plan: StudyPlan) -> int:
        grouped = sum(more_counts.group_cells(plan, group) for group in plan.evaluation.groups)
        return kind.cells(plan) + grouped + more_counts.importance_cells(plan)

    def blocks(plan: StudyPlan) -> int:
        more = len(plan.evaluation.groups) + bool(plan.evaluation.importance_clip)
        return kind.blocks(plan) + more

    def count(plan: StudyPlan, records: Records, unit: int) -> Units:
        weights = record_weights(records.owners, unit)
        grouped = (
            more_counts.count_group(plan, g, records, weights) for g in plan.evaluation.groups
        )
        parts = [kind.count(plan, records, unit), *grouped]
        if plan.evaluation.importance_clip:
            parts.append(more_counts.count_importances(plan, records, unit))
        return np.concatenate(parts)

    def read(plan: StudyPlan, counts: NDArray[np.float64], deviation: float) -> Reading:
        at, groups = kind.cells(plan), []
        found = kind.read(plan, counts[:at], deviation)
        for group in plan.evaluation.groups:
            end = at + more_counts.group_cells(plan, group)
            groups.append(more_counts.read_group(plan, group, counts[at:end], deviation))
            at = end
        importances = more_counts.read_importances(plan, counts[at:], deviation)
        return replace(found, groups=tuple(groups), importances=importances)

    return CountKind(cells, blocks, count, read)


def exact_metrics(plan: StudyPlan, counts: NDArray[np.float64]) -> dict[str, float]:
    """The metrics of counts without noise, in patients.

    Raises:
        ConfigError: no patient was counted.
    """
    metrics = count_kind(plan).read(plan, counts, 0.0).metrics
    if not metrics.pop("count") > 0:
        raise ConfigError("no test patient was counted; give at least one site a test part")
    return metrics


@dataclass(frozen=True)
class CountNoise:
    """What a site does to its counts before masking.

    Attributes:
        unit: Ring units that one patient weighs.
        clamp: Largest magnitude of a cell before noise, in ring units.
        sensitivity: Most that one patient moves a release, L2, in ring units.
        deviation: Parameter of one site's discrete Gaussian, in ring units; 0 where exact.
        honest: Sites whose noise the promise counts on; 1 in mode `local`.
        noise_multiplier: Of the promise; 0 where exact.
    """

    unit: int
    clamp: int
    sensitivity: float
    deviation: float
    honest: int
    noise_multiplier: float

    @property
    def alone(self) -> float:
        """Noise multiplier of one site's own noise, if every other site sides with the server."""
        if not self.deviation:
            return 0.0
        return math.sqrt(self.deviation**2 - SMOOTHING**2) / self.sensitivity

    def spread(self, sites: int) -> float:
        """Standard deviation of a summed cell's noise, in patients."""
        return math.sqrt(sites) * self.deviation / self.unit


@lru_cache(maxsize=64)
def count_noise(plan: StudyPlan) -> CountNoise:
    """Size unit, clamp and noise of a plan's counts.

    Raises:
        ConfigError: the ring is too small for counts and noise; the message says what would fit.
    """
    blocks = math.sqrt(count_kind(plan).blocks(plan))
    sigma = count_noise_multiplier(plan)
    if sigma is None:
        return CountNoise(
            EXACT_UNIT, MAX_TEST_PATIENTS * EXACT_UNIT, blocks * EXACT_UNIT, 0.0, 1, 0.0
        )
    cohort = plan.cohort
    sites = len(cohort.sites)
    honest = 1 if plan.privacy.mode == "local" else cohort.threshold - cohort.colluders
    most = ROOM * max(100, *(site.expected_patients for site in cohort.sites))
    half = 1 << (plan.secure_sum.bits - 1)
    for unit in UNITS:
        sensitivity = blocks * unit
        deviation = math.sqrt(((sigma * sensitivity) ** 2 + SMOOTHING**2) / honest)
        needed = sites * most * unit + WRAP_DEVIATIONS * math.sqrt(sites) * deviation
        if not more_counts.resolves(plan, unit):
            continue
        if needed < half and deviation >= 2 * SMOOTHING:
            return CountNoise(unit, most * unit, sensitivity, deviation, honest, sigma)
    raise ConfigError(
        f"a ring of {plan.secure_sum.bits} bits is too small for noisy counts of up to {most} "
        f"patients at each of {sites} sites. Take secure_sum.bits = 24 or 32."
    )


def due_counts(plan: StudyPlan, finished: int) -> bool:
    """Whether counts leave with the round that starts from the model of `finished` rounds."""
    return not plan.learns or plan.evaluation.is_due(finished, plan.training.rounds)


def releases_counts(plan: StudyPlan) -> bool:
    """Whether a study of this plan ever releases counts."""
    return not plan.learns or plan.evaluation.release != "none"
