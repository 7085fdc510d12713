"""A hospital's own table (CSV or Parquet) to a PatientDataset, by a mapping that stays local.

The plan speaks of features; the mapping says which column of this hospital's file each one is,
which texts mean "missing", and how its codes translate. Messages name file, column and row
number, never a value or an identifier: an engineer may have to send them to somebody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import Texts, read_columns
from client.data.dataset import PatientDataset
from shared.config import require
from shared.errors import ConfigError
from shared.features import MISSING_CATEGORY, clamped_counts, encode
from shared.plan import FeaturePlan, TaskPlan


@dataclass(frozen=True)
class ColumnMapping:
    """How one column of the plan is found and read in this hospital's file.

    Attributes:
        name: The plan's name of the feature or label.
        column: The file's name of it; empty where it is the same.
        missing: Texts that mean "missing" in this column, besides the table's own.
        values: Pairs [text in the file, text in the plan], for categories and labels.
    """

    name: str
    column: str = ""
    missing: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for i, pair in enumerate(self.values):
            require(
                len(pair) == 2,
                f"column {self.name!r}: values[{i}] must be a pair [text in file, text in plan]",
            )
        known = [pair[0] for pair in self.values]
        require(len(set(known)) == len(known), f"column {self.name!r}: values has a text twice")


@dataclass(frozen=True)
class TableMapping:
    """How this hospital's table answers the plan.

    Attributes:
        patient: The column with the patient's identifier. Privacy is counted by it.
        one_row_per_patient: Instead of `patient`: the hospital vouches that no patient has two.
        columns: Only the columns that need translation.
        header: Column names, for a file that has no header row.
        missing: Texts that mean "missing" in every column.
        drop_incomplete: Leave out rows with a missing label or a missing value that the plan
            refuses, instead of stopping.
        allow_one_class: Accept a file in which all patients have the same label.
    """

    patient: str = ""
    one_row_per_patient: bool = False
    columns: tuple[ColumnMapping, ...] = ()
    header: tuple[str, ...] = ()
    missing: tuple[str, ...] = ("", "NA", "NaN", "nan")
    delimiter: str = ","
    drop_incomplete: bool = False
    allow_one_class: bool = False

    def __post_init__(self) -> None:
        require(
            bool(self.patient) != self.one_row_per_patient,
            "name the patient column (patient = ...), or vouch with one_row_per_patient = true "
            "that no patient has two rows; not both",
        )
        require(len(self.delimiter) == 1, "delimiter must be one character")
        names = [c.name for c in self.columns]
        require(len(set(names)) == len(names), "columns has two entries with the same name")

    def of(self, name: str) -> ColumnMapping:
        """The mapping of the plan's column `name`; the identity where none is written."""
        return next((c for c in self.columns if c.name == name), ColumnMapping(name))


