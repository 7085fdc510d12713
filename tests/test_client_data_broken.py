"""Broken files by the hundred: each is refused, or left out and listed, with what and where.

Hypothesis breaks good files of every kind that a hospital may hand in. A reader may answer with a
ConfigError of one paragraph that names the file, the place in it (row, column, array or tag) and a
remedy, or go on without that file or row and list it. Anything else is a fault of the reader: a
bare traceback, a silent acceptance, or a patient's value in a message.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pydicom
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from client.data.dicom import read_dicom_folder
from client.data.images import ImageMapping, read_image_folder
from client.data.mapping import ColumnMapping, TableMapping
from client.data.nifti import read_nifti_folder
from client.data.npz import read_npz
from client.data.scans import ScanMapping
from client.data.table import Reading, read_table
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

many = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
HEADER = ["pid", "sex", "crp", "born", "seen", "ill"]
ROWS = 8
TASK = TaskPlan(
    "ill",
    positive="yes",
    features=(
        FeaturePlan("sex", "category", categories=("f", "m")),
        FeaturePlan("crp", unit="mg/l", minimum=0.1, maximum=300),
        FeaturePlan("age", unit="years", minimum=0, maximum=120),
    ),
)
MAPPING = TableMapping(patient="pid", columns=(ColumnMapping("age", column="seen", since="born"),))
FLAT = TaskPlan("finding", positive="ill", image=ImagePlan(1, 16, 16))
VOLUME = TaskPlan("finding", positive="ill", image=ImagePlan(1, 8, 8, depth=8))
LAX = ScanMapping(allow_one_class=True, resize=True)
VALUE = "Zzyzx-4711"  # stands in a broken cell, and must stand in no message

Table = list[list[str]]
cells = st.tuples(st.integers(1, ROWS), st.integers(0, len(HEADER) - 1))


def good_table() -> Table:
    """Header and rows that fit the plan."""
    rows = [
        [f"p{i}", "fm"[i % 2], f"{3.5 + i}", f"19{40 + i}-02-11", f"202{i % 4}-10-0{i + 1}", yes]
        for i, yes in enumerate(["yes", "no"] * (ROWS // 2))
    ]
    return [list(HEADER), *rows]


def as_csv(table: Table) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(table)
    return text.getvalue().encode()


def message_of(read: Callable[[], Reading], file: Path) -> str:
    """The refusal: one paragraph with the file, at least two sentences, and no patient's value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError) as caught:
            read()
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert VALUE not in message
    rest = message.replace(str(file), "FILE")
    assert re.search(r"[.:;,] .*\w{4}", rest), message
    assert caught.value.__cause__ is None  # the library's own words stay inside
    return rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


def refusal_of_table(folder: Path, content: bytes, mapping: TableMapping = MAPPING) -> str:
    file = folder / "patients.csv"
    file.write_bytes(content)
    return message_of(lambda: read_table(file, mapping, TASK), file)


def test_the_good_files_are_read(folder: Path) -> None:
    (folder / "good.csv").write_bytes(as_csv(good_table()))
    assert read_table(folder / "good.csv", MAPPING, TASK).data.patient_count == ROWS


# --- tables ---------------------------------------------------------------------------------------

wrong_texts = st.one_of(
    st.just(VALUE),
    st.sampled_from(["inf", "-inf", "1e999", "1_000", "12 mg/l", "3,5", "--", "0x1F", "1e", "True",
                     "2021-13-45", "31.12.2020", "٣٫٥x", "💊", "=1+1", "\x00", "#N/A", "1.2.3"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\""), min_size=1)
    .map(lambda text: f"x{text}x"),
)  # fmt: skip


