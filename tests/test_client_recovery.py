"""After a lost key or a restored snapshot: nothing that was spent is forgotten."""

from __future__ import annotations

import shutil
import sqlite3
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from project_cases import Play
from site_cases import IDENTITIES, make_site, open_books, study, trained

from client import recovery
from client.budget import commitments, histories
from client.config import SiteFolder
from client.consent import Books
from client.ledger import Charge
from client.site import Site
from server import provision
from server.project import Project, ProjectSettings
from shared.errors import PolicyError, ProtocolError
from shared.messages import encode
from shared.plan import StudyPlan, from_table
from shared.privacy import epsilon_of_events
from shared.study import PhaseRequest, Receipt

WARD = [f"p{i}" for i in range(20)]


def spend(folder: Path, plan: StudyPlan, run: str, rounds: range, *, approve: bool) -> None:
    """Approve a study, or go on with it, and charge some of its rounds."""
    books = open_books(folder)
    people = trained(books, WARD)
    if approve:
        books.approve(plan, people)
    for number in rounds:
        books.admit(plan, run, people)
        ward = people["training"].digest
        charge = Charge(run, plan.sha256, number, "0" * 64, 4.0, 4.0, 0.5, 1, ward)
        books.ledger.reserve(charge, limit=10)
    books.close()


def worst(books: Books, *, spent_only: bool) -> float:
    """Epsilon of the patient who has spent most."""
    known = commitments(books.ledger)
    past = histories(trained(books, WARD)["training"].members, known, books.ledger.members)
    return max(
        epsilon_of_events([c.event for c in history if c.spent or not spent_only], 1e-5)
        for history in past
    )


def receipt(run: str, plan: StudyPlan, steps: int) -> Receipt:
    hashes = {n: bytes(32) for n in ("model_sha256", "transcript", "log_root", "ledger_head")}
    fields = dict.fromkeys(Receipt.__dataclass_fields__, 0.0) | hashes
    whole = {"run_id": run, "site": "site-0", "plan_sha256": bytes.fromhex(plan.sha256)}
    whole |= {"rounds": steps, "steps": steps, "log_size": 0, "count_releases": 0}
    return Receipt(**fields | whole)  # type: ignore[arg-type]


# A restored snapshot.


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that commands write beside them stay with the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def restored(tmp_path: Path) -> Path:
    """A site that trained 2 rounds, was copied, trained 8 more, and was restored from the copy."""
    folder = make_site(tmp_path / "site", max_epsilon=40.0, max_epsilon_alone=40.0)
    spend(folder, study(), "run-1", range(1, 3), approve=True)
    shutil.copytree(folder, tmp_path / "copy")
    spend(folder, study(), "run-1", range(3, 11), approve=False)
    folder.rename(tmp_path / "lost")
    (tmp_path / "copy").rename(folder)
    return folder


def test_what_was_open_at_a_snapshot_counts_as_spent(restored: Path, tmp_path: Path) -> None:
    true = worst(open_books(tmp_path / "lost"), spent_only=True)
    forgotten = worst(open_books(restored), spent_only=True)
    assert forgotten < true  # the danger is there
    site = SiteFolder(restored)
    done = recovery.write_off(site, site.config(), [], [], time.time())
    assert done.steps == (("trial", "training", 8),)
    books = open_books(restored)
    assert worst(books, spent_only=True) == pytest.approx(true)
    assert books.ledger.verify() > 0
    with pytest.raises(PolicyError, match="another run has taken that"):
        books.require_approved(study(), "run-2")
    again = recovery.write_off(site, site.config(), [], [], time.time() + 2)
    assert again.steps == ()


def test_an_approval_that_nobody_had_taken_is_written_off_too(tmp_path: Path) -> None:
    """After the snapshot a run may have taken it; it must not be taken twice."""
    folder = make_site(tmp_path / "site")
    spend(folder, study(), "", range(0), approve=True)
    site = SiteFolder(folder)
    done = recovery.write_off(site, site.config(), [], [], time.time())
    assert done.steps == (("trial", "training", 10),)
    books = open_books(folder)
    assert worst(books, spent_only=True) == pytest.approx(worst(books, spent_only=False))
    with pytest.raises(PolicyError, match="approve the plan again"):
        books.require_approved(study(), "run-1")


def test_a_statistics_study_is_written_off_as_one_and_counted_once(tmp_path: Path) -> None:
    table = {
        "name": "counts",
        "task": asdict(study().task) | {"kind": "statistics"},
        "privacy": {"mode": "local", "epsilon": 2.0, "delta": 1e-5},
        "cohort": asdict(study().cohort),
    }
    plan = from_table(table, "test")
    folder = make_site(tmp_path / "site", tasks=["statistics"])
    books = open_books(folder)
    books.approve(plan, {"statistics": books.population(WARD)})
    reserved = worst(books, spent_only=False)
    books.close()
    site = SiteFolder(folder)
    done = recovery.write_off(site, site.config(), [], [], time.time())
    assert done.steps == (("counts", "statistics", 1),)
    books = open_books(folder)
    assert worst(books, spent_only=True) == worst(books, spent_only=False) == reserved > 0


