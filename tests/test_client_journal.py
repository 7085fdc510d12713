"""The site's journal: complete, signed, not to be changed unnoticed, and silent about patients."""

from __future__ import annotations

import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from site_cases import IDENTITIES, make_site, study, write_plan
from study_cases import Sites

from client import commands_study
from client.app import answer, forget_sites
from client.chain import ChainFile, link
from client.cli import main
from client.config import SiteFolder
from client.journal import CHAIN, Handled, Journal, LogConfig, check_export
from client.run import SiteRun
from client.site import Site
from shared.errors import AuditError, ConfigError, PolicyError, ProtocolError
from shared.messages import encode
from shared.study import Join
from simulations.scenario import load_scenario

ME = IDENTITIES["site-0"]
PATIENT = "MRN-4711-Smith"
OVERRIDES = ["training.rounds=3", "training.local_steps=2", "evaluation.bins=16"]


def open_journal(folder: Path) -> Journal:
    site = SiteFolder(folder)
    journal = site.journal(site.config(), site.identity())
    assert journal is not None
    return journal


def handled(**changes: Any) -> Handled:
    fields: dict[str, Any] = {
        "action": "round",
        "run": "run-1",
        "plan": "ab" * 32,
        "bytes_in": 10,
        "bytes_out": 20,
        "error": "",
        "seconds": 0.5,
        "charges": (),
        "ledger_head": "00" * 32,
    }
    return Handled(**fields | changes)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, ME, LogConfig(), clock=lambda: 1000.0)
    for number in range(5):
        made.message(handled(bytes_out=number), "heart")
    return made


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    scenario = load_scenario("breast_cancer", OVERRIDES)
    made = Sites(scenario, tmp_path_factory.mktemp("sites"))
    made.study("run-1")
    return made


def test_a_whole_study_is_in_every_sites_journal(sites: Sites) -> None:
    for name, folder in sites.folders.items():
        journal, site = open_journal(folder), Site(folder)
        lines = [line for line in journal.lines() if line["kind"] == "message"]
        assert {line["action"] for line in lines} >= {"join", "setup", "round", "agree", "finish"}
        assert {line["outcome"] for line in lines} == {"answered"}
        assert {line["run"] for line in lines} == {"run-1"}
        joined = [line for line in lines if line["action"] != "rollcall"]  # which names no plan
        assert {line["plan"] for line in joined} == {sites.plan.sha256}
        assert all(line["bytes_out"] > 0 for line in lines)
        costs = [cost for line in lines for cost in line["cost"]]
        charges = site.books.ledger.charges("run-1")
        assert sum(c["steps"] for c in costs) == sum(c.steps for c in charges) > 0, name
        assert lines[-1]["ledger_head"] == site.books.ledger.head.hex()
        assert journal.verify()[0] == len(list(journal.lines()))


def test_nothing_in_a_journal_reveals_a_patient(sites: Sites) -> None:
    for name, folder in sites.folders.items():
        text = "".join(body for _, body, _, _ in open_journal(folder).rows())
        fields = {key for line in open_journal(folder).lines() for key in line}
        assert not fields & {"population", "populations", "patients", "descriptor"}
        for digest in (e["digest"] for e in Site(folder).books.ledger.events("population")):
            assert digest not in text
        texts = {
            v for line in open_journal(folder).lines() for v in line.values() if isinstance(v, str)
        }
        assert not texts & set(sites.data[name].patient_ids)


def test_a_patient_in_an_error_text_stays_out_of_the_journal(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sites.folders["city"]
    for error in (KeyError(PATIENT), ConfigError(f"{PATIENT} has two ages. Correct it.")):

        def failing(self: SiteRun, *args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Site, "_join", failing)
        answer(folder, "join", b"whatever")
        forget_sites()
    last = list(open_journal(folder).lines())[-2:]
    assert [line["error"] for line in last] == ["KeyError", "ConfigError"]
    assert [line["outcome"] for line in last] == ["refused"] * 2
    kept = "".join(p.read_text(errors="replace") for p in folder.glob("journal.db*"))
    assert PATIENT not in kept
    assert PATIENT in (folder / "refusals.log").read_text()  # the plant was there to be found


def test_whatever_is_no_name_becomes_a_question_mark(tmp_path: Path) -> None:
    """Also what the server calls things is untrusted text."""
    journal = Journal(tmp_path, ME, LogConfig())
    strange = "x\ny " + PATIENT + " <b>"
    journal.message(handled(action=strange, run=strange, plan=strange, error=strange), strange)
    journal.command("approve", user=strange, plan=strange, exit_code=0, error=strange)
    assert "Smith" not in "".join(body for _, body, _, _ in journal.rows())


def test_a_refused_message_is_noted_with_its_class_alone(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site")
    plan = study("never-approved")
    site = Site(folder)
    with pytest.raises(PolicyError):
        site.handle("join", encode(Join(run_id="run-9", plan=plan.canonical_bytes)))
    line = list(open_journal(folder).lines())[-1]
    assert (line["run"], line["error"], line["bytes_out"]) == ("run-9", "PolicyError", 0)


def test_without_a_record_nothing_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(make_site(tmp_path / "site"))
    monkeypatch.setattr(site, "_answer", lambda action, body: b"the answer")
    assert site.handle("join", b"") == b"the answer"

    def full(self: ChainFile, body: bytes) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ChainFile, "_insert", full)
    with pytest.raises(ConfigError, match="nothing leaves this site without a record"):
        site.handle("join", b"")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE event SET body = replace(body, '\"bytes_out\":2', '\"bytes_out\":0')",
        "DELETE FROM event WHERE number = 3",
        "DELETE FROM event WHERE number = 1",
        "UPDATE event SET number = number + 10 WHERE number = 5",
        "UPDATE event SET signature = zeroblob(64) WHERE number = 2",
    ],
)
def test_a_changed_journal_is_noticed(tmp_path: Path, journal: Journal, damage: str) -> None:
    assert journal.verify()[0] == 5
    with sqlite3.connect(tmp_path / "journal.db") as database:
        database.execute(damage)
    with pytest.raises(AuditError, match="log collector"):
        journal.verify()


