"""The privacy ledger: charged once, signed, chained; whatever is changed shows."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from client.budget import commitments
from client.ledger import Charge, HeadMovedError, Ledger
from client.patients import PatientKey
from shared.errors import PolicyError
from shared.identity import Identity
from shared.privacy import epsilon_of_events

ME = Identity.from_bytes(bytes(range(32)))
KEY = PatientKey(bytes(32))
WARD = KEY.population(["anna", "bert", "cleo"])
LIMIT = 100


def charge(round_no: int, **changes: object) -> Charge:
    fields: dict[str, object] = {
        "run": "run-1",
        "plan_sha256": "0" * 64,
        "round_no": round_no,
        "descriptor": f"{round_no:064x}",
        "noise_multiplier": 1.5,
        "alone": 1.5,
        "sample_rate": 0.1,
        "steps": 5,
        "population": WARD.digest,
    }
    return Charge(**(fields | changes))  # type: ignore[arg-type]


def open_ledger(folder: Path, identity: Identity = ME) -> Ledger:
    ledger = Ledger(folder / "ledger.db", identity, durable=False, clock=lambda: 1000.0)
    ledger.open_for("city", KEY.check)
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one population and three charges, the first two released."""
    ledger = open_ledger(tmp_path)
    ledger.add_population(WARD, "ward")
    for number in (1, 2, 3):
        ledger.reserve(charge(number), limit=LIMIT)
    for number in (1, 2):
        ledger.release(charge(number))
    return ledger


def test_a_charge_is_written_once_and_survives(ledger: Ledger, tmp_path: Path) -> None:
    head = ledger.head
    ledger.reserve(charge(1), limit=LIMIT)
    ledger.release(charge(1))
    ledger.add_population(WARD, "renamed")
    assert ledger.head == head
    ledger.close()
    again = open_ledger(tmp_path)
    assert again.charges() == (charge(1), charge(2), charge(3))
    assert again.steps("run-1") == 15
    assert again.spent() == {("run-1", WARD.digest): {("training", 1.5, 1.5, 0.1): 15}}
    assert again.verify() == 7


@pytest.mark.parametrize(
    "change",
    [
        {"descriptor": "f" * 64},
        {"steps": 1},
        {"sample_rate": 0.01},
        {"noise_multiplier": 9.0},
        {"population": "0" * 64},
    ],
)
def test_one_round_is_never_charged_for_two_things(
    ledger: Ledger, change: dict[str, object]
) -> None:
    with pytest.raises(PolicyError, match="already charged"):
        ledger.reserve(charge(1, **change), limit=LIMIT)
    assert ledger.steps("run-1") == 15


def test_the_same_round_of_another_run_or_epoch_is_charged_again(ledger: Ledger) -> None:
    ledger.reserve(charge(1, run="run-2"), limit=LIMIT)
    ledger.reserve(charge(1, epoch=1), limit=LIMIT)
    assert (ledger.steps("run-1"), ledger.steps("run-2")) == (20, 5)


def test_a_run_never_passes_its_limit_and_nothing_is_written(ledger: Ledger) -> None:
    head = ledger.head
    with pytest.raises(PolicyError, match="covers 19"):
        ledger.reserve(charge(4), limit=19)
    assert ledger.head == head


def test_a_run_that_is_over_is_charged_no_more(ledger: Ledger) -> None:
    ledger.close_run("run-1")
    with pytest.raises(PolicyError, match="is over"):
        ledger.reserve(charge(4), limit=LIMIT)
    ledger.reserve(charge(3), limit=LIMIT)  # a repeated request changes nothing


def test_a_decision_on_an_older_state_is_not_written(ledger: Ledger, tmp_path: Path) -> None:
    before = ledger.head
    open_ledger(tmp_path).reserve(charge(4), limit=LIMIT)
    with pytest.raises(HeadMovedError):
        ledger.append("approved", {}, expected_head=before)
    assert ledger.verify() == 8


