"""Which of a site's patients a plan would touch, by what it would charge them for."""

from __future__ import annotations

from client.config import Part, SiteConfig, SiteFolder
from client.consent import Books, People
from client.data.dataset import PatientDataset, joined
from client.data.prepared import read_prepared
from shared.errors import ConfigError, PolicyError
from shared.plan import StudyPlan
from shared.privacy import Use, costs_of

PARTS: dict[Use, tuple[Part, ...]] = {
    "training": ("train",),
    "evaluation": ("test",),
    "statistics": ("train", "test"),
}
"""Which parts of the data each use takes."""


def read_parts(
    folder: SiteFolder, config: SiteConfig, books: Books, plan: StudyPlan, parts: tuple[Part, ...]
) -> PatientDataset:
    """The records of some parts, less those of patients who opted out.

    Raises:
        ConfigError: a file is missing or damaged, or its records do not have the plan's shape.
        PolicyError: the data name no patients, and the policy does not say that rows are patients.
    """
    from shared.models import input_shape  # noqa: PLC0415  # torch takes seconds

    source = None if config.data is not None else config.source
    if source and not source.names_patients and not books.limits.rows_are_patients:
        raise PolicyError(
            "site.toml names no patient column, so the ledger could not recognise a patient in "
            "another file. Name it there; or, if each row really is another patient, let the "
            "officer say so: rows_are_patients = true in policy.toml charges them all as one."
        )
    found = []
    for part in parts:
        path = folder.data_file(config, plan, part)
        data = read_prepared(path)
        if data.inputs.shape[1:] != input_shape(plan):
            raise ConfigError(
                f"{path}: records of shape {data.inputs.shape[1:]}, not {input_shape(plan)}"
            )
        found.append(data)
    return books.opt_out.without(joined(found))


def people_of(folder: SiteFolder, config: SiteConfig, books: Books, plan: StudyPlan) -> People:
    """The patients that each use of a plan would charge, less those who opted out.

    Raises:
        ConfigError: a part's file is missing or damaged.
    """
    ids = {}
    for use in costs_of(plan):
        ids[use] = read_parts(folder, config, books, plan, PARTS[use]).patient_ids
    return books.people(plan, ids)
