"""Which of a site's patients a plan would touch, by what it would charge them for."""

from __future__ import annotations

from client.config import Part, SiteConfig, SiteFolder
from client.consent import Books, People
from client.data.prepared import read_prepared
from shared.plan import StudyPlan
from shared.privacy import Use, costs_of

PARTS: dict[Use, Part] = {"training": "train", "evaluation": "test"}
"""Which part of the data each use takes."""


def people_of(folder: SiteFolder, config: SiteConfig, books: Books, plan: StudyPlan) -> People:
    """The patients that each use of a plan would charge, less those who opted out.

    Raises:
        ConfigError: a part's file is missing or damaged.
    """
    ids = {}
    for use in costs_of(plan):
        data = read_prepared(folder.data_file(config, plan, PARTS[use]))
        ids[use] = books.opt_out.without(data).patient_ids
    return books.people(plan, ids)
