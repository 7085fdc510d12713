"""The site's durable state: all or nothing, and what one process wrote another sees."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from client.ledger import Charge, Ledger
from client.store import Prefixed, RunStore
from shared.errors import PolicyError


def charge(round_no: int, **changes: object) -> Charge:
    fields: dict[str, object] = {
        "run": "run-1",
        "plan_sha256": "0" * 64,
        "round_no": round_no,
        "descriptor": f"{round_no:064x}",
        "noise_multiplier": 1.5,
        "sample_rate": 0.1,
        "steps": 5,
    }
    return Charge(**(fields | changes))  # type: ignore[arg-type]


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "state.db")
    with store.transaction():
        store["kept"] = b"1"

    def interrupted() -> None:
        with store.transaction():
            store["kept"] = b"2"
            store["lost"] = b"3"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert dict(store) == {"kept": b"1"}
    store.close()
    assert dict(RunStore(tmp_path / "state.db")) == {"kept": b"1"}


def test_another_process_sees_what_was_committed(tmp_path: Path) -> None:
    first, second = RunStore(tmp_path / "state.db"), RunStore(tmp_path / "state.db")
    with first.transaction():
        first["model"] = b"new"
    assert "model" not in second
    assert second.refresh()
    assert second["model"] == b"new"
    assert not second.refresh()


def test_deleted_values_are_gone_from_the_file(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "state.db")
    secret = b"a-mask-key-that-must-be-erased"
    with store.transaction():
        store["key"] = secret
    with store.transaction():
        del store["key"]
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    assert secret not in (tmp_path / "state.db").read_bytes()


def test_a_prefix_sees_its_own_names_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "state.db")
    with store.transaction():
        store["model"] = b"m"
        part = Prefixed(store, "secagg/")
        part["model"] = b"s"
    assert dict(part) == {"model": b"s"}
    assert store["model"] == b"m"
    assert len(part) == 1
    with store.transaction():
        del part["model"]
    assert dict(store) == {"model": b"m"}


def test_a_charge_is_written_once_and_survives(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.reserve(charge(1))
    ledger.reserve(charge(1))
    ledger.reserve(charge(2))
    ledger.close()
    again = Ledger(tmp_path / "ledger.db")
    assert again.charges() == (charge(1), charge(2))
    assert again.steps("run-1") == 10
    again.verify()


@pytest.mark.parametrize("change", [{"descriptor": "f" * 64}, {"steps": 1}, {"sample_rate": 0.01}])
def test_one_round_is_never_charged_for_two_things(
    tmp_path: Path, change: dict[str, object]
) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.reserve(charge(1))
    with pytest.raises(PolicyError, match="already charged"):
        ledger.reserve(charge(1, **change))
    assert ledger.steps("run-1") == 5


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE event SET body = CAST(replace(body, '1.5', '9.5') AS BLOB) WHERE number = 2",
        "UPDATE event SET steps = 1 WHERE number = 2",
        "DELETE FROM event WHERE number = 2",
    ],
)
def test_a_changed_or_removed_line_is_found(tmp_path: Path, tamper: str) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for number in (1, 2, 3):
        ledger.reserve(charge(number))
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute(tamper)
    with pytest.raises(PolicyError, match="does not follow"):
        Ledger(tmp_path / "ledger.db").verify()
