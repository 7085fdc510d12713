"""One patient's records at this hospital, as a released model reads them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.config import Part, SiteConfig, SiteFolder
from client.data.dataset import PatientDataset
from client.data.prepared import read_prepared
from client.data.site_config import read_source
from client.data.unlabelled import Unlabelled
from shared.config import require
from shared.plan import StudyPlan

PARTS: tuple[Part, ...] = ("train", "test")


def records_of(
    folder: SiteFolder, plan: StudyPlan, patient: str, given: Unlabelled | None = None
) -> NDArray[np.float32]:
    """The records of one patient, shape (records, *input_shape), scaled by the plan.

    Args:
        folder: Of this site.
        plan: Of the model.
        patient: The hospital's own identifier.
        given: New records to look among; the only one is taken for the patient's where it cannot
            say whose it is. Left out: the site's own data.

    Raises:
        ConfigError: there is no such patient, or the data do not fit; never the identifier.
    """
    if given is not None:
        alone = len(given.inputs) == 1 and not given.named
        found = given.inputs[[alone or name == patient for name in given.patients]]
    else:
        own = _own(folder, folder.config(), plan)
        found = np.concatenate([_of(part, patient) for part in own])
    require(
        len(found) > 0,
        f"{'this site' if given is None else 'the file'} has no record of that patient. Give the "
        "identifier as it stands in the data (or in a picture's name); for a patient who is not in "
        "the study's data, name the file: fedward-site explain MODEL FILE --patient ID.",
    )
    return found


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
