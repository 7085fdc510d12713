"""One run of a study on the coordinator's machine: its folder, and what the ServerApp does in it.

RUN/run.json       what was started: run id, sites, their identities and node keys
RUN/plan.json      the plan's canonical bytes
RUN/status.json    where it stands, for `status` and `watch`; rewritten at every step
RUN/rounds.jsonl   one line a round
RUN/checkpoint/    from which `run --resume` goes on
RUN/spool/         evidence so far
RUN/results.json, report.html, model.*, evidence/    at the end
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.gate import require_audit
from server.manifest import write_manifest
from server.model_card import write_card
from server.record import server_results, write_evidence, write_model
from server.report import write_report
from server.results import build_results, write_results
from server.rounds import RoundReport, StudyOutcome
from server.spool import DurableSpool
from server.transport import GridTransport
from shared import plan as plans
from shared.config import parse
from shared.errors import AuditError, ConfigError, FedwardError
from shared.identity import Identity
from shared.plan import StudyPlan
from shared.supervise import write_json

STATUS_SCHEMA = "fedward-run-status/1"
ENGINE = "deployment"
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


def work(grid: Grid, context: Context, folder: RunFolder, build: Callable[..., ServerApp]) -> None:
    """Run the study in `folder` to its end, from its checkpoint if there is one.

    Args:
        grid: Flower's grid.
        context: Of the Flower run.
        folder: What to work on.
        build: `server.app.make_server_app`.

    Raises:
        FedwardError: the study cannot go on; status.json says why.
    """
    with folder.lock():
        _Live(folder, grid).run(build, context)


class _Live:
    def __init__(self, folder: RunFolder, grid: Grid) -> None:
        self._folder, self._grid = folder, grid
        self._record, self._plan = folder.record(), folder.plan()
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self._action = ""
        self._done = int(folder.status().get("round", 0))
        self._spool = DurableSpool(folder.path / "spool")

    def run(self, build: Callable[..., ServerApp], context: Context) -> None:
        begun = self._folder.checkpoint.exists()
        self._folder.tell("running" if begun else "set-up", **self._facts)
        keys = {bytes.fromhex(site.node_key): site.name for site in self._record.sites}

        def directory() -> Mapping[str, int]:
            return {
                keys[bytes(node.public_key)]: node.node_id
                for node in self._grid.get_nodes()
                if bytes(node.public_key) in keys
            }

        app = build(
            self._plan,
            self._record.run_id,
            {site.name: bytes.fromhex(site.identity) for site in self._record.sites},
            observer=self._observe,
            finished=self._finish,
            recorder=self._spool,
            directory=directory,
            waiting=self._waiting,
            exchanging=self._exchanging,
            wait_s=self._record.wait_s,
            checkpoint=self._folder.checkpoint,
        )
        try:
            app(self._grid, context)
        except FedwardError as error:
            self._folder.tell("failed", error=str(error), exit_code=error.exit_code)
            raise
        except Exception as error:
            self._folder.tell("failed", error=f"{type(error).__name__}: {error}", exit_code=1)
            raise
        finally:
            self._spool.close()

    def _identity(self) -> Identity | None:
        """The coordinator's, of the project whose folder holds this run."""
        file = self._folder.path.parent.parent / "server" / "identity.pem"
        return Identity.load(file) if file.exists() else None

    def _exchanging(self, action: str) -> None:
        self._action = action
        state: State = "set-up" if action in ("rollcall", "join", "setup") else "running"
        self._folder.tell(state, **self._facts)

    def _waiting(self, absent: tuple[str, ...]) -> None:
        if absent:
            self._folder.tell("waiting", absent=absent, wait_s=self._record.wait_s, **self._facts)
        else:
            self._folder.tell("running", **self._facts)

    @property
    def _facts(self) -> dict[str, Any]:
        rounds = self._plan.training.rounds
        return {"round": self._done, "rounds": rounds, "action": self._action}

    def _observe(self, report: RoundReport) -> None:
        if report.trained and not report.reason:
            self._done = report.model_round + 1
        line = {
            "round": report.round_no,
            "model_round": report.model_round,
            "trained": report.trained,
            "cohort": report.cohort,
            "contributors": report.contributors,
            "dropped": report.dropped,
            "aborted": report.reason,
            "wall_s": round(report.wall_s, 3),
            "ended": time.time(),
        }
        with (self._folder.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._folder.tell("running", last=line, **self._facts)

    def _finish(self, outcome: StudyOutcome, transport: GridTransport) -> None:
        path, plan = self._folder.path, self._plan
        if not plan.audit.gate:
            write_model(plan, outcome, path)
        write_evidence(plan, outcome, self._spool, path / "evidence", self._identity())
        fields = server_results(plan, outcome, transport) | {
            "scenario": plan.name,
            "title": plan.name,
            "seed": 0,
            "engine": ENGINE,
            "started": f"{self._started:%Y-%m-%dT%H:%M:%SZ}",
            "wall_s": time.perf_counter() - self._clock,
        }
        results = build_results(**fields)
        write_results(results, path / "results.json")
        write_report(results, path / "report.html")
        write_card(plan, results, path)
        write_manifest(path, self._identity())
        facts = self._facts | {"sha256": outcome.state.digest().hex()}
        try:
            require_audit(plan, path)
        except AuditError as error:
            facts |= {"error": str(error), "exit_code": error.exit_code}
        self._folder.tell("finished", **facts)
