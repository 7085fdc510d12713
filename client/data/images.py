"""A folder of images (PNG, JPEG, TIFF, BMP) to a PatientDataset.

Two layouts: a table `labels.csv` with the columns file, label and patient; or one sub-folder per
class, with the patient in the file's name. Messages count images and rows and never print a file
name from inside the folder, since such names often hold an identifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.columns import read_columns
from client.data.dataset import PatientDataset
from client.data.labels import read_labels, refuse_unusable_labels
from client.data.mapped import Spool
from client.data.mapping import ColumnMapping, TableMapping
from client.data.table import (
    Reading,
    ReadingNotes,
    group_patients,
)
from shared.config import require
from shared.errors import ConfigError
from shared.features import image_inputs
from shared.task_plan import ImagePlan, TaskPlan

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
AT_ONCE = 32  # images that are in memory at once
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class ImageMapping:
    """How a hospital's folder of images answers the plan.

    Attributes:
        labels: The table in the folder. Where it does not exist, sub-folders are the classes.
        file: Its column with the image's path within the folder.
        label: Its column with the label.
        patient: Its column with the patient's identifier.
        values: Pairs [label text or sub-folder, text in the plan].
        patient_separator: With sub-folders: a file's name up to this text is its patient.
        one_image_per_patient: Instead of a patient: the hospital vouches that none has two.
        resize: Bring every image to the plan's size (bilinear), instead of refusing another size.
        allow_one_class: Accept a folder in which all patients have the same label.
    """

    labels: str = "labels.csv"
    file: str = "file"
    label: str = "label"
    patient: str = "patient"
    values: tuple[tuple[str, ...], ...] = ()
    patient_separator: str = ""
    one_image_per_patient: bool = False
    resize: bool = False
    allow_one_class: bool = False


@dataclass(frozen=True)
class _Listing:
    """What is in the folder: one entry per image."""

    files: list[Path]
    labels: list[str]
    patients: list[str]
    entry: str  # how messages call an entry: "data row" or "image"


def read_image_folder(folder: Path, mapping: ImageMapping, task: TaskPlan) -> Reading:
    """Read every listed image, scaled by the plan.

    Raises:
        ConfigError: the folder, an image or a label does not fit; the message names the folder or
            its table, the row or image number, and the remedy.
    """
    if task.image is None or task.image.depth:
        kind = "a table of features" if task.image is None else "volumes; use DICOM or NIfTI"
        raise ConfigError(f"{folder} holds flat images, and the plan's task has {kind}.")
    require(folder.is_dir(), f"{folder} is not a folder. Give the folder that holds the images.")
    table = folder / mapping.labels
    listed = table if table.is_file() else folder
    listing = _from_table(folder, table, mapping) if table.is_file() else _by_class(folder, mapping)
    require(bool(listing.files), f"{listed} lists no images. Supported: {', '.join(FORMATS)}.")
    as_table = _as_table(mapping, task)
    labels = read_labels(listed, {task.label: listing.labels}, task, as_table)
    refuse_unusable_labels(listed, mapping.label, labels, task, mapping.allow_one_class)
    spool = Spool()
    for first in range(0, len(listing.files), AT_ONCE):
        pixels = [
            read_pixels(file, task.image, mapping.resize, f"{listed}: {listing.entry} {number}")
            for number, file in enumerate(listing.files[first : first + AT_ONCE], start=first + 1)
        ]
        spool.add(image_inputs(task.image, np.stack(pixels)))
    ids, patients = group_patients(listing.patients)
    data = PatientDataset(spool.array(), labels, patients, ids)
    return Reading(data, ReadingNotes(len(labels)))


def _from_table(folder: Path, table: Path, mapping: ImageMapping) -> _Listing:
    patient = [] if mapping.one_image_per_patient else [mapping.patient]
    columns = read_columns(table, [mapping.file, mapping.label, *patient])
    root = folder.resolve()
    files = []
    for row, name in enumerate(columns[mapping.file], start=1):
        file = (root / name).resolve()
        require(
            file.is_relative_to(root) and file.is_file(),
            f"{table}: column {mapping.file!r} names in data row {row} no file within the folder. "
            "Correct the path; it is read relative to the folder.",
        )
        files.append(file)
    names = columns[mapping.patient] if patient else [str(i) for i in range(len(files))]
    empty = [row for row, name in enumerate(names, start=1) if not name]
    require(
        not empty,
        f"{table}: column {mapping.patient!r} (the patient's identifier) is missing in data row "
        f"{empty[0] if empty else 0}. Privacy is counted by patient, so every row needs one.",
    )
    return _Listing(files, columns[mapping.label], names, "data row")


def _by_class(folder: Path, mapping: ImageMapping) -> _Listing:
    require(
        bool(mapping.patient_separator) != mapping.one_image_per_patient,
        f"{folder} has no {mapping.labels}, so its sub-folders are read as classes; say which "
        "patient an image is of: patient_separator = '_' takes the file's name up to that text, "
        "one_image_per_patient = true vouches that no patient has two. Give one of them.",
    )
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES)
    stems = [file.stem for file in files]
    if mapping.patient_separator:
        stems = [stem.split(mapping.patient_separator)[0] for stem in stems]
    else:
        stems = [str(i) for i in range(len(files))]
    return _Listing(files, [f.parent.name for f in files], stems, "image (in order of path)")


def _as_table(mapping: ImageMapping, task: TaskPlan) -> TableMapping:
    label = ColumnMapping(task.label, mapping.label, values=mapping.values)
    return TableMapping(one_row_per_patient=True, columns=(label,))


def read_pixels(file: Path, image: ImagePlan, resize: bool, where: str) -> NDArray[np.generic]:
    """One image's pixels in their own unit, shape (height, width) or (height, width, 3).

    Raises:
        ConfigError: it is no image, or of another size; the message says `where`, not the file.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.mode.startswith(("I", "F")) and image.channels == 1:  # 16 or 32 bits a pixel
                picture = Image.fromarray(np.asarray(opened, np.float32))
            else:
                picture = opened.convert("L" if image.channels == 1 else "RGB")
        if resize and picture.size != (image.width, image.height):
            picture = picture.resize((image.width, image.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ConfigError(
            f"{where} is not a readable image. Supported: {', '.join(FORMATS)}. Export it again."
        ) from None
    require(
        bool(np.isfinite(pixels).all()), f"{where} has a pixel that is no number. Export it again."
    )
    require(
        pixels.shape[:2] == (image.height, image.width),
        f"{where} is {pixels.shape[0]} x {pixels.shape[1]} pixels; the plan needs {image.height} x "
        f"{image.width}. Set resize = true, or export that size.",
    )
    return pixels
