"""Scans (DICOM, NIfTI) to a PatientDataset: what their two readers have in common.

A reader yields one `Scan` for each image or volume that it could read, with the names under which
the hospital's list of labels may know it. A file that cannot be used is left out and listed with
its reason; the rest is read on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.columns import read_columns
from client.data.dataset import PatientDataset
from client.data.labels import read_labels, refuse_unusable_labels
from client.data.mapped import Spool, release
from client.data.mapping import ColumnMapping, TableMapping
from client.data.table import (
    Reading,
    ReadingNotes,
    group_patients,
)
from shared.config import require
from shared.errors import ConfigError
from shared.features import features_of_scaled
from shared.task_plan import ImagePlan, TaskPlan

Key = Literal["patient", "study", "series", "file"]
Values = NDArray[np.float32]

AT_ONCE = 32  # scans whose features are made at once
MOST_VALUES = 1 << 28
"""Of one file: a larger one is damaged, or an attack on memory."""


@dataclass(frozen=True)
class ScanMapping:
    """How a hospital's folder of scans answers the plan.

    Attributes:
        labels: A table in the folder. Where it does not exist, the folders directly below are
            the classes.
        key: What a row of the table is about: a patient, a study or series (their DICOM UID), or
            a file (its path within the folder).
        column: The table's column with that key; empty where it is named like `key`.
        label: The table's column with the label.
        values: Pairs [label text or folder, text in the plan].
        window: "plan" scales by the plan's black and white, in the scan's own unit, such as
            Hounsfield. "file" uses the window that each DICOM file names, as a viewer does.
        resize: Bring every scan to the plan's size (linear), instead of leaving other sizes out.
        patient_separator: NIfTI only: a file's name up to this text is its patient.
        drop_unlabelled: Leave out scans without a label, instead of stopping.
        allow_one_class: Accept a folder in which all scans have the same label.
    """

    labels: str = "labels.csv"
    key: Key = "patient"
    column: str = ""
    label: str = "label"
    values: tuple[tuple[str, ...], ...] = ()
    window: Literal["plan", "file"] = "plan"
    resize: bool = False
    patient_separator: str = ""
    drop_unlabelled: bool = False
    allow_one_class: bool = False


@dataclass(frozen=True)
class Scan:
    """One readable image or volume.

    Attributes:
        values: float32 within [-1, 1], shape (channels, *grid).
        file: Path below the folder, of a series' first file.
    """

    values: Values
    patient: str
    file: str
    study: str = ""
    series: str = ""


class UnusableScanError(Exception):
    """Why one file cannot be used; caught by the reader, which goes on with the others."""


@dataclass
class Found:
    """What a reader has found so far; the scans' values are in the spool, in order."""

    scans: list[Scan] = field(default_factory=list)
    spool: Spool = field(default_factory=Spool)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, file: str, read: Callable[[], Scan]) -> None:
        """Add a scan, or the reason why there is none."""
        try:
            scan = read()
        except UnusableScanError as error:
            self.rejected.append((file, str(error)))
            return
        self.spool.add(scan.values[None])
        self.scans.append(replace(scan, values=np.zeros(0, np.float32)))

    def inputs(self, image: ImagePlan, rows: Sequence[int]) -> Values:
        """The model's inputs of some of the scans."""
        values, kept = self.spool.array(), Spool()
        for first in range(0, len(rows), AT_ONCE):
            part = np.array(values[list(rows[first : first + AT_ONCE])])
            kept.add(features_of_scaled(image, part))
            release(values)
        return kept.array()


def to_dataset(folder: Path, found: Found, mapping: ScanMapping, task: TaskPlan) -> Reading:
    """Join scans with their labels, grouped by patient.

    Raises:
        ConfigError: no usable scan, or labels that do not fit; names the folder or its table.
    """
    require_scans(folder, found)
    texts = _label_texts(folder, found.scans, mapping)
    known = [i for i, text in enumerate(texts) if text is not None]
    missing = len(texts) - len(known)
    require(
        missing == 0 or mapping.drop_unlabelled,
        f"{folder}: {missing} of {len(texts)} scans have no label in {mapping.labels}. Complete "
        "it, or set drop_unlabelled = true.",
    )
    require(bool(known), f"{folder}: no scan has a label in {mapping.labels}. Check `key`.")
    label = ColumnMapping(task.label, mapping.label, values=mapping.values)
    table = TableMapping(one_row_per_patient=True, columns=(label,))
    labels = read_labels(folder, {task.label: [texts[i] or "" for i in known]}, task, table)
    refuse_unusable_labels(folder, mapping.label, labels, task, mapping.allow_one_class)
    scans = [found.scans[i] for i in known]
    ids, patients = group_patients([scan.patient for scan in scans])
    inputs = found.inputs(image_of(folder, task), known)
    data = PatientDataset(inputs, labels, patients, ids)
    notes = ReadingNotes(
        len(texts), missing, rejected=tuple(found.rejected), warnings=tuple(found.warnings)
    )
    return Reading(data, notes)


