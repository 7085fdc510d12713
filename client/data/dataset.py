"""A site's records as arrays, grouped by patient; it never leaves the site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from client.data.mapped import all_finite, taken
from shared.config import require


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
        known = np.unique(self.patients)
        require(
            np.array_equal(known, np.arange(len(self.patient_ids))),
            "every patient must have a record, and every record a known patient",
        )

    @property
    def patient_count(self) -> int:
        """How many patients there are; private under differential privacy."""
        return len(self.patient_ids)

    @cached_property
    def records_of(self) -> tuple[NDArray[np.int64], ...]:
        """The record rows of each patient, in file order."""
        order = np.argsort(self.patients, kind="stable")
        ends = np.cumsum(np.bincount(self.patients, minlength=self.patient_count))
        return tuple(np.split(order, ends[:-1]))

    def select(self, patients: NDArray[np.int64]) -> PatientDataset:
        """The dataset of the given patients alone, renumbered in the given order."""
        rows = np.concatenate([self.records_of[p] for p in patients.tolist()])
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