def test_a_run_that_was_open_does_not_go_on(restored: Path) -> None:
    (restored / "runs" / "run-1").mkdir(parents=True)
    (restored / "runs" / "run-1" / "state.db").write_bytes(b"mask keys of the past")
    site = SiteFolder(restored)
    done = recovery.write_off(site, site.config(), [], [], time.time())
    assert (done.aside / "runs" / "run-1" / "state.db").exists()
    with pytest.raises(ProtocolError, match="has not joined"):
        Site(restored).handle("agree", encode(PhaseRequest(run_id="run-1", body=b"")))


def test_a_study_after_the_snapshot_is_noticed_by_its_receipt(restored: Path) -> None:
    site, later = SiteFolder(restored), study("later")
    seen = [receipt("run-7", later, 10)]
    with pytest.raises(PolicyError, match="older than that study"):
        recovery.write_off(site, site.config(), seen, [], time.time())
    before = worst(open_books(restored), spent_only=False)
    done = recovery.write_off(site, site.config(), seen, [later], time.time())
    assert ("later", "training", 10) in done.steps
    assert worst(open_books(restored), spent_only=True) > before


# A lost key.


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """A project in which site-0, with its ledger, and two others are enrolled."""
    made = Play(tmp_path)
    settings = ProjectSettings(
        schema="fedward-project/1",
        name="heart",
        advertise="localhost:8443",
        bind="localhost:8443",
        expires="2099-12-31",
        requires_fedward="",
    )
    made.project = provision.init(Project(tmp_path / "project").path, settings, time.time())
    return made


@pytest.fixture
def old(play: Play) -> Path:
    """site-0 after some rounds of a study that is still open."""
    folder = make_site(play.folder / "site-0")
    spend(folder, study(), "run-1", range(1, 5), approve=True)
    return folder


def recover(play: Play, *words: object) -> int:
    file = play.file("again.json")
    assert play.server("project", "invite", "site-0", "--out", file) == 0
    mine = play.project.identity().fingerprint
    return play.site("site-0", "recover", "new-identity", file, "--fingerprint", mine, *words)


def test_a_new_identity_goes_on_with_the_old_ledger(play: Play, old: Path) -> None:
    before, lines = commitments(open_books(old).ledger), list(open_books(old).ledger.lines())
    (old / "identity.pem").unlink()  # lost
    assert recover(play) == 0
    site = SiteFolder(old)
    assert site.identity().public != IDENTITIES["site-0"].public
    play.approve("site-0")
    kit = play.file("kit.json")
    assert play.server("project", "kit", "site-0", "--out", kit) == 0
    assert play.site("site-0", "join", kit) == 0
    (old / "roster.json").write_text("{}")
    books = open_books(old)
    assert books.ledger.verify() == len(lines) + 1  # and the end of the run that was open
    spent = [c for c in commitments(books.ledger) if c.spent]
    assert spent == [c for c in before if c.spent] != []
    opened = next(books.ledger.events("opened"))
    assert opened["follows"][0]["public"] == IDENTITIES["site-0"].public.hex()
    assert opened["follows"][0]["head"] == lines[-1][2].hex()
    aside = next((old / "former").iterdir())
    assert (aside / "ledger.db").exists()


def test_without_recovering_a_new_identity_opens_nothing(play: Play, old: Path) -> None:
    (old / "identity.pem").unlink()
    IDENTITIES["site-1"].save(old / "identity.pem")
    with pytest.raises(PolicyError, match="does not empty a ledger"):
        open_books(old)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM event WHERE number = 4",
        "UPDATE event SET body = replace(body, '\"steps\":1,', '\"steps\":0,')",
    ],
)
def test_a_ledger_that_was_changed_is_not_taken_over(play: Play, old: Path, damage: str) -> None:
    with sqlite3.connect(old / "ledger.db") as database:
        assert database.execute(damage).rowcount
    assert recover(play) == 3
    assert SiteFolder(old).identity().public == IDENTITIES["site-0"].public  # nothing was moved


def test_without_the_ledger_there_is_no_new_identity(play: Play, old: Path) -> None:
    (old / "ledger.db").unlink()
    assert recover(play) == 3


def test_an_invitation_for_another_site_changes_nothing(play: Play, old: Path) -> None:
    file = play.file("other.json")
    assert play.server("project", "invite", "elsewhere", "--out", file) == 0
    mine = play.project.identity().fingerprint
    assert play.site("site-0", "recover", "new-identity", file, "--fingerprint", mine) == 2
    assert SiteFolder(old).identity().public == IDENTITIES["site-0"].public


def test_the_opt_out_list_survives_a_new_identity(play: Play, old: Path) -> None:
    open_books(old).opt_out.add(("p3",), "2026-11-25")
    assert recover(play) == 0
    (old / "roster.json").write_text("{}")
    assert open_books(old).opt_out.has("p3")
