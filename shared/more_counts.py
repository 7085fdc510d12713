"""What an evaluation may release beside the scores: importances of features, results by group.

Each is one more block of cells, so it is summed, noised and charged as the scores are, and all of a
release's noise grows by the root of its blocks (shared/PRIVACY.md, "Counts"). They are about
tables alone.

Importance of a feature: how far the model's answer moves when that feature alone is put to the
public baseline, averaged over test patients. A patient's vector of such moves is clipped to norm
`importance_clip`, so a patient weighs at most one unit in it whatever the model says.

Groups: of a plan's binary task, true and false answers of the patients in each category of a
feature, or between the edges of a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.evaluation_plan import GroupPlan
from shared.features import feature_columns, public_baseline
from shared.metrics import fieller
from shared.plan import StudyPlan
from shared.statistics import Records
from shared.task_plan import FeaturePlan, TaskPlan

Units = NDArray[np.int64]
Reals = NDArray[np.float64]
Outputs = NDArray[np.float32]

ANSWERS = 4
"""Cells of a group: true label 0 and said 0, 0 and 1, 1 and 0, 1 and 1."""


# Importances: one cell a feature, and last one that counts the patients themselves.


def importance_cells(plan: StudyPlan) -> int:
    """Numbers in the block of importances; 0 where the plan releases none."""
    return len(plan.task.features) + 1 if plan.evaluation.importance_clip else 0


def moves_of(
    task: TaskPlan,
    inputs: NDArray[np.float32],
    outputs: Outputs,
    predict: Callable[[NDArray[np.float32]], Outputs],
) -> Reals:
    """How far the answer to each record moves when one feature is put to the public baseline.

    Args:
        task: With features.
        inputs: Shape (n, width).
        outputs: What the model says of them.
        predict: Asks the model.

    Returns:
        float64, shape (n, features), within [0, 1]: of a probability or risk its change, of
        classes half the sum of all changes, of a value its change over the label's range.
    """
    baseline, before = public_baseline(task), _answers(task, outputs)
    moved = np.zeros((len(inputs), len(task.features)))
    for number, columns in enumerate(feature_columns(task)):
        changed = inputs.copy()
        changed[:, columns] = baseline[columns]
        moved[:, number] = _distance(task, before, _answers(task, predict(changed)))
    return moved


def _answers(task: TaskPlan, outputs: Outputs) -> Reals:
    """The answers in which a move is measured, shape (n, columns)."""
    import torch  # noqa: PLC0415  # takes seconds

    from shared.answers import risks_of  # noqa: PLC0415

    risks = risks_of(task, torch.from_numpy(outputs.astype(np.float64)))
    if task.kind == "survival":
        risks = risks[:, -1:]
    if task.kind == "regression":
        risks = risks / ((task.maximum or 0.0) - (task.minimum or 0.0))
    found: Reals = risks.numpy()
    return found


def _distance(task: TaskPlan, before: Reals, after: Reals) -> Reals:
    share = 0.5 if task.kind == "multiclass" else 1.0
    change = share * np.abs(np.nan_to_num(after) - np.nan_to_num(before)).sum(axis=1)
    inside: Reals = np.clip(change, 0.0, 1.0)
    return inside


def count_importances(plan: StudyPlan, records: Records, unit: int) -> Units:
    """Sum of the patients' clipped vectors, in units, shape (importance_cells,).

    A patient's own vector v, over all the records, has norm 1 at most. What is added for the
    patient is (round(s v), s): with s = unit / sqrt 2 - sqrt(features) / 2 rounded down, its norm
    is at most sqrt((s + sqrt(features) / 2)^2 + s^2) <= unit, rounding included.
    """
    patients = int(records.owners.max()) + 1 if len(records.owners) else 0
    sizes = np.maximum(np.bincount(records.owners, minlength=patients), 1)
    means = np.stack(
        [
            np.bincount(records.owners, weights=column, minlength=patients) / sizes
            for column in np.nan_to_num(records.moves).T
        ],
        axis=1,
    )
    vectors = means / plan.evaluation.importance_clip
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(norms, 1.0)
    scale = importance_scale(len(plan.task.features), unit)
    sums = np.rint(scale * vectors).astype(np.int64).sum(axis=0)
    here = np.bincount(records.owners, minlength=patients) > 0
    return np.append(sums, scale * int(here.sum())).astype(np.int64)


def importance_scale(features: int, unit: int) -> int:
    """Ring units of a vector of norm 1; see `count_importances`."""
    return max(math.floor(unit / math.sqrt(2) - math.sqrt(features) / 2), 0)


def resolves(plan: StudyPlan, unit: int) -> bool:
    """Whether a patient's vector can be told apart in whole numbers of so fine a unit."""
    if not plan.evaluation.importance_clip:
        return True
    return importance_scale(len(plan.task.features), unit) >= len(plan.task.features)