@dataclass(frozen=True)
class ReadingNotes:
    """What the engineer should know about a reading; private, never leaves the site.

    Attributes:
        rows: Data rows in the file.
        dropped: Rows left out because of missing values.
        clamped: Values outside the plausible range, by feature; only features that have some.
        missing: Missing values in the rows that were kept, likewise.
        rejected: Files that were left out, by their path below the folder, and why. Such paths
            may hold an identifier: for the engineer's terminal, not for a log.
        warnings: What somebody should look at before the data are used.
    """

    rows: int
    dropped: int = 0
    clamped: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    rejected: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The notes as text for the local log; of rejected files the reasons and their number."""
        notes = [f"{self.rows} rows read"]
        if self.dropped:
            notes.append(f"{self.dropped} incomplete rows left out")
        notes += [
            f"{name}: {count} values outside the plan's plausible range were clamped"
            for name, count in self.clamped.items()
        ]
        notes += [f"{name}: {count} missing values" for name, count in self.missing.items()]
        reasons = Counter(reason for _, reason in self.rejected)
        notes += [f"{count} file(s) left out: {reason}" for reason, count in reasons.items()]
        return [*notes, *self.warnings]


@dataclass(frozen=True)
class Reading:
    """A dataset with the local notes about how it was read."""

    data: PatientDataset
    notes: ReadingNotes


def read_table(path: Path, mapping: TableMapping, task: TaskPlan) -> Reading:
    """Read a CSV (UTF-8) or Parquet file into the plan's inputs and labels.

    Args:
        path: A .parquet file, or any other name for text with `mapping.delimiter`.
        mapping: This hospital's mapping.
        task: The plan's task with features.

    Raises:
        ConfigError: the file, a column or a value does not fit; the message names file, column,
            the first such data row (1 is the first after the header) and the remedy.
    """
    label = mapping.of(task.label).column or task.label
    sources = {f.name: mapping.of(f.name).column or f.name for f in task.features}
    known = {task.label, *sources}
    stray = [c.name for c in mapping.columns if c.name not in known]
    require(
        not stray,
        f"{path}: the mapping names {', '.join(map(repr, stray))}, which the plan does not have. "
        "Correct the name (it must be the plan's), or remove the entry.",
    )
    wanted = [label, *sources.values(), *([mapping.patient] if mapping.patient else [])]
    table = read_columns(path, wanted, header=mapping.header, delimiter=mapping.delimiter)
    rows = len(table[label])
    require(rows > 0, f"{path} has no data rows. Check that the export is complete.")

    labels = read_labels(path, table[label], label, task, mapping)
    columns = {
        f.name: _read_feature(path, table[sources[f.name]], f, mapping) for f in task.features
    }
    needed = {sources[f.name]: columns[f.name] for f in task.features if f.missing == "refuse"}
    keep = _complete_rows(path, labels, needed, mapping.drop_incomplete)
    refuse_unusable_labels(path, label, labels[keep], mapping.allow_one_class)
    columns = {name: values[keep] for name, values in columns.items()}
    names = _read_patients(path, table, mapping, rows)
    ids, patients = group_patients([n for n, k in zip(names, keep.tolist(), strict=True) if k])
    data = PatientDataset(encode(task, columns, str(path)), labels[keep], patients, ids)
    missing = {name: int(_is_missing(values).sum()) for name, values in columns.items()}
    missing = {name: count for name, count in missing.items() if count}
    notes = ReadingNotes(rows, rows - int(keep.sum()), clamped_counts(task, columns), missing)
    return Reading(data, notes)


def group_patients(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Distinct identifiers in order of first appearance, and each record's index among them."""
    index: dict[str, int] = {}
    rows = [index.setdefault(name, len(index)) for name in names]
    return tuple(index), np.array(rows, dtype=np.int64)


def read_labels(
    path: Path, texts: Texts, column: str, task: TaskPlan, mapping: TableMapping
) -> NDArray[np.int64]:
    """1 where a text means the plan's positive label, 0 for the one other text, -1 if missing.

    Raises:
        ConfigError: more than one other text, so that the negative class is ambiguous.
    """
    plan_texts = _translate(texts, mapping.of(task.label), mapping.missing)
    present = [_plain(t) for t in plan_texts if t is not None]
    negatives = set(present) - {_plain(task.positive)}
    require(
        len(negatives) <= 1,
        f"{path}: column {column!r} has {len(negatives)} different labels besides "
        f"{task.positive!r}; a binary task needs one. Map each text to "
        f"{task.positive!r} or to one other text (columns, name = {task.label!r}, values = ...).",
    )
    positive = _plain(task.positive)
    return np.array([-1 if t is None else int(_plain(t) == positive) for t in plan_texts], np.int64)


def refuse_unusable_labels(
    path: Path, column: str, labels: NDArray[np.int64], allow_one_class: bool
) -> None:
    """Raise ConfigError where a label is missing (-1), or where only one class is there."""
    missing = labels < 0
    require(
        not missing.any(),
        f"{path}: column {column!r} (the label) is missing in {int(missing.sum())} row(s), the "
        f"first is data row {int(np.argmax(missing)) + 1}. Complete them, or set "
        "drop_incomplete = true.",
    )
    require(
        allow_one_class or len(np.unique(labels)) == 2,
        f"{path}: column {column!r} (the label) has one class only, so there is nothing to tell "
        "apart. Check the label mapping and the plan's positive label; if this hospital really "
        "has one class, set allow_one_class = true.",
    )