def require_scans(where: Path, found: Found) -> None:
    """Raise ConfigError where a reader found nothing that it could use."""
    require(
        bool(found.scans),
        f"{where}: none of {len(found.rejected)} files is usable"
        + (f"; the first: {found.rejected[0][1]}." if found.rejected else ": there is none.")
        + " Check the path and the export.",
    )


def _label_texts(folder: Path, scans: Sequence[Scan], mapping: ScanMapping) -> Sequence[str | None]:
    """Each scan's label as text, None where the table has none."""
    table = folder / mapping.labels
    if not table.is_file():
        parts = [Path(scan.file).parts for scan in scans]
        require(
            all(len(part) > 1 for part in parts),
            f"{folder} has no {mapping.labels}, so the folders below it are read as classes, and "
            "some scans lie in none. Add the table (columns "
            f"{mapping.column or mapping.key}, {mapping.label}), or sort them.",
        )
        return [part[0] for part in parts]
    key = mapping.column or mapping.key
    columns = read_columns(table, [key, mapping.label])
    known: dict[str, str] = {}
    for row, (name, text) in enumerate(zip(*columns.values(), strict=True), start=1):
        require(
            known.setdefault(name, text) == text,
            f"{table}: data row {row} gives another label for a {mapping.key} than an earlier "
            "row. Correct one.",
        )
    return [known.get(getattr(scan, mapping.key)) for scan in scans]


def scaled(values: Values, black: float, white: float) -> Values:
    """A scan's own values brought from [black, white] to [-1, 1], clamped."""
    inside: Values = np.clip((values - black) / (white - black) * 2 - 1, -1, 1).astype(np.float32)
    return inside


def fit_grid(values: Values, image: ImagePlan, *, resize: bool) -> Values:
    """A scan of shape (*grid, channels) brought to the plan's grid and channels.

    Colour becomes grey by luminance, grey becomes colour by repetition.

    Raises:
        UnusableScanError: another size, and `resize` is off; or not 1 or 3 channels.
    """
    if values.shape[-1] not in (1, 3):
        raise UnusableScanError(f"{values.shape[-1]} channels; 1 or 3 can be read")
    if values.shape[-1] == 3 and image.channels == 1:
        values = values @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    if values.shape[-1] == 1 and image.channels == 3:
        values = np.repeat(values, 3, axis=-1)
    if values.shape[:-1] == image.grid:
        return values
    if not resize or values.ndim != len(image.grid) + 1:
        have, want = (" x ".join(map(str, shape)) for shape in (values.shape[:-1], image.grid))
        raise UnusableScanError(f"size {have}; the plan needs {want} (set resize = true)")
    return _resized(values, image.grid)


def _resized(values: Values, grid: tuple[int, ...]) -> Values:
    """Linear interpolation with Pillow's anti-aliasing, one pair of axes after the other."""
    if values.ndim == 4:
        values = np.stack([_resized(part, grid[1:]) for part in values])
        # As images of (depth, all the rest): only the depth changes.
        flat = values.reshape(len(values), -1)
        return _plane(flat, (grid[0], flat.shape[1])).reshape(*grid, values.shape[-1])
    return np.stack([_plane(part, grid) for part in np.moveaxis(values, -1, 0)], axis=-1)


def _plane(plane: Values, size: tuple[int, ...]) -> Values:
    picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def files_below(folder: Path, skip: str) -> Iterable[tuple[str, Path]]:
    """Every file below a folder with its relative path, in order; none outside it by a link."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        inside = path.resolve().is_relative_to(root)
        if path.is_file() and inside and relative != skip and not path.name.startswith("."):
            yield relative, path


def image_of(folder: Path, task: TaskPlan) -> ImagePlan:
    """The plan's image; ConfigError where the task has a table, or the folder is none."""
    if task.image is None:
        raise ConfigError(f"{folder} holds scans, and the plan's task has a table of features.")
    require(folder.is_dir(), f"{folder} is not a folder. Give the folder that holds the scans.")
    return task.image