@many
@given(cells, wrong_texts)
def test_a_wrong_text_is_refused_with_its_column_and_row(
    folder: Path, place: tuple[int, int], text: str
) -> None:
    row, column = place
    assume(column > 0)  # any text names a patient
    table = good_table()
    table[row][column] = text
    message = refusal_of_table(folder, as_csv(table))
    names = {"born": ["born"], "seen": ["seen"]}.get(HEADER[column], [HEADER[column]])
    if "\x00" not in text:
        assert any(repr(name) in message for name in names)
        assert HEADER[column] == "ill" or f"data row {row}" in message
        assert text not in message or len(text) < 4


@many
@given(cells, st.sampled_from(["", "NA", "NaN", "nan", " "]))
def test_a_missing_value_is_refused_by_its_row_or_left_out_and_counted(
    folder: Path, place: tuple[int, int], text: str
) -> None:
    row, column = place
    table = good_table()
    table[row][column] = text
    message = refusal_of_table(folder, as_csv(table))
    assert f"data row {row}" in message
    assert "missing" in message
    if column > 0:  # without its patient no row can be used at all
        lax = TableMapping(patient="pid", columns=MAPPING.columns, drop_incomplete=True)
        reading = read_table(folder / "patients.csv", lax, TASK)
        assert (reading.notes.dropped, reading.data.patient_count) == (1, ROWS - 1)


@many
@given(st.sampled_from(HEADER), st.sampled_from(["gone", "twice", "renamed", "case"]))
def test_a_column_that_is_not_there_once_is_named(folder: Path, name: str, how: str) -> None:
    table, column = good_table(), HEADER.index(name)
    for i, row in enumerate(table):
        if how == "gone":
            del row[column]
        elif how == "twice":
            row.append(row[column])
        elif i == 0:
            row[column] = name.upper() if how == "case" else f"{name}_old"
    message = refusal_of_table(folder, as_csv(table))
    assert repr(name) in message
    assert ("2 columns" in message) == (how == "twice")


@many
@given(st.sampled_from([1e3, 1e-3, 1e6, -1.0, 88.4e3]), st.integers(0, 1000))
def test_a_column_in_another_unit_is_refused(folder: Path, factor: float, shift: int) -> None:
    table = good_table()
    for row in table[1:]:
        row[2] = repr((5 + (float(row[2]) * (1 + shift)) % 50) * factor)
    message = refusal_of_table(folder, as_csv(table))
    assert "'crp'" in message
    assert "factor" in message


@many
@given(st.sampled_from(["%d.%m.%Y", "%m/%d/%y", "%Y%m%d", "%d-%b-%Y", "%Y-%m-%d %H:%M"]), cells)
def test_dates_of_another_writing_are_refused(
    folder: Path, writing: str, place: tuple[int, int]
) -> None:
    table = good_table()
    row, column = place[0], 3 + place[1] % 2
    year, month, day = (int(part) for part in table[row][column].split("-"))
    moment = np.datetime64(f"{year:04d}-{month:02d}-{day:02d}").astype(object)
    table[row][column] = moment.strftime(writing)
    message = refusal_of_table(folder, as_csv(table))
    assert f"data row {row}" in message
    assert "date_format" in message


@many
@given(st.sampled_from(["utf-16", "latin-1", "cp1252", "utf-32"]), st.integers(1, ROWS))
def test_another_encoding_is_refused(folder: Path, encoding: str, row: int) -> None:
    table = good_table()
    table[row][0] = "Müller"
    assert "UTF-8" in refusal_of_table(folder, as_csv(table).decode().encode(encoding))


@many
@given(st.integers(1, ROWS), st.sampled_from(["short", "long", "quote", "empty", "header", "tabs"]))
def test_a_file_of_another_shape_is_refused(folder: Path, row: int, how: str) -> None:
    table = good_table()
    if how == "short":
        table[row].pop()
    elif how == "long":
        table[row].append(VALUE)
    content = as_csv(table)
    if how == "quote":
        content = content.replace(f"p{row - 1},".encode(), f'"p{row - 1},'.encode(), 1)
    elif how == "empty":
        content = b""
    elif how == "header":
        content = as_csv(table[:1])
    elif how == "tabs":
        content = content.replace(b",", b"\t")
    message = refusal_of_table(folder, content)
    assert how not in ("short", "long") or f"data row {row}" in message


