"""Studies of sites that are no simulation: noise from the operating system, disk writes awaited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.app import forget_sites
from client.config import SiteFolder
from server.app import make_server_app
from server.outcome import StudyOutcome
from shared.errors import CohortError
from simulations.engines import run_in_process
from simulations.hospitals import load_hospitals
from simulations.scenario import Scenario, load_scenario
from simulations.sites import write_sites

QUICK = ("training.rounds=2", "training.spare_rounds=0")


def make_real(folder: Path) -> None:
    """Take away all that marks a pretended hospital."""
    file = folder / "site.toml"
    kept = [
        line
        for line in file.read_text().splitlines()
        if not line.startswith(("simulation", "random_key", "journal"))
    ]
    file.write_text("\n".join(kept) + "\n")
    config = SiteFolder(folder).config()
    assert not config.simulation
    assert config.random_key is None


def run(base: Path, scenario: Scenario, change: Callable[[Path], None]) -> StudyOutcome:
    plan, finished = scenario.plan, []
    hospitals = load_hospitals(scenario.simulation, plan)
    roster = write_sites(base, plan, hospitals, seed=1, device="cpu")
    folders = {h.name: base / h.name for h in hospitals}
    for folder in folders.values():
        change(folder)

    def keep(outcome: StudyOutcome, transport: Any) -> None:
        del transport
        finished.append(outcome)

    app = make_server_app(
        plan, "run-1", roster, observer=lambda report: None, finished=keep, poll_s=0.01
    )
    try:
        run_in_process(app, folders)
    finally:
        forget_sites()
    return finished[0]


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_real_sites_draw_other_noise_each_time_and_pretended_ones_the_same(
    tmp_path: Path, mode: str
) -> None:
    scenario = load_scenario("as_approved", [*QUICK, f"privacy.mode={mode}"])
    real = [run(tmp_path / f"real-{i}", scenario, make_real) for i in range(2)]
    pretended = [run(tmp_path / f"sim-{i}", scenario, lambda folder: None) for i in range(2)]
    models = [o.state.parameters for o in real]
    assert np.abs(models[0] - models[1]).max() > 1e-3
    np.testing.assert_array_equal(*(o.state.parameters for o in pretended))
    counts = [o.reports[-1].counts for o in real]
    assert len(counts[0]) == 24
    assert (counts[0] != counts[1]).mean() > 0.9  # both drew their own noise on the counts, too
    assert set(real[0].receipts) == set(scenario.plan.cohort.names)


def test_a_real_site_keeps_a_journal_and_a_durable_ledger(tmp_path: Path) -> None:
    scenario = load_scenario("as_approved", QUICK)
    run(tmp_path, scenario, make_real)
    folder = tmp_path / "city"
    assert (folder / "journal.db").exists()
    site = SiteFolder(folder)
    books = site.books(site.config(), site.identity())
    assert books.ledger.verify() > 5
    assert books.ledger.steps("run-1") == 2
    assert books.ledger.steps("run-1", "evaluation") == 1
    assert books.ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    books.close()


def test_no_real_site_releases_exact_counts(tmp_path: Path) -> None:
    scenario = load_scenario("breast_cancer", ["training.rounds=2"])
    with pytest.raises(CohortError, match="sites are ready for the set-up"):
        run(tmp_path, scenario, make_real)
    refused = (tmp_path / "city" / "refusals.log").read_text()
    assert "exact counts of test patients are for simulations only" in refused
