"""The folder of one run on the coordinator's machine; server/live.py works in it.

RUN/run.json       what was started: run id, sites, their identities and node keys
RUN/plan.json      the plan's canonical bytes
RUN/status.json    where it stands, for `status` and `watch`; rewritten at every step
RUN/rounds.jsonl   one line a round
RUN/checkpoint/    from which `run --resume` goes on
RUN/spool/         evidence so far
RUN/results.json, report.html, model.*, evidence/    at the end
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared import plan as plans
from shared.config import parse
from shared.errors import ConfigError
from shared.plan import StudyPlan
from shared.supervise import write_json

STATUS_SCHEMA = "fedward-run-status/1"
State = Literal["starting", "waiting", "set-up", "running", "finished", "failed"]


@dataclass(frozen=True)
class RunSite:
    """A site of a run: its Ed25519 identity in hex, and its node key in the SuperLink's form."""

    name: str
    identity: str
    node_key: str


@dataclass(frozen=True)
class RunRecord:
    """`run.json`.

    Attributes:
        run_id: In every key, message and receipt of the study.
        wait_s: How long the study waits for absent sites before it stops.
    """

    schema: Literal["fedward-run/1"]
    run_id: str
    created: str
    wait_s: float
    sites: tuple[RunSite, ...]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder."""

    path: Path

    def record(self) -> RunRecord:
        """Read run.json; ConfigError where there is none."""
        file = self.path / "run.json"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{self.path} holds no run. fedward-server status lists them."
            ) from None
        return parse(RunRecord, table, str(file))

    def plan(self) -> StudyPlan:
        """The run's plan."""
        return plans.from_bytes((self.path / "plan.json").read_bytes())

    @property
    def checkpoint(self) -> Path:
        """Where the study's checkpoint lies."""
        return self.path / "checkpoint"

    def status(self) -> dict[str, Any]:
        """Read status.json; a run that was never begun is "starting"."""
        file = self.path / "status.json"
        if not file.exists():
            return {"state": "starting", "since": 0.0}
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def tell(self, state: State, **facts: object) -> None:
        """Write status.json."""
        record = {
            "schema": STATUS_SCHEMA,
            "state": state,
            "since": time.time(),
            "pid": os.getpid(),
        }
        write_json(record | facts, self.path / "status.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one ServerApp that works on this run; ends with its process."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError("another ServerApp works on this run; let it end first") from None
            yield


def create_run(folder: Path, plan: StudyPlan, record: RunRecord) -> RunFolder:
    """Write a new run's folder.

    Raises:
        ConfigError: it exists.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} exists; give the run another name") from None
    (folder / "plan.json").write_bytes(plan.canonical_bytes)
    sites = [vars(site) for site in record.sites]
    write_json(vars(record) | {"sites": sites}, folder / "run.json")
    return RunFolder(folder)
