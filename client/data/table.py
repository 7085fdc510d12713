"""A hospital's own table (CSV or Parquet) to a PatientDataset, by a mapping that stays local.

The plan speaks of features; the mapping says which column of this hospital's file each one is,
which texts mean "missing", and how its codes translate. Messages name file, column and row
number, never a value or an identifier: an engineer may have to send them to somebody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import Texts, read_columns
from client.data.dataset import PatientDataset
from client.data.labels import label_columns, read_labels, refuse_unusable_labels
from client.data.mapping import TableMapping, numbers_of, plain, translate, years_between
from shared.config import require
from shared.errors import ConfigError
from shared.features import MISSING_CATEGORY, clamped_counts, encode
from shared.task_plan import FeaturePlan, TaskPlan

MOST_IMPLAUSIBLE = 0.5  # share of a column's values; more are a mistake, fewer are clamped


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
    labelled = label_columns(task)
    features = [f.name for f in task.features]
    sources = {name: mapping.of(name).column or name for name in (*labelled, *features)}
    known = set(sources)
    stray = [c.name for c in mapping.columns if c.name not in known]
    require(
        not stray,
        f"{path}: the mapping names {', '.join(map(repr, stray))}, which the plan does not have. "
        "Correct the name (it must be the plan's), or remove the entry.",
    )
    also = [mapping.patient, *(mapping.of(name).since for name in features)]
    wanted = [*sources.values(), *(column for column in also if column)]
    table = read_columns(path, wanted, header=mapping.header, delimiter=mapping.delimiter)
    rows = len(table[label])
    require(rows > 0, f"{path} has no data rows. Check that the export is complete.")

    texts = {name: table[sources[name]] for name in labelled}
    labels = read_labels(path, texts, task, mapping)
    columns = {f.name: _read_feature(path, table, f, mapping) for f in task.features}
    needed = {sources[f.name]: columns[f.name] for f in task.features if f.missing == "refuse"}
    keep = _complete_rows(path, labels, needed, mapping.drop_incomplete)
    refuse_unusable_labels(path, label, labels[keep], task, mapping.allow_one_class)
    columns = {name: values[keep] for name, values in columns.items()}
    _refuse_wrong_units(path, task, columns, sources)
    names = _read_patients(path, table, mapping, rows)
    ids, patients = group_patients([n for n, k in zip(names, keep.tolist(), strict=True) if k])
    data = PatientDataset(encode(task, columns, str(path)), labels[keep], patients, ids)
    missing = {name: int(_is_missing(values).sum()) for name, values in columns.items()}
    missing = {name: count for name, count in missing.items() if count}
    notes = ReadingNotes(rows, rows - int(keep.sum()), clamped_counts(task, columns), missing)
    return Reading(data, notes)


def read_inputs(
    path: Path, mapping: TableMapping, task: TaskPlan
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Inputs of new patients, without labels, and whose each row is: (rows, width), (rows,).

    Raises:
        ConfigError: as `read_table`; a missing value that the plan refuses stops the reading.
    """
    sources = {f.name: mapping.of(f.name).column or f.name for f in task.features}
    also = [mapping.patient, *(mapping.of(name).since for name in sources)]
    wanted = [*sources.values(), *(column for column in also if column)]
    table = read_columns(path, wanted, header=mapping.header, delimiter=mapping.delimiter)
    rows = len(table[wanted[0]])
    require(rows > 0, f"{path} has no data rows. Check that the export is complete.")
    columns = {f.name: _read_feature(path, table, f, mapping) for f in task.features}
    _refuse_wrong_units(path, task, columns, sources)
    return encode(task, columns, str(path)), tuple(_read_patients(path, table, mapping, rows))


def group_patients(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Distinct identifiers in order of first appearance, and each record's index among them."""
    index: dict[str, int] = {}
    rows = [index.setdefault(name, len(index)) for name in names]
    return tuple(index), np.array(rows, dtype=np.int64)


def _read_feature(
    path: Path, table: Mapping[str, Texts], feature: FeaturePlan, mapping: TableMapping
) -> NDArray[np.float64] | NDArray[np.int64]:
    column = mapping.of(feature.name)
    source = column.column or feature.name
    translated = translate(table[source], column, mapping.missing)
    if feature.type != "number":
        return _codes(path, translated, source, feature)
    if column.since:
        absent = {*mapping.missing, *column.missing}
        values = years_between(path, table[column.since], translated, column, absent)
    else:
        values = numbers_of(path, translated, source)
    return values * column.factor + column.offset


def _refuse_wrong_units(
    path: Path,
    task: TaskPlan,
    columns: Mapping[str, NDArray[np.float64] | NDArray[np.int64]],
    sources: Mapping[str, str],
) -> None:
    """Stop where most values of a number are implausible: the unit is another one."""
    for name, outside in clamped_counts(task, columns).items():
        measured = int((~_is_missing(columns[name])).sum())
        require(
            outside <= MOST_IMPLAUSIBLE * measured,
            f"{path}: column {sources[name]!r}: {outside} of {measured} values lie outside the "
            f"plan's plausible range of {name!r}. Probably the unit is another one: give factor "
            "(and offset) for it in the mapping, or correct the column.",
        )


def _codes(
    path: Path, texts: Sequence[str | None], source: str, feature: FeaturePlan
) -> NDArray[np.int64]:
    exact = {c: i for i, c in enumerate(feature.categories)}
    spelt = {plain(c): i for i, c in enumerate(feature.categories)}
    codes = np.full(len(texts), MISSING_CATEGORY, dtype=np.int64)
    for row, text in enumerate(texts):
        if text is None:
            continue
        code = exact.get(text, spelt.get(plain(text)))
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
