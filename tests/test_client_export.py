"""fedward-site export: an ONNX file that says of raw records what PyTorch says of prepared ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from client import export
from client.cli import main
from client.export import SCHEMA, TOLERANCE, ask, describe, export_onnx, off_by
from client.portable import CellMeans, Encoding, Scaling
from client.prediction import outputs_of
from server.record import write_model
from server.rounds import StudyOutcome
from shared.errors import ConfigError
from shared.features import encode, feature_columns, scale_pixels
from shared.models import initial_parameters
from shared.optimizers import initial_state
from shared.plan import StudyPlan
from shared.released import ReleasedModel, answers, read_model, require_plain_inputs
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan
from simulations.hospitals import load_hospitals
from simulations.scenario import load_scenario

ENCODINGS = ("one-hot", "drop-first")
MIXED = (
    FeaturePlan("age", minimum=20.0, maximum=100.0),
    FeaturePlan("stage", type="category", categories=("I", "II", "III"), missing="indicator"),
    FeaturePlan("creatinine", minimum=0.0, maximum=10.0, missing="indicator"),
    FeaturePlan("ward", type="category", categories=("A", "B"), missing="midpoint"),
    FeaturePlan("sodium", minimum=100.0, maximum=180.0, missing="midpoint"),
)
RAW = np.array(
    [
        [63, 2, 1.2, 0, 140],
        [20, 0, np.nan, 1, np.nan],
        [130, np.nan, 10, np.nan, 99],
        [np.nan, 1, 3, 0, 120],  # the plan refuses to miss an age
        [50, 3, 3, 0, 120],  # there is no fourth stage
        [50, 1.5, 3, 0, 120],
        [50, 1, np.inf, 0, 120],
    ],
    dtype=np.float32,
)
ADMITTED = 3


def model_of(plan: StudyPlan) -> ReleasedModel:
    return ReleasedModel(plan, initial_parameters(plan) * np.float32(2), "ab" * 32)


def said(model: ReleasedModel, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """What `predict` writes."""
    columns = answers(model.plan.task, outputs_of(model, inputs))
    return np.stack(list(columns.values()), axis=1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_files_preprocessing_is_the_plans(encoding: Any) -> None:
    task = TaskPlan("ill", features=MIXED, encoding=encoding)
    good = RAW[:ADMITTED].astype(np.float64)
    columns: dict[str, Any] = {}
    for i, feature in enumerate(MIXED):
        values = good[:, i]
        if feature.type == "category":
            values = np.where(np.isnan(values), -1, values).astype(np.int64)
        columns[feature.name] = values
    inputs, usable = Encoding(task)(torch.from_numpy(RAW))
    assert usable.tolist() == [True] * ADMITTED + [False] * 4
    np.testing.assert_allclose(inputs[:ADMITTED].numpy(), encode(task, columns), atol=1e-6)


@pytest.mark.parametrize(("channels", "depth"), [(1, 0), (3, 0), (1, 4)])
def test_the_files_scaling_is_the_plans(channels: int, depth: int) -> None:
    image = ImagePlan(channels, 8, 8, depth=depth, black=-1000, white=400)
    raw = np.random.default_rng(1).uniform(-1500, 900, (3, *image.grid, channels))
    inputs, usable = Scaling(image)(torch.from_numpy(raw.astype(np.float32)))
    assert usable.all()
    np.testing.assert_allclose(inputs.numpy(), scale_pixels(image, raw), atol=1e-6)


@pytest.mark.parametrize(("grid", "cells"), [((12, 8), (4, 4)), ((9, 7, 11), (4, 3, 5))])
def test_cell_means_are_pytorchs_adaptive_pooling(
    grid: tuple[int, ...], cells: tuple[int, ...]
) -> None:
    pool = torch.nn.AdaptiveAvgPool3d if len(grid) == 3 else torch.nn.AdaptiveAvgPool2d
    images = torch.rand(2, 3, *grid)
    torch.testing.assert_close(CellMeans(cells)(images), pool(cells)(images))


def raw_of(task: TaskPlan, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Test records in their own units again."""
    if task.image is not None:
        black, white = task.image.black, task.image.white
        grey = np.rint(black + (inputs.astype(np.float64) + 1) / 2 * (white - black))
        return np.moveaxis(grey, 1, -1).astype(np.float32)
    scaled = [inputs[:, columns.start] for columns in feature_columns(task)]
    raw = [
        (f.minimum or 0) + (x.astype(np.float64) + 1) / 2 * ((f.maximum or 0) - (f.minimum or 0))
        for f, x in zip(task.features, scaled, strict=True)
    ]
    return np.stack(raw, axis=1).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("breast_cancer", ""),
        ("diabetes", ""),
        ("nodules_contrast", ""),
        ("tcga_brca", "tcga_brca_6regions"),
        ("adrenal", "adrenalmnist3d"),
    ],
)
def test_the_file_equals_pytorch_on_a_studys_test_data(
    name: str, folder: str, request: pytest.FixtureRequest
) -> None:
    overrides = ["simulation.site_sizes=[20,20,20,20]"] if "nodules" in name else []
    if folder:
        overrides = [f"simulation.folder={request.getfixturevalue('real_data') / folder}"]
    scenario = load_scenario(name, overrides)
    hospitals = load_hospitals(scenario.simulation, scenario.plan)
    tested = np.concatenate([h.test.inputs for h in hospitals])
    model = model_of(scenario.plan)
    data = export_onnx(model)
    found, wanted = ask(data, raw_of(scenario.plan.task, tested)), said(model, tested)
    assert np.ptp(wanted) > 1e-3  # the answers differ from one another
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert off_by(found, wanted) <= 1


