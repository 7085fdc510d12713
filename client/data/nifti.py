"""A folder of NIfTI volumes (.nii, .nii.gz) to a PatientDataset.

Axes are turned to the nearest of the standard ones (right, anterior, superior), so that scanners'
habits do not matter; slices run along the last axis. NIfTI names no patient: the file's name does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from client.data.scans import (
    MOST_VALUES,
    Found,
    Scan,
    ScanMapping,
    UnusableScanError,
    files_below,
    fit_grid,
    image_of,
    scaled,
    to_dataset,
)
from client.data.table import Reading
from shared.config import require
from shared.task_plan import ImagePlan, TaskPlan

ENDINGS = (".nii", ".nii.gz")


def read_nifti_folder(folder: Path, mapping: ScanMapping, task: TaskPlan) -> Reading:
    """Read every NIfTI volume below a folder, scaled by the plan's black and white to [-1, 1].

    Files that cannot be used are left out; `Reading.notes.rejected` lists them with the reason.

    Raises:
        ConfigError: the plan's image is flat, no usable file, or labels that do not fit.
    """
    image = image_of(folder, task)
    found = find_nifti(folder, files_below(folder, mapping.labels), mapping, image)
    return to_dataset(folder, found, mapping, task)


def find_nifti(
    where: Path, files: Iterable[tuple[str, Path]], mapping: ScanMapping, image: ImagePlan
) -> Found:
    """Read NIfTI files, given by name and path; labels play no part.

    Raises:
        ConfigError: the plan's image is flat, or the mapping asks for a file's own window.
    """
    require(bool(image.depth), f"{where}: NIfTI holds volumes, and the plan's image is flat.")
    require(mapping.window == "plan", f"{where}: NIfTI names no window; use window = 'plan'.")
    found = Found()
    for file, path in files:
        if path.name.lower().endswith(ENDINGS):
            found.take(file, partial(_scan, file, path, image, mapping))
        else:
            found.rejected.append((file, "not named .nii or .nii.gz"))
    return found


_canonical: Any = nibabel.as_closest_canonical


def _scan(file: str, path: Path, image: ImagePlan, mapping: ScanMapping) -> Scan:
    try:
        loaded: Any = nibabel.load(path)
        if len(loaded.shape) != 3 or not 0 < int(np.prod(loaded.shape)) <= MOST_VALUES:
            raise UnusableScanError(f"shape {loaded.shape}; one volume of three axes is needed")
        values = np.asarray(_canonical(loaded).get_fdata(dtype=np.float32))
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error):
        raise UnusableScanError("not a readable NIfTI file, or cut short") from None
    if not np.isfinite(values).all():
        raise UnusableScanError("values that are not finite")
    # (x, y, z) to (slices, rows, columns) as a radiologist looks at them.
    grid = np.transpose(scaled(values, image.black, image.white), (2, 1, 0))[:, ::-1, :, None]
    fitted = fit_grid(np.ascontiguousarray(grid), image, resize=mapping.resize)
    name = path.name[: path.name.lower().rindex(".nii")]
    patient = name.split(mapping.patient_separator)[0] if mapping.patient_separator else name
    return Scan(np.ascontiguousarray(np.moveaxis(fitted, -1, 0)), patient, file)
