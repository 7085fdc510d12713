"""The replay of a deployment in one process has the contributors that it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.progress import Progress
from shared.errors import FedwardError
from simulations import replay as module
from simulations.grid import Delivery
from simulations.hospitals import load_hospitals
from simulations.replay import replay
from simulations.scenario import load_scenario

SMALL = ["training.rounds=3", "training.local_steps=1", "evaluation.bins=16"]


@pytest.fixture
def live() -> Any:
    """A deployment of which nothing but its rounds matters."""
    scenario = load_scenario("breast_cancer", SMALL)
    plan = scenario.plan
    return SimpleNamespace(
        scenario=scenario,
        plan=plan,
        names=plan.cohort.names,
        hospitals=load_hospitals(scenario.simulation, plan),
    )


def rounds(live: Any, *absent: set[str]) -> None:
    """Let these sites be missing, round by round."""
    lines = [
        {"round": n + 1, "contributors": sorted(set(live.names) - gone)}
        for n, gone in enumerate((*absent, set()))
    ]
    live.rounds = lambda: lines


def test_a_site_that_was_missing_twice_may_be_back_at_once(live: Any) -> None:
    """As where a new epoch has let it in; a server would ask it more rarely otherwise."""
    rounds(live, {"county"}, {"county"}, set())
    note_absent = Progress.note_absent
    late = replay(live, "run-1").sha256
    assert Progress.note_absent is note_absent
    rounds(live, {"county"}, {"county"}, {"county"})
    never = replay(live, "run-1")
    assert late != never.sha256
    assert set(never.updates) == set(live.names)
    rounds(live, set(), set(), set())
    assert replay(live, "run-1").sha256 == replay(live, "run-1", everyone=True).sha256


def test_a_replay_with_other_contributors_says_so(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds(live, {"county"}, set(), set())
    nobody_missing = lambda contributors: lambda *message: Delivery((message[-1],))  # noqa: E731
    monkeypatch.setattr(module, "absent_from", nobody_missing)
    with pytest.raises(FedwardError, match="other contributors"):
        replay(live, "run-1")
