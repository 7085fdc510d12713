"""A folder of DICOM files, as exported from a PACS, to a PatientDataset.

A flat image is one file; a volume is one series, its slices put in order along the normal of
their plane. The patient is the file's own Patient ID, wherever in the folder the file lies.

Source: DICOM PS3.3, C.7.6.2 (image plane), C.11.1 (modality LUT), C.11.2 (VOI LUT).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from client.data.scans import (
    MOST_VALUES,
    Found,
    Scan,
    ScanMapping,
    UnusableScanError,
    Values,
    files_below,
    fit_grid,
    image_of,
    scaled,
    to_dataset,
)
from client.data.table import Reading
from shared.task_plan import ImagePlan, TaskPlan

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


@dataclass(frozen=True)
class _File:
    """A file whose header was read; its pixels are read when it is their turn."""

    name: str
    path: Path
    header: pydicom.Dataset


def read_dicom_folder(folder: Path, mapping: ScanMapping, task: TaskPlan) -> Reading:
    """Read every DICOM image (flat) or series (volume) below a folder, scaled to [-1, 1].

    Files that cannot be used are left out; `Reading.notes.rejected` lists them with the reason.

    Raises:
        ConfigError: no usable file, or labels that do not fit; names the folder or its table.
    """
    found = find_dicom(files_below(folder, mapping.labels), mapping, image_of(folder, task))
    return to_dataset(folder, found, mapping, task)


def find_dicom(files: Iterable[tuple[str, Path]], mapping: ScanMapping, image: ImagePlan) -> Found:
    """Read DICOM files, given by name and path, as images or as series; labels play no part."""
    found = Found()
    # pydicom's warnings and log lines may quote values of the file.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        readable = _read_headers(files, found)
        if image.depth:
            for series in _by_series(readable):
                found.take(series[0].name, partial(_volume, series, image, mapping))
        else:
            for file in readable:
                found.take(file.name, partial(_flat, file, image, mapping))
    _warn_of_text(readable, found)
    return found


def _read_headers(listed: Iterable[tuple[str, Path]], found: Found) -> list[_File]:
    files: list[_File] = []
    for name, path in listed:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            _check_header(header)
            files.append(_File(name, path, header))
        except UnusableScanError as error:
            found.rejected.append((name, str(error)))
        except (InvalidDicomError, OSError, EOFError):
            found.rejected.append((name, "not a DICOM file, or cut short"))
        except Exception:  # pydicom raises whatever its parser meets in a damaged file
            found.rejected.append((name, "a damaged DICOM file"))
    return files


def _check_header(header: pydicom.Dataset) -> None:
    if "Rows" not in header:
        raise UnusableScanError("no picture (0028,0010): a report, plan or directory")
    if not str(header.get("PatientID") or "").strip():
        raise UnusableScanError(
            "no Patient ID (0010,0020); privacy is counted by patient, so every file needs one"
        )
    frames = int(header.get("NumberOfFrames") or 1)
    samples = int(header.get("SamplesPerPixel") or 1)
    size = int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * frames * samples
    if not 0 < size <= MOST_VALUES:
        raise UnusableScanError("rows, columns or frames (0028,xxxx) are absent or implausible")


def _by_series(files: Sequence[_File]) -> list[list[_File]]:
    """The files of each series; a file without a series UID is one of its own."""
    series: dict[str, list[_File]] = {}
    for file in files:
        uid = _text(file.header, "SeriesInstanceUID") or file.name
        series.setdefault(uid, []).append(file)
    return list(series.values())


def _flat(file: _File, image: ImagePlan, mapping: ScanMapping) -> Scan:
    frames = _frames(file, image, mapping.window)
    if len(frames) != 1:
        raise UnusableScanError(
            f"{len(frames)} frames (0028,0008), and the plan's image is flat; export single frames"
        )
    return _scan(file, fit_grid(frames[0], image, resize=mapping.resize))


def _volume(series: list[_File], image: ImagePlan, mapping: ScanMapping) -> Scan:
    """One series as a volume, (depth, height, width)."""
    if len({_text(file.header, "PatientID") for file in series}) != 1:
        raise UnusableScanError("a series with more than one Patient ID (0010,0020)")
    ordered = sorted(series, key=_position)
    parts = [_frames(file, image, mapping.window) for file in ordered]
    if len({part.shape[1:] for part in parts}) != 1:
        raise UnusableScanError("slices of unequal size in one series")
    return _scan(series[0], fit_grid(np.concatenate(parts), image, resize=mapping.resize))


def _scan(file: _File, values: Values) -> Scan:
    return Scan(
        np.ascontiguousarray(np.moveaxis(values, -1, 0)),
        _text(file.header, "PatientID"),
        file.name,
        _text(file.header, "StudyInstanceUID"),
        _text(file.header, "SeriesInstanceUID"),
    )


def _text(header: pydicom.Dataset, name: str) -> str:
    return str(header.get(name) or "").strip()


def _position(file: _File) -> tuple[float, float]:
    """Where a slice lies along the normal of its plane; by its number where that is not said."""
    header = file.header
    number = float(header.get("InstanceNumber") or 0)
    try:
        row, column = np.reshape([float(v) for v in header.ImageOrientationPatient], (2, 3))
        place = [float(v) for v in header.ImagePositionPatient]
        return float(np.dot(np.cross(row, column), place)), number
    except (AttributeError, TypeError, ValueError):
        return 0.0, number


def _frames(file: _File, image: ImagePlan, window: str) -> Values:
    """A file's frames within [-1, 1], shape (frames, rows, columns, 1 or 3)."""
    kind = _text(file.header, "PhotometricInterpretation")
    grey = kind in _GREY
    if not grey and kind not in _COLOUR:
        raise UnusableScanError("an unknown photometric interpretation (0028,0004)")
    values = _modality_values(file.path, kind)
    rows, columns, samples = int(file.header.Rows), int(file.header.Columns), 1 if grey else 3
    if values.size % (rows * columns * samples):
        raise UnusableScanError("pixels (7FE0,0010) that do not fit its rows and columns")
    values = values.reshape(-1, rows, columns, samples)
    if not np.isfinite(values).all():
        raise UnusableScanError("pixel values that are not finite")
    black, white = _window(file.header, window, image, grey)
    shown = scaled(values, black, white)
    return -shown if kind == "MONOCHROME1" else shown


