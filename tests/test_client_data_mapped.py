"""Data sets larger than memory: the same records, the same training, and no more memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from training_cases import make_data, make_plan

import client.training
from client.data import mapped, npz, prepared
from client.data.dataset import PatientDataset
from client.data.images import ImageMapping, read_image_folder
from client.data.mapped import Spool, release, taken
from client.data.npz import read_npz
from client.data.prepared import read_prepared, write_prepared
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from shared.models import initial_parameters
from shared.task_plan import ImagePlan, TaskPlan

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MB = 1 << 20
PLAN = make_plan("pooled-linear", image=64, model={"width": 4})


def memory(line: str) -> float:
    """Megabytes of one line of the process's status."""
    return float(STATUS.read_text().split(line)[1].split()[0]) / 1024


def growth(work: Callable[[], object]) -> float:
    """By how many megabytes the process grew at its largest."""
    before = memory("VmRSS:")
    CLEAR.write_text("5")  # forget the largest so far
    work()
    return memory("VmHWM:") - before


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is too large for memory."""
    for module in (mapped, prepared, npz):
        monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(Spool.__init__, "__defaults__", (0,))


def test_a_spool_gives_back_what_went_in(small: None) -> None:
    parts = [np.random.default_rng(i).normal(size=(i, 3, 4)).astype(np.float32) for i in range(4)]
    spool = Spool()
    for part in parts:
        spool.add(part)
    array = spool.array()
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, np.concatenate(parts))
    rows = np.array([5, 0, 5])
    np.testing.assert_array_equal(taken(array, rows), np.concatenate(parts)[rows])
    release(array)
    np.testing.assert_array_equal(array, np.concatenate(parts))


def test_a_prepared_file_is_a_safetensors_file_and_is_mapped(tmp_path: Path, small: None) -> None:
    data, path = make_data(PLAN, patients=9, records_each=2), tmp_path / "train.safetensors"
    write_prepared(data, path)
    np.testing.assert_array_equal(load_file(path)["inputs"], data.inputs)
    again = read_prepared(path)
    assert isinstance(again.inputs, np.memmap)
    np.testing.assert_array_equal(again.inputs, data.inputs)
    np.testing.assert_array_equal(again.labels, data.labels)
    assert again.patient_ids == data.patient_ids
    kept = np.array([4, 1])
    np.testing.assert_array_equal(again.select(kept).inputs, data.select(kept).inputs)


def test_training_on_mapped_records_is_the_same(tmp_path: Path, small: None) -> None:
    data = make_data(PLAN, patients=20)
    write_prepared(data, tmp_path / "train.safetensors")
    sums, said, start = [], [], initial_parameters(PLAN)
    for part in (data, read_prepared(tmp_path / "train.safetensors")):
        trainer = LocalTrainer(PLAN, "site-0", part, 1.0, "cpu")
        random = ChaChaRandom(simulation_key(1, "site-0"))
        sums.append(trainer.clipped_sum(start, random, 1).update)
        said.append(trainer.predict(start, part.inputs))
    np.testing.assert_array_equal(*sums)
    np.testing.assert_array_equal(*said)


def test_readers_of_pictures_and_npz_map_what_is_large(tmp_path: Path, small: None) -> None:
    task = TaskPlan("label", image=ImagePlan(1, 16, 16))
    images = np.random.default_rng(0).integers(0, 255, (70, 16, 16)).astype(np.uint8)
    labels = np.arange(70, dtype=np.uint8)[:, None] % 2
    expected = images[:, None].astype(np.float32) / np.float32(127.5) - 1
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", train_images=images, train_labels=labels)
        inputs = read_npz(tmp_path / "images.npz", task).data.inputs
        assert isinstance(inputs, np.memmap)
        np.testing.assert_allclose(inputs, expected, atol=1e-6)
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file,label,patient", *(f"{i}.png,{i % 2},{i}" for i in range(70))]
    (folder / "labels.csv").write_text("\n".join(lines))
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    inputs = read_image_folder(folder, ImageMapping(), task).data.inputs
    assert isinstance(inputs, np.memmap)
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


def stored(path: Path, records: int) -> PatientDataset:
    """Random images, written piece by piece."""
    spool = Spool()
    for _ in range(records // 256):
        spool.add(torch.rand(256, 1, 64, 64).numpy() * 2 - 1)
    data = PatientDataset(
        spool.array(), np.arange(records) % 2, np.arange(records), tuple(map(str, range(records)))
    )
    write_prepared(data, path)
    return read_prepared(path)


def train(data: PatientDataset) -> None:
    """Steps that between them look at every record's page, a hundred records at a time."""
    trainer = LocalTrainer(PLAN, "site-0", data, 1.0, "cpu", max_physical_records=100)
    start, random = initial_parameters(PLAN), ChaChaRandom(simulation_key(1, "site-0"))
    for first in range(0, data.patient_count, 100):
        everyone = np.arange(first, min(first + 100, data.patient_count))
        trainer.gradient(start, everyone, random)


@pytest.mark.skipif(not CLEAR.exists(), reason="the largest memory so far is Linux's to tell")
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.safetensors"
    train(stored(path, 256))  # torch's own pools are filled
    grown = growth(lambda: train(stored(path, 8192)))  # 128 MB of images
    assert grown < 64
    monkeypatch.setattr(client.training, "release", lambda records: None)
    assert growth(lambda: train(read_prepared(path))) > grown + 40  # the measure would notice
