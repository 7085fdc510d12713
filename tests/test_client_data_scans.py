"""DICOM and NIfTI folders: the files that pydicom ships, made-up ones, and broken ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_voi_lut
from pydicom.uid import generate_uid

from client.data.dicom import read_dicom_folder
from client.data.nifti import read_nifti_folder
from client.data.scans import ScanMapping
from client.data.site_config import SourceConfig, read_source
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

HOUNSFIELD = ImagePlan(1, 128, 128, black=-1000, white=400)
TASK = TaskPlan("finding", positive="ill", image=HOUNSFIELD)
SLICES = replace(TASK, image=replace(HOUNSFIELD, depth=6))
ONE = ScanMapping(allow_one_class=True)


def shipped(name: str) -> Path:
    """A file that comes with pydicom."""
    found = get_testdata_file(name, download=False)
    assert isinstance(found, str)
    return Path(found)


def put(name: str, target: Path, **tags: object) -> pydicom.Dataset:
    """A shipped file under another name, with some tags changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.dcmread(shipped(name))
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.save_as(target)
    return data


def sized(name: str, **changes: object) -> TaskPlan:
    """The task for a shipped file's own size."""
    header = pydicom.dcmread(shipped(name))
    image = replace(HOUNSFIELD, height=header.Rows, width=header.Columns, **changes)  # type: ignore[arg-type]
    return replace(TASK, image=image)


def test_ct_is_read_in_hounsfield_units(tmp_path: Path) -> None:
    data = put("CT_small.dcm", tmp_path / "ill" / "a.dcm")
    read = read_dicom_folder(tmp_path, ONE, TASK)
    raw = np.frombuffer(data.PixelData, "<i2").reshape(128, 128).astype(np.float64)
    hounsfield = raw * float(data.RescaleSlope) + float(data.RescaleIntercept)
    expected = np.clip((hounsfield + 1000) / 1400 * 2 - 1, -1, 1)
    assert float(data.RescaleIntercept) == -1024  # forgetting it would show
    np.testing.assert_allclose(read.data.inputs[0, 0], expected, atol=1e-6)
    assert read.data.patient_ids == ("1CT1",)
    assert read.notes.rejected == ()


def test_monochrome1_is_black_on_white(tmp_path: Path) -> None:
    put("CT_small.dcm", tmp_path / "ill" / "a.dcm")
    put("CT_small.dcm", tmp_path / "well" / "b.dcm", PhotometricInterpretation="MONOCHROME1")
    inputs = read_dicom_folder(tmp_path, ONE, TASK).data.inputs
    assert np.ptp(inputs[0]) > 0.5
    np.testing.assert_array_equal(inputs[1], -inputs[0])


def test_the_window_of_the_file_is_what_a_viewer_shows(tmp_path: Path) -> None:
    name = "examples_overlay.dcm"
    data = put(name, tmp_path / "ill" / "a.dcm")
    mapping = replace(ONE, window="file")
    inputs = read_dicom_folder(tmp_path, mapping, sized(name)).data.inputs[0, 0]
    shown = apply_voi_lut(data.pixel_array, data, index=0)
    expected = (shown - shown.min()) / (shown.max() - shown.min()) * 2 - 1
    np.testing.assert_allclose(inputs, expected, atol=1e-3)
    assert (inputs == -1).any()  # the window cuts at both ends,
    assert (inputs == 1).any()
    assert len(np.unique(inputs)) > 100  # and is not a threshold


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm",
        "examples_palette.dcm",
    ],
)  # fmt: skip
def test_every_encoding_gives_the_picture_that_pydicom_shows(tmp_path: Path, name: str) -> None:
    header = put(name, tmp_path / "ill" / "a.dcm", PatientID="P-1")
    task = sized(name, channels=1 if header.SamplesPerPixel == 1 else 3, black=0, white=255)
    if name == "examples_palette.dcm":
        task = sized(name, channels=3, black=0, white=255)
    inputs = read_dicom_folder(tmp_path, ONE, task).data.inputs[0]
    pixels = header.pixel_array.astype(np.float64)
    if name == "examples_palette.dcm":
        pixels = pydicom.pixels.apply_color_lut(header.pixel_array, header) / 257.0
    expected = np.clip(pixels.reshape(*inputs.shape[1:], -1) / 255 * 2 - 1, -1, 1)
    np.testing.assert_allclose(inputs, np.moveaxis(expected, -1, 0), atol=1e-5)


def test_the_same_picture_in_five_encodings(tmp_path: Path) -> None:
    names = ["", "_RLE", "_implicit", "_bigendian", "_jp2klossless"]
    for number, name in enumerate(names):
        put(f"MR_small{name}.dcm", tmp_path / "ill" / f"{number}.dcm")
    inputs = read_dicom_folder(tmp_path, ONE, sized("MR_small.dcm")).data.inputs
    assert len(inputs) == 5
    assert (inputs == inputs[0]).all()


