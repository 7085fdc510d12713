"""The signed statement, its page, the release gate and the rounds' log, from one small run."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from audit_run import make_run
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from server.gate import release_model, require_audit
from shared import plan as plans
from shared.errors import AuditError, ConfigError, ProtocolError
from shared.evidence import RECORD_FILE, log_entry, read_record_file, write_record_file
from shared.identity import Identity
from shared.statement import open_statement, sign_statement, statement
from simulations.audits import cli, page
from simulations.audits.finding import (
    AuditOptions,
    AuditTarget,
    Chart,
    Finding,
    Picture,
    Series,
    Table,
    Verdict,
)
from simulations.audits.report import audit_schema
from simulations.cli import main as simulate

AUDITOR = Identity.from_bytes(bytes([9] * 32))
EVIL = '<script>alert(1)</script><img src="https://example.org/x.png">'
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def finding(probe: str, verdict: Verdict = "not refuted", **more: Any) -> Finding:
    """What a probe could say, with everything that a finding may carry."""
    return Finding(
        probe=probe,
        name="example",
        claim=f"A claim of {probe} {EVIL}",
        statistic="lower bound of epsilon",
        value=1.25,
        interval=(0.5, float("inf")),
        alpha=0.001,
        assumptions=("independent scores",),
        verdict=verdict,
        explanation="What was seen.",
        expected=4.0,
        tables=(Table("A table", ("what", "how much"), (("one", 1.5), (EVIL, None))),),
        charts=(Chart("A chart", "x", "y", (Series("line", ((1, 1), (10, 3))),), log_x=True),),
        pictures=(Picture("A picture", EVIL, PIXEL),),
        details={"seed": 2**60},
        artefact_sha256="ab" * 32,
        **more,
    )


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    """Stands in for the probes, which have tests of their own; verdicts can be set."""
    verdicts: dict[str, Verdict] = {}

    def fake(name: str) -> Any:
        def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
            assert target.plan.name == "breast-cancer"
            options.progress("example", 0.5)
            return [finding(name, verdicts.get(name, "not refuted"))]

        return run

    monkeypatch.setattr("simulations.audits.families.probe", fake)
    return verdicts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Identity]]:
    out = tmp_path_factory.mktemp("report") / "run"
    return out, make_run(out)


@pytest.fixture
def run(made: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "run"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    AUDITOR.save(tmp_path / "auditor.pem")
    return tmp_path / "auditor.pem"


def report(run: Path, key: Path, *more: str) -> int:
    return cli.main(["report", str(run), "--key", str(key), "--quick", *more])


def test_a_report_is_signed_fits_its_schema_and_is_verified_without_fedward(
    run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    assert report(run, key, "--seed", str(2**60)) == 0
    text = (run / "audit.json").read_text()
    envelope = Envelope.from_dict(json.loads(text))
    public = SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(AUDITOR.public))
    envelope.verify([public], 1)
    stranger = SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(Identity.generate().public))
    with pytest.raises(VerificationError):
        envelope.verify([stranger], 1)
    record = json.loads(envelope.payload)
    validator = jsonschema.Draft202012Validator(audit_schema())
    validator.check_schema(audit_schema())
    validator.validate(record)
    found = record["predicate"]
    assert found["verdict"] == "not refuted"
    assert found["seed"] == str(2**60)
    assert found["claim"]["unit"].startswith("one patient of one hospital")
    named = {s["name"] for s in record["subject"]}
    assert {"model.safetensors", "evidence/record.fwe", "results.json"} <= named
    assert open_statement(text, AUDITOR.public) == record


def test_a_schema_that_lets_everything_through_would_be_noticed(
    run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    assert report(run, key) == 0
    validator = jsonschema.Draft202012Validator(audit_schema())
    for change in (
        lambda r: r["predicate"].pop("verdict"),
        lambda r: r["predicate"].update(verdict="passed"),
        lambda r: r["predicate"]["claim"].pop("accountant"),
        lambda r: r["predicate"]["findings"][0].update(verdict="anonymous"),
        lambda r: r["predicate"]["findings"][0].pop("assumptions"),
        lambda r: r["subject"][0]["digest"].update(sha256="short"),
        lambda r: r.update(extra=1),
    ):
        record = open_statement((run / "audit.json").read_text(), AUDITOR.public)
        change(record)
        assert not validator.is_valid(record)


def test_no_byte_of_a_statement_can_be_changed(key: Path) -> None:
    text = sign_statement(statement({"a": "0" * 64}, {"verdict": "not refuted", "n": 2**70}), key)
    record = open_statement(text, AUDITOR.public)
    assert record["predicate"]["n"] == str(2**70)
    for at in range(len(text)):
        changed = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        with pytest.raises(ProtocolError):
            open_statement(changed, AUDITOR.public)
    with pytest.raises(ProtocolError, match="not signed by the auditor"):
        open_statement(text, Identity.generate().public)


class Links(html.parser.HTMLParser):
    """Everything that a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_refers_to_nothing_outside_and_runs_nothing(
    run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    assert report(run, key) == 0
    text = (run / "audit.html").read_text()
    links = Links()
    links.feed(text)
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in links.references)
    assert not links.tags & {"script", "iframe", "link", "object", "form"}
    assert "url(" not in text
    assert EVIL in links.text  # shown as text, never as markup
    assert "Strongest attack1.25" in links.text
    assert "One training run, attacked" in links.text
    assert "default-src &#x27;none&#x27;" in text