def read_importances(
    plan: StudyPlan, counts: Reals, deviation: float
) -> tuple[dict[str, Any], ...]:
    """The mean importance of each feature, the largest first.

    Args:
        plan: The study.
        counts: The block's cells, in patients.
        deviation: Standard deviation of a cell's noise, in patients.

    Returns:
        Name, `value` and, where there is noise, `interval`: in parts of the answer's range, so
        0.1 is ten points of a probability. Empty where noise hides how many patients there are.
    """
    factor = plan.evaluation.importance_clip
    if not factor:
        return ()
    patients = np.zeros(len(counts))
    patients[-1] = 1.0
    found = []
    for number, feature in enumerate(plan.task.features):
        own = np.zeros(len(counts))
        own[number] = 1.0
        ratio = fieller(own, patients, counts, deviation)
        if ratio is None:
            return ()
        entry: dict[str, Any] = {"name": feature.name, "value": factor * _share(ratio[0])}
        if deviation:
            entry["interval"] = [factor * _share(end) for end in ratio[1]]
        found.append(entry)
    return tuple(sorted(found, key=lambda entry: -entry["value"]))


# Groups: for each of the plan's groupings one block, [group, label, said].


def group_names(plan: StudyPlan, group: GroupPlan) -> tuple[str, ...]:
    """What a grouping's groups are called, in order; last those with a missing value."""
    feature = _feature(plan, group)
    if feature.type == "category":
        names = list(feature.categories)
    else:
        edges = [f"{edge:g}" for edge in group.edges]
        unit = f" {feature.unit}".rstrip()
        between = [f"{a} to {b}{unit}" for a, b in itertools.pairwise(edges)]
        names = [f"below {edges[0]}{unit}", *between, f"{edges[-1]}{unit} or more"]
    return (*names, "missing") if feature.missing == "indicator" else tuple(names)


def group_cells(plan: StudyPlan, group: GroupPlan) -> int:
    """Numbers in a grouping's block."""
    return ANSWERS * len(group_names(plan, group))


def count_group(plan: StudyPlan, group: GroupPlan, records: Records, weights: Units) -> Units:
    """True and false answers in each group, shape (group_cells,); a patient weighs one unit."""
    said = (np.nan_to_num(records.outputs) > 0).astype(np.int64)
    place = _group_of(plan, group, records) * ANSWERS + 2 * records.labels + said
    size = group_cells(plan, group)
    return np.bincount(place, weights=weights, minlength=size).astype(np.int64)


def _group_of(plan: StudyPlan, group: GroupPlan, records: Records) -> Units:
    feature = _feature(plan, group)
    number = [f.name for f in plan.task.features].index(feature.name)
    columns = records.inputs[:, feature_columns(plan.task)[number]]
    flags = feature.missing == "indicator"
    values = columns[:, :-1] if flags else columns
    if feature.type == "number":
        index = np.searchsorted(_scaled(feature, group.edges), values[:, 0], side="right")
    elif plan.task.encoding == "drop-first":
        index = np.where(values.max(axis=1) > 0.5, values.argmax(axis=1) + 1, 0)
    else:
        index = values.argmax(axis=1)
    last = len(group_names(plan, group)) - 1
    gone = columns[:, -1] > 0.5 if flags else np.zeros(len(columns), dtype=bool)
    return np.where(gone, last, index).astype(np.int64)


def _scaled(feature: FeaturePlan, edges: tuple[float, ...]) -> NDArray[np.float32]:
    """Edges as a record at them is encoded, rounding included."""
    low, high = feature.minimum or 0.0, feature.maximum or 0.0
    middle = (low + high) / 2
    return ((np.array(edges) - middle) / ((high - low) / 2)).astype(np.float32)


def read_group(
    plan: StudyPlan, group: GroupPlan, counts: Reals, deviation: float
) -> dict[str, Any]:
    """How well the model does in each group, from the block's cells in patients."""
    found = []
    for number, name in enumerate(group_names(plan, group)):
        cells = counts[number * ANSWERS : (number + 1) * ANSWERS]
        entry: dict[str, Any] = {"name": name, "patients": max(float(cells.sum()), 0.0)}
        for metric, over, under in _RATIOS:
            ratio = fieller(np.array(over), np.array(under), cells, deviation)
            if ratio is None:
                continue
            entry[metric] = _share(ratio[0])
            if deviation:
                entry[f"{metric}_interval"] = [_share(end) for end in ratio[1]]
        found.append(entry)
    return {"feature": group.feature, "groups": found}


_RATIOS = (
    ("accuracy", (1.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0)),
    ("recall", (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)),
    ("specificity", (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)),
)


def _feature(plan: StudyPlan, group: GroupPlan) -> FeaturePlan:
    return next(f for f in plan.task.features if f.name == group.feature)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)