@many
@given(st.binary(max_size=400))
def test_bytes_of_any_kind_are_no_table(folder: Path, content: bytes) -> None:
    refusal_of_table(folder, content)


@many
@given(st.data())
def test_a_damaged_parquet_file_is_refused(folder: Path, data: st.DataObject) -> None:
    file = folder / "patients.parquet"
    table = pyarrow.csv.read_csv(io.BytesIO(as_csv(good_table())))
    pyarrow.parquet.write_table(table, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    message_of(lambda: read_table(file, MAPPING, TASK), file)


# --- pictures -------------------------------------------------------------------------------------


@many
@given(st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]), st.floats(0, 0.9), st.booleans())
def test_a_cut_or_foreign_picture_is_refused_by_its_row(
    folder: Path, kind: str, share: float, foreign: bool
) -> None:
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    (place / "labels.csv").write_text("file,label,patient\na.png,ill,1\nb.png,well,2\n")
    noise = np.random.default_rng(0).integers(0, 255, (16, 16)).astype(np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(noise).save(place / name, format=kind)
    whole = (place / "b.png").read_bytes()
    cut = whole[: int(len(whole) * share)]
    (place / "b.png").write_bytes(b"GIF89a" + cut if foreign else cut)
    read = read_image_folder
    message = message_of(lambda: read(place, ImageMapping(), FLAT), place / "labels.csv")
    assert "data row 2" in message


@many
@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 255))
def test_a_picture_of_numbers_that_are_none_is_refused(
    folder: Path, value: float, place: int
) -> None:
    pictures = folder / "measured"
    pictures.mkdir(exist_ok=True)
    (pictures / "labels.csv").write_text("file,label,patient\na.tif,ill,1\nb.tif,well,2\n")
    values = np.full((16, 16), 7, np.float32)
    Image.fromarray(values).save(pictures / "a.tif")
    values.flat[place] = value
    Image.fromarray(values).save(pictures / "b.tif")
    read = read_image_folder
    message = message_of(lambda: read(pictures, ImageMapping(), FLAT), pictures / "labels.csv")
    assert "data row 2" in message


# --- scans: a broken file is left out and listed --------------------------------------------------


def shipped() -> pydicom.Dataset:
    return pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))


def spoil(data: pydicom.Dataset, how: str) -> None:
    """Take away or falsify what a reader needs."""
    if how.startswith("no "):
        delattr(data, how[3:])
    else:
        name, _, value = how.partition("=")
        setattr(data, name, type(data[name].value)(value) if value else None)


FAULTS = {
    "no PixelData": "7FE0,0010", "no Rows": "0028,0010", "no PatientID": "0010,0020",
    "no BitsAllocated": "7FE0,0010", "no PhotometricInterpretation": "0028,0004",
    "no PixelRepresentation": "7FE0,0010", "Rows=0": "0028", "Columns=0": "0028",
    "Rows=60000": "7FE0,0010", "BitsAllocated=12": "7FE0,0010", "PatientID=": "0010,0020",
    "PhotometricInterpretation=SEPIA": "0028,0004", "SamplesPerPixel=3": "",
    "BitsStored=99": "",
}  # fmt: skip


def listed_dicom(folder: Path, content: bytes) -> str:
    """Why the broken one of two files was left out."""
    place = folder / "scans"
    (place / "ill").mkdir(parents=True, exist_ok=True)
    shipped().save_as(place / "ill" / "good.dcm")
    (place / "ill" / "bad.dcm").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reading = read_dicom_folder(place, LAX, FLAT)
    assert reading.data.patient_count == 1
    ((name, reason),) = reading.notes.rejected
    assert name == "ill/bad.dcm"
    assert len(reason) > 10
    return reason


