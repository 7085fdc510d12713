"""Runs of every kind verify: dropouts, aborts, refills, both modes, noised counts, statistics."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from simulations.audits.verify import verify
from simulations.cli import main
from simulations.grid import Delivery, Direction
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

SMALL = ("--quiet", "--set", "evaluation.bins=16")


@pytest.mark.parametrize(
    "more",
    [
        ("breast_cancer", "--rounds", "3", "--set", "privacy.mode=distributed"),
        ("breast_cancer", "--rounds", "3", "--set", "evaluation.release=noised",
         "--set", "evaluation.epsilon=2", "--set", "evaluation.every=2"),
        ("breast_cancer", "--rounds", "2", "--set", "optimizer.name=fedadam",
         "--set", "audit.keep_sums=false"),
    ],
    ids=["distributed", "noised counts", "no sums kept"],
)  # fmt: skip
def test_a_run_of_this_kind_holds(tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(["run", *more, *SMALL, "--out", str(tmp_path / "run")]) == 0
    found = verify(tmp_path / "run")
    assert [f.name for f in found.findings if f.verdict == "violated"] == []
    open_questions = {f.name for f in found.findings if f.verdict == "not testable"}
    without_sums = {"sums"} if "audit.keep_sums=false" in more else set()
    assert open_questions == {"plan-approved", "identities"} | without_sums


def test_a_statistics_study_holds(tmp_path: Path) -> None:
    assert main(["run", "statistics", "--quiet", "--out", str(tmp_path / "run")]) == 0
    found = verify(tmp_path / "run")
    assert [f.name for f in found.findings if f.verdict == "violated"] == []
    promise = next(f for f in found.findings if f.name == "promise")
    assert "statistics:" in promise.explanation


def test_dropouts_aborts_and_refills_hold(tmp_path: Path) -> None:
    asked: Counter[tuple[str, str]] = Counter()

    def lose(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        del direction
        asked[site, action] += 1
        gone = "round" in action and (
            (site == "rural" and asked[site, action] in (5, 6))
            or (site in ("city", "county") and asked[site, action] == 12)
        )
        return Delivery(() if gone else (body,))

    settings = ["training.rounds=14", "training.spare_rounds=4", "training.round_timeout_s=2",
                "secure_sum.prekey_rounds=6", "evaluation.bins=16"]  # fmt: skip
    run = tmp_path / "run"
    scenario = load_scenario("breast_cancer", settings)
    execute(prepare(scenario, RunOptions(out=run, device="cpu", faults=lose)), lambda report: None)
    rounds = json.loads((run / "results.json").read_text())["rounds"]
    assert any(r["dropped"] for r in rounds)
    assert any(r["aborted"] for r in rounds)
    found = verify(run)
    assert [(f.name, f.explanation) for f in found.findings if f.verdict == "violated"] == []
    assert found.history is not None
    assert len({r.descriptor.batch for r in found.history.rounds}) > 1  # prekeys were refilled
    left = sum("rural" in r.contributors for r in found.history.sums)
    charged = next(f for f in found.findings if f.name == "charges" and "rural" in f.claim)
    assert charged.explanation.startswith(f"{left} vectors")
    assert left < len(found.history.sums)