def _read_feature(
    path: Path, texts: Texts, feature: FeaturePlan, mapping: TableMapping
) -> NDArray[np.float64] | NDArray[np.int64]:
    column = mapping.of(feature.name)
    source = column.column or feature.name
    translated = _translate(texts, column, mapping.missing)
    if feature.type == "number":
        return _numbers(path, translated, source, feature)
    return _codes(path, translated, source, feature)


def _translate(texts: Texts, column: ColumnMapping, missing: tuple[str, ...]) -> list[str | None]:
    """Each text in the plan's words, or None where it means "missing"."""
    pairs: dict[str, str | None] = dict.fromkeys((*missing, *column.missing))
    pairs |= {pair[0]: pair[1] for pair in column.values}
    if not any(_plain(text).lstrip("-").isdigit() for text in pairs):
        return [pairs.get(text, text) for text in texts]
    return [pairs[t] if t in pairs else pairs.get(_plain(t), t) for t in texts]


def _numbers(
    path: Path, texts: Sequence[str | None], source: str, feature: FeaturePlan
) -> NDArray[np.float64]:
    values = np.array([math.nan if text is None else _number(text) for text in texts])
    odd = np.isinf(values)
    require(
        not odd.any(),
        f"{path}: column {source!r} must hold numbers ({feature.name!r} in the plan), but data row "
        f"{int(np.argmax(odd)) + 1} has another text. Correct it (decimal point, no unit, no "
        "thousands separator), or name that text under missing in the mapping.",
    )
    return values


def _number(text: str) -> float:
    """The number that a text says, infinity where it says none."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(value) or "_" in text else value


def _codes(
    path: Path, texts: Sequence[str | None], source: str, feature: FeaturePlan
) -> NDArray[np.int64]:
    exact = {c: i for i, c in enumerate(feature.categories)}
    plain = {_plain(c): i for i, c in enumerate(feature.categories)}
    codes = np.full(len(texts), MISSING_CATEGORY, dtype=np.int64)
    for row, text in enumerate(texts):
        if text is None:
            continue
        code = exact.get(text, plain.get(_plain(text)))
        if code is None:
            raise ConfigError(
                f"{path}: column {source!r} has in data row {row + 1} a text that is none of the "
                f"plan's categories for {feature.name!r}: {', '.join(feature.categories)}. "
                "Translate it in the mapping (values = [[text in file, category], ...]), or name "
                "it under missing."
            )
        codes[row] = code
    return codes


def _read_patients(path: Path, table: dict[str, Texts], mapping: TableMapping, rows: int) -> Texts:
    if not mapping.patient:
        return [str(row + 1) for row in range(rows)]
    texts = table[mapping.patient]
    missing = set(mapping.missing)
    first = next((row for row, text in enumerate(texts, start=1) if text in missing), 0)
    require(
        first == 0,
        f"{path}: column {mapping.patient!r} (the patient's identifier) is missing in data row "
        f"{first}. Privacy is counted by patient, so every row needs one.",
    )
    return texts


def _complete_rows(
    path: Path,
    labels: NDArray[np.int64],
    needed: dict[str, NDArray[np.float64] | NDArray[np.int64]],
    drop_incomplete: bool,
) -> NDArray[np.bool_]:
    """Which rows to keep: all, or those with a label and all needed values."""
    keep = labels >= 0 if drop_incomplete else np.ones(len(labels), dtype=np.bool_)
    for source, values in needed.items():
        missing = _is_missing(values)
        if drop_incomplete:
            keep = keep & ~missing
            continue
        require(
            not missing.any(),
            f"{path}: column {source!r} has {int(missing.sum())} missing value(s), the first in "
            f"data row {int(np.argmax(missing)) + 1}, and the plan refuses them. Complete those "
            "rows, leave them out with drop_incomplete = true, or agree on another plan (missing "
            "= 'midpoint' or 'indicator').",
        )
    require(bool(keep.any()), f"{path}: every row is incomplete, so none is left.")
    return keep


def _is_missing(values: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.bool_]:
    missing = values == MISSING_CATEGORY if values.dtype == np.int64 else np.isnan(values)
    return np.asarray(missing, dtype=np.bool_)


def _plain(text: str) -> str:
    """One spelling of a whole number: "1.0" and "01" become "1"; other texts stay."""
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() else text