def mixed_plan(**changes: Any) -> StudyPlan:
    plan = load_scenario("breast_cancer").plan
    task = TaskPlan("grade", kind="multiclass", classes=("A", "B", "C"), features=MIXED)
    model = dataclasses.replace(plan.model, name="mlp", hidden=(8,))
    return dataclasses.replace(plan, task=dataclasses.replace(task, **changes), model=model)


@pytest.mark.slow
def test_the_command_writes_a_file_that_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mixed_plan()
    state = initial_state(plan.optimizer, initial_parameters(plan))
    write_model(plan, StudyOutcome(state, (), {}, b""), tmp_path)
    out = tmp_path / "model.onnx"
    words = ["--site", str(tmp_path), "export", str(tmp_path), "--out", str(out)]
    data = export_onnx(read_model(tmp_path))
    monkeypatch.setattr(export, "export_onnx", lambda model: data)  # it takes seconds
    real = export.ask
    monkeypatch.setattr(export, "ask", lambda data, raw: real(data, raw) + np.float32(1e-3))
    assert main(words) == 1  # a file that differs is not written
    assert "differs from PyTorch by 1.0e-03" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(export, "ask", real)
    assert main(words) == 0
    assert "of PyTorch on invented records" in capsys.readouterr().out
    assert main(words) == 2  # never overwritten

    graph = onnx.load(out)
    about = json.loads({p.key: p.value for p in graph.metadata_props}["fedward"])
    assert about["schema"] == SCHEMA
    assert about["plan_sha256"] == plan.sha256
    assert [f["name"] for f in about["features"]] == [f.name for f in MIXED]
    assert about["answers"] == [f"probability of {c}" for c in "ABC"]
    found = ask(out.read_bytes(), RAW)
    np.testing.assert_allclose(found[:ADMITTED].sum(axis=1), 1, atol=1e-5)
    assert np.isnan(found[ADMITTED:]).all()  # what the plan refuses gets no answer


def test_what_cannot_be_in_a_file_is_refused() -> None:
    scattered = load_scenario("breastmnist").plan
    assert scattered.task.image is not None
    with pytest.raises(ConfigError, match="features that were made of the picture"):
        export_onnx(ReleasedModel(scattered, np.zeros(0, dtype=np.float32), ""))
    whole = dataclasses.replace(
        scattered.task.image, features="resnet18", weights_sha256="0" * 64, trainable="all"
    )
    require_plain_inputs(dataclasses.replace(scattered.task, image=whole), "exported")
    stage = dataclasses.replace(whole, trainable="last-stage")
    with pytest.raises(ConfigError, match="cannot be exported: it reads fixed features"):
        require_plain_inputs(dataclasses.replace(scattered.task, image=stage), "exported")
    flamby = load_scenario("heart_flamby_fedavg").plan
    with pytest.raises(ConfigError, match="each hospital's own data"):
        export_onnx(ReleasedModel(flamby, np.zeros(0, dtype=np.float32), ""))
    assert "records" in describe(model_of(mixed_plan()))


def test_a_model_that_the_exporter_cannot_write_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise torch.onnx.OnnxExporterError("a page of its own advice")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ConfigError, match=r"cannot write the model 'mlp' as ONNX"):
        export_onnx(model_of(mixed_plan()))


def test_without_onnx_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "onnxscript" else real(name, *a)  # noqa: E731
    monkeypatch.setattr(export.importlib.util, "find_spec", hidden)
    with pytest.raises(ConfigError, match=r"pip install 'fedward\[onnx\]'"):
        export_onnx(model_of(mixed_plan()))
