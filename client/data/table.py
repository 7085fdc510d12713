"""A hospital's own table (CSV or Parquet) to a PatientDataset, by a mapping that stays local.

The plan speaks of features; the mapping says which column of this hospital's file each one is,
which texts mean "missing", and how its codes translate. Messages name file, column and row
number, never a value or an identifier: an engineer may have to send them to somebody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from client.data.columns import Part, Texts, read_parts
from client.data.dataset import PatientDataset
from client.data.labels import label_columns, read_label_parts, refuse_unusable_labels
from client.data.mapped import Records, Spool
from client.data.mapping import (
    TableMapping,
    leaves_numbers,
    numbers_of,
    plain,
    refuse_infinite,
    translate,
    years_between,
)
from shared.config import require
from shared.errors import ConfigError
from shared.features import MISSING_CATEGORY, clamped_counts, encode, missing_refused
from shared.task_plan import FeaturePlan, TaskPlan

Inputs = tuple[Records, Sequence[str]]
"""Records of new patients, and whose each is."""

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
    own = [sources[name] for name in labelled]
    also = [mapping.patient, *(mapping.of(name).since for name in features)]
    needed = [*(sources[name] for name in features), *(column for column in also if column)]
    spelt = _Spelt(header=mapping.header, delimiter=mapping.delimiter)
    parts = read_parts(path, own, beside=needed, **spelt)
    named = ({name: part.texts[sources[name]] for name in labelled} for part in parts)
    labels = read_label_parts(path, named, task, mapping)
    require(len(labels) > 0, f"{path} has no data rows. Check that the export is complete.")
    gathered = _Gathered(path, mapping, task, sources, labels)
    for part in read_parts(path, needed, numbers=_numbers(mapping, task), **spelt):
        gathered.add(part)
    return gathered.reading(label)


class _Spelt(TypedDict):
    header: Sequence[str]
    delimiter: str


class _Gathered:
    """A table's rows as its parts arrive; whatever stops the reading is said at the end."""

    def __init__(
        self,
        path: Path,
        mapping: TableMapping,
        task: TaskPlan,
        sources: Mapping[str, str],
        labels: NDArray[np.int64],
    ) -> None:
        self._path, self._mapping, self._task = path, mapping, task
        self._sources, self._labels = sources, labels
        self._spool, self._keep, self._rows = Spool(), np.ones(len(labels), dtype=np.bool_), 0
        self._owners: list[pa.DictionaryArray] = []
        self._nameless = 0
        self._lacking: dict[str, tuple[int, int]] = {}
        self._outside, self._missing = Counter[str](), Counter[str]()

    def add(self, part: Part) -> None:
        """Take a part's rows that are kept."""
        start, path, mapping, task = self._rows, self._path, self._mapping, self._task
        count = part.rows
        self._rows += count
        columns = {f.name: _read_feature(path, part, f, mapping, start + 1) for f in task.features}
        keep = self._complete(columns, start, count)
        self._keep[start : start + count] = keep
        columns = {name: values[keep] for name, values in columns.items()}
        self._outside.update(clamped_counts(task, columns))
        self._missing.update({name: int(_is_missing(v).sum()) for name, v in columns.items()})
        names, nameless = _patient_names(part, mapping, start)
        self._nameless = self._nameless or nameless
        kept = [n for n, k in zip(names, keep.tolist(), strict=True) if k]
        self._owners.append(pa.array(kept, pa.string()).dictionary_encode())
        if not self._lacking:
            self._spool.add(encode(task, columns, str(path)))

    def _complete(
        self,
        columns: Mapping[str, NDArray[np.float64] | NDArray[np.int64]],
        start: int,
        count: int,
    ) -> NDArray[np.bool_]:
        """Which of a part's rows to keep: all, or those with a label and all needed values."""
        drop = self._mapping.drop_incomplete
        labels = self._labels[start : start + count]
        keep = labels >= 0 if drop else np.ones(count, dtype=np.bool_)
        for feature in self._task.features:
            if feature.missing != "refuse":
                continue
            missing = _is_missing(columns[feature.name])
            if drop:
                keep = keep & ~missing
            elif missing.any():
                _note_missing(self._lacking, self._sources[feature.name], missing, start)
        return keep

    def reading(self, label: str) -> Reading:
        """The dataset; ConfigError where something stops the reading."""
        path, mapping, task, keep = self._path, self._mapping, self._task, self._keep
        if self._lacking:
            source, (count, first) = next(iter(self._lacking.items()))
            raise ConfigError(
                f"{path}: column {source!r} has {count} missing value(s), the first in data row "
                f"{first}, and the plan refuses them. Complete those rows, leave them out with "
                "drop_incomplete = true, or agree on another plan (missing = 'midpoint' or "
                "'indicator')."
            )
        require(bool(keep.any()), f"{path}: every row is incomplete, so none is left.")
        labels = self._labels if keep.all() else self._labels[keep]
        refuse_unusable_labels(path, label, labels, task, mapping.allow_one_class)
        kept = int(keep.sum())
        measured = {name: kept - missing for name, missing in self._missing.items()}
        _refuse_wrong_units(path, self._outside, measured, self._sources)
        _refuse_nameless(path, mapping, self._nameless)
        ids, patients = _joined(self._owners)
        data = PatientDataset(self._spool.array(), labels, patients, ids)
        clamped, missing = (
            {f.name: n[f.name] for f in task.features if n[f.name]}
            for n in (self._outside, self._missing)
        )
        return Reading(data, ReadingNotes(self._rows, self._rows - kept, clamped, missing))


