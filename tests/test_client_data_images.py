"""A folder of images: both layouts, and how each bad input is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.images import ImageMapping, read_image_folder
from shared.errors import ConfigError
from shared.task_plan import ImagePlan, TaskPlan

TASK = TaskPlan("finding", positive="ill", image=ImagePlan(1, 8, 8))
TABLE = ImageMapping(values=(("1", "ill"), ("0", "well")))
CLASSES = ImageMapping(patient_separator="_")


def draw(path: Path, grey: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey if mode == "L" else (grey, grey, grey)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two patients, listed in labels.csv."""
    for name, grey in (("P-771-a.png", 0), ("P-771-b.png", 255), ("P-442.png", 51)):
        draw(tmp_path / "scans" / name, grey)
    (tmp_path / "labels.csv").write_text(
        "file,label,patient\n"
        "scans/P-771-a.png,1,P-771\nscans/P-442.png,0,P-442\nscans/P-771-b.png,1,P-771\n"
    )
    return tmp_path


def refused(folder: Path, match: str, mapping: ImageMapping = TABLE, task: TaskPlan = TASK) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read_image_folder(folder, mapping, task)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert "P-771" not in message
    assert "P-442" not in message


def test_a_listed_folder(folder: Path) -> None:
    data = read_image_folder(folder, TABLE, TASK).data
    assert data.inputs.shape == (3, 1, 8, 8)
    np.testing.assert_allclose(data.inputs[:, 0, 0, 0], [-1, -0.6, 1], atol=1e-6)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.patients.tolist() == [0, 1, 0]
    assert data.patient_ids == ("P-771", "P-442")


def test_one_folder_per_class(tmp_path: Path) -> None:
    for name in ("ill/P-1_a.png", "ill/P-1_b.png", "well/P-2_a.png"):
        draw(tmp_path / name, 0)
    data = read_image_folder(tmp_path, CLASSES, TASK).data
    assert data.labels.tolist() == [1, 1, 0]
    assert data.patients.tolist() == [0, 0, 1]


def test_colour_and_sixteen_bits(folder: Path) -> None:
    draw(folder / "scans" / "P-442.png", 51, mode="RGB")
    grey = read_image_folder(folder, TABLE, TASK).data
    np.testing.assert_allclose(grey.inputs[1, 0, 0, 0], -0.6, atol=1e-6)

    deep = np.full((8, 8), 60000, np.uint16)
    for name in ("P-771-a.png", "P-771-b.png", "P-442.png"):
        Image.fromarray(deep).save(folder / "scans" / name)
    task = replace(TASK, image=ImagePlan(1, 8, 8, white=60000))
    assert (read_image_folder(folder, TABLE, task).data.inputs == 1).all()


def test_another_size_is_refused_or_resized(folder: Path) -> None:
    draw(folder / "scans" / "P-442.png", 51, (16, 12))
    refused(folder, "data row 2 is 12 x 16 pixels; the plan needs 8 x 8")
    data = read_image_folder(folder, replace(TABLE, resize=True), TASK).data
    np.testing.assert_allclose(data.inputs[1], -0.6, atol=1e-6)


def test_a_damaged_image_is_called_by_its_row(folder: Path) -> None:
    (folder / "scans" / "P-442.png").write_bytes(b"\x89PNG not really")
    refused(folder, "data row 2 is not a readable image")


def test_a_path_out_of_the_folder_is_refused(folder: Path) -> None:
    draw(folder.parent / "P-442-outside.png", 0)
    for name in ("../P-442-outside.png", str(folder.parent / "P-442-outside.png"), "P-442-no.png"):
        table = f"file,label,patient\nscans/P-771-a.png,1,x\n{name},0,y\n"
        (folder / "labels.csv").write_text(table)
        refused(folder, "data row 2 no file within the folder")


def test_one_class_or_a_third_class(folder: Path) -> None:
    refused(folder, "2 different labels", ImageMapping())
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace(",0,", ",1,"))
    refused(folder, "one class only")


def test_a_missing_patient_column_or_patient(folder: Path) -> None:
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("0,P-442", "0,"))
    refused(folder, "column 'patient'.*data row 2")
    refused(folder, "no column 'case'", replace(TABLE, patient="case"))


def test_class_folders_need_to_say_who_is_a_patient(tmp_path: Path) -> None:
    draw(tmp_path / "ill" / "a.png", 0)
    refused(tmp_path, "patient_separator", ImageMapping())
    refused(tmp_path / "ill", "lists no images", CLASSES)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")
