"""New patients' records without labels, for a model that is used and not trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dicom import find_dicom
from client.data.images import AT_ONCE, SUFFIXES, ImageMapping, read_pixels
from client.data.mapped import Spool, pieces_of, release
from client.data.nifti import ENDINGS, find_nifti
from client.data.scans import ScanMapping, files_below, require_scans
from client.data.site_config import SourceConfig
from client.data.table import Inputs, ReadingNotes, read_inputs
from shared.config import require
from shared.errors import ConfigError
from shared.features import image_inputs
from shared.task_plan import ImagePlan, TaskPlan

Listed = Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class Unlabelled:
    """Records as the plan's inputs.

    Attributes:
        inputs: Scaled by the plan, shape (records, *input_shape).
        patients: Whose each record is; a picture's or NIfTI volume's is taken from its name.
        named: Whether the records themselves say so, as a table's column or a DICOM tag does.
        notes: What was left out, and why.
    """

    inputs: NDArray[np.float32]
    patients: tuple[str, ...]
    named: bool
    notes: ReadingNotes

    def pieces(self) -> Iterator[Inputs]:
        """The records in runs, of which one is in memory at a time where they are mapped."""
        for piece in pieces_of(len(self.inputs), self.inputs.shape[1:]):
            yield self.inputs[piece], self.patients[piece]
            release(self.inputs)


def read_unlabelled(path: Path, source: SourceConfig | None, task: TaskPlan) -> Unlabelled:
    """Read a table, an image or scan, or a folder of images or scans; no label is needed.

    Args:
        path: A CSV or Parquet file by the mapping of site.toml; or a picture (PNG, JPEG, TIFF,
            BMP), NIfTI volume, DICOM file, or a folder that holds such files of one kind. Which,
            a file's ending says; whatever has none of these endings is read as DICOM.
        source: Of site.toml, where it has one; image sites' sizes and windows are taken from it.
        task: The plan's.

    Raises:
        ConfigError: site.toml maps no table, nothing usable is there, or it does not fit the plan.
    """
    if task.image is None:
        spool, names = Spool(), list[str]()
        for inputs, whose in read_rows(path, source, task):
            spool.add(inputs)
            names += whose
        return Unlabelled(spool.array(), tuple(names), True, ReadingNotes(len(names)))
    require(path.exists(), f"{path} does not exist. Check the path.")
    images = source.images if source is not None else ImageMapping()
    scans = source.scans if source is not None else ScanMapping()
    skip = images.labels if source is not None and source.kind == "image-folder" else scans.labels
    listed = list(files_below(path, skip)) if path.is_dir() else [(path.name, path)]
    require(bool(listed), f"{path} holds no files. Check the path.")
    kinds = {_kind(file) for _, file in listed}
    require(
        len(kinds) == 1,
        f"{path} mixes kinds of files ({', '.join(sorted(kinds))}; DICOM is whatever has no other "
        "kind's ending). Give a folder with one kind.",
    )
    if kinds == {"picture"}:
        return _pictures(path, listed, images, task.image)
    return _scans(path, listed, scans, task.image, nifti=kinds == {"NIfTI"})


def read_rows(path: Path, source: SourceConfig | None, task: TaskPlan) -> Iterator[Inputs]:
    """A table's rows as `read_unlabelled` reads them, part by part, so that it may be large.

    Raises:
        ConfigError: as there; part of it after the last part (`read_inputs`).
    """
    if source is None or source.table is None:
        raise ConfigError(
            "site.toml maps no table. Propose the lines with: fedward-site data map PLAN FILE."
        )
    return read_inputs(path, source.table, task)


def _kind(file: Path) -> str:
    if file.suffix.lower() in SUFFIXES:
        return "picture"
    return "NIfTI" if file.name.lower().endswith(ENDINGS) else "DICOM"


def _pictures(path: Path, listed: Listed, mapping: ImageMapping, image: ImagePlan) -> Unlabelled:
    require(not image.depth, f"{path}: a picture is flat, and the plan's image is a volume.")
    spool = Spool()
    for first in range(0, len(listed), AT_ONCE):
        part = enumerate(listed[first : first + AT_ONCE], start=first + 1)
        pixels = [
            read_pixels(file, image, mapping.resize, _place(path, number))
            for number, (_, file) in part
        ]
        spool.add(image_inputs(image, np.stack(pixels)))
    names = _stems((Path(name).stem for name, _ in listed), mapping.patient_separator)
    return Unlabelled(spool.array(), names, False, ReadingNotes(len(listed)))


def _place(path: Path, number: int) -> str:
    return f"{path}: image {number} (in order of path)" if path.is_dir() else str(path)


def _scans(
    path: Path, listed: Listed, mapping: ScanMapping, image: ImagePlan, *, nifti: bool
) -> Unlabelled:
    found = (
        find_nifti(path, listed, mapping, image) if nifti else find_dicom(listed, mapping, image)
    )
    require_scans(path, found)
    names = tuple(scan.patient for scan in found.scans)
    inputs = found.inputs(image, range(len(names)))
    notes = ReadingNotes(len(names), rejected=tuple(found.rejected), warnings=tuple(found.warnings))
    return Unlabelled(inputs, names, not nifti, notes)


def _stems(names: Iterable[str], separator: str) -> tuple[str, ...]:
    return tuple(name.split(separator)[0] if separator else name for name in names)