def test_the_page_says_nothing_stronger_than_the_verdicts(
    run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    probes["neighbour"] = "violated"
    probes["collusion"] = "not testable"
    assert report(run, key) == 5
    record = open_statement((run / "audit.json").read_text(), AUDITOR.public)
    words = json.dumps(record) + (run / "audit.html").read_text()
    assert not re.search(r"anonym|proven|guaranteed safe|\bsafe\b", words, re.IGNORECASE)
    assert record["predicate"]["verdict"] == "violated"
    assert record["predicate"]["risks"]["query"]["verdict"] == "violated"
    shown = (run / "audit.html").read_text()
    for word in ("Violated.", "not refuted", "not testable", "Neighbouring relation"):
        assert word in shown


def test_a_page_of_a_run_whose_plan_cannot_be_read(
    run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    (run / "evidence" / "record.fwe").write_bytes(b"FWE1")
    assert report(run, key) == 5
    assert "Violated." in (run / "audit.html").read_text()


def test_a_study_that_counts_alone_is_reported_and_what_trains_is_not_testable(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "simulations.audits.families.probe",
        lambda name: lambda target, options: [finding(name)],
    )
    run = tmp_path / "run"
    assert simulate(["run", "statistics", "--quiet", "--out", str(run)]) == 0
    assert report(run, key) == 0
    found = open_statement((run / "audit.json").read_text(), AUDITOR.public)["predicate"]
    verdicts = {f["probe"]: f["verdict"] for f in found["findings"] if f["probe"] != "verify"}
    assert {name for name, verdict in verdicts.items() if verdict == "not testable"} == {
        *("neighbour", "one_run", "membership", "reconstruction")
    }
    assert verdicts["implementation"] == "not refuted"


# The gate.


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "run"
    settings = ("audit.gate=true", f"audit.auditor={AUDITOR.public.hex()}", "evaluation.bins=16")
    more = [text for setting in settings for text in ("--set", setting)]
    assert simulate(["run", "--out", str(out), "--quiet", "--rounds", "2", *more]) == 5
    return out


@pytest.fixture
def withheld(gated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gated, tmp_path / "withheld"))


def test_no_model_leaves_before_its_audit_passed(
    withheld: Path, key: Path, probes: dict[str, Verdict], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (withheld / "model.safetensors").exists()
    assert (withheld / "results.json").exists()
    assert cli.main(["release", str(withheld)]) == 5
    assert "the model is withheld" in capsys.readouterr().err
    assert report(withheld, key) == 0
    assert cli.main(["release", str(withheld)]) == 0
    assert (withheld / "model.safetensors").exists()
    assert cli.main(["verify", str(withheld)]) == 0


def test_what_does_not_open_the_gate(
    withheld: Path, tmp_path: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    plan = plans.from_bytes((withheld / "evidence" / "plan.json").read_bytes())
    other_key = tmp_path / "other.pem"
    Identity.generate().save(other_key)
    assert report(withheld, other_key) == 0
    with pytest.raises(AuditError, match="not signed by the auditor"):
        require_audit(plan, withheld)
    assert report(withheld, key, "--only", "neighbour") == 0
    with pytest.raises(AuditError, match="left families out"):
        require_audit(plan, withheld)
    probes["one_run"] = "violated"
    assert report(withheld, key) == 5
    with pytest.raises(AuditError, match="did not pass"):
        require_audit(plan, withheld)
    probes.clear()
    assert report(withheld, key) == 0
    require_audit(plan, withheld)
    state = withheld / "evidence" / "state.fwm"
    state.write_bytes(state.read_bytes()[:-1] + b"\x00")
    with pytest.raises(AuditError, match="is not what was audited"):
        release_model(withheld)


def test_an_audit_of_another_run_does_not_open_the_gate(
    withheld: Path, run: Path, key: Path, probes: dict[str, Verdict]
) -> None:
    assert report(run, key) == 0
    shutil.copy(run / "audit.json", withheld / "audit.json")
    plan = plans.from_bytes((withheld / "evidence" / "plan.json").read_bytes())
    with pytest.raises(AuditError, match="another plan"):
        require_audit(plan, withheld)
    open_gate = dataclasses.replace(plan, audit=plans.AuditPlan())
    require_audit(open_gate, withheld)
    with pytest.raises(ConfigError, match="gate needs auditor"):
        plans.AuditPlan(gate=True)


# The command line.


def test_the_commands_exit_with_what_they_found(
    run: Path, tmp_path: Path, key: Path, probes: dict[str, Verdict],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["violated"] is False
    assert cli.main(["one-run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["probe"] == "one_run"
    probes["one_run"] = "violated"
    assert cli.main(["one-run", str(run)]) == 5
    assert "NOT SO" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "nothing")]) == 2
    assert cli.main(["verify", str(run), "--fingerprint", "city"]) == 2
    assert report(run, key) == 5
    auditor = AUDITOR.public.hex()
    assert cli.main(["show", str(run / "audit.json"), "--auditor", auditor]) == 5
    assert "Violated" in capsys.readouterr().out
    other = Identity.generate().public.hex()
    assert cli.main(["show", str(run / "audit.json"), "--auditor", other]) == 5
    (run / "model.json").write_text("{}")
    assert cli.main(["verify", str(run)]) == 5


def test_a_round_is_proven_to_whoever_knows_the_sites(
    run: Path, made: tuple[Path, dict[str, Identity]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    proof = tmp_path / "proof.json"
    roster = tmp_path / "roster.json"
    roster.write_text(json.dumps({n: k.public.hex() for n, k in made[1].items()}))
    assert cli.main(["log", "show", str(run)]) == 0
    assert cli.main(["log", "prove", str(run), "2", str(proof)]) == 0
    check = ["log", "check", str(proof), "--roster", str(roster), "--cosigners"]
    assert cli.main([*check, "4"]) == 0
    assert "round 2" in capsys.readouterr().out
    assert cli.main([*check, "5"]) == 5
    assert cli.main(["log", "check", str(proof)]) == 2
    whole = json.loads(proof.read_text())
    for field in ("entry", "root", "index", "size", "path", "run_id", "cosigners"):
        forged = json.loads(proof.read_text())
        value = forged[field]
        forged[field] = (
            value + 1 if isinstance(value, int) else value[:-1] if field != "cosigners" else {}
        )
        proof.write_text(json.dumps(forged))
        assert cli.main([*check, "4"]) == 5, field
    whole["cosigners"]["city"]["signature"] = whole["cosigners"]["rural"]["signature"]
    proof.write_text(json.dumps(whole))
    assert cli.main([*check, "3"]) == 5


def test_an_older_copy_of_the_log_must_be_the_beginning_of_the_newer(
    run: Path, tmp_path: Path, made: tuple[Path, dict[str, Identity]]
) -> None:

    records = read_record_file(run / "evidence" / RECORD_FILE).records
    ends = [i for i, r in enumerate(records) if log_entry(r) is not None]
    older = tmp_path / "older"
    older.mkdir()
    write_record_file(older / RECORD_FILE, records[: ends[1] + 1], keeper="server", identity=None)
    assert cli.main(["log", "compare", str(older), str(run)]) == 0
    assert cli.main(["log", "compare", str(run), str(older)]) == 5  # cut
    moved = [*records[: ends[0]], *records[ends[1] :]]
    write_record_file(older / RECORD_FILE, moved, keeper="server", identity=None)
    assert cli.main(["log", "compare", str(older), str(run)]) == 5  # another view


def test_the_page_draws_a_chart_only_from_points_that_it_can_place() -> None:
    shown = page.render(
        {
            "subject": [],
            "predicate": {
                "tool": {"name": "fedward-audit", "version": "0"},
                "time": "now",
                "extent": "quick",
                "families": [
                    {"name": "one_run", "verdict": "not refuted", "counts": {}, "alpha": 0.01}
                ],
                "findings": [
                    dataclasses.replace(
                        finding("one_run"),
                        charts=(Chart("None", "x", "y", (Series("n", ((0, 1),)),), log_x=True),),
                    ).as_dict()
                ],
                "limits": ["one"],
                "unsigned": [],
                "code_sha256": "0" * 64,
            },
        }
    )
    assert "<svg" not in shown