def test_three_broken_files_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / ("ill" if number % 2 else "well")
        put("CT_small.dcm", folder / f"{number}.dcm", PatientID=f"P-{number}")
    (tmp_path / "ill" / "cut.dcm").write_bytes(shipped("CT_small.dcm").read_bytes()[:9000])
    (tmp_path / "ill" / "note.txt").write_text("see ward round")
    shutil.copy(shipped("reportsi.dcm"), tmp_path / "well" / "report.dcm")
    read = read_dicom_folder(tmp_path, ScanMapping(), TASK)
    assert read.data.labels.tolist() == [1, 1, 0, 0]
    reasons = dict(read.notes.rejected)
    assert set(reasons) == {"ill/cut.dcm", "ill/note.txt", "well/report.dcm"}
    assert "7FE0,0010" in reasons["ill/cut.dcm"]
    assert "not a DICOM file" in reasons["ill/note.txt"]
    assert "no picture" in reasons["well/report.dcm"]
    lines = read.notes.lines()
    assert sum("left out" in line for line in lines) == 3
    assert not any("P-" in line or "cut.dcm" in line for line in lines)


def test_a_patient_in_two_folders_is_one_patient(tmp_path: Path) -> None:
    put("CT_small.dcm", tmp_path / "well" / "2019.dcm", PatientID="P-7 ")
    put("CT_small.dcm", tmp_path / "ill" / "2021.dcm", PatientID="P-7")
    put("CT_small.dcm", tmp_path / "ill" / "other.dcm", PatientID="P-8")
    data = read_dicom_folder(tmp_path, ScanMapping(), TASK).data
    assert data.patient_ids == ("P-7", "P-8")
    assert data.patients.tolist() == [0, 1, 0]
    assert data.labels.tolist() == [1, 1, 0]


def series(folder: Path, patient: str = "P-1", slices: int = 6) -> None:
    """A series whose file names and instance numbers run against its slices' places."""
    uid = generate_uid()
    for z in range(slices):
        data = put(
            "CT_small.dcm",
            folder / f"{slices - z}.dcm",
            PatientID=patient,
            SeriesInstanceUID=uid,
            InstanceNumber=slices - z,
            ImagePositionPatient=[0, 0, 10 * z],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )
        flat = np.full((128, 128), 1024 + 100 * z, dtype="<i2")  # 100 z Hounsfield
        data.PixelData = flat.tobytes()
        data.save_as(folder / f"{slices - z}.dcm")


def test_slices_are_put_in_the_order_of_their_places(tmp_path: Path) -> None:
    series(tmp_path / "ill" / "a")
    series(tmp_path / "well" / "b", patient="P-2")
    data = read_dicom_folder(tmp_path, ScanMapping(), SLICES).data
    assert data.inputs.shape == (2, 1, 6, 128, 128)
    hounsfield = (data.inputs[0, 0, :, 5, 5] + 1) * 700 - 1000
    np.testing.assert_allclose(hounsfield, [0, 100, 200, 300, 400, 400], atol=0.01)


def test_a_series_is_brought_to_the_plans_size_only_if_asked(tmp_path: Path) -> None:
    series(tmp_path / "ill" / "a", slices=12)
    with pytest.raises(ConfigError, match="size 12 x 128 x 128; the plan needs 6 x 128 x 128"):
        read_dicom_folder(tmp_path, ONE, SLICES)
    image = ImagePlan(1, 32, 64, depth=6, black=-1000, white=1000)
    mapping = replace(ONE, resize=True)
    inputs = read_dicom_folder(tmp_path, mapping, replace(TASK, image=image)).data.inputs
    assert inputs.shape == (1, 1, 6, 32, 64)
    assert (np.diff(inputs[0, 0, :, 3, 3]) > 0).all()
    assert np.ptp(inputs[0, 0, 2]) < 1e-5


def test_what_cannot_be_used_is_said_with_its_tag(tmp_path: Path) -> None:
    cases = {
        "anonymous.dcm": ("CT_small.dcm", {"PatientID": ""}, "0010,0020"),
        "frames.dcm": ("SC_rgb_rle_2frame.dcm", {}, "0028,0008"),
        "kind.dcm": ("CT_small.dcm", {"PhotometricInterpretation": "CIELAB"}, "0028,0004"),
        "rows.dcm": ("CT_small.dcm", {"Rows": 0}, "0028,xxxx"),
        "size.dcm": ("MR_small.dcm", {}, "size 64 x 64"),
        "coded.dcm": ("JPGExtended.dcm", {}, "7FE0,0010"),
    }
    put("CT_small.dcm", tmp_path / "ill" / "good.dcm")
    for file, (name, tags, _) in cases.items():
        put(name, tmp_path / "ill" / file, **tags)
    reasons = dict(read_dicom_folder(tmp_path, ONE, TASK).notes.rejected)
    for file, (_, _, word) in cases.items():
        assert word in reasons[f"ill/{file}"]


def test_a_window_that_no_file_names_cannot_be_used(tmp_path: Path) -> None:
    put("CT_small.dcm", tmp_path / "ill" / "a.dcm")
    with pytest.raises(ConfigError, match=r"0028,1050.*use window = 'plan'"):
        read_dicom_folder(tmp_path, replace(ONE, window="file"), TASK)


