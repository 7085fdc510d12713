"""The site's durable state: all or nothing, and what one process wrote another sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.store import Prefixed, RunStore


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


@pytest.mark.parametrize("size", [64, 100_000], ids=["in its row", "on pages of its own"])
@pytest.mark.parametrize("after", [1.0, 0.5, 2.0], ids=["as long", "shorter", "longer"])
def test_a_value_that_was_replaced_is_gone_from_the_file(
    tmp_path: Path, size: int, after: float
) -> None:
    store = RunStore(tmp_path / "state.db")
    secret, new = b"s3cr" * (size // 4), b"new." * int(after * size // 4)
    with store.transaction():
        store["key"], store["other"] = secret, b"other"
    with store.transaction():
        store["key"] = new
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    assert b"s3cr" not in (tmp_path / "state.db").read_bytes()
    assert dict(RunStore(tmp_path / "state.db")) == {"key": new, "other": b"other"}


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
