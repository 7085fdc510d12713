"""Ctrl-C in the middle of a simulated study, and `fedward-sim run --resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_cases import stopping

from client.app import forget_sites
from simulations import cli

SMALL = ["training.rounds=3", "training.local_steps=1", "evaluation.bins=16"]


def command(out: Path, *more: str) -> list[str]:
    sets = [part for value in SMALL for part in ("--set", value)]
    same = ("--quiet", "--insecure-reproducible")
    return ["run", "breast_cancer", *same, "--out", str(out), *sets, *more]


def results(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


def test_a_stopped_run_is_gone_on_with_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tmp_path / "whole")) == 0
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stopping(patched, after=2)
        assert cli.main(command(out)) == 130
    forget_sites()
    assert f"--resume {out}" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(command(out)) == 2  # not over an unfinished one
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["run", "--resume", str(out), "--quiet"]) == 0
    whole, resumed = results(tmp_path / "whole"), results(out)
    for key in ("model", "privacy", "final", "plan_sha256", "scenario", "seed"):
        assert resumed[key] == whole[key]
    assert [r["metrics"] for r in resumed["rounds"]] == [r["metrics"] for r in whole["rounds"]]
    # Nothing of the hospitals' data is left beside the run.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_what_was_not_stopped_cannot_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--resume", str(tmp_path / "nothing")]) == 2
    assert "not an unfinished run" in capsys.readouterr().err


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise cli.FedwardError("the study cannot go on")

    monkeypatch.setattr("simulations.run.run_in_process", failing)
    assert cli.main(command(tmp_path / "run")) == 1
    assert list(tmp_path.iterdir()) == []
