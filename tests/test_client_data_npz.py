"""MedMNIST files: what is read, and how damaged or hostile ones are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.npz import read_npz
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

TASK = TaskPlan("label", positive="0", image=ImagePlan(1, 28, 28))


def saved(folder: Path, **arrays: Any) -> Path:
    parts = {
        "train_images": np.zeros((4, 28, 28), np.uint8),
        "train_labels": np.array([[0], [1], [1], [0]], np.uint8),
    }
    np.savez(folder / "images.npz", allow_pickle=True, **(parts | arrays))
    return folder / "images.npz"


def refused(path: Path, match: str, task: TaskPlan = TASK) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read_npz(path, task)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_published_file_has_the_published_counts(breastmnist_folder: Path) -> None:
    path = breastmnist_folder / "breastmnist.npz"
    counts = {}
    for part in ("train", "val", "test"):
        data = read_npz(path, TASK, part).data  # type: ignore[arg-type]
        assert data.inputs.shape[1:] == (1, 28, 28)
        assert data.inputs.min() >= -1
        assert data.inputs.max() <= 1
        assert data.patient_count == len(data.labels)
        counts[part] = (len(data.labels), int(data.labels.sum()))
    assert counts == {"train": (546, 147), "val": (78, 21), "test": (156, 42)}


def test_flat_labels_and_the_positive_class(tmp_path: Path) -> None:
    path = saved(tmp_path, train_labels=np.array([0, 1, 1, 0]))
    assert read_npz(path, TASK).data.labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"train_images": np.zeros((4, 64, 64), np.uint8)}, r"\(64, 64\); the plan needs 28 x 28"),
        ({"train_images": np.zeros((4, 784), np.uint8)}, "3 or 4 or 5 dimensions"),
        ({"train_images": np.full((4, 28, 28), "x")}, "unsigned or real numbers"),
        ({"train_labels": np.zeros((4, 14), np.uint8)}, "one label each"),
        ({"train_labels": np.zeros((3, 1), np.uint8)}, "one label each"),
        ({"train_labels": np.array([0.5, 1, 0, 1])}, "whole numbers"),
        ({"train_labels": np.array([0, 1, 2, 3])}, "4 classes"),
        ({"train_labels": np.array([0, 0, 0, 0])}, "one class only"),
        (
            {
                "train_images": np.zeros((0, 28, 28), np.uint8),
                "train_labels": np.zeros((0, 1), int),
            },
            "no images",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], match: str
) -> None:
    refused(saved(tmp_path, **arrays), match)


def test_a_file_without_the_arrays_or_no_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    refused(tmp_path / "other.npz", "no array 'train_images'")
    refused(tmp_path / "nowhere.npz", "does not exist")
    (tmp_path / "text.npz").write_text("not a zip")
    refused(tmp_path / "text.npz", "not an .npz file")
    np.save(tmp_path / "single.npy", np.zeros(3))
    refused((tmp_path / "single.npy").rename(tmp_path / "single.npz"), "not an .npz file")


class Bomb:
    """Unpickling it would import and run something; here it sets a flag."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys.fedward_bomb = True",)


def test_a_pickle_inside_is_never_run(tmp_path: Path) -> None:
    path = saved(tmp_path, train_images=np.array([Bomb()] * 4, dtype=object))
    refused(path, "Python objects")
    assert not hasattr(sys, "fedward_bomb")
    np.load(path, allow_pickle=True)["train_images"]  # the trap is real
    assert hasattr(sys, "fedward_bomb")
    del sys.fedward_bomb


def test_images_do_not_fit_a_table(tmp_path: Path) -> None:
    table = TaskPlan("label", features=(FeaturePlan("age", minimum=0, maximum=1),))
    refused(saved(tmp_path), "table of features", table)
