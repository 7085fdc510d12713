"""Every task that Fedward ships, as one command runs it: a study that learns more than nothing.

Whole studies in process with few rounds, on data of the row's own kind. The long ones are the
scenarios themselves, whose figures stand in README.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.app import forget_sites
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

FOLDERS = {
    "adrenal": "adrenalmnist3d",
    "breastmnist": "breastmnist",
    "heart": "heart_disease_4hospitals",
    "heart_severity": "heart_disease_4hospitals",
    "indo_rct": "indo_rct_4centers",
    "tcga_brca": "tcga_brca_6regions",
}


def study(out: Path, name: str, *overrides: str) -> dict[str, Any]:
    """The results of a whole study; skips where its data are not at hand."""
    if name in FOLDERS:
        base = os.environ.get("FEDWARD_TEST_DATA", "")
        folder = Path(base) / FOLDERS[name]
        if not base or not folder.is_dir():
            pytest.skip(f"no {FOLDERS[name]} in FEDWARD_TEST_DATA")
        overrides = (f'simulation.folder="{folder}"', *overrides)
    scenario = load_scenario(name, overrides)
    try:
        run = prepare(scenario, RunOptions(out=out / "run", device="cpu"))
        return execute(run, lambda report: None)
    finally:
        forget_sites()


@dataclass(frozen=True)
class Row:
    """A scenario, what shortens it, its metric, and what knowing nothing would give."""

    scenario: str
    metric: str
    trivial: float
    overrides: tuple[str, ...] = ()


SHORT = ("training.rounds=6", "evaluation.every=0")
ROWS = {
    "image, 2D": Row("breastmnist", "auroc", 0.5, SHORT),
    "image, 3D": Row("adrenal", "auroc", 0.5, SHORT),
    "image, CNN": Row("nodules", "auroc", 0.5, ("training.rounds=3", "training.local_steps=3",
        "simulation.site_sizes=[40, 40, 40, 40]", "privacy.mode=none")),
    "risk, binary": Row("heart", "auroc", 0.5, SHORT),
    "risk, four centres": Row("indo_rct", "auroc", 0.5, ("evaluation.every=0",)),
    "risk, classes": Row("heart_severity", "auroc", 0.5, SHORT),
    "risk, a number": Row("diabetes", "r2", 0.0, ("evaluation.every=0",)),
    "survival": Row("tcga_brca", "c_index", 0.5, ("training.rounds=10", "evaluation.every=0")),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_short_study_of_every_row_beats_knowing_nothing(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    results = study(tmp_path, row.scenario, *row.overrides)
    assert results["final"]["metrics"][row.metric] > row.trivial
    if results["mode"] != "none":
        assert all(0 < s["epsilon"] <= 8 for s in results["privacy"]["sites"].values())


@pytest.mark.slow
def test_survival_without_privacy_reaches_what_a_pooled_cox_model_reaches(tmp_path: Path) -> None:
    metrics = study(tmp_path, "tcga_brca", "privacy.mode=none")["final"]["metrics"]
    assert metrics["c_index"] >= 0.80  # published FedAdam and a pooled ridge Cox model: 0.842
