"""fedward-site predict: a released model on new patients, in the task's own words."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from client.cli import main
from shared.errors import ConfigError
from shared.released import answers, read_model
from shared.task_plan import FeaturePlan, TaskPlan
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

AGE = (FeaturePlan("age", minimum=0, maximum=120),)
FEATURES = {"mean radius": 15.0, "mean texture": 20.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two features."""
    out = tmp_path_factory.mktemp("model") / "run"
    features = json.dumps([
        {"name": "mean radius", "minimum": 5, "maximum": 30},
        {"name": "mean texture", "minimum": 5, "maximum": 45},
    ]).replace('":', '" =')  # fmt: skip
    overrides = [f"task.features={features}", "training.rounds=3"]
    options = RunOptions(out=out, insecure_reproducible=True)
    execute(prepare(load_scenario("breast_cancer", overrides), options), lambda report: None)
    return out


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site whose table calls things by other names and another unit."""
    (tmp_path / "site.toml").write_text(
        'name = "city"\n[source]\nkind = "table"\npath = "ward.csv"\n[source.table]\n'
        'patient = "MRN"\n[[source.table.columns]]\nname = "mean radius"\ncolumn = "r_um"\n'
        "factor = 0.001\n"
    )
    (tmp_path / "new.csv").write_text(
        "MRN,r_um,mean texture\nP-1,9000,12\nP-2,26000,35\nP-1,15000,20\n"
    )
    return tmp_path


def test_each_row_of_a_table_without_labels_is_answered(
    run: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = site / "said.csv"
    command = ["--site", str(site), "predict", str(run), str(site / "new.csv")]
    assert main([*command, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["patient"] for row in rows] == ["P-1", "P-2", "P-1"]
    model = read_model(run)
    weights = model.parameters[:2].astype(np.float64)
    said = [float(row["probability of malignant"]) for row in rows]
    for row, (radius, texture) in zip(said, [(9, 12), (26, 35), (15, 20)], strict=True):
        scaled = np.array([(radius - 17.5) / 12.5, (texture - 25) / 20])
        logit = scaled @ weights + float(model.parameters[2])
        assert row == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    assert "P-1" not in capsys.readouterr().out
    assert main([*command, "--out", str(out)]) == 2  # never overwritten
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("patient,probability of malignant")


def test_a_changed_model_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    about = json.loads((tmp_path / "model.json").read_text())
    about["plan"]["task"]["positive"] = "benign"
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="plan_sha256"):
        read_model(tmp_path)
    (tmp_path / "model.json").write_bytes((run / "model.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(ConfigError, match="no readable"):
        read_model(tmp_path)


def test_answers_are_in_the_tasks_own_words() -> None:
    stage = TaskPlan("s", kind="multiclass", classes=("0", "I", "II"), features=AGE)
    said = answers(stage, np.log(np.array([[0.2, 0.3, 0.5]], dtype=np.float32)) + 5)
    assert {name: float(v[0]) for name, v in said.items()} == pytest.approx(
        {"probability of 0": 0.2, "probability of I": 0.3, "probability of II": 0.5}
    )
    days = TaskPlan("days", kind="regression", minimum=10, maximum=30, features=AGE)
    said = answers(days, np.array([-1, 0, 1], dtype=np.float32))
    assert said["days"].tolist() == [10, 20, 30]
    death = TaskPlan("e", kind="survival", time="t", intervals=(30, 90), features=AGE)
    said = answers(death, np.zeros((1, 2), dtype=np.float32))
    assert {name: float(v[0]) for name, v in said.items()} == pytest.approx(
        {"without event at 30": 0.5, "without event at 90": 0.25}
    )
