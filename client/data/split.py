"""Training and test parts of a site's patients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from shared.config import require

FEW_LABELS = 10
STRATUM = 20  # patients with neighbouring labels


def split_by_share(
    data: PatientDataset, test_fraction: float, shares: NDArray[np.float64]
) -> tuple[PatientDataset, PatientDataset]:
    """Split into train and test, each patient by a number of his own; how a hospital's data are.

    Whoever was trained on is never tested on later, however the hospital's file grows. The parts
    have the wished sizes and classes only on average.

    Args:
        data: Of one site.
        test_fraction: On average this share of the patients is in the test part.
        shares: In [0, 1), one for each patient; see `PatientKey.shares`.

    Raises:
        ConfigError: one part would be empty.
    """
    in_test = shares < test_fraction
    return _parts(data, np.flatnonzero(~in_test), np.flatnonzero(in_test), test_fraction)


def split_by_patient(
    data: PatientDataset, test_fraction: float, rng: np.random.Generator
) -> tuple[PatientDataset, PatientDataset]:
    """Split into train and test by patient, each class (a patient's highest label) alike.

    For pretended hospitals, whose data do not change: a patient's part depends on all others.
    Where labels are many (numbers, times), those of neighbouring labels are alike instead. No
    patient is in both parts, however many records there are.

    Raises:
        ConfigError: too few patients for one in each part.
    """
    label = np.array([data.labels[rows].max() for rows in data.records_of])
    train: list[int] = []
    test: list[int] = []
    for members in _alike(label, rng):
        cut = round(len(members) * test_fraction)
        train.extend(members[cut:].tolist())
        test.extend(members[:cut].tolist())
    return _parts(data, np.sort(train), np.sort(test), test_fraction)


def _parts(
    data: PatientDataset,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    test_fraction: float,
) -> tuple[PatientDataset, PatientDataset]:
    require(
        len(train) > 0 and len(test) > 0,
        f"too few patients for a test fraction of {test_fraction:g}: one part would be empty. "
        "Give the site more patients, or change test_fraction.",
    )
    return data.select(train), data.select(test)


def _alike(label: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Patients of one label each, in random order; of neighbouring labels where these are many."""
    values = np.unique(label)
    if len(values) <= FEW_LABELS:
        return [rng.permutation(np.flatnonzero(label == value)) for value in values]
    shuffled = rng.permutation(len(label))
    order = shuffled[np.argsort(label[shuffled], kind="stable")]
    return [rng.permutation(part) for part in np.array_split(order, -(-len(order) // STRATUM))]
