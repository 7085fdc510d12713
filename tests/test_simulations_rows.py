"""One small study, plan to report, for each network and task that no other test takes there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.guard import check_sensitivity
from shared.models import initial_parameters
from shared.pretrained import FOLDER
from simulations.pretraining import pretrain, write_weights
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

QUICK = ["training.rounds=1", "training.local_steps=2", "training.sample_rate=0.5"]
QUICK += ["privacy.noise_multiplier=2.0"]  # to search for it takes longer than most studies here
WIDE = ["model.width=8", "model.hidden=[8]"]
SIDE = 8
TWO = (
    'task.features=[{name = "mean radius", minimum = 5, maximum = 30},'
    '{name = "mean texture", minimum = 5, maximum = 45}]'
)
ROWS = {
    "FT-Transformer": ("breast_cancer", ["model.name=ft-transformer", *WIDE, TWO]),
    "ViT": ("breastmnist", ["model.name=vit", *WIDE, "task.image.features=pixels"]),
    "ViT on fixed features": ("breastmnist_vit", [*WIDE, "task.image.cells=2"]),
    "ResNet from scratch": (
        "breastmnist",
        ["model.name=resnet18", "model.width=4", "task.image.features=pixels"],
    ),
    "ResNet fine-tuned": ("breastmnist_resnet", []),
    "3D CNN": ("adrenal", ["model.name=cnn3d", "model.width=4"]),
}

# Real tables and drawings need no made-up file: model and features as they are, fewer rounds.
TASKS = {
    "heart": ("heart", [], "heart_disease_4hospitals", "auroc"),
    "heart, trees": ("heart_trees", [], "heart_disease_4hospitals", "auroc"),
    "diabetes": ("diabetes", [], "", "r2"),
    "diabetes, trees": ("diabetes_trees", [], "", "r2"),
    "survival, Cox": ("tcga_brca", [], "tcga_brca_6regions", "c_index"),
    "survival, hazard network": ("tcga_brca", ["model.name=mlp"], "tcga_brca_6regions", "c_index"),
    "nodules": ("nodules", ["simulation.site_sizes=[40,40,40,40]"], "", "auroc"),
}


def values_of(row: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a row needs of files, which are made up here: noise in place of patients."""
    name = ROWS[row][0]
    if name == "breast_cancer":
        return []
    grid = {"depth": SIDE, "height": SIDE, "width": SIDE}
    if name != "adrenal":
        del grid["depth"]
    random, arrays = np.random.default_rng(1), {}
    for part in ("train", "val", "test"):
        pixels = random.integers(0, 255, (40, *grid.values()), dtype=np.uint8)
        arrays |= {f"{part}_images": pixels, f"{part}_labels": np.arange(40)[:, None] % 2}
    np.savez(folder / ("adrenalmnist3d" if name == "adrenal" else "breastmnist"), **arrays)
    values = [f"simulation.folder={folder}", "simulation.site_sizes=[10,10,10,10]"]
    values += [f"task.image.{axis}={size}" for axis, size in grid.items()]
    if name == "breastmnist_resnet":
        monkeypatch.setenv(FOLDER, str(folder))
        network, _ = pretrain(1, SIDE, 1, test_on=8)
        values.append(f"task.image.weights_sha256={write_weights(network, folder)}")
    return values


@pytest.mark.parametrize("row", ROWS)
def test_every_network_trains_from_plan_to_report(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, overrides = ROWS[row]
    more = values_of(row, tmp_path, monkeypatch)
    trained_and_reported(name, [*overrides, *more], tmp_path / "run", "auroc")


@pytest.mark.parametrize("row", TASKS)
def test_every_task_trains_from_plan_to_report(
    row: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, overrides, data, metric = TASKS[row]
    more = []
    if data:
        folder: Path = request.getfixturevalue("real_data") / data
        if not folder.is_dir():
            pytest.skip(f"no {data} in FEDWARD_TEST_DATA")
        more.append(f"simulation.folder={folder}")
    trained_and_reported(name, [*overrides, *more], tmp_path / "run", metric)


def trained_and_reported(name: str, overrides: list[str], out: Path, metric: str) -> None:
    """A private round that all sites contribute to, and what it leaves behind."""
    scenario = load_scenario(name, [*QUICK, *overrides])
    results = execute(prepare(scenario, RunOptions(out=out)), lambda report: None)
    assert math.isfinite(results["final"]["metrics"][metric])
    assert results["rounds"][0]["contributors"] == sorted(scenario.plan.cohort.names)
    found = load_file(out / "model.safetensors")
    moved = np.concatenate([t.ravel() for t in found.values()]) - initial_parameters(scenario.plan)
    assert np.mean(moved != 0) > 0.99  # noise alone moves every parameter
    assert (out / "report.html").exists()


def test_the_hybrid_transformer_keeps_to_the_clip_norm() -> None:
    overrides = [*WIDE, "task.image.height=16", "task.image.width=16", "task.image.cells=2"]
    plan = load_scenario("breastmnist_vit", overrides).plan
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4
