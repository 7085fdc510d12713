"""The simulated hospitals: a plan's sites with the patients that a scenario gives them.

Sources: "breast-cancer" (scikit-learn's Wisconsin data, dealt out to unequal, unlike hospitals),
"nodules" (drawn images, simulations/nodules.py), "heart" (the four UCI hospitals, from their
original files), "npz" (a MedMNIST file, dealt out), "csv" and "image-folder" (one file or folder
per site). Everything is a function of the scenario and its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from shared.config import require
from shared.errors import ConfigError
from shared.features import encode, fit_zscore
from shared.plan import StudyPlan
from simulations.scenario import SimulationConfig


@dataclass(frozen=True)
class Hospital:
    """One simulated site: its patients for training, and other patients of its own for testing."""

    name: str
    train: PatientDataset
    test: PatientDataset


def load_hospitals(
    simulation: SimulationConfig, plan: StudyPlan, seed: int | None = None
) -> tuple[Hospital, ...]:
    """Load or draw every site's patients, in the order of `plan.cohort.sites`.

    Args:
        simulation: The scenario's [simulation].
        plan: The study plan; its task shapes the inputs.
        seed: In place of `simulation.seed`.

    Returns:
        One hospital per site. No patient is in both of a hospital's parts.

    Raises:
        ConfigError: files are missing or do not fit the plan; the message names them.
    """
    if seed is not None:
        simulation = replace(simulation, seed=seed)
    hospitals = _SOURCES[simulation.source](simulation, plan)
    if plan.task.scaling == "site-zscore":
        hospitals = tuple(_zscored(h) for h in hospitals)
    return hospitals


def deal_out(
    score: NDArray[np.float64], sizes: tuple[int, ...], skew: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Deal patients out to unequal, unlike sites: the first site tends to get the highest scores.

    Args:
        score: What the sites differ by, shape (patients,), such as tumour size.
        sizes: Proportions of the sites.
        skew: 0 deals at random, 1 sorts by score; between, the order is by score and chance.
        rng: The chance.

    Returns:
        The patients of each site; together all of them, each once.
    """
    spread = float(score.std()) or 1.0
    standard = (score - score.mean()) / spread
    order = np.argsort(-(skew * standard + (1 - skew) * rng.normal(size=len(score))), kind="stable")
    ends = np.round(np.cumsum(sizes) / np.sum(sizes) * len(score)).astype(np.int64)
    return [np.sort(part) for part in np.split(order, ends[:-1])]


def split_by_patient(
    data: PatientDataset, test_fraction: float, rng: np.random.Generator
) -> tuple[PatientDataset, PatientDataset]:
    """Split into train and test by patient, each class (a patient's highest label) alike.

    Raises:
        ConfigError: too few patients for one in each part.
    """
    label = np.array([data.labels[rows].max() for rows in data.records_of])
    parts: tuple[list[int], list[int]] = ([], [])
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        cut = round(len(members) * test_fraction)
        parts[0].extend(members[cut:].tolist())
        parts[1].extend(members[:cut].tolist())
    require(
        bool(parts[0]) and bool(parts[1]),
        f"{data.patient_count} patients cannot be split with test_fraction {test_fraction:g}: one "
        "part would be empty. Give the site more patients, or change test_fraction.",
    )
    train, test = (data.select(np.sort(np.array(part, dtype=np.int64))) for part in parts)
    return train, test


def _breast_cancer(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  a second to import

    source = load_breast_cancer()
    names = [str(name) for name in source.feature_names]
    odd = [f.name for f in plan.task.features if f.name not in names]
    require(
        bool(plan.task.features) and not odd and plan.task.positive in ("malignant", "benign"),
        f"the breast-cancer source has no feature {', '.join(map(repr, odd)) or '(image)'}, and "
        "its labels are 'malignant' and 'benign'. See simulations/scenarios/breast_cancer.toml.",
    )
    columns = {f.name: source.data[:, names.index(f.name)] for f in plan.task.features}
    positive = list(source.target_names).index(plan.task.positive)
    count = len(source.target)
    data = PatientDataset(
        encode(plan.task, columns, "the breast-cancer source"),
        (source.target == positive).astype(np.int64),
        np.arange(count),
        tuple(f"wisconsin-{row + 1}" for row in range(count)),
    )
    size = source.data[:, names.index("mean radius")]
    return _dealt_out(data, size, simulation, plan)


def _dealt_out(
    data: PatientDataset,
    score: NDArray[np.float64],
    simulation: SimulationConfig,
    plan: StudyPlan,
) -> tuple[Hospital, ...]:
    sizes = simulation.site_sizes or tuple(s.expected_patients for s in plan.cohort.sites)
    rng = np.random.default_rng(simulation.seed)
    hospitals = []
    for site, members in zip(
        plan.cohort.sites, deal_out(score, sizes, simulation.skew, rng), strict=True
    ):
        train, test = split_by_patient(data.select(members), simulation.test_fraction, rng)
        hospitals.append(Hospital(site.name, train, test))
    return tuple(hospitals)


def _zscored(hospital: Hospital) -> Hospital:
    scale = fit_zscore(hospital.train.inputs)
    train, test = (
        replace(part, inputs=scale.apply(part.inputs)) for part in (hospital.train, hospital.test)
    )
    return Hospital(hospital.name, train, test)


def _not_yet(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    raise ConfigError(f"source {simulation.source!r} is not available yet")


_SOURCES = {
    "breast-cancer": _breast_cancer,
    "nodules": _not_yet,
    "heart": _not_yet,
    "npz": _not_yet,
    "csv": _not_yet,
    "image-folder": _not_yet,
}
