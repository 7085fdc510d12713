"""New images and scans without labels: what `predict` and `explain` are asked about."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from client.cli import main
from client.data.dicom import read_dicom_folder
from client.data.images import ImageMapping, read_image_folder
from client.data.scans import ScanMapping
from client.data.site_config import SourceConfig
from client.data.unlabelled import read_unlabelled
from server.record import write_model
from server.rounds import StudyOutcome
from shared.errors import ConfigError
from shared.identity import Identity
from shared.models import initial_parameters
from shared.optimizers import initial_state
from shared.plan import from_table
from shared.task_plan import ImagePlan, TaskPlan

PICTURES = TaskPlan("ill", image=ImagePlan(1, 16, 16))
SCANS = TaskPlan("ill", image=ImagePlan(1, 128, 128, black=-1000, white=400))


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_are_read_as_training_reads_them(tmp_path: Path) -> None:
    for number, name in enumerate(("1/a_1.png", "0/a_2.png", "1/b_1.png")):
        draw(tmp_path / name, number)
    mapping = ImageMapping(patient_separator="_")
    trained = read_image_folder(tmp_path, mapping, PICTURES).data
    source = SourceConfig("image-folder", "somewhere", images=mapping)
    found = read_unlabelled(tmp_path, source, PICTURES)
    np.testing.assert_array_equal(found.inputs, trained.inputs)
    assert found.patients == ("a", "a", "b")
    alone = read_unlabelled(tmp_path / "0" / "a_2.png", source, PICTURES)
    np.testing.assert_array_equal(alone.inputs, trained.inputs[:1])
    features = replace(PICTURES.image, features="scattering")  # type: ignore[type-var]
    assert read_unlabelled(tmp_path, source, replace(PICTURES, image=features)).inputs.ndim == 2


def test_another_size_is_refused_unless_the_site_resizes(tmp_path: Path) -> None:
    file = draw(tmp_path / "P-7.png", 1, (32, 24))
    with pytest.raises(ConfigError, match=r"P-7.png is 32 x 24 pixels.*resize = true"):
        read_unlabelled(file, None, PICTURES)
    source = SourceConfig("image-folder", "somewhere", images=ImageMapping(resize=True))
    assert read_unlabelled(file, source, PICTURES).inputs.shape == (1, 1, 16, 16)


def test_dicom_is_named_by_its_tag_and_the_unusable_is_said(tmp_path: Path) -> None:
    shipped = get_testdata_file("CT_small.dcm", download=False)
    data = pydicom.dcmread(str(shipped))
    (tmp_path / "ill").mkdir()
    data.save_as(tmp_path / "ill" / "one")
    (tmp_path / "ill" / "two").write_bytes(b"no scan")
    found = read_unlabelled(tmp_path, None, SCANS)
    assert (found.patients, found.named) == (("1CT1",), True)
    assert "1 file(s) left out: not a DICOM file, or cut short" in found.notes.lines()
    labelled = read_dicom_folder(tmp_path, ScanMapping(allow_one_class=True), SCANS)
    np.testing.assert_array_equal(found.inputs, labelled.data.inputs)
    with pytest.raises(ConfigError, match="none of 1 files is usable"):
        read_unlabelled(tmp_path / "ill" / "two", None, SCANS)


def test_nifti_is_a_volume_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    task = replace(PICTURES, image=ImagePlan(1, 8, 8, depth=4))
    values = np.random.default_rng(1).uniform(0, 255, (8, 8, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "P-7.nii")
    found = read_unlabelled(tmp_path / "P-7.nii", None, task)
    assert (found.inputs.shape, found.patients, found.named) == ((1, 1, 4, 8, 8), ("P-7",), False)
    with pytest.raises(ConfigError, match="the plan's image is flat"):
        read_unlabelled(tmp_path / "P-7.nii", None, PICTURES)
    draw(tmp_path / "P-8.png", 1)
    with pytest.raises(ConfigError, match=r"mixes kinds of files \(NIfTI, picture"):
        read_unlabelled(tmp_path, None, task)
    with pytest.raises(ConfigError, match="a picture is flat"):
        read_unlabelled(tmp_path / "P-8.png", None, task)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with a released model of pictures, and nothing prepared."""
    table = {
        "name": "lesions",
        "task": {"label": "ill", "image": {"channels": 1, "height": 16, "width": 16}},
        "model": {"name": "cnn", "width": 4},
        "training": {"rounds": 2, "local_steps": 1, "learning_rate": 1, "sample_rate": 0.5},
        "privacy": {"mode": "local", "epsilon": 4, "delta": 1e-4, "clip_norm": 1},
        "cohort": {
            "threshold": 3,
            "sites": [{"name": n, "expected_patients": 100} for n in ("a", "b", "c", "d")],
        },
    }
    plan = from_table(table, "test")
    state = initial_state(plan.optimizer, initial_parameters(plan))
    (tmp_path / "model").mkdir()
    write_model(plan, StudyOutcome(state, (), {}, b""), tmp_path / "model")
    Identity.generate().save(tmp_path / "identity.pem")
    (tmp_path / "site.toml").write_text('name = "city"\n')
    return tmp_path


def test_a_new_picture_is_answered_and_explained(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(site / "new" / "scan-1.png", 1)
    draw(site / "new" / "scan-2.png", 2)
    words = ["--site", str(site)]
    said = site / "said.csv"
    assert (
        main([*words, "predict", str(site / "model"), str(site / "new"), "--out", str(said)]) == 0
    )
    rows = list(csv.DictReader(said.read_text().splitlines()))
    assert [row["patient"] for row in rows] == ["scan-1", "scan-2"]
    assert rows[0]["probability of 1"] != rows[1]["probability of 1"]
    explain = [*words, "explain", str(site / "model")]
    alone = [str(site / "new" / "scan-1.png"), "--patient", "P-7", "--out", str(site / "1.html")]
    assert main([*explain, *alone]) == 0  # a picture does not say whose it is
    assert "patient P-7" in (site / "1.html").read_text()
    among = [str(site / "new"), "--patient", "P-7", "--out", str(site / "2.html")]
    assert main([*explain, *among]) == 2
    assert "no record of that patient" in capsys.readouterr().err
    among[2] = "scan-2"
    assert main([*explain, *among]) == 0
