"""Training and test parts of a site's patients."""

from __future__ import annotations

import numpy as np

from client.data.dataset import PatientDataset
from shared.config import require


def split_by_patient(
    data: PatientDataset, test_fraction: float, rng: np.random.Generator
) -> tuple[PatientDataset, PatientDataset]:
    """Split into train and test by patient, each class (a patient's highest label) alike.

    No patient is in both parts, however many records there are.

    Raises:
        ConfigError: too few patients for one in each part.
    """
    label = np.array([data.labels[rows].max() for rows in data.records_of])
    train: list[int] = []
    test: list[int] = []
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        cut = round(len(members) * test_fraction)
        train.extend(members[cut:].tolist())
        test.extend(members[:cut].tolist())
    require(
        bool(train) and bool(test),
        f"too few patients for a test fraction of {test_fraction:g}: one part would be empty. "
        "Give the site more patients, or change test_fraction.",
    )
    return data.select(np.sort(train)), data.select(np.sort(test))
