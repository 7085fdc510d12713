"""Federated statistics: counts, missing values, means and histograms of a plan's features.

Cells, in this order: for each number a histogram over its plausible range, with a cell for missing
values where the plan allows them, then the sums of x and of x squared, x scaled to [-1, 1]; for
each category one cell, and one for missing values; at last the label's two classes. A histogram
is one block, each of the two sums another: in each, a patient weighs at most 1, shared by the
patient's records. Values outside the range count in its outermost bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.metrics import fieller
from shared.plan import StudyPlan
from shared.task_plan import FeaturePlan

Units = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Records:
    """Records as counting needs them.

    Attributes:
        owners: int64, shape (n,): which patient each record belongs to, from 0.
        labels: int64, shape (n,).
        inputs: float32, shape (n, *input_shape), scaled by the plan.
        outputs: What the model says of each record, shape (n, ...); empty without a model.
        moves: How far each feature moves it, shape (n, features), see shared/more_counts.py;
            empty where the plan releases no importances.
    """

    owners: Units
    labels: Units
    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32]
    moves: Reals = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class FeatureBlock:
    """Where one feature lies in the input matrix, and where its cells lie in a release.

    Attributes:
        feature: The plan's; None for the label.
        column: Its first column of the encoded inputs.
        width: Its columns, without the indicator of missing values.
        missing: Column of that indicator, or None.
        first: Its first cell.
        bins: Cells of its histogram, without the one for missing values.
    """

    feature: FeaturePlan | None
    column: int
    width: int
    missing: int | None
    first: int
    bins: int

    @property
    def is_number(self) -> bool:
        """Whether it has sums of x and x squared."""
        return self.feature is not None and self.feature.type == "number"

    @property
    def counted(self) -> int:
        """Cells of the histogram, missing values included."""
        return self.bins + (self.missing is not None)

    @property
    def cells(self) -> int:
        """All its cells."""
        return self.counted + 2 * self.is_number

    @property
    def blocks(self) -> int:
        """Groups of cells in each of which a patient weighs at most 1."""
        return 3 if self.is_number else 1


@dataclass(frozen=True)
class FeatureCells:
    """The cells of a statistics release."""

    parts: tuple[FeatureBlock, ...]

    @property
    def cells(self) -> int:
        """Numbers in a release."""
        return sum(part.cells for part in self.parts)

    @property
    def blocks(self) -> int:
        """Groups of cells in each of which a patient weighs at most 1."""
        return sum(part.blocks for part in self.parts)


@lru_cache(maxsize=64)
def feature_cells(plan: StudyPlan) -> FeatureCells:
    """Lay out the cells of a plan's statistics."""
    parts: list[FeatureBlock] = []
    column = first = 0
    for feature in plan.task.features:
        number = feature.type == "number"
        width = 1
        if not number:
            width = len(feature.categories) - (plan.task.encoding == "drop-first")
        missing = column + width if feature.missing == "indicator" else None
        bins = plan.statistics.bins if number else len(feature.categories)
        parts.append(FeatureBlock(feature, column, width, missing, first, bins))
        column += width + (missing is not None)
        first += parts[-1].cells
    parts.append(FeatureBlock(None, column, 0, None, first, 2))
    return FeatureCells(tuple(parts))


def count_features(layout: FeatureCells, records: Records, weights: Units) -> Units:
    """Count the features of some records.

    Args:
        layout: From `feature_cells`.
        records: Encoded by the plan.
        weights: What each record counts; a patient's add up to one unit.

    Returns:
        int64, shape (cells,). Every record falls into exactly one cell of each histogram,
        whatever its inputs hold.
    """
    out = np.zeros(layout.cells, dtype=np.int64)
    for part in layout.parts:
        index = _cell_of(part, records)
        counts = np.bincount(index, weights=weights, minlength=part.counted)
        out[part.first : part.first + part.counted] = counts.astype(np.int64)
        if part.is_number:
            out[part.first + part.counted : part.first + part.cells] = _sums(part, records, weights)
    return out