def database(folder: Path, *statements: str) -> None:
    with sqlite3.connect(folder / "ledger.db") as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("statements", "line"),
    [
        (["UPDATE event SET body = replace(body, '1.5', '9.5') WHERE number = 3"], "line 3"),
        (["UPDATE event SET body = replace(body, '1000.0', '1000') WHERE number = 3"], "line 3"),
        (["UPDATE event SET signature = zeroblob(64) WHERE number = 6"], "line 6 is not signed"),
        (["DELETE FROM event WHERE number = 4"], "line 5"),
        (["DELETE FROM event WHERE number = 1"], "line 2"),
        (
            [
                "DELETE FROM event WHERE number = 4",
                "UPDATE event SET number = number - 1 WHERE number > 4",
            ],
            "line 4",
        ),
        (
            [
                "UPDATE event SET number = 99 WHERE number = 3",
                "UPDATE event SET number = 3 WHERE number = 4",
                "UPDATE event SET number = 4 WHERE number = 99",
            ],
            "line 3",
        ),
        (["UPDATE population SET members = zeroblob(24)"], "population"),
        (["DELETE FROM population"], "population"),
    ],
)
def test_a_changed_removed_or_moved_line_is_found(
    ledger: Ledger, tmp_path: Path, statements: list[str], line: str
) -> None:
    ledger.close()
    database(tmp_path, *statements)
    with pytest.raises(PolicyError, match=line):
        Ledger(tmp_path / "ledger.db", ME).verify()


def test_any_changed_byte_of_the_file_is_found_or_changes_no_line(
    ledger: Ledger, tmp_path: Path
) -> None:
    ledger.close()
    path = tmp_path / "ledger.db"
    whole = path.read_bytes()
    intact = list(open_ledger(tmp_path).lines())
    found = 0
    for place in range(0, len(whole), 97):
        for extra in ("-wal", "-shm"):
            (tmp_path / f"ledger.db{extra}").unlink(missing_ok=True)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        try:
            damaged = Ledger(path, ME)
            damaged.verify()
            assert list(damaged.lines()) == intact
        except PolicyError:
            found += 1
    assert found > 20


def test_a_rewritten_chain_is_not_signed_by_this_site(tmp_path: Path) -> None:
    forged = open_ledger(tmp_path, Identity.generate())
    forged.add_population(WARD, "ward")
    forged.close()
    with pytest.raises(PolicyError, match="not signed"):
        Ledger(tmp_path / "ledger.db", ME).verify()
    with pytest.raises(PolicyError, match="another identity"):
        open_ledger(tmp_path)


def test_lines_cut_off_at_the_end_show_by_a_head_kept_elsewhere_and_by_nothing_else(
    ledger: Ledger, tmp_path: Path
) -> None:
    kept_by_a_peer = ledger.head
    ledger.close()
    database(tmp_path, "DELETE FROM event WHERE number > 5")
    cut = open_ledger(tmp_path)
    assert cut.verify() == 5  # the chain alone cannot tell
    with pytest.raises(PolicyError, match="older copy, or cut"):
        cut.require_head(kept_by_a_peer, "the receipt of run run-1")


def test_another_patients_key_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger.close()
    with pytest.raises(PolicyError, match="another patients' key"):
        Ledger(tmp_path / "ledger.db", ME).open_for("city", PatientKey(bytes([1] * 32)).check)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"something else" * 100)
    with pytest.raises(PolicyError, match="not a ledger"):
        Ledger(tmp_path / "ledger.db", ME)


def test_no_line_names_a_patient_or_counts_them(ledger: Ledger) -> None:
    text = "".join(body for _, body, _, _ in ledger.lines())
    for patient in ("anna", "bert", "cleo"):
        assert patient not in text
    lines = [json.loads(body) for _, body, _, _ in ledger.lines()]
    (population,) = (line for line in lines if line["kind"] == "population")
    assert set(population) == {"kind", "time", "digest", "dataset"}


def test_a_long_history_composes_to_the_sum_of_its_steps(ledger: Ledger) -> None:
    for number in range(10, 500):
        ledger.reserve(charge(number, noise_multiplier=20.0 + number % 4), limit=10**9)
    spent = [c.event for c in commitments(ledger)]
    assert sum(e.steps for e in spent) == 493 * 5
    assert len(spent) == 5  # one for each kind of step, however many rounds there were
    assert epsilon_of_events(spent, 1e-5) > 0
