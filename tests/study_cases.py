"""Whole studies in this process whose sites' folders stay, to be looked at afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import ServerApp

from client.app import forget_sites
from client.data.dataset import PatientDataset
from server.app import make_server_app
from server.outcome import RoundReport
from server.rounds import Observer, StudyOutcome
from shared.plan import StudyPlan
from simulations import cli
from simulations.engines import run_in_process
from simulations.grid import FaultHook, no_faults
from simulations.hospitals import load_hospitals
from simulations.scenario import Scenario
from simulations.sites import write_sites


class Sites:
    """The folders of a scenario's sites, with their journals kept."""

    def __init__(self, scenario: Scenario, base: Path) -> None:
        self.plan: StudyPlan = scenario.plan
        hospitals = load_hospitals(scenario.simulation, self.plan)
        self.data: Mapping[str, PatientDataset] = {h.name: h.train for h in hospitals}
        self.test: Mapping[str, PatientDataset] = {h.name: h.test for h in hospitals}
        self.roster = write_sites(base, self.plan, hospitals, seed=1, device="cpu")
        self.folders = {h.name: base / h.name for h in hospitals}
        for folder in self.folders.values():
            settings = folder / "site.toml"
            settings.write_text(settings.read_text().replace("journal = false", "journal = true"))

    def app(
        self,
        run_id: str,
        outcomes: list[StudyOutcome],
        observer: Observer = lambda report: None,
    ) -> ServerApp:
        """The study's ServerApp, which leaves its outcome in a list."""
        return make_server_app(
            self.plan,
            run_id,
            self.roster,
            observer=observer,
            finished=lambda outcome, transport: outcomes.append(outcome),
            poll_s=0.01,
        )

    def study(
        self,
        run_id: str,
        *,
        observer: Observer = lambda report: None,
        faults: FaultHook = no_faults,
    ) -> StudyOutcome:
        """Run the study to its end."""
        outcomes: list[StudyOutcome] = []
        app = self.app(run_id, outcomes, observer)
        try:
            run_in_process(app, self.folders, faults)
        finally:
            forget_sites()
        return outcomes[0]


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Press Ctrl-C once so many rounds have ended."""
    build = cli._observer

    def observer(plan: Any, progress: Any) -> Any:
        inner = build(plan, progress)

        def observe(report: RoundReport) -> None:
            inner(report)
            if report.round_no == after:
                raise KeyboardInterrupt

        return observe

    monkeypatch.setattr(cli, "_observer", observer)