def _cell_of(part: FeatureBlock, records: Records) -> Units:
    if part.feature is None:
        return (records.labels > 0).astype(np.int64)
    inputs = records.inputs
    if part.is_number:
        scaled = (np.clip(inputs[:, part.column], -1.0, 1.0) + 1.0) / 2.0
        index = np.minimum((scaled * part.bins).astype(np.int64), part.bins - 1)
    else:
        columns = inputs[:, part.column : part.column + part.width]
        dropped = part.bins - part.width  # the first category has no column of its own
        index = columns.argmax(axis=1) + dropped
        if dropped:
            index = np.where(columns.max(axis=1) > 0.5, index, 0)
    return np.where(_is_missing(part, records), part.bins, index)


def _is_missing(part: FeatureBlock, records: Records) -> NDArray[np.bool_]:
    if part.missing is None:
        return np.zeros(len(records.owners), dtype=bool)
    flags: NDArray[np.bool_] = records.inputs[:, part.missing] > 0.5
    return flags


def _sums(part: FeatureBlock, records: Records, weights: Units) -> list[int]:
    """Sums of x and x squared, in units; each patient's own part is rounded, so it stays whole."""
    value = np.clip(records.inputs[:, part.column].astype(np.float64), -1.0, 1.0)
    value = np.where(_is_missing(part, records), 0.0, value)
    sums = []
    for power in (value, value**2):
        own = np.bincount(records.owners, weights=weights * power)
        sums.append(int(np.rint(own).astype(np.int64).sum()))
    return sums


def read_features(plan: StudyPlan, counts: Reals, deviation: float) -> tuple[dict[str, Any], ...]:
    """What summed statistics say, feature by feature, the label last.

    Args:
        plan: The study.
        counts: float64, shape (cells,), in patients; noise may make them negative.
        deviation: Standard deviation of a cell's noise, in patients.

    Returns:
        For each feature its name, type, `present` and `missing` patients, and its histogram; of a
        number also its mean and standard deviation in its own unit. `..._interval` is where the
        value without noise lies, at the level of `metrics.LEVEL`; a value that noise hides whole is
        left out.
    """
    parts = feature_cells(plan).parts
    return tuple(dict(_read_part(plan, part, counts, deviation)) for part in parts)


def _read_part(
    plan: StudyPlan, part: FeatureBlock, counts: Reals, deviation: float
) -> Iterator[tuple[str, Any]]:
    feature = part.feature
    histogram = counts[part.first : part.first + part.bins]
    yield "name", feature.name if feature else plan.task.label
    yield "type", feature.type if feature else "label"
    yield from _count("present", float(histogram.sum()), deviation * math.sqrt(part.bins))
    if part.missing is not None:
        yield from _count("missing", float(counts[part.first + part.bins]), deviation)
    yield "histogram", histogram.tolist()
    yield "deviation", deviation
    if feature is None or feature.type == "category":
        named = feature.categories if feature else (f"not {plan.task.positive}", plan.task.positive)
        yield "categories", list(named)
        return
    yield "unit", feature.unit
    yield "edges", np.linspace(*_range(feature), part.bins + 1).tolist()
    yield from _moments(part, feature, counts, deviation)


def _count(name: str, value: float, deviation: float) -> Iterator[tuple[str, Any]]:
    yield name, max(value, 0.0)
    if deviation:
        ends = (value - 1.959964 * deviation, value + 1.959964 * deviation)
        yield f"{name}_interval", [max(end, 0.0) for end in ends]


def _moments(
    part: FeatureBlock, feature: FeaturePlan, counts: Reals, deviation: float
) -> Iterator[tuple[str, Any]]:
    """Mean and standard deviation over patients, from the two sums and the histogram."""
    cells = counts[part.first : part.first + part.cells]
    present, first, second = (np.zeros(part.cells) for _ in range(3))
    present[: part.bins] = 1.0
    first[part.counted], second[part.counted + 1] = 1.0, 1.0
    low, high = _range(feature)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = fieller(first, present, cells, deviation)
    square = fieller(second, present, cells, deviation)
    if mean is None or square is None:
        return
    centre = min(max(mean[0], -1.0), 1.0)
    yield "mean", middle + half * centre
    if deviation:
        yield "mean_interval", [middle + half * min(max(end, -1.0), 1.0) for end in mean[1]]
    yield "standard_deviation", half * math.sqrt(min(max(square[0] - centre**2, 0.0), 1.0))


def _range(feature: FeaturePlan) -> tuple[float, float]:
    return float(feature.minimum or 0.0), float(feature.maximum or 0.0)
