"""Long studies on a real deployment that never come to rest.

    python -m simulations.soak [--only NAME ...] [--seed N] [--folder DIR]

soak      20 rounds, while sites, workers and every process of the server are killed at random
restarts  12 rounds, in ten of which the server is killed and gone on with

Both are checked as the fault matrix checks its plays; `restarts` must also end with the model of
the run that nothing disturbed. What is found is written into simulations/soak.json and SECURITY.md
with the date. With --folder a study that was stopped in the middle is gone on with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.project import Project
from shared.errors import FedwardError
from shared.supervise import free_port, write_json
from simulations.deployment import Deployment, breast_cancer, deployed, reopened
from simulations.fault_matrix import check
from simulations.fault_page import write_soak
from simulations.fault_play import Fault, NotHeldError, Play
from simulations.meddler import Meddler, meddling
from simulations.scenario import Scenario

LEAST = {"soak": 30, "restarts": 10}
"""Kills that a study must have lived through."""

A_ROUND = 1.6
"""Kills in each round of the soak, on average."""

LATEST_S = 12.0
"""A kill comes up to so long after it is due."""

RESULTS = Path(__file__).with_name("soak.json")

_TARGETS = ("site", "site", "worker", "worker", "superlink", "proxy", "serverapp", "machine")


@dataclass
class Torment:
    """A study and the kills that it has lived through."""

    play: Play
    seed: int
    record: Path
    kills: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Know the kills of an earlier part of the study."""
        if self.record.exists():
            self.kills = list(json.loads(self.record.read_text(encoding="utf-8"))["kills"])

    def begin(self) -> None:
        """Begin the study, or go on with it."""
        if self.kills:
            self.play.resume()
        else:
            self.play.begin()

    def go_on(self) -> bool:
        """Whether the study still runs; resumed where it has stopped."""
        process, live = self.play.process, self.play.live
        if process is None or not process.ended:
            return True
        status = live.status()
        if status["state"] == "finished":
            return False
        if "spare rounds" in str(status.get("error", "")):
            raise NotHeldError(str(status["error"]))
        time.sleep(1.0)
        self.play.resume()
        return True

    def wait(self, due: Callable[[], bool], limit_s: float) -> bool:
        """Wait until a kill is due; False once the study is over."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if not self.go_on():
                return False
            if due():
                return True
            time.sleep(0.2)
        raise NotHeldError(f"no progress in {limit_s:.0f} s after {len(self.kills)} kills")

    def kill(self, target: str, name: str = "") -> None:
        """Kill -9; what is not there at the moment is let be."""
        live = self.play.live
        try:
            if target == "site":
                self.play.kill_site(name)
            elif target == "worker":
                os.kill(live.site_pid(name, "worker"), signal.SIGKILL)
            elif target == "serverapp":
                os.kill(int(live.status()["pid"]), signal.SIGKILL)
            elif target == "machine":
                _kill_machine(live)
            else:
                os.kill(live.server_pid(target), signal.SIGKILL)
        except (FedwardError, OSError, TypeError, KeyError):
            return
        self.kills.append(f"{target} {name}" if target in ("site", "worker") else target)
        write_json({"seed": self.seed, "kills": self.kills}, self.record)


def _kill_machine(live: Deployment) -> None:
    """All of the server at once; then it is started again."""
    server = live.processes["server"]
    server.popen.kill()
    server.popen.wait()
    live.start_server()


def soak(torment: Torment) -> None:
    """Kill at random until the study is over."""
    live, tries = torment.play.live, 0
    torment.begin()
    while True:
        tries += 1
        chance = random.Random(f"{torment.seed} {len(torment.kills)} {tries}")
        due_round = int(len(torment.kills) / A_ROUND)
        if not torment.wait(lambda due=due_round: len(live.rounds()) >= due, 1200):  # type: ignore[misc]
            return
        later = time.monotonic() + chance.uniform(0, LATEST_S)
        if not torment.wait(lambda end=later: time.monotonic() >= end, 120):  # type: ignore[misc]
            return
        torment.kill(chance.choice(_TARGETS), chance.choice(live.names))


def restarts(torment: Torment) -> None:
    """Kill the server in ten rounds, drawn at random, at any moment of them."""
    live = torment.play.live
    chance = random.Random(f"{torment.seed} rounds")
    rounds = sorted(chance.sample(range(live.plan.training.rounds), LEAST["restarts"]))
    torment.begin()
    for number in rounds[len(torment.kills) :]:
        torment.wait(lambda due=number: len(live.rounds()) >= due, 600)  # type: ignore[misc]
        later = time.monotonic() + chance.uniform(0, LATEST_S / 2)
        torment.wait(lambda end=later: time.monotonic() >= end, 120)  # type: ignore[misc]
        _strike(torment, chance.choice(("serverapp", "serverapp", "machine")))
    while torment.go_on():
        time.sleep(0.5)


def _strike(torment: Torment, target: str) -> None:
    """Kill it as soon as it is there: it may be starting again after the last kill."""
    before = len(torment.kills)
    while torment.go_on():
        torment.kill(target)
        if len(torment.kills) > before:
            return
        time.sleep(0.2)


@dataclass(frozen=True)
class Marathon:
    """One long study: its name, its plan, and what happens to it."""

    name: str
    what: str
    scenario: Callable[[], Scenario]
    run: Callable[[Torment], None]


MARATHONS = (
    Marathon(
        "soak",
        "20 rounds, at least 30 kills at random of sites, workers and the server's processes",
        lambda: breast_cancer(20, timeout_s=90.0, spare_rounds=40),
        soak,
    ),
    Marathon(
        "restarts",
        "12 rounds, the server killed in ten of them, at random moments",
        lambda: breast_cancer(12, timeout_s=240.0, spare_rounds=6),
        restarts,
    ),
)


@contextmanager
def _stage(base: Path, scenario: Scenario) -> Iterator[tuple[Deployment, Meddler]]:
    """A deployment behind a meddler, running; the one in `base` if there is one."""
    known = (base / "project").exists()
    port = Project(base / "project").advertise.port if known else free_port()
    opened = reopened(base, scenario) if known else deployed(base, scenario, behind=port)
    with opened as live:
        project = live.project
        files = (project.ca_certificate, project.tls_certificate, project.tls_key)
        with meddling(port, f"https://{project.bind}", *files) as meddler:
            live.start_all()
            yield live, meddler


def run(marathon: Marathon, base: Path, seed: int) -> dict[str, Any]:
    """Run one long study in a folder, and say what was found."""
    begun = time.monotonic()
    with _stage(base, marathon.scenario()) as (live, meddler):
        play = Play(live, meddler)
        torment = Torment(play, seed, base / "kills.json")
        try:
            with play.watching():
                marathon.run(torment)
            held, found = True, _check(marathon.name, torment)
        except (FedwardError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            held, found = False, f"{type(error).__name__}: {error}"
            print(live.words())
    return {
        "what": marathon.what,
        "held": held,
        "found": found,
        "seed": seed,
        "kills": torment.kills,
        "seconds": round(time.monotonic() - begun, 1),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


def _check(name: str, torment: Torment) -> str:
    play, kills = torment.play, len(torment.kills)
    found = check(Fault(name, "", lambda play: None), play)
    if kills < LEAST[name]:
        raise NotHeldError(f"{kills} kills only; {LEAST[name]} are needed. Another seed may do.")
    said = f"{kills} kills; {len(play.live.rounds())} rounds with those that were repeated; {found}"
    if name == "soak":
        return said
    if play.live.status()["sha256"] != play.replayed(everyone=True).sha256:
        raise NotHeldError(f"{said}; not the model of the run that nothing disturbed")
    return f"{said}; the model of the run that nothing disturbed"


def read_results() -> dict[str, Any]:
    """What was found so far."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if all that was run held."""
    options = argparse.ArgumentParser(description=__doc__)
    names = [m.name for m in MARATHONS]
    options.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, help="kept, so that a stopped study may go on")
    chosen = options.parse_args(arguments)
    results = read_results()
    for marathon in MARATHONS:
        if marathon.name not in chosen.only:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            base = (chosen.folder or Path(temporary)) / marathon.name
            base.mkdir(parents=True, exist_ok=True)
            results[marathon.name] = run(marathon, base, chosen.seed)
        write_json(results, RESULTS)
        write_soak(results)
        print(f"{marathon.name:<10} {results[marathon.name]['found']}", flush=True)
    return 0 if all(results[name]["held"] for name in chosen.only) else 4


if __name__ == "__main__":
    raise SystemExit(main())
