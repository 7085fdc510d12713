"""The simulated hospitals: a plan's sites with the patients that a scenario gives them.

Sources: "breast-cancer" and "diabetes" (scikit-learn's data, dealt out to unequal, unlike
hospitals), "nodules" (drawn images, simulations/nodules.py), "heart" (the four UCI hospitals, from
their original files), "tcga-brca" (survival in six regions), "npz" (a MedMNIST file, dealt out),
"table" (one file with a column for the hospital), "csv" and "image-folder" (one file or folder per
site). Everything is a function of the scenario and its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import read_columns
from client.data.dataset import PatientDataset
from client.data.images import read_image_folder
from client.data.labels import read_labels
from client.data.mapping import TableMapping
from client.data.npz import read_npz
from client.data.split import split_by_patient
from client.data.table import read_table
from shared.config import require
from shared.errors import ConfigError
from shared.features import encode, fit_zscore, image_inputs
from shared.plan import StudyPlan
from simulations import heart, tcga
from simulations.nodules import SITES, draw_nodules
from simulations.scenario import SimulationConfig

_ROW_PER_PATIENT = TableMapping(one_row_per_patient=True)


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
    return _split_each(_deal(data, size, simulation, plan), simulation, plan)


def _diabetes(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    from sklearn.datasets import load_diabetes  # noqa: PLC0415  a second to import

    source = load_diabetes(scaled=False)
    names = list(source.feature_names)
    odd = [f.name for f in plan.task.features if f.name not in names]
    require(
        bool(plan.task.features) and not odd and plan.task.kind == "regression",
        f"the diabetes source has no feature {', '.join(map(repr, odd)) or '(image)'}, and its "
        "label is a number. See simulations/scenarios/diabetes.toml.",
    )
    columns = {f.name: source.data[:, names.index(f.name)] for f in plan.task.features}
    texts = [repr(float(value)) for value in source.target]
    path = Path("the diabetes source")
    labels = read_labels(path, {plan.task.label: texts}, plan.task, _ROW_PER_PATIENT)
    ids = tuple(f"diabetes-{row + 1}" for row in range(len(texts)))
    data = PatientDataset(encode(plan.task, columns, str(path)), labels, np.arange(len(ids)), ids)
    age = source.data[:, names.index("age")]
    return _split_each(_deal(data, age, simulation, plan), simulation, plan)


def _deal(
    data: PatientDataset,
    score: NDArray[np.float64],
    simulation: SimulationConfig,
    plan: StudyPlan,
) -> list[PatientDataset]:
    rng = np.random.default_rng(simulation.seed)
    dealt = deal_out(score, _sizes(simulation, plan), simulation.skew, rng)
    return [data.select(members) for members in dealt]


def _nodules(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    if plan.task.image is None:
        raise ConfigError("the nodules source draws images, and the plan's task has a table.")
    sizes = _sizes(simulation, plan)
    hospitals = []
    for number, (site, size) in enumerate(zip(plan.cohort.sites, sizes, strict=True)):
        look = replace(SITES[number % len(SITES)], patients=size)
        drawn = draw_nodules(look, simulation.seed, number)
        data = PatientDataset(
            image_inputs(plan.task.image, drawn.pixels),
            drawn.labels,
            drawn.patients,
            tuple(f"synthetic-{number}-{patient + 1}" for patient in range(size)),
        )
        hospitals.append(_split(site.name, data, simulation, number))
    return tuple(hospitals)


def _heart(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    folder = heart.check_folder(simulation.folder)
    hospitals = []
    for number, site in enumerate(plan.cohort.sites):
        data = heart.read_hospital(folder, site.name, plan.task)
        if simulation.split == "official":
            train, test = heart.official_split(folder, site.name, data)
            hospitals.append(Hospital(site.name, data.select(train), data.select(test)))
        else:
            hospitals.append(_split(site.name, data, simulation, number))
    return tuple(hospitals)


def _npz(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    expected = "the folder with the MedMNIST file, and the file's name in simulation.file"
    path = _folder(simulation, expected) / simulation.file
    train = read_npz(path, plan.task, "train").data
    dealt = _deal(train, train.labels.astype(np.float64), simulation, plan)
    if simulation.split == "random":
        return _split_each(dealt, simulation, plan)
    test = read_npz(path, plan.task, "test").data
    tests = _deal(test, test.labels.astype(np.float64), simulation, plan)
    return tuple(map(Hospital, (site.name for site in plan.cohort.sites), dealt, tests))


def _tcga_brca(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    folder = Path(simulation.folder)
    hospitals = []
    for number, (name, data, is_test) in enumerate(tcga.read_regions(folder, plan)):
        if simulation.split == "official":
            parts = (data.select(np.flatnonzero(part)) for part in (~is_test, is_test))
            hospitals.append(Hospital(name, *parts))
        else:
            hospitals.append(_split(name, data, simulation, number))
    return tuple(hospitals)


def _table(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    """One file for all: each hospital reads the rows that are its own."""
    folder = _folder(simulation, "the folder with the table, and its name in simulation.file")
    require(bool(simulation.site_column), "source 'table' needs simulation.site_column")
    path, mapping = folder / simulation.file, simulation.table
    of = dict(pair for pair in simulation.site_values if len(pair) == 2)
    sites = read_columns(path, [simulation.site_column], delimiter=mapping.delimiter)
    named = [of.get(text, text) for text in sites[simulation.site_column]]
    whole = read_table(path, replace(mapping, drop_incomplete=False), plan.task).data
    hospitals = []
    for number, site in enumerate(plan.cohort.sites):
        rows = np.flatnonzero(np.array([name == site.name for name in named]))
        own = np.unique(whole.patients[rows])
        require(len(own) > 0, f"{path}: no row is of site {site.name!r}; see site_values.")
        hospitals.append(_split(site.name, whole.select(own), simulation, number))
    return tuple(hospitals)


def _csv(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    names = [site.name for site in plan.cohort.sites]
    folder = _folder(simulation, f"the folder with {names[0]}.csv (or .parquet) and the others")
    hospitals = []
    for number, name in enumerate(names):
        parquet = folder / f"{name}.parquet"
        path = parquet if parquet.is_file() else folder / f"{name}.csv"
        data = read_table(path, simulation.table, plan.task).data
        hospitals.append(_split(name, data, simulation, number))
    return tuple(hospitals)


def _image_folder(simulation: SimulationConfig, plan: StudyPlan) -> tuple[Hospital, ...]:
    names = [site.name for site in plan.cohort.sites]
    folder = _folder(simulation, f"the folder with one sub-folder per site: {', '.join(names)}")
    return tuple(
        _split(
            name,
            read_image_folder(folder / name, simulation.images, plan.task).data,
            simulation,
            number,
        )
        for number, name in enumerate(names)
    )


def _folder(simulation: SimulationConfig, expected: str) -> Path:
    require(
        bool(simulation.folder) and Path(simulation.folder).is_dir(),
        f"source {simulation.source!r} needs {expected}; "
        f"{simulation.folder or 'no folder'} was given. "
        "Give it with --data FOLDER or --set simulation.folder=PATH.",
    )
    return Path(simulation.folder)


def _sizes(simulation: SimulationConfig, plan: StudyPlan) -> tuple[int, ...]:
    return simulation.site_sizes or tuple(s.expected_patients for s in plan.cohort.sites)


def _split_each(
    parts: list[PatientDataset], simulation: SimulationConfig, plan: StudyPlan
) -> tuple[Hospital, ...]:
    return tuple(
        _split(site.name, part, simulation, number)
        for number, (site, part) in enumerate(zip(plan.cohort.sites, parts, strict=True))
    )


def _split(name: str, data: PatientDataset, simulation: SimulationConfig, number: int) -> Hospital:
    rng = np.random.default_rng([simulation.seed, number])
    try:
        return Hospital(name, *split_by_patient(data, simulation.test_fraction, rng))
    except ConfigError as error:
        raise ConfigError(f"site {name!r}: {error}") from None


def _zscored(hospital: Hospital) -> Hospital:
    scale = fit_zscore(hospital.train.inputs)
    train, test = (
        replace(part, inputs=scale.apply(part.inputs)) for part in (hospital.train, hospital.test)
    )
    return Hospital(hospital.name, train, test)


_SOURCES = {
    "breast-cancer": _breast_cancer,
    "nodules": _nodules,
    "heart": _heart,
    "diabetes": _diabetes,
    "tcga-brca": _tcga_brca,
    "table": _table,
    "npz": _npz,
    "csv": _csv,
    "image-folder": _image_folder,
}
