"""The hospital's own files, read by site.toml's mapping, as the arrays that training reads."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.config import Part, SiteConfig, SiteFolder
from client.data.dataset import PatientDataset
from client.data.labels import label_columns, positives
from client.data.prepared import write_prepared
from client.data.site_config import read_source
from client.data.split import split_by_share
from client.data.table import ReadingNotes
from client.patients import PatientKey
from shared.errors import ConfigError
from shared.files import make_folder
from shared.plan import StudyPlan
from shared.task_plan import TaskPlan


@dataclass(frozen=True)
class Prepared:
    """What was read, for the engineer at the hospital; counts stay there."""

    train: PatientDataset
    test: PatientDataset
    notes: ReadingNotes
    task: TaskPlan

    def lines(self) -> list[str]:
        """The counts as text."""
        parts = (("train", self.train), ("test", self.test))
        return [
            *self.notes.lines(),
            *(f"{name:<6} {_counts(self.task, data)}" for name, data in parts),
        ]


def prepare(folder: SiteFolder, config: SiteConfig, plan: StudyPlan, key: PatientKey) -> Prepared:
    """Read [source] as the plan's task wants it, and write the training and test parts.

    Every plan with the same task uses the same files. Prepare again after the source changed: a
    patient stays in the part that he was in, which `key` decides.

    Raises:
        ConfigError: site.toml names prepared files or no source, or the data do not fit.
    """
    if config.source is None or config.data is not None:
        raise ConfigError(
            f"{folder.settings_file} has {'prepared files' if config.data else 'no [source]'}. "
            "Say there where the hospital's own files are: fedward-site data map PLAN FILE "
            "writes the lines for it."
        )
    reading = read_source(config.source, folder.path, plan.task)
    shares = key.shares(reading.data.patient_ids, config.source.test_seed)
    train, test = split_by_share(reading.data, config.source.test_fraction, shares)
    parts: tuple[tuple[Part, PatientDataset], ...] = (("train", train), ("test", test))
    for part, data in parts:
        file = folder.data_file(config, plan, part)
        make_folder(file.parent)
        temporary = file.with_name(f".{file.name}")
        write_prepared(data, temporary)
        temporary.chmod(0o600)
        temporary.replace(file)
    return Prepared(train, test, reading.notes, plan.task)


def ensure_prepared(
    folder: SiteFolder, config: SiteConfig, plan: StudyPlan, key: PatientKey
) -> Prepared | None:
    """Prepare what the plan needs unless it is there; None where nothing had to be done."""
    if config.source is None or folder.data_file(config, plan, "train").exists():
        return None
    return prepare(folder, config, plan, key)


def _counts(task: TaskPlan, data: PatientDataset) -> str:
    marked = positives(task, data.labels)
    label = f"{len(np.unique(data.labels))} different labels"
    if marked is not None:
        seen = sum(int(marked[rows].max()) for rows in data.records_of)
        label = f"{seen} with the {'event' if task.kind == 'survival' else 'positive label'}"
    return f"{data.patient_count} patients, {label}, {len(data.labels)} records"


def suggest(plan: StudyPlan, file: Path, header: tuple[str, ...]) -> str:
    """Lines for site.toml that map a table's columns to a plan; guesses are marked as such.

    Args:
        plan: Whose label and features are wanted.
        file: The table.
        header: Its column names.
    """
    lines = [
        "[source]",
        'kind = "table"',
        f'path = "{file.resolve()}"',
        "",
        "[source.table]",
        'patient = "' + (_guess("patient id mrn", header) or "?") + '"  # privacy is counted by it',
    ]
    for name in (*label_columns(plan.task), *(f.name for f in plan.task.features)):
        if name in header:
            continue
        guess = _guess(name, header)
        lines += ["", "[[source.table.columns]]", f'name = "{name}"']
        lines.append(f'column = "{guess or "?"}"  # {"a guess: check it" if guess else "which?"}')
        if name == plan.task.label:
            lines.append(f'# values = [["TEXT IN THE FILE", "{plan.task.positive}"], ...]')
    return "\n".join(lines)


def _guess(name: str, header: tuple[str, ...]) -> str | None:
    """The column whose name is most like one of the words."""
    lower = {column.lower(): column for column in header}
    for word in name.lower().split():
        close = difflib.get_close_matches(word, lower, n=1, cutoff=0.6)
        if close:
            return lower[close[0]]
    return None
