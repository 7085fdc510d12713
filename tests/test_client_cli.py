"""fedward-site: what the officer sees, and the exit code of every refusal."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from site_cases import IDENTITIES, make_site, open_books, study, write_plan, write_policy

from client import commands_study
from client.cli import main
from client.consent import People
from client.ledger import Charge
from shared.messages import encode
from shared.study import Receipt

WARD = [f"p{i}" for i in range(20)]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture(autouse=True)
def quick_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard has tests of its own and takes seconds."""
    monkeypatch.setattr(commands_study, "_sensitivity", lambda plan, config: 1.0)


def command(site: Path, *words: object) -> int:
    return main(["--site", str(site), *map(str, words)])


def test_approving_shows_the_cost_and_reserves_it(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = study()
    file = write_plan(plan, tmp_path / "plan.toml")
    assert command(site, "approve", file, "--show") == 0
    shown = capsys.readouterr().out
    for words in (plan.sha256, "10 rounds", "epsilon after this study", "site-3", "collude", "f4"):
        assert words in shown
    measured = re.search(r"moves the sum before\s+noise by at most\s+([\d.]+)", shown)
    assert measured
    assert 0.9 < float(measured[1]) <= 1.0001  # the guard's figure for this very plan
    assert "Approved" not in shown
    assert command(site, "approve", file, "--yes") == 0
    assert "Approved for one run" in capsys.readouterr().out
    books = open_books(site)
    assert len(list(books.ledger.events("approved"))) == 1
    assert books.require_approved(plan, "run-1")["parts"]["training"]["steps"] == 10


def test_without_a_terminal_nothing_is_approved(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_plan(study(), tmp_path / "plan.toml")
    assert command(site, "approve", file) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    assert command(site, "approve", file) == 3
    monkeypatch.setattr("builtins.input", lambda prompt: study().sha256[:6])
    assert command(site, "approve", file) == 0


def test_the_study_that_would_pass_the_cap_ends_with_code_3(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, expected in [(1, 0), (2, 0), (3, 3)]:
        plan = study(f"number-{number}", training={"rounds": 18})
        file = write_plan(plan, tmp_path / f"{number}.toml")
        assert command(site, "approve", file, "--yes") == expected
    error = capsys.readouterr().err
    assert "allows 4 over all studies" in error
    assert "of its 18 rounds" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [("approve", "PLAN", "--yes"), ("policy", "check"), ("spent",), ("policy", "check", "PLAN")],
)
def test_without_a_policy_every_question_ends_with_code_3(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    file = write_plan(study(), tmp_path / "plan.toml")
    (site / "policy.toml").unlink()
    assert command(site, *(file if w == "PLAN" else w for w in words)) == 3
    assert "allows nothing" in capsys.readouterr().err


def test_the_policy_is_begun_strict_and_checked(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(site, "policy", "init") == 2  # never over a file
    (site / "policy.toml").unlink()
    assert command(site, "policy", "init") == 0
    assert command(site, "policy", "check") == 0
    file = write_plan(study(), tmp_path / "plan.toml")
    assert command(site, "policy", "check", file) == 3
    assert "is not in roster" in capsys.readouterr().err
    write_policy(site)
    assert command(site, "policy", "check", file) == 0


def trained(site: Path, rounds: int) -> bytes:
    """Approve a study and charge some of its rounds; the head after its end."""
    plan, books = study(), open_books(site)
    people: People = {"training": books.population(WARD)}
    books.approve(plan, people)
    ward = people["training"].digest
    for number in range(1, rounds + 1):
        books.admit(plan, "run-1", people)
        charge = Charge("run-1", plan.sha256, number, "0" * 64, 4.0, 4.0, 0.5, 1, ward)
        books.ledger.reserve(charge, limit=10)
    books.ledger.close_run("run-1")
    head = books.ledger.head
    books.close()
    return head


def test_spent_lists_studies_and_what_remains(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(site, "spent") == 0
    assert "remains for new studies       4.000" in capsys.readouterr().out
    trained(site, 4)
    assert command(site, "spent", "default") == 0
    shown = capsys.readouterr().out
    assert "run-1" in shown
    remains = float(shown.split("remains for new studies")[1])
    assert 0 < remains < 4
    assert command(site, "spent", "unknown") == 3


def test_a_changed_ledger_is_found_with_code_3(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(site, 3)
    assert command(site, "ledger", "verify") == 0
    assert "older copy" in capsys.readouterr().out
    with sqlite3.connect(site / "ledger.db") as database:
        database.execute("DELETE FROM event WHERE number = 5")
    assert command(site, "ledger", "verify") == 3
    assert "line 6" in capsys.readouterr().err


def test_an_older_copy_is_found_by_receipts_and_by_nothing_else(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = trained(site, 3)
    receipts = write_receipts(tmp_path / "receipts.json", head)
    assert command(site, "ledger", "verify", "--receipts", receipts) == 0
    with sqlite3.connect(site / "ledger.db") as database:
        database.execute("DELETE FROM event WHERE number > 4")
    assert command(site, "ledger", "verify") == 0
    assert command(site, "ledger", "verify", "--receipts", receipts) == 3
    assert command(site, "ledger", "verify", "--head", head.hex()) == 3
    assert "older copy, or cut" in capsys.readouterr().err
    assert command(site, "ledger", "verify", "--head", "abc") == 2


def write_receipts(path: Path, head: bytes, signer: str = "site-0") -> Path:
    fields = {name: bytes(32) for name in ("plan_sha256", "model_sha256", "transcript", "log_root")}
    numbers = {
        f: 0.0
        for f in Receipt.__dataclass_fields__
        if "epsilon" in f or "noise" in f or f == "sample_rate"
    }
    receipt = encode(
        Receipt(
            run_id="run-1",
            site="site-0",
            rounds=3,
            steps=3,
            ledger_head=head,
            log_size=3,
            count_releases=0,
            **fields,
            **numbers,
        )
    )
    signature = IDENTITIES[signer].sign("receipt", receipt)
    entry = {"receipt": receipt.hex(), "signature": signature.hex()}
    path.write_text(json.dumps({"receipts": {"site-0": entry}}))
    return path


def test_a_receipt_that_somebody_else_signed_proves_nothing(site: Path, tmp_path: Path) -> None:
    head = trained(site, 1)
    forged = write_receipts(tmp_path / "receipts.json", head, signer="site-1")
    assert command(site, "ledger", "verify", "--receipts", forged) == 4


def test_an_export_holds_no_patient_and_is_checked_without_the_site(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(site, 2)
    file = tmp_path / "export.jsonl"
    assert command(site, "ledger", "export", file) == 0
    assert command(site, "ledger", "export", file) == 2  # never over a file
    text = file.read_text()
    assert '"p0"' not in text
    assert '"members"' not in text
    me = IDENTITIES["site-0"].fingerprint
    nowhere = tmp_path / "nowhere"
    verify = ("ledger", "verify", file, "--fingerprint")
    assert command(nowhere, *verify, me) == 0
    assert command(nowhere, *verify, IDENTITIES["site-1"].fingerprint) == 3
    lines = text.splitlines()
    for damaged in (
        [*lines[:3], *lines[4:]],
        [lines[0], lines[2], lines[1], *lines[3:]],
        [line.replace("4.0", "9.0") for line in lines],
    ):
        file.write_text("\n".join(damaged))
        assert command(nowhere, *verify, me) == 3
    file.write_text("nonsense")
    assert command(nowhere, *verify, me) == 2


def test_withdrawing_and_unknown_folders(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_plan(study(), tmp_path / "plan.toml")
    command(site, "approve", file, "--yes")
    assert command(site, "withdraw", file) == 0
    assert "1 approval(s)" in capsys.readouterr().out
    assert command(tmp_path / "nowhere", "spent") == 2


def test_a_plan_for_another_version_is_refused_before_it_costs_anything(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for versions, code in ((">=99", 2), ("<99", 0), ("ninety-nine", 2)):
        file = write_plan(study(), tmp_path / "plan.toml")
        pinned = file.read_text().replace(
            'requires_fedward = ""', f'requires_fedward = "{versions}"'
        )
        file.write_text(pinned)
        assert command(site, "policy", "check", file) == code
    assert "needs fedward >=99" in capsys.readouterr().err
