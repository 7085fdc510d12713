"""Labels of a hospital's file as the codes of the plan's task (shared/tasks.py).

One function a kind of task, entered in `_READERS`; it may see a file part by part. Messages name
file, column and row number, never a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import Texts
from client.data.mapping import TableMapping, numbers_of, plain, translate
from shared.config import require
from shared.errors import ConfigError
from shared.task_plan import TaskPlan
from shared.tasks import VALUE_STEPS

Codes = NDArray[np.int64]
MISSING = -1


@dataclass(frozen=True)
class LabelColumn:
    """A part of one column of the label: where it stands, what it is called there, and its texts.

    Attributes:
        first: The part's first data row.
        negatives: Texts seen so far in the column beside the positive one; the reader adds to it.
    """

    path: Path
    column: str
    texts: Sequence[str | None]
    first: int
    negatives: set[str]

    def numbers(self) -> NDArray[np.float64]:
        """The column as numbers, NaN where missing; ConfigError where a text is none."""
        return numbers_of(self.path, self.texts, self.column, self.first)


def label_columns(task: TaskPlan) -> tuple[str, ...]:
    """The plan's names of the columns that a label is made of."""
    return (task.label, task.time) if task.time else (task.label,)


def read_labels(
    path: Path, columns: Mapping[str, Texts], task: TaskPlan, mapping: TableMapping
) -> Codes:
    """Codes of the labels, int64, shape (rows,); -1 where a label is missing.

    Args:
        path: Named in messages.
        columns: Texts of each of `label_columns`.
        task: The plan's task.
        mapping: How the hospital's texts answer the plan.

    Raises:
        ConfigError: a text is no label of the plan, or a column is not there.
    """
    return read_label_parts(path, [columns], task, mapping)


def read_label_parts(
    path: Path, parts: Iterable[Mapping[str, Texts]], task: TaskPlan, mapping: TableMapping
) -> Codes:
    """The same, where the columns come in runs of rows, of which one is held at a time."""
    names, codes, rows = label_columns(task), list[NDArray[np.int32]](), 0
    negatives: set[str] = set()
    for columns in parts:
        absent = [name for name in names if name not in columns]
        require(
            not absent,
            f"{path}: a task of kind {task.kind!r} needs the column "
            f"{', '.join(map(repr, absent))} beside the label, which only a table has.",
        )
        found = [
            LabelColumn(
                path,
                mapping.of(name).column or name,
                translate(columns[name], mapping.of(name), mapping.missing),
                rows + 1,
                negatives,
            )
            for name in names
        ]
        codes.append(_READERS[task.kind](task, found).astype(np.int32))
        rows += len(codes[-1])
    source = mapping.of(task.label).column or task.label
    require(
        len(negatives) <= 1,
        f"{path}: column {source!r} has {len(negatives)} "
        f"different labels besides {task.positive!r}; a task of kind {task.kind!r} needs one. Map "
        f"each text to {task.positive!r} or to one other text (columns, name = {task.label!r}, "
        "values = ...).",
    )
    return np.concatenate([np.zeros(0, np.int32), *codes], dtype=np.int64)


def refuse_unusable_labels(
    path: Path, column: str, labels: Codes, task: TaskPlan, allow_one_class: bool
) -> None:
    """Raise ConfigError where a label is missing (-1), or where all are the same."""
    missing = labels < 0
    require(
        not missing.any(),
        f"{path}: column {column!r} (the label) is missing in {int(missing.sum())} row(s), the "
        f"first is data row {int(np.argmax(missing)) + 1}. Complete them, or set "
        "drop_incomplete = true.",
    )
    seen = labels % 2 if task.kind == "survival" else labels
    require(
        allow_one_class or len(np.unique(seen)) >= 2,
        f"{path}: column {column!r} (the label) has one class only, so there is nothing to tell "
        "apart. Check the label mapping and the plan's positive label; if this hospital really "
        "has one class, set allow_one_class = true.",
    )


def positives(task: TaskPlan, labels: Codes) -> Codes | None:
    """1 where a label says ill, or that the event was seen; None where the task asks neither."""
    if task.kind not in ("binary", "statistics", "survival"):
        return None
    return labels % 2


def class_of(task: TaskPlan, text: str) -> int:
    """1 where a text is the positive one, or its place among the classes; -1 where it is none."""
    if task.kind != "multiclass":
        return int(plain(text) == plain(task.positive))
    known = {plain(name): code for code, name in enumerate(task.classes)}
    return known.get(plain(text), MISSING)


def _binary(task: TaskPlan, found: list[LabelColumn]) -> Codes:
    """1 where a text means the plan's positive label, 0 for the others, of which there is one."""
    label = found[0]
    label.negatives.update(plain(t) for t in label.texts if t is not None)
    label.negatives.discard(plain(task.positive))
    return np.array([MISSING if t is None else class_of(task, t) for t in label.texts], np.int64)


def _classes(task: TaskPlan, found: list[LabelColumn]) -> Codes:
    label = found[0]
    codes = [MISSING if t is None else class_of(task, t) for t in label.texts]
    for row, (code, text) in enumerate(zip(codes, label.texts, strict=True), label.first):
        if code == MISSING and text is not None:
            raise ConfigError(
                f"{label.path}: column {label.column!r} has in data row {row} a text that is none "
                f"of the plan's classes: {', '.join(task.classes)}. Translate it in the mapping "
                f"(columns, name = {task.label!r}, values = ...)."
            )
    return np.array(codes, dtype=np.int64)


def _values(task: TaskPlan, found: list[LabelColumn]) -> Codes:
    """Steps of the plan's range; a value outside it counts as its nearer end."""
    if task.minimum is None or task.maximum is None:
        raise ConfigError("a regression task needs the label's minimum and maximum")
    values = found[0].numbers()
    share = np.clip((values - task.minimum) / (task.maximum - task.minimum), 0.0, 1.0)
    steps = np.round(np.nan_to_num(share) * VALUE_STEPS).astype(np.int64)
    return np.where(np.isnan(values), MISSING, steps)


def _survival(task: TaskPlan, found: list[LabelColumn]) -> Codes:
    """2 j + e; a time on an edge belongs to the interval that it ends."""
    event, time = _binary(task, found[:1]), found[1].numbers()
    negative = int(np.argmax(time < 0)) + found[1].first if (time < 0).any() else 0
    require(
        not negative,
        f"{found[1].path}: column {found[1].column!r} (the time of follow-up) is below 0 in data "
        f"row {negative}. Correct it.",
    )
    end = np.searchsorted(np.asarray(task.intervals), np.nan_to_num(time), side="left")
    past = end == len(task.intervals)
    codes = 2 * end + np.where(past, 0, event)
    return np.where(np.isnan(time) | (event == MISSING), MISSING, codes).astype(np.int64)


_READERS: dict[str, Callable[[TaskPlan, list[LabelColumn]], Codes]] = {
    "binary": _binary,
    "statistics": _binary,
    "multiclass": _classes,
    "regression": _values,
    "survival": _survival,
}
