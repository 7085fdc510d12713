"""One patient's records at this hospital, as a released model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.config import Part, SiteConfig, SiteFolder
from client.data.dataset import PatientDataset
from client.data.prepared import read_prepared
from client.data.site_config import read_source
from client.data.table import read_inputs
from shared.config import require
from shared.errors import ConfigError
from shared.plan import StudyPlan
from shared.task_plan import TaskPlan

PARTS: tuple[Part, ...] = ("train", "test")


def records_of(
    folder: SiteFolder, plan: StudyPlan, patient: str, file: Path | None = None
) -> NDArray[np.float32]:
    """The records of one patient, shape (records, *input_shape), scaled by the plan.

    Args:
        folder: Of this site.
        plan: Of the model.
        patient: The hospital's own identifier.
        file: A table by site.toml's mapping, no label needed. Left out: the site's own data.

    Raises:
        ConfigError: there is no such patient, or the data do not fit; never the identifier.
    """
    config = folder.config()
    if file is not None:
        inputs, names = read_unlabelled(config, plan.task, file)
        found = inputs[[name == patient for name in names]]
    else:
        found = np.concatenate([_of(part, patient) for part in _own(folder, config, plan)])
    require(
        len(found) > 0,
        f"{file or 'this site'} has no record of that patient. Give the identifier as it stands "
        "in the data; for a patient who is not in the study's data, name the table: "
        "fedward-site explain MODEL FILE --patient ID.",
    )
    return found


def read_unlabelled(
    config: SiteConfig, task: TaskPlan, file: Path
) -> tuple[NDArray[np.float32], Sequence[str]]:
    """Inputs and patients of a table by site.toml's mapping, no label needed.

    Raises:
        ConfigError: site.toml maps no table, or the file does not fit the mapping.
    """
    if config.source is None or config.source.table is None:
        raise ConfigError(
            "site.toml maps no table. Propose the lines with: fedward-site data map PLAN FILE."
        )
    return read_inputs(file, config.source.table, task)


def _own(folder: SiteFolder, config: SiteConfig, plan: StudyPlan) -> list[PatientDataset]:
    """The site's data as the plan's task wants them: prepared ones, else from their source."""
    files = [folder.data_file(config, plan, part) for part in PARTS]
    if config.source is None or all(file.exists() for file in files):
        return [read_prepared(file) for file in files]
    return [read_source(config.source, folder.path, plan.task).data]


def _of(data: PatientDataset, patient: str) -> NDArray[np.float32]:
    if patient not in data.patient_ids:
        return data.inputs[:0]
    return data.inputs[data.records_of[data.patient_ids.index(patient)]]
