"""Studies whose sites come late, lose their state, or vanish: in by a new epoch, on vouchers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_server_resume import Hospitals, facts, hospitals, killing

from client.app import forget_sites
from server.evidence import along
from shared.errors import CohortError
from shared.messages import decode
from shared.study import Receipt, RecheckRequest
from simulations.audits.verify import verify
from simulations.grid import Delivery, Direction, FaultHook
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

__all__ = ["hospitals"]

Build = Callable[..., Hospitals]


def away_until(study: Hospitals, name: str, rounds: int) -> FaultHook:
    """A site that cannot be reached until so many rounds have ended."""

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        return Delivery(() if site == name and len(study.reports) < rounds else (body,))

    return hook


def steps(study: Hospitals) -> dict[str, int]:
    assert study.outcome is not None
    return {n: decode(Receipt, s.receipt).steps for n, s in study.outcome.receipts.items()}


def test_a_study_starts_without_a_site_and_takes_it_in_later(hospitals: Build) -> None:
    study = hospitals("training.rounds=4")
    outcome = study.until_done(away_until(study, "rural", 2))
    assert "rural" not in outcome.reports[0].cohort
    assert "rural" in outcome.reports[2].contributors
    assert [r.reason for r in outcome.reports] == [""] * len(outcome.reports)
    # All four hold one model and one history (the server compares the receipts).
    assert steps(study) == {"city": 4, "county": 4, "university": 4, "rural": 2}
    assert len(along(study.spool.records, outcome.transcript)) == len(study.spool.records)


def test_a_site_that_lost_its_folder_of_the_run_comes_back(hospitals: Build) -> None:
    study = hospitals("training.rounds=6")
    lost: list[str] = []

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if len(study.reports) == 2 and not lost:
            lost.append(site)
            forget_sites()
            shutil.rmtree(study.base / "city" / "runs")
        return Delivery((body,))

    outcome = study.until_done(hook)
    assert outcome.reports[2].dropped == ("city",)
    assert "city" in outcome.reports[-1].contributors
    # The ledger is the site's, not the run's: what was charged before the loss still counts.
    assert steps(study)["city"] == sum("city" in r.contributors for r in outcome.reports[:6])


def test_a_site_whose_folder_was_rolled_back_comes_back(hospitals: Build) -> None:
    study = hospitals("training.rounds=6")
    copy, restored = study.base / "copy", []

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        runs = study.base / "city" / "runs"
        if len(study.reports) == 1 and not copy.exists():
            forget_sites()
            shutil.copytree(runs, copy)
        if len(study.reports) == 3 and not restored:
            restored.append(site)
            forget_sites()
            shutil.rmtree(runs)
            shutil.copytree(copy, runs)
        return Delivery((body,))

    outcome = study.until_done(hook)
    assert outcome.reports[3].dropped == ("city",)
    assert "city" in outcome.reports[-1].contributors


def test_too_few_sites_at_the_start_are_named(hospitals: Build) -> None:
    study = hospitals()

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        return Delivery(() if site in ("rural", "city") else (body,))

    with pytest.raises(CohortError, match=r"needs 3 of 4.*city, rural"):
        study.serve(hook)


def test_a_site_that_vanishes_in_the_set_up_does_not_stop_the_others(hospitals: Build) -> None:
    study = hospitals()
    calls = 0

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal calls
        calls += (site, action) == ("county", "query.setup")
        return Delivery(() if site == "county" and calls > 2 and not study.reports else (body,))

    outcome = study.until_done(hook)
    assert outcome.reports[0].cohort == ("city", "rural", "university")
    assert "county" in outcome.reports[-1].contributors


@pytest.mark.parametrize("answers", [True, False], ids=["answer lost", "not reached"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_site_leaves_of_the_last_recheck_the_others_do(
    hospitals: Build, count: int, answers: bool
) -> None:
    """The sites that are asked first, 1 or 2, never answer."""
    study = hospitals("training.rounds=1")
    lost = Direction.TO_SERVER if answers else Direction.TO_SITE
    gone: set[str] = set()

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if action != "query.recheck":
            return Delivery((body,))
        asked = direction is Direction.TO_SITE and decode(RecheckRequest, body).packages
        if asked and len(gone) < count:
            gone.add(site)
        return Delivery(() if site in gone and direction is lost else (body,))

    study.serve(hook)
    assert len(gone) == count
    assert study.outcome is not None
    assert set(study.outcome.receipts) == set(study.roster)


def test_one_site_cannot_recheck_the_last_sum_alone(hospitals: Build) -> None:
    study = hospitals("training.rounds=1")

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        return Delivery(() if site != "city" and action == "query.recheck" else (body,))

    with pytest.raises(CohortError, match="recheck"):
        study.serve(hook)


@pytest.mark.slow
def test_a_server_killed_while_an_epoch_begins_goes_on(hospitals: Build) -> None:
    undisturbed = hospitals("training.rounds=3")
    undisturbed.until_done(away_until(undisturbed, "rural", 1))
    theirs = facts(undisturbed)
    for turn in (45, 60, 85, 90, 95, 100, 105, 110, 115, 120):
        study = hospitals("training.rounds=3")
        study.until_done(killing({turn}, away_until(study, "rural", 1), []))
        assert study.starts == 2, turn
        ours = facts(study)
        for what in ("model", "steps", "evidence"):
            assert ours[what] == theirs[what], (turn, what)


def test_an_auditor_follows_the_run_through_its_epochs(tmp_path: Path) -> None:
    """Rural comes after two rounds: its record begins with the epoch that it joined."""
    chosen = ["training.rounds=5", "training.local_steps=1", "evaluation.bins=16"]
    ended: list[int] = []

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        return Delivery(() if site == "rural" and len(ended) < 2 else (body,))

    options = RunOptions(out=tmp_path / "run", faults=hook)
    prepared = prepare(load_scenario("breast_cancer", chosen), options)
    results = execute(prepared, lambda report: ended.append(report.round_no))
    assert "rural" in results["rounds"][-1]["contributors"]
    checked = verify(tmp_path / "run")
    assert [f for f in checked.findings if f.verdict == "violated"] == []
    assert checked.history is not None
    assert [len(session.names) for session in checked.history.sessions] == [3, 4]
    assert len(checked.history.rounds) == len(results["rounds"]) + 1  # and the last counts
