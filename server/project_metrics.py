"""What a project's operator may watch: processes, connected sites, the latest run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server.project import Project
from server.run_folder import RunFolder
from server.runs import all_runs, rounds_of
from shared.exposition import Metric, process_metrics

STATES = ("starting", "set-up", "running", "waiting", "finished", "failed")


def project_metrics(project: Project, health: Mapping[str, Any]) -> Iterator[Metric]:
    """All of a project's metrics."""
    yield from process_metrics(health)
    for name, site in health["sites"].items():
        online = float(site["status"] == "online")
        yield Metric("fedward_site_online", "1 while connected.", online, labels={"site": name})
    runs = all_runs(project)
    yield Metric("fedward_runs", "Runs of this project.", float(len(runs)))
    if runs:
        yield from _run_metrics(runs[-1])


def _run_metrics(run: RunFolder) -> Iterator[Metric]:
    status, labels = run.status(), {"run": run.path.name}
    for state in STATES:
        yield Metric(
            "fedward_run_state",
            "1 for the latest run's state.",
            float(status["state"] == state),
            labels=labels | {"state": state},
        )
    rounds = rounds_of(run)
    done = float(status.get("round", 0))
    aborted = float(sum(bool(r["aborted"]) for r in rounds))
    absent = float(len(status.get("absent", ())))
    yield Metric("fedward_run_rounds", "Trained so far.", done, labels=labels)
    yield Metric("fedward_run_aborted_rounds_total", "Without a sum.", aborted, "counter", labels)
    yield Metric("fedward_run_absent_sites", "For which it waits.", absent, labels=labels)
    if rounds:
        last = rounds[-1]
        seconds, ended = float(last["wall_s"]), float(last["ended"])
        count = float(len(last["contributors"]))
        yield Metric("fedward_round_seconds", "The last round took.", seconds, labels=labels)
        yield Metric("fedward_round_contributors", "Sites in its sum.", count, labels=labels)
        yield Metric("fedward_round_timestamp_seconds", "When it ended.", ended, labels=labels)