def read_inputs(path: Path, mapping: TableMapping, task: TaskPlan) -> Iterator[Inputs]:
    """Inputs of new patients, without labels, part by part, and whose each row is.

    Yields:
        float32, shape (rows, width), and the identifiers, (rows,).

    Raises:
        ConfigError: as `read_table`; a missing value that the plan refuses stops the reading. What
            only the whole file tells, such as a wrong unit, is said after the last part.
    """
    sources = {f.name: mapping.of(f.name).column or f.name for f in task.features}
    also = [mapping.patient, *(mapping.of(name).since for name in sources)]
    wanted = [*sources.values(), *(column for column in also if column)]
    spelt = _Spelt(header=mapping.header, delimiter=mapping.delimiter)
    rows, nameless, lacking = 0, 0, dict[str, tuple[int, int]]()
    outside, measured = Counter[str](), Counter[str]()
    for part in read_parts(path, wanted, numbers=_numbers(mapping, task), **spelt):
        columns = {f.name: _read_feature(path, part, f, mapping, rows + 1) for f in task.features}
        outside.update(clamped_counts(task, columns))
        for feature in task.features:
            missing = _is_missing(columns[feature.name])
            measured[feature.name] += int((~missing).sum())
            if feature.missing == "refuse" and missing.any():
                _note_missing(lacking, feature.name, missing, rows)
        names, bad = _patient_names(part, mapping, rows)
        nameless, rows = nameless or bad, rows + part.rows
        if not lacking:
            yield encode(task, columns, str(path)), names
    require(rows > 0, f"{path} has no data rows. Check that the export is complete.")
    _refuse_wrong_units(path, outside, measured, sources)
    _refuse_nameless(path, mapping, nameless)
    for feature in task.features:
        if feature.name in lacking:
            raise missing_refused(feature, *lacking[feature.name], str(path))


def _note_missing(
    lacking: dict[str, tuple[int, int]], name: str, missing: NDArray[np.bool_], start: int
) -> None:
    """Count a part's missing values of a column, and keep the first data row that has one."""
    before, first = lacking.get(name, (0, start + int(np.argmax(missing)) + 1))
    lacking[name] = (before + int(missing.sum()), first)