def _modality_values(path: Path, kind: str) -> Values:
    """A file's pixels: grey in modality units such as Hounsfield, colour as RGB."""
    syntax = "unknown"
    try:
        whole = pydicom.dcmread(path)
        syntax = str(whole.file_meta.TransferSyntaxUID.name)
        stored = whole.pixel_array
        if kind == "PALETTE COLOR":
            stored = apply_color_lut(stored, whole) / 257.0  # 16 bits to 8
        elif kind in _GREY:
            stored = apply_modality_lut(stored, whole)
    except Exception as error:  # decoders raise whatever they meet
        raise UnusableScanError(
            f"its pixels (7FE0,0010) cannot be decoded ({type(error).__name__}; {syntax})"
        ) from None
    return np.asarray(stored, dtype=np.float32)


def _window(
    header: pydicom.Dataset, window: str, image: ImagePlan, grey: bool
) -> tuple[float, float]:
    """What is shown black and white, in modality units."""
    if window == "plan":
        return image.black, image.white
    if not grey:
        return 0.0, float(2 ** int(header.get("BitsStored") or 8) - 1)
    try:
        centre, width = (_first(header.get(n)) for n in ("WindowCenter", "WindowWidth"))
    except (TypeError, ValueError, IndexError):
        raise UnusableScanError(
            "no window (0028,1050 and 0028,1051); use window = 'plan' with black and white there"
        ) from None
    if _text(header, "VOILUTFunction") == "LINEAR_EXACT":
        low, high = centre - width / 2, centre + width / 2
    else:  # PS3.3 C.11.2.1.2.1
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if not (np.isfinite([low, high]).all() and low < high):
        raise UnusableScanError("a window of no width (0028,1051)")
    return low, high


def _first(value: object) -> float:
    """The first of one or several numbers."""
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return float(several[0])  # type: ignore[arg-type]


def _warn_of_text(files: Sequence[_File], found: Found) -> None:
    burnt = sum(_text(file.header, "BurnedInAnnotation").upper() == "YES" for file in files)
    if burnt:
        found.warnings.append(
            f"{burnt} file(s) say that text is burnt into the picture (0028,0301), which may name "
            "the patient; leave them out or blank it before training"
        )
