"""A site's records as arrays, grouped by patient; it never leaves the site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from client.data.mapped import all_finite, taken
from shared.config import require

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RecordRows:
    """The record rows of each patient, `of[patient]`: one array for all, not one object a patient.

    Attributes:
        rows: int64, the rows of the first patient, of the second, and so on.
        starts: int64, shape (patients,), where each patient's begin.
        counts: int64, likewise, how many each has.
    """

    rows: Rows
    starts: Rows
    counts: Rows

    @classmethod
    def of(cls, patients: Rows, patient_count: int) -> RecordRows:
        """Each patient's rows in file order, from each record's patient."""
        counts = np.bincount(patients, minlength=patient_count)
        return cls(np.argsort(patients, kind="stable"), np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        """How many patients there are."""
        return len(self.starts)

    def __getitem__(self, patient: int) -> Rows:
        """One patient's rows."""
        start = self.starts[patient]
        return self.rows[start : start + self.counts[patient]]

    def __iter__(self) -> Iterator[Rows]:
        """Every patient's rows in turn."""
        return (self[patient] for patient in range(len(self)))

    def first(self, most: int) -> RecordRows:
        """The same with at most so many rows of each patient."""
        return RecordRows(self.rows, self.starts, np.minimum(self.counts, most))

    def together(self, patients: Rows) -> Rows:
        """The rows of some patients, one patient after the other."""
        counts = self.counts[patients]
        shifts = self.starts[patients] - (np.cumsum(counts) - counts)
        places = np.arange(counts.sum())
        places += np.repeat(shifts, counts)
        return self.rows[places]


@dataclass(frozen=True)
class PatientDataset:
    """Records with labels, each belonging to one patient.

    Attributes:
        inputs: float32, shape (records, *input_shape), finite, already scaled by the plan; many are
            mapped from a file (client/data/mapped.py).
        labels: int64, shape (records,); 0 or 1 for a binary task.
        patients: int64, shape (records,), the row in `patient_ids` of each record's patient.
        patient_ids: the hospital's own identifiers, one per patient.

    Raises:
        ConfigError: shapes disagree, a value is not finite, or a patient has no record.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]
    patient_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.inputs)
        require(len(self.labels) == n == len(self.patients), "inputs, labels, patients differ")
        require(all_finite(self.inputs), "an input value is not finite")
        count = len(self.patient_ids)
        known = not n or (self.patients.min() >= 0 and self.patients.max() < count)
        require(
            bool(known and np.bincount(self.patients, minlength=count).all()),
            "every patient must have a record, and every record a known patient",
        )

    @property
    def patient_count(self) -> int:
        """How many patients there are; private under differential privacy."""
        return len(self.patient_ids)

    @cached_property
    def records_of(self) -> RecordRows:
        """The record rows of each patient, in file order."""
        return RecordRows.of(self.patients, self.patient_count)

    def select(self, patients: NDArray[np.int64]) -> PatientDataset:
        """The dataset of the given patients alone, renumbered in the given order."""
        rows = self.records_of.together(patients)
        renumbered = np.full(self.patient_count, -1, dtype=np.int64)
        renumbered[patients] = np.arange(len(patients))
        return PatientDataset(
            taken(self.inputs, rows),
            self.labels[rows],
            renumbered[self.patients[rows]],
            tuple(self.patient_ids[p] for p in patients.tolist()),
        )


def joined(parts: Sequence[PatientDataset]) -> PatientDataset:
    """Several parts of one site's data as one; a patient who is in two of them stays one."""
    if len(parts) == 1:
        return parts[0]
    known: dict[str, int] = {}
    for part in parts:
        for name in part.patient_ids:
            known.setdefault(name, len(known))
    owners = [np.array([known[n] for n in p.patient_ids])[p.patients] for p in parts]
    return PatientDataset(
        np.concatenate([p.inputs for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate(owners),
        tuple(known),
    )
