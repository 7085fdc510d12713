"""The long studies' own rules: when they kill, when they go on, and what they accept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulations import soak as module
from simulations.fault_page import SOAK_BEGIN, SOAK_END, write_soak
from simulations.fault_play import NotHeldError
from simulations.soak import Torment, restarts, soak

NAMES = ("city", "county")


class World:
    """A study that ends one round whenever somebody waits, and what was done to it."""

    now: World

    def __init__(self, rounds: int) -> None:
        World.now = self
        self.left, self.done = rounds, 0
        self.calls: list[str] = []
        self.over = False
        self.live: Any = SimpleNamespace(
            names=NAMES,
            plan=SimpleNamespace(training=SimpleNamespace(rounds=rounds)),
            rounds=lambda: list(range(self.done)),
            status=lambda: {"state": "finished" if self.over else "running", "pid": 1},
        )
        self.process: Any = self
        self.stops = 0

    @property
    def ended(self) -> bool:
        self.over = self.done >= self.left
        if self.stops:
            self.stops -= 1
            return True
        return self.over

    def wait(self, seconds: float) -> None:
        self.done += 1

    def begin(self) -> None:
        self.calls.append("begin")

    def resume(self) -> None:
        self.calls.append("resume")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LATEST_S", 0.0)

    def sleep(seconds: float) -> None:
        World.now.wait(seconds)

    monkeypatch.setattr(module.time, "sleep", sleep)


class Recorded(Torment):
    """Notes kills instead of killing."""

    def kill(self, target: str, name: str = "") -> None:
        self.kills.append(f"{target} {name}")
        module.write_json({"kills": self.kills}, self.record)


def torment(world: World, tmp_path: Path, seed: int = 1) -> Recorded:
    """A world under a torment of this seed."""
    play: Any = world
    return Recorded(play, seed, tmp_path / f"kills-{seed}.json")


def test_a_soak_of_twenty_rounds_has_thirty_kills_of_every_kind(tmp_path: Path) -> None:
    world = World(20)
    found = torment(world, tmp_path)
    soak(found)
    assert len(found.kills) >= module.LEAST["soak"]
    assert {kill.split()[0] for kill in found.kills} == set(module._TARGETS)
    other = torment(World(20), tmp_path, seed=2)
    soak(other)
    assert other.kills != found.kills


def test_a_soak_that_was_stopped_goes_on_with_its_kills(tmp_path: Path) -> None:
    first = torment(World(20), tmp_path)
    for _ in range(7):
        first.kill("worker", "city")
    world = World(20)
    second = torment(world, tmp_path)
    assert second.kills == ["worker city"] * 7
    soak(second)
    assert world.calls == ["resume"]
    assert second.kills[:7] == ["worker city"] * 7
    assert json.loads(second.record.read_text())["kills"] == second.kills


def test_a_study_that_stopped_is_resumed_and_one_without_spare_rounds_is_lost(
    tmp_path: Path,
) -> None:
    world = World(4)
    world.stops = 3
    soak(torment(world, tmp_path))
    assert world.calls == ["begin", *["resume"] * 3]
    world = World(4)
    world.stops = 1
    world.live.status = lambda: {"state": "failed", "error": "The spare rounds are used up"}
    with pytest.raises(NotHeldError, match="spare rounds"):
        soak(torment(world, tmp_path, seed=3))


def test_restarts_kill_the_server_alone_and_ten_times(tmp_path: Path) -> None:
    world = World(12)
    found = torment(world, tmp_path)
    restarts(found)
    assert len(found.kills) == module.LEAST["restarts"]
    assert {kill.split()[0] for kill in found.kills} <= {"serverapp", "machine"}


class Missing(Recorded):
    """Finds nothing to kill at every first try."""

    tries = 0

    def kill(self, target: str, name: str = "") -> None:
        self.tries += 1
        if self.tries % 2:
            World.now.done -= 1  # the pause before the next try ends no round
        else:
            super().kill(target, name)


def test_a_server_that_is_not_there_yet_is_killed_once_it_is(tmp_path: Path) -> None:
    play: Any = World(12)
    found = Missing(play, 1, tmp_path / "kills.json")
    restarts(found)
    assert len(found.kills) == module.LEAST["restarts"]
    assert found.tries == 2 * len(found.kills)


@pytest.mark.parametrize(
    "case",
    [
        ("soak", 29, "aa", "29 kills only"),
        ("soak", 30, "bb", ""),
        ("restarts", 10, "bb", "not the model of the run that nothing disturbed"),
        ("restarts", 10, "aa", ""),
    ],
)
def test_too_few_kills_or_another_model_are_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, int, str, str]
) -> None:
    name, kills, calm, words = case
    monkeypatch.setattr(module, "check", lambda fault, play: "no round lost")
    world: Any = World(3)
    world.live.status = lambda: {"state": "finished", "sha256": "aa"}
    world.replayed = lambda everyone: SimpleNamespace(sha256=calm)
    found = torment(world, tmp_path)
    found.kills = ["serverapp"] * kills
    if words:
        with pytest.raises(NotHeldError, match=words):
            module._check(name, found)
    else:
        assert f"{kills} kills" in module._check(name, found)


def test_the_page_shows_what_did_not_hold(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{SOAK_BEGIN}\n{SOAK_END}\nbelow\n")
    row = {"what": "long", "held": False, "found": "why", "seed": 3, "seconds": 90, "date": "d"}
    write_soak({"soak": row}, page)
    assert "| long | d | **no** | why; seed 3, 2 min |" in page.read_text()
