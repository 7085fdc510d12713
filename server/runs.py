"""Starts, resumes and follows the runs of a project; the work itself is the ServerApp's.

PROJECT/runs/RUN/             see server/run_folder.py
PROJECT/runs/RUN/flower.json  the Flower run that works on it now
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.project import Project
from server.run_folder import RunFolder, RunRecord, RunSite, create_run
from shared.errors import ConfigError, FedwardError
from shared.plan import StudyPlan
from shared.supervise import write_json

if TYPE_CHECKING:
    from server.link import Link

FINAL = ("finished", "failed")
UNFINISHED = ("pending", "starting", "running")
BEGIN_S = 120.0
"""Until a ServerApp that was started must have written its first status."""


@dataclass(frozen=True)
class Step:
    """What `follow` saw: a state of status.json, or a round that ended."""

    kind: str
    facts: dict[str, Any]


def new_run(project: Project, plan: StudyPlan, wait_s: float, now: float) -> RunFolder:
    """Write the folder of a new run of a plan.

    Args:
        project: The coordinator's folder.
        plan: What the sites approved.
        wait_s: How long the study may wait for absent sites.
        now: Unix seconds.

    Raises:
        ConfigError: a site of the plan is not an active site of the project.
    """
    from server.link import node_key_bytes  # noqa: PLC0415  # Flower takes seconds

    active = project.active(now)
    missing = [name for name in plan.cohort.names if name not in active]
    if missing:
        raise ConfigError(
            f"the plan names {', '.join(missing)}, which this project has not admitted or has "
            "revoked. fedward-server project list shows the sites."
        )
    stamp = datetime.datetime.fromtimestamp(now, datetime.UTC)
    name = f"{plan.name[:32]}-{stamp:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    sites = tuple(
        RunSite(n, active[n].identity.hex(), node_key_bytes(active[n].node_key).hex())
        for n in plan.cohort.names
    )
    record = RunRecord(
        schema="fedward-run/1", run_id=name, created=f"{stamp:%FT%TZ}", wait_s=wait_s, sites=sites
    )
    return create_run(project.path / "runs" / name, plan, record)


def start(link: Link, run: RunFolder) -> None:
    """Let a ServerApp work on a run, from its checkpoint if there is one.

    A ServerApp that still works on it is stopped first.

    Raises:
        ConfigError: the run is finished.
    """
    if run.status()["state"] == "finished":
        raise ConfigError(f"{run.path} is finished; its results are there.")
    before = _flower_run(run)
    if before is not None and link.run_status(before).startswith(UNFINISHED):
        link.stop(before)
    before_it = {k: v for k, v in run.status().items() if k in ("round", "rounds")}
    run.tell("starting", pid=None, **before_it)
    write_json({"flower_run": link.start(run.path)}, run.path / "flower.json")


def find_run(project: Project, name: str | None) -> RunFolder:
    """A run by name, or the latest one.

    Raises:
        ConfigError: there is none.
    """
    runs = all_runs(project)
    if name is not None:
        runs = tuple(run for run in runs if run.path.name == name)
    if not runs:
        raise ConfigError(
            f"no run {name!r} in {project.path / 'runs'}. fedward-server status lists them."
            if name
            else "this project has no run yet. Begin one: fedward-server run PLAN"
        )
    return runs[-1]


def all_runs(project: Project) -> tuple[RunFolder, ...]:
    """The project's runs, oldest first."""
    folder = project.path / "runs"
    found = [RunFolder(p) for p in folder.iterdir()] if folder.is_dir() else []
    found = [run for run in found if (run.path / "run.json").exists()]
    return tuple(sorted(found, key=lambda run: run.record().created))


def follow(
    run: RunFolder,
    flower_status: Callable[[], str],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Step]:
    """What happens in a run, until it ends.

    Args:
        run: The run.
        flower_status: Such as "running"; asked only while no ServerApp shows itself.
        sleep: Between two looks.
        clock: For the patience with a ServerApp that does not begin.

    Raises:
        FedwardError: the ServerApp died, or did not begin.
    """
    told: dict[str, Any] = {}
    lines = 0
    begun = clock()
    while True:
        status = run.status()
        rounds = rounds_of(run)
        for line in rounds[lines:]:
            yield Step("round", line | {"rounds": status.get("rounds")})
        lines = len(rounds)
        news = {k: status.get(k) for k in ("state", "absent")}
        if news != told:
            told = news
            yield Step(str(status["state"]), status)
        if status["state"] in FINAL:
            return
        _refuse_dead(run, status, flower_status, clock() - begun)
        sleep(0.5)


def _refuse_dead(
    run: RunFolder, status: dict[str, Any], flower_status: Callable[[], str], waited_s: float
) -> None:
    remedy = f"Go on from the last round: fedward-server run --resume {run.path.name}"
    pid = status.get("pid")
    if pid is not None:
        if not _alive(int(pid)) and run.status() == status:
            raise FedwardError(f"the ServerApp died in state {status['state']!r}. {remedy}")
    elif waited_s > BEGIN_S or flower_status().startswith("finished"):
        raise FedwardError(f"no ServerApp began; logs/serverapp.log says why. {remedy}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]


def _flower_run(run: RunFolder) -> int | None:
    file = run.path / "flower.json"
    if not file.exists():
        return None
    return int(json.loads(file.read_text(encoding="utf-8"))["flower_run"])


def flower_run_status(link: Link, run: RunFolder) -> str:
    """The state of the Flower run that works on a run, or "" for none."""
    flower_run = _flower_run(run)
    return link.run_status(flower_run) if flower_run is not None else ""


def rounds_of(run: RunFolder) -> list[dict[str, Any]]:
    """The rounds of a run so far; see server/run_folder.py."""
    file = run.path / "rounds.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half written
    return [dict(json.loads(line)) for line in lines]
