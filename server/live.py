"""What the ServerApp does in a run's folder (server/run_folder.py): the study, to its report."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.gate import require_audit
from server.manifest import write_manifest
from server.model_card import write_card
from server.record import server_results, write_evidence, write_model
from server.report import write_report
from server.results import build_results, write_results
from server.rounds import RoundReport, StudyOutcome
from server.run_folder import RunFolder, State
from server.spool import DurableSpool
from server.transport import GridTransport
from shared.errors import AuditError, FedwardError
from shared.identity import Identity

ENGINE = "deployment"


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
