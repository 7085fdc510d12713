"""fedward-sim plan: the same numbers as the sites', and the same refusals, beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from site_cases import policy_text

from client.app import forget_sites
from shared.privacy import costs_of, epsilon_of
from simulations.cli import main
from simulations.planning import planned
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

QUICK = ("training.rounds=3", "training.spare_rounds=1", "privacy.noise_multiplier=4.0")
WIDE: dict[str, Any] = {
    "max_epsilon": 8.0,
    "max_epsilon_alone": 20.0,
    "max_delta": 1e-3,
    "modes": ["local", "distributed"],
    "min_sites": 3,
    "min_honest": 2,
    "evaluation": ["none", "noised"],
    "tasks": ["binary", "statistics"],
}


def policy(path: Path, **changes: Any) -> Path:
    path.write_text(policy_text(**(WIDE | changes)))
    path.chmod(0o600)
    return path


def test_the_planned_epsilon_is_what_a_run_without_dropouts_charges(tmp_path: Path) -> None:
    scenario = load_scenario("as_approved", QUICK)
    uses = planned(scenario, {})["privacy"]["uses"]
    try:
        results = execute(
            prepare(scenario, RunOptions(out=tmp_path / "run", device="cpu")), lambda report: None
        )
    finally:
        forget_sites()
    for site in results["privacy"]["sites"].values():
        assert site["epsilon"] == uses["training"]["epsilon"]
        assert site["evaluation"]["epsilon"] == uses["evaluation"]["epsilon"]
    for use, event in costs_of(scenario.plan).items():
        worst = epsilon_of(event.noise_multiplier, event.sample_rate, event.steps, 1e-4)
        assert uses[use]["epsilon_worst"] == worst > uses[use]["epsilon"]
        assert uses[use]["epsilon_alone"] > worst


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"modes": ["local"]}, "'distributed' is not in modes"),
        ({"max_epsilon_alone": 8.0, "max_epsilon": 3.0}, "max_epsilon is 3"),
        ({"evaluation": ["none"]}, "'noised' is not in evaluation"),
        ({"max_epsilon": 4.0, "max_epsilon_alone": 4.0}, "max_epsilon_alone is 4"),
        ({"max_delta": 1.0e-4, "max_epsilon": 3.99, "max_epsilon_alone": 20.0}, "max_epsilon"),
        ({"roster": []}, ""),  # from outside nobody knows which identities a site pinned
    ],
)
def test_each_policy_is_held_against_the_plan(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    file = policy(tmp_path / "policy.toml", **changes)
    scenario = load_scenario("as_approved")
    site = planned(scenario, {"city": file})["sites"]["city"]
    assert site["allowed"] is (not reason)
    assert reason in "; ".join(site["refusals"])


def test_the_command_line_prints_a_sheet_or_json_and_exits_3_where_a_site_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = policy(tmp_path / "good.toml"), policy(tmp_path / "bad.toml", max_clip_norm=0.1)
    arguments = ["plan", "as_approved", "--policy", f"city={good}"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("7 parameters", "would allow it", "policy not given", "clip norms", "if alone"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main([*arguments, "--policy", f"rural={bad}", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["sites"]["rural"]["refusals"] == ["clip_norm is 0.5, max_clip_norm is 0.1"]
    assert found["sensitivity"]["measured"] <= 1.0001
    assert main(["plan", "as_approved", "--policy", f"nowhere={good}"]) == 2
    assert main(["plan", "as_approved", "--policy", str(good)]) == 2


def test_simulating_gives_the_expected_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [word for override in QUICK for word in ("--set", override)]
    assert main(["plan", "as_approved", "--simulate", "2", "--json", *quick]) == 0
    simulated = json.loads(capsys.readouterr().out)["simulated"]
    assert simulated["seeds"] == [1, 2]
    assert 0.5 < simulated["mean"]["auroc"] <= 1
    assert simulated["standard_deviation"]["auroc"] >= 0


def test_a_statistics_study_and_one_without_privacy_have_a_sheet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "statistics"]) == 0
    assert "nothing is learnt" in capsys.readouterr().out
    assert main(["plan", "--set", "privacy.mode=none"]) == 0
    assert "every real site refuses" in capsys.readouterr().out
