"""The UCI heart-disease data of four real hospitals, prepared as FLamby does.

Kept are the ten columns that all hospitals measured; rows that lack one are left out; disease is
`num` above 0, or `num` itself in a task with classes. The split is FLamby's published one.

Sources: Janosi, Steinbrunn, Pfisterer, Detrano, "Heart Disease", UCI Machine Learning Repository,
1988, DOI 10.24432/C52P4X; Ogier du Terrail et al., "FLamby", NeurIPS 2022 Datasets and Benchmarks,
appendix on Fed-Heart-Disease.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import read_columns
from client.data.dataset import PatientDataset
from client.data.mapping import ColumnMapping, TableMapping
from client.data.table import read_table
from shared.config import require
from shared.task_plan import TaskPlan

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
SPLIT_FILE = "flamby_split.csv"
_COLUMNS = (
    "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num".split()  # noqa: SIM905
)
_MAPPING = TableMapping(
    one_row_per_patient=True,
    header=tuple(_COLUMNS),
    missing=("?",),
    drop_incomplete=True,
    columns=(ColumnMapping("num", values=(("2", "1"), ("3", "1"), ("4", "1"))),),
)
_SEVERITY = replace(_MAPPING, columns=())


def check_folder(folder: str) -> Path:
    """The folder with the four original files.

    Raises:
        ConfigError: no folder was given, or a file is not in it.
    """
    files = [f"processed.{name}.data" for name in HOSPITALS]
    absent = [name for name in files if not folder or not (Path(folder) / name).is_file()]
    require(
        not absent,
        f"source 'heart' needs a folder with the UCI heart-disease files {', '.join(files)}; "
        f"{folder or 'no folder'} was given, and {', '.join(absent)} are not there. Fetch "
        "them from https://archive.ics.uci.edu/dataset/45 and give the folder with "
        "--data FOLDER or --set simulation.folder=PATH.",
    )
    return Path(folder)


def read_hospital(folder: Path, name: str, task: TaskPlan) -> PatientDataset:
    """One hospital's complete rows; a patient's identifier is the row number in the file.

    Raises:
        ConfigError: no such hospital, or the file does not fit the plan.
    """
    require(
        name in HOSPITALS,
        f"source 'heart' has no hospital {name!r}; the plan's sites must be of: "
        f"{', '.join(HOSPITALS)}.",
    )
    mapping = _SEVERITY if task.kind == "multiclass" else _MAPPING
    return read_table(folder / f"processed.{name}.data", mapping, task).data


def official_split(
    folder: Path, name: str, data: PatientDataset
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """FLamby's training and test patients of one hospital.

    Read from flamby_split.csv where it lies in the folder, otherwise drawn as FLamby draws them:
    66 % for training, scikit-learn's train_test_split with random_state 43, stratified unless a
    class has at most two members.

    Raises:
        ConfigError: the split file does not name exactly this hospital's patients.
    """
    path = folder / SPLIT_FILE
    if not path.is_file():
        return _drawn_split(data)
    table = read_columns(path, ["site", "source_row", "split"])
    parts = {
        row: split
        for site, row, split in zip(*table.values(), strict=True)
        if site == name and split in ("train", "test")
    }
    require(
        set(parts) == set(data.patient_ids),
        f"{path} does not name the same rows of {name} as the data has after incomplete rows are "
        "left out. Use the plan's ten features, or set simulation.split to 'random'.",
    )
    is_train = np.array([parts[row] == "train" for row in data.patient_ids])
    return np.flatnonzero(is_train), np.flatnonzero(~is_train)


def _drawn_split(data: PatientDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  a second to import

    counts = np.bincount(np.minimum(data.labels, 1), minlength=2)
    train, test = train_test_split(
        np.arange(len(data.labels)),
        test_size=1.0 - 0.66,
        train_size=0.66,
        random_state=43,
        stratify=np.minimum(data.labels, 1) if counts.min() > 2 else None,
    )
    return np.sort(train), np.sort(test)