def test_a_chain_that_somebody_else_wrote_anew_is_noticed(tmp_path: Path, journal: Journal) -> None:
    """Every link follows, but the signatures are another's."""
    other, chain = IDENTITIES["site-1"], bytes(32)
    with sqlite3.connect(tmp_path / "journal.db") as database:
        for number, body, _, _ in list(journal.rows()):
            text = body.replace("heart", "lungs")
            chain = link(CHAIN.schema, chain, text.encode())
            row = (text, chain, other.sign(CHAIN.context, chain), number)
            database.execute("UPDATE event SET body=?, chain=?, signature=? WHERE number=?", row)
    with pytest.raises(AuditError, match="not signed by this site"):
        journal.verify()


def test_a_cut_journal_is_noticed_by_a_head_that_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_site(tmp_path / "site")
    for number in range(3):
        open_journal(folder).message(handled(bytes_out=number), "heart")
    assert main(["--site", str(folder), "log", "verify"]) == 0
    head = capsys.readouterr().out.split("head ")[1].split()[0]
    with sqlite3.connect(folder / "journal.db") as database:
        database.execute("DELETE FROM event WHERE number = 3")
    assert main(["--site", str(folder), "log", "verify"]) == 0  # alone it cannot be seen
    assert main(["--site", str(folder), "log", "verify", "--head", head]) == 5
    assert "older copy, or cut" in capsys.readouterr().err


def test_an_export_is_checked_without_the_site(tmp_path: Path, journal: Journal) -> None:
    file = tmp_path / "export.jsonl"
    assert journal.export(file, "site-0") == 5
    assert check_export(file, ME.fingerprint)[0] == 5
    with pytest.raises(AuditError, match="not by"):
        check_export(file, IDENTITIES["site-1"].fingerprint)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], *lines[3:]]))
    with pytest.raises(AuditError, match="does not follow"):
        check_export(file, ME.fingerprint)


def test_commands_are_noted_by_name_without_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands_study, "_sensitivity", lambda plan, config: 1.0)
    folder = make_site(tmp_path / "site")
    plan = study()
    file = write_plan(plan, tmp_path / f"{PATIENT}.toml")
    assert main(["--site", str(folder), "approve", str(file), "--yes"]) == 0
    assert main(["--site", str(folder), "approve", str(file)]) == 2
    assert main(["--site", str(folder), "spent"]) == 0  # changes nothing
    lines = list(open_journal(folder).lines())
    assert [line["command"] for line in lines] == ["approve", "approve"]
    assert [line["exit_code"] for line in lines] == [0, 2]
    assert {line["plan"] for line in lines} == {plan.sha256}
    assert PATIENT not in json.dumps(lines)
    capsys.readouterr()
    assert main(["--site", str(folder), "log"]) == 0
    assert f"ran approve plan {plan.sha256[:16]}: done" in capsys.readouterr().out
    assert main(["--site", str(folder), "log", "--json", "--last", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_a_changed_policy_is_noted_once(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site")
    site = Site(folder)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            site.handle("join", b"")
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text() + "\n# tightened\n")
    with pytest.raises(ProtocolError):
        site.handle("join", b"")
    noted = [line["sha256"] for line in open_journal(folder).lines() if line["kind"] == "policy"]
    assert len(noted) == len(set(noted)) == 2


def test_lines_also_go_to_syslog_and_a_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.bind(("127.0.0.1", 0))
        collector.settimeout(60)
        where = f"127.0.0.1:{collector.getsockname()[1]}"
        journal = Journal(tmp_path, ME, LogConfig(json=True, syslog=where))
        journal.message(handled(), "heart")
        received = collector.recv(65536).decode()
        journal.close()
    assert "fedward-site: {" in received
    assert '"asked_by": "heart"' in received
    mirrored = json.loads((tmp_path / "logs" / "journal.jsonl").read_text())
    assert mirrored["action"] == "round"


def test_only_a_pretended_hospital_may_do_without(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site")
    settings = folder / "site.toml"
    settings.write_text(settings.read_text() + "[log]\njournal = false\n")
    with pytest.raises(ConfigError, match="a hospital keeps its journal"):
        Site(folder)


def test_following_shows_what_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_site(tmp_path / "site")
    open_journal(folder).message(handled(action="setup"), "heart")
    waits = iter([True, False])

    def wait(seconds: float) -> None:
        if not next(waits):
            raise KeyboardInterrupt
        open_journal(folder).message(handled(action="release", error="PolicyError"), "heart")

    monkeypatch.setattr("client.commands_log.time.sleep", wait)
    assert main(["--site", str(folder), "log", "--follow"]) == 130
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert "setup" in shown[0]
    assert "REFUSED  PolicyError" in shown[1]