def _numbers(mapping: TableMapping, task: TaskPlan) -> set[str]:
    """The file's columns that may be read as numbers."""
    texts, found = {mapping.patient}, set[str]()
    for feature in task.features:
        column = mapping.of(feature.name)
        number = feature.type == "number" and not column.since
        fits = number and leaves_numbers(column, mapping.missing)
        (found if fits else texts).add(column.column or feature.name)
        texts.add(column.since)
    return found - texts


def _joined(parts: list[pa.DictionaryArray]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """What `group_patients` says of several parts' names, which are forgotten.

    Arrow holds them in less room than Python.
    """
    joined = pa.chunked_array(parts).unify_dictionaries()
    patients = np.concatenate([part.indices.to_numpy() for part in joined.chunks], dtype=np.int64)
    ids = joined.chunk(0).dictionary
    parts.clear()
    del joined
    pa.default_memory_pool().release_unused()  # it would keep 36 bytes a patient
    return tuple(ids.to_pylist()), patients


def group_patients(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Distinct identifiers in order of first appearance, and each record's index among them."""
    index: dict[str, int] = {}
    rows = [index.setdefault(name, len(index)) for name in names]
    return tuple(index), np.array(rows, dtype=np.int64)


def _read_feature(
    path: Path,
    part: Part,
    feature: FeaturePlan,
    mapping: TableMapping,
    first: int,
) -> NDArray[np.float64] | NDArray[np.int64]:
    column = mapping.of(feature.name)
    source = column.column or feature.name
    if source in part.numbers:
        refuse_infinite(path, part.numbers[source], source, first)
        return part.numbers[source] * column.factor + column.offset
    translated = translate(part.texts[source], column, mapping.missing)
    if feature.type != "number":
        return _codes(path, translated, source, feature, first)
    if column.since:
        absent = {*mapping.missing, *column.missing}
        values = years_between(
            path, part.texts[column.since], translated, column, absent, start=first
        )
    else:
        values = numbers_of(path, translated, source, first)
    return values * column.factor + column.offset


def _refuse_wrong_units(
    path: Path,
    outside: Mapping[str, int],
    measured: Mapping[str, int],
    sources: Mapping[str, str],
) -> None:
    """Stop where most values of a number are implausible: the unit is another one."""
    for name, count in outside.items():
        require(
            count <= MOST_IMPLAUSIBLE * measured[name],
            f"{path}: column {sources[name]!r}: {count} of {measured[name]} values lie outside the "
            f"plan's plausible range of {name!r}. Probably the unit is another one: give factor "
            "(and offset) for it in the mapping, or correct the column.",
        )


def _codes(
    path: Path, texts: Sequence[str | None], source: str, feature: FeaturePlan, first: int
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
                f"{path}: column {source!r} has in data row {row + first} a text that is none of "
                f"the plan's categories for {feature.name!r}: {', '.join(feature.categories)}. "
                "Translate it in the mapping (values = [[text in file, category], ...]), or name "
                "it under missing."
            )
        codes[row] = code
    return codes


def _patient_names(part: Part, mapping: TableMapping, start: int) -> tuple[Texts, int]:
    """Whose the rows after the first `start` are, and the first data row that does not say it."""
    if not mapping.patient:
        return [str(start + row) for row in range(1, part.rows + 1)], 0
    texts, missing = part.texts[mapping.patient], set(mapping.missing)
    rows = enumerate(texts, start=start + 1)
    return texts, next((row for row, text in rows if text in missing), 0)


def _refuse_nameless(path: Path, mapping: TableMapping, row: int) -> None:
    require(
        row == 0,
        f"{path}: column {mapping.patient!r} (the patient's identifier) is missing in data row "
        f"{row}. Privacy is counted by patient, so every row needs one.",
    )


def _is_missing(values: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.bool_]:
    missing = values == MISSING_CATEGORY if values.dtype == np.int64 else np.isnan(values)
    return np.asarray(missing, dtype=np.bool_)
