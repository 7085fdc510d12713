"""Studies whose sites come late, lose their state, or vanish: in by a new epoch, on vouchers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_server_resume import Hospitals, KilledError, deliver, facts, hospitals, killing

from client.app import forget_sites
from client.site import Site
from server.evidence import along
from shared.errors import CohortError, FedwardError
from shared.messages import decode, encode
from shared.optimizers import ModelState
from shared.secagg.messages import Voucher
from shared.study import (
    EpochTerms,
    Join,
    Receipt,
    first_terms,
    state_from_bytes,
    state_to_bytes,
)
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


@pytest.mark.parametrize("turn", [45, 60, 75, 85, 90, 95, 100, 105, 110, 115, 120, 130])
def test_a_server_killed_while_an_epoch_begins_goes_on(hospitals: Build, turn: int) -> None:
    undisturbed = hospitals("training.rounds=3")
    undisturbed.until_done(away_until(undisturbed, "rural", 1))
    study = hospitals("training.rounds=3")
    study.until_done(killing({turn}, away_until(study, "rural", 1), []))
    assert study.starts == 2
    ours, theirs = facts(study), facts(undisturbed)
    assert ours["model"] == theirs["model"]
    assert ours["steps"] == theirs["steps"]
    assert ours["evidence"] == theirs["evidence"]


def planted(body: bytes) -> bytes:
    """The server changes one weight of the model that a newcomer is to take."""
    request = decode(Join, body)
    if not request.model:
        return body
    state = state_from_bytes(request.model)
    weights = state.parameters.copy()
    weights[0] += 1
    other = ModelState(weights, state.first_moment, state.second_moment, state.round_no)
    return encode(replace(request, model=state_to_bytes(other)))


def few_vouchers(body: bytes) -> bytes:
    """The server shows two vouchers where three are needed."""
    request = decode(Join, body)
    return encode(replace(request, vouchers=dict(sorted(request.vouchers.items())[:2])))


def own_voucher(body: bytes) -> bytes:
    """The server lets one voucher stand for another site, too."""
    request = decode(Join, body)
    if not request.vouchers:
        return body
    first, second = sorted(request.vouchers)[:2]
    forged = replace(decode(Voucher, request.vouchers[first]), sender=second)
    return encode(replace(request, vouchers={**request.vouchers, second: encode(forged)}))


@pytest.mark.parametrize("lie", [planted, few_vouchers, own_voucher])
def test_a_newcomer_refuses_a_model_that_the_others_do_not_vouch_for(
    hospitals: Build, lie: Callable[[bytes], bytes]
) -> None:
    study = hospitals("training.rounds=4")
    away, lied = away_until(study, "rural", 1), 0

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal lied
        delivery = away(site, action, direction, body)
        to_rural = (site, action, direction) == ("rural", "query.join", Direction.TO_SITE)
        if to_rural and delivery.bodies and decode(Join, body).model:
            lied += 1
            return Delivery((lie(body),))
        return delivery

    outcome = study.until_done(hook)
    assert lied >= 1
    assert all("rural" not in r.cohort for r in outcome.reports)  # and the others went on
    refusals = (study.base / "rural" / "refusals.log").read_text(encoding="utf-8")
    assert "vouch" in refusals or "signature" in refusals


def test_a_site_does_not_follow_the_server_into_another_history(hospitals: Build) -> None:
    """Epochs that a lying server proposes to a site that is in the middle of a study."""
    study = hospitals("training.rounds=2")
    with pytest.raises(KilledError):
        study.serve(killing({75}, deliver, []))
    forget_sites()
    site, plan = Site(study.base / "city"), study.plan.canonical_bytes
    names = study.plan.cohort.names
    here = site._run("run-1").member

    def join(terms: EpochTerms, **more: bytes) -> bytes:
        return site.handle("join", encode(Join("run-1", plan, terms, **more)))  # type: ignore[arg-type]

    model = state_to_bytes(site._run("run-1").state)
    ahead = here.next_round
    for terms, more, why in (
        (first_terms(study.plan), {}, "new keys need a new epoch"),
        (EpochTerms(1, names, ahead, bytes(32)), {}, "not this site's"),
        (EpochTerms(1, names, ahead, bytes([7] * 32)), {}, "not this site's"),
        (EpochTerms(1, names, ahead, bytes([7] * 32)), {"model": model}, "sites vouch"),
        (EpochTerms(1, names, ahead - 1, here.transcript), {}, "vouches for no model yet"),
        (EpochTerms(1, names[:2], ahead, here.transcript), {}, "takes 3 or more"),
        (EpochTerms(1, names[1:], ahead, here.transcript), {}, "without this site"),
        (EpochTerms(1, ("city", "city", "rural"), ahead, here.transcript), {}, "each once"),
    ):
        with pytest.raises(FedwardError, match=why):
            join(terms, **more)


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
