"""A hospital's own file that does not fit: the whole command says so in one paragraph, code 2."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from simulations.cli import main

SITES = ("north", "east", "south")
SCENARIO = """
[simulation]
title = "Own tables"
source = "csv"
[plan]
name = "own"
[plan.task]
label = "ill"
[[plan.task.features]]
name = "age"
minimum = 0
maximum = 100
[plan.model]
name = "logistic"
[plan.training]
rounds = 1
local_steps = 1
learning_rate = 0.1
sample_rate = 0.5
[plan.privacy]
mode = "local"
epsilon = 8
delta = 1e-3
clip_norm = 1
[plan.cohort]
threshold = 3
sites = [
  {name = "north", expected_patients = 20},
  {name = "east", expected_patients = 20},
  {name = "south", expected_patients = 20},
]
[plan.evaluation]
release = "exact"
"""


def write_tables(folder: Path, spoil: str = "") -> None:
    """Three good files, the first of which may be spoilt."""
    rng = np.random.default_rng(0)
    for site in SITES:
        rows = [[int(rng.integers(20, 90)), i % 2] for i in range(24)]
        header = ["age", "ill"]
        if site == "north":
            if spoil == "no label":
                header = ["age", "sick"]
            elif spoil == "text":
                rows[6][0] = "seventy"  # type: ignore[call-overload]
            elif spoil == "one class":
                rows = [[age, 0] for age, _ in rows]
            elif spoil == "no rows":
                rows = []
        with (folder / f"{site}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    (folder / "own.toml").write_text(SCENARIO, encoding="utf-8")


def run(folder: Path, out: Path) -> int:
    arguments = ["run", str(folder / "own.toml"), "--data", str(folder), "--out", str(out)]
    return main([*arguments, "--quiet"])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "data", tmp_path / "out"


def test_good_tables_run_to_the_end(folders: tuple[Path, Path]) -> None:
    data, out = folders
    write_tables(data)
    assert run(data, out / "run") == 0
    assert (out / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("no label", ["ill"]),
        ("text", ["age", "row"]),
        ("one class", ["ill"]),
        ("no rows", ["no data rows"]),
    ],
)
def test_a_spoilt_table_is_named_with_its_column_and_the_remedy(
    folders: tuple[Path, Path], spoil: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folders
    write_tables(data, spoil)
    assert run(data, out / "run") == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "north.csv" in error
    assert "seventy" not in error
    for word in words:
        assert word in error
    assert list(out.iterdir()) == []
