"""fedward-site predict: a released model on new patients, in the task's own words."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from torch import nn

import client.prediction
from client.cli import main
from client.config import SiteFolder
from client.data import columns
from client.data.unlabelled import read_unlabelled
from client.prediction import MOST_RECORDS, outputs_of
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


@pytest.fixture
def asking(run: Path, site: Path) -> tuple[Path, list[str]]:
    """The site, and the command but for the file."""
    return site, ["--site", str(site), "predict", str(run)]


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


ROWS, AT_ONCE = 700, 97


def many(folder: Path, name: str, changes: dict[str, dict[int, str]]) -> Path:
    """A table with some cells changed: `{column: {data row: text}}`."""
    random = np.random.default_rng(1)
    table: dict[str, list[object]] = {
        "MRN": [f"P-{n}" for n in random.integers(0, 300, ROWS)],
        "r_um": random.uniform(5e3, 3e4, ROWS).tolist(),
        "mean texture": random.uniform(5, 45, ROWS).tolist(),
    }
    for column, cells in changes.items():
        table[column] = [cells.get(row, cell) for row, cell in enumerate(table[column], start=1)]
        if name.endswith(".parquet"):
            table[column] = [str(cell) for cell in table[column]]
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table(table), path, row_group_size=150)
    else:
        rows = [",".join(map(str, cells)) for cells in zip(*table.values(), strict=True)]
        path.write_text("\n".join([",".join(table), *rows]) + "\n")
    return path


def read_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """So many rows at once; how many the model is then asked about at once."""
    asked: list[int] = []

    def outputs(module: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        asked.append(len(inputs))
        return real(module, inputs)

    real = client.prediction._outputs
    monkeypatch.setattr(columns, "AT_ONCE", 3 * rows)
    monkeypatch.setattr(client.prediction, "_outputs", outputs)
    return asked


@pytest.mark.parametrize("name", ["new.csv", "new.parquet"])
def test_a_table_is_answered_in_pieces_as_if_it_were_whole(
    name: str, run: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    path, model = many(site, name, {}), read_model(run)
    found = read_unlabelled(path, SiteFolder(site).config().source, model.plan.task)
    said = answers(model.plan.task, outputs_of(model, found.inputs))
    lines = [f"{n},{p:.6g}" for n, p in zip(found.patients, *said.values(), strict=True)]
    want = "".join(f"{line}\r\n" for line in ("patient,probability of malignant", *lines))
    out = site / "said.csv"
    asked = read_at_once(monkeypatch, AT_ONCE)
    command = ["--site", str(site), "predict", str(run), str(path)]
    assert main([*command, "--out", str(out)]) == 0
    assert out.read_bytes().decode() == want
    assert out.stat().st_mode & 0o777 == 0o600
    assert f"{ROWS} rows written" in capfd.readouterr().out
    assert main(command) == 0
    assert capfd.readouterr().out == want
    # A table that is read as a whole is asked about as a whole.
    assert sum(asked) == 2 * ROWS
    assert max(asked) < MOST_RECORDS + AT_ONCE


@pytest.mark.parametrize("name", ["new.csv", "new.parquet"])
@pytest.mark.parametrize(
    "case",
    [
        ({"r_um": {650: "wide"}}, "column 'r_um' must hold numbers, but data row 650"),
        (
            {"mean texture": {651: "", 660: "NA"}},
            "'mean texture' has 2 missing value(s), the first in data row 651",
        ),
        ({"MRN": {652: ""}}, "missing in data row 652"),
        ({"mean texture": dict.fromkeys(range(101, 601), "99")}, "500 of 700 values"),
    ],
)
def test_what_is_wrong_in_a_late_piece_leaves_nothing_behind(
    name: str,
    case: tuple[dict[str, dict[int, str]], str],
    asking: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    (bad, words), (site, command) = case, asking
    path, said = many(site, name, bad), []
    before = set(site.iterdir())
    command.append(str(path))
    for rows in (ROWS, 70):  # as a whole, and in ten pieces
        read_at_once(monkeypatch, rows)
        assert main([*command, "--out", str(site / "said.csv")]) == 2
        assert main(command) == 2
        shown = capfd.readouterr()
        assert not shown.out
        assert f"{path}: " in shown.err
        assert words in shown.err
        said.append(shown.err)
    assert said[0] == said[1]
    assert set(site.iterdir()) - before <= {site / "journal.jsonl"}


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