@pytest.mark.parametrize("how", FAULTS)
def test_a_dicom_file_that_lacks_something_is_listed_with_the_tag(folder: Path, how: str) -> None:
    data, stream = shipped(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoil(data, how)
        data.save_as(stream)
    assert FAULTS[how] in listed_dicom(folder, stream.getvalue())


@many
@given(st.floats(0, 0.95))
def test_a_cut_dicom_file_is_listed(folder: Path, share: float) -> None:
    stream = io.BytesIO()
    shipped().save_as(stream)
    whole = stream.getvalue()
    listed_dicom(folder, whole[: int(len(whole) * share)])


@many
@given(st.floats(0, 0.95), st.sampled_from(["cut", "nan", "flat", "four", "noise", "empty axis"]))
def test_a_broken_nifti_file_is_listed(folder: Path, share: float, how: str) -> None:
    place = folder / "volumes"
    (place / "ill").mkdir(parents=True, exist_ok=True)
    shape = {"flat": (8, 8), "four": (8, 8, 8, 2)}.get(how, (8, 8, 8))
    values = np.random.default_rng(0).normal(100, 9, shape).astype(np.float32)
    if how == "nan":
        values[0, 0, 0] = np.nan
    good = np.full((8, 8, 8), 7, np.float32)
    for name, voxels in (("good", good), ("bad", values)):
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), place / "ill" / f"{name}.nii")
    file = place / "ill" / "bad.nii"
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: int(len(content) * share)]
    elif how == "noise":
        content[:348] = np.random.default_rng(int(share * 1e6)).bytes(348)
    elif how == "empty axis":
        content[42:44] = b"\0\0"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reading = read_nifti_folder(place, LAX, VOLUME)
    ((name, reason),) = reading.notes.rejected
    assert name == "ill/bad.nii"
    assert len(reason) > 10


# --- npz ------------------------------------------------------------------------------------------


def good_npz() -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16)).astype(np.uint8)
    return {"train_images": images, "train_labels": np.arange(6, dtype=np.uint8)[:, None] % 2}


NPZ_TASK = TaskPlan("label", positive="1", image=ImagePlan(1, 16, 16))


@many
@given(
    st.floats(0, 0.97),
    st.sampled_from(["cut", "no images", "no labels", "object", "text", "size", "count", "three",
                     "nan", "infinite", "negative label", "not zip"]),
)  # fmt: skip
def test_a_broken_npz_file_is_refused_by_its_array(folder: Path, share: float, how: str) -> None:
    file, arrays = folder / "images.npz", good_npz()
    if how in ("no images", "no labels"):
        del arrays[f"train_{how[3:]}"]
    elif how == "object":
        arrays["train_labels"] = np.array([None] * 6, dtype=object)
    elif how == "text":
        arrays["train_images"] = np.full((6, 16, 16), "x")
    elif how == "size":
        arrays["train_images"] = arrays["train_images"][:, :15]
    elif how == "count":
        arrays["train_labels"] = arrays["train_labels"][:5]
    elif how == "three":
        arrays["train_labels"] = np.arange(6, dtype=np.uint8) % 3
    elif how in ("nan", "infinite"):
        arrays["train_images"] = arrays["train_images"].astype(np.float32)
        arrays["train_images"][3, 0, 0] = np.nan if how == "nan" else np.inf
    elif how == "negative label":
        arrays["train_labels"] = np.array([0, 1, -1, 0, 1, -1])
    np.savez(file, **arrays)  # type: ignore[arg-type]
    if how == "cut":
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    elif how == "not zip":
        file.write_bytes(b"PK\x03\x04" + bytes(200))
    message = message_of(lambda: read_npz(file, NPZ_TASK), file)
    if how not in ("cut", "not zip"):
        assert "array" in message
    assert zipfile.is_zipfile(file) or "Fetch" in message