def test_text_burnt_into_a_picture_is_warned_of(tmp_path: Path) -> None:
    put("CT_small.dcm", tmp_path / "ill" / "a.dcm", BurnedInAnnotation="YES")
    put("CT_small.dcm", tmp_path / "ill" / "b.dcm", BurnedInAnnotation="NO")
    lines = read_dicom_folder(tmp_path, ONE, TASK).notes.lines()
    assert "1 file(s) say that text is burnt" in lines[-1]


@pytest.mark.parametrize("key", ["patient", "study", "series", "file"])
def test_labels_by_patient_study_series_or_file(tmp_path: Path, key: str) -> None:
    names = {}
    for number, label in enumerate(("1", "0")):
        uid = generate_uid()
        put(
            "CT_small.dcm", tmp_path / f"{number}.dcm",
            PatientID=f"P-{number}", StudyInstanceUID=uid, SeriesInstanceUID=uid,
        )  # fmt: skip
        names[{"patient": f"P-{number}", "file": f"{number}.dcm"}.get(key, uid)] = label
    put("CT_small.dcm", tmp_path / "unlabelled.dcm", PatientID="P-9", StudyInstanceUID="1.2",
        SeriesInstanceUID="1.2")  # fmt: skip
    rows = "".join(f"{name},{label}\n" for name, label in names.items())
    (tmp_path / "labels.csv").write_text(f"{key},label\n{rows}")
    mapping = ScanMapping(key=key, values=(("1", "ill"), ("0", "well")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 of 3 scans have no label"):
        read_dicom_folder(tmp_path, mapping, TASK)
    data = read_dicom_folder(tmp_path, replace(mapping, drop_unlabelled=True), TASK).data
    assert data.labels.tolist() == [1, 0]
    (tmp_path / "labels.csv").write_text(f"{key},label\n{rows}{next(iter(names))},0\n")
    with pytest.raises(ConfigError, match="data row 3 gives another label"):
        read_dicom_folder(tmp_path, mapping, TASK)


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_files_never_stop_the_reading(tmp_path: Path, data: st.DataObject) -> None:
    original = bytearray(shipped("MR_small.dcm").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, 1600))  # the header, mostly
        original[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(original)))
    put("MR_small.dcm", tmp_path / "ill" / "good.dcm")
    (tmp_path / "ill" / "bad.dcm").write_bytes(original[:end])
    read = read_dicom_folder(tmp_path, ONE, sized("MR_small.dcm"))
    assert len(read.data.labels) + len(read.notes.rejected) == 2
    assert np.isfinite(read.data.inputs).all()


def nifti(path: Path, values: np.ndarray, axes: str = "RAS") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.0 if axis in "LPI" else 1.0 for axis in axes] + [1.0])
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)


def test_nifti_volumes_whatever_way_the_scanner_turned_them(tmp_path: Path) -> None:
    volume = np.random.default_rng(1).uniform(-1000, 400, (8, 9, 6))
    nifti(tmp_path / "ill" / "P1_a.nii.gz", volume)
    nifti(tmp_path / "well" / "P2_a.nii", volume[::-1, ::-1], "LPS")
    nifti(tmp_path / "well" / "P1_b.nii", volume)
    (tmp_path / "well" / "cut.nii.gz").write_bytes(
        (tmp_path / "ill" / "P1_a.nii.gz").read_bytes()[:200]
    )
    image = ImagePlan(1, 9, 8, depth=6, black=-1000, white=400)
    task = replace(TASK, image=image)
    read = read_nifti_folder(tmp_path, ScanMapping(patient_separator="_"), task)
    assert read.data.inputs.shape == (3, 1, 6, 9, 8)
    np.testing.assert_allclose(read.data.inputs[0], read.data.inputs[2], atol=1e-6)
    hounsfield = (read.data.inputs[0, 0, 4, 8, 2] + 1) * 700 - 1000
    assert hounsfield == pytest.approx(volume[2, 0, 4], abs=1e-3)  # row 8 is the back
    assert read.data.patient_ids == ("P1", "P2")
    assert [file for file, _ in read.notes.rejected] == ["well/cut.nii.gz"]


def test_a_site_reads_either_by_its_own_mapping(tmp_path: Path) -> None:
    put("CT_small.dcm", tmp_path / "ill" / "a.dcm")
    put("CT_small.dcm", tmp_path / "well" / "b.dcm", PatientID="P-2")
    config = SourceConfig("dicom", str(tmp_path))
    assert read_source(config, tmp_path, TASK).data.patient_count == 2
    with pytest.raises(ConfigError, match="NIfTI holds volumes"):
        read_source(replace(config, kind="nifti"), tmp_path, TASK)
    with pytest.raises(ConfigError, match="table of features"):
        read_source(
            config,
            tmp_path,
            replace(TASK, image=None, features=(FeaturePlan("age", minimum=0, maximum=120),)),
        )
    with pytest.raises(ConfigError, match="is for kinds 'dicom' and 'nifti'"):
        SourceConfig("npz", "x.npz", scans=ScanMapping(resize=True))
