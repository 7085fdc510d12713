"""A statistics study through the real apps, from the plan to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.app import forget_sites
from server.report import render
from shared.counts import count_noise
from simulations.cli import main
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario
from simulations.terminal import final_table


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("run") / "run"
    run = prepare(load_scenario("statistics"), RunOptions(out=out, insecure_reproducible=True))
    try:
        return execute(run, lambda report: None)
    finally:
        forget_sites()


def test_what_is_found_differs_from_the_exact_figures_by_the_promised_noise(
    results: dict[str, Any],
) -> None:
    noise = count_noise(load_scenario("statistics").plan)
    residual = np.concatenate(
        [
            np.array(seen["histogram"]) - np.array(exact["histogram"])
            for seen, exact in zip(
                results["statistics"]["features"], results["statistics"]["exact"], strict=True
            )
        ]
    )
    assert len(residual) == 6 * 8 + 2
    assert 0.5 < residual.var() / noise.spread(4) ** 2 < 1.7  # 1 +- 5 standard errors of 50
    assert abs(residual.mean()) < 5 * noise.spread(4) / np.sqrt(50)
    assert len({round(r, 6) for r in residual}) > 40


def test_everybody_is_charged_once_and_the_receipts_say_so(results: dict[str, Any]) -> None:
    sites = results["privacy"]["sites"]
    assert sum(s["patients"] for s in sites.values()) == 569
    for site in sites.values():
        assert 1.9 < site["epsilon"] <= 2.0 < site["epsilon_alone"]
        assert site["releases"] == 1
    assert results["rounds"] == []
    assert results["model"]["parameters"] == 0


def test_report_and_terminal_show_the_features(results: dict[str, Any]) -> None:
    page, shown = render(results), final_table(results)
    for name in ("mean radius", "worst area", "diagnosis"):
        assert name in page
        assert name in shown
    assert "trained one model" not in page
    assert "simulation only" in page


def test_the_command_line_runs_it_and_refuses_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["run", "statistics", "--quiet", "--out", out, "--baselines"]) == 2
    assert "trains nothing" in capsys.readouterr().err
    assert main(["run", "statistics", "--quiet", "--out", out]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["statistics"]["features"]
