"""Run evidence: server and sites keep the same rounds, in files that no byte can be changed in."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.evidence import Spool, along
from shared import rfc9162
from shared.errors import ConfigError, FedwardError, ProtocolError
from shared.evidence import (
    RECORD_FILE,
    RoundEnded,
    log_entry,
    log_leaves,
    read_frames,
    read_record_file,
    write_frames,
    write_record_file,
)
from shared.identity import Identity
from shared.messages import decode, encode, kind_of
from shared.secagg.messages import Abort, Descriptor
from shared.study import Receipt, SignedReceipt
from simulations.cli import main

SITES = ("city", "county", "rural", "university")
IDENTITY = Identity.from_bytes(bytes([7] * 32))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["run", "--out", str(out), "--rounds", "5", "--quiet"]) == 0
    return out / "evidence"


def test_server_and_sites_hold_the_same_log_and_every_site_signs_it(evidence: Path) -> None:
    server = read_record_file(evidence / RECORD_FILE)
    leaves = log_leaves(server.records)
    assert len(leaves) == 5 + 1  # the last round evaluates
    signed = [decode(SignedReceipt, r) for r in server.records if kind_of(r) is SignedReceipt]
    receipts = [decode(Receipt, s.receipt) for s in signed]
    assert {r.site for r in receipts} == set(SITES)
    assert {r.log_size for r in receipts} == {6}
    assert {r.log_root for r in receipts} == {rfc9162.root_of(leaves)}
    for name in SITES:
        record = read_record_file(evidence / "sites" / name / RECORD_FILE)
        assert record.keeper == name
        assert log_leaves(record.records) == leaves
        common = [r for r in record.records if kind_of(r) is RoundEnded]
        assert common == [r for r in server.records if kind_of(r) is RoundEnded]


def test_an_export_holds_no_vector(evidence: Path) -> None:
    sums = list(read_frames(evidence / "sums.fwe"))
    exported = (evidence / "sites" / "city" / RECORD_FILE).read_bytes()
    assert len(sums) == 6
    assert not any(total[20:52] in exported for total in sums[:5])  # the last round trains none


def records() -> list[bytes]:
    """Three rounds, the second one aborted, each going on from the one before."""
    made, at = [], bytes(32)
    for round_no in (1, 2, 3):
        descriptor = encode(Descriptor(bytes(32), bytes(32), round_no, bytes(32), at, ("a", "b")))
        made.append(
            encode(Abort(descriptor, "too few"))
            if round_no == 2
            else encode(RoundEnded(descriptor, (), {}, bytes([round_no] * 32)))
        )
        entry = log_entry(made[-1])
        assert entry is not None
        at = entry.transcript
    return made


def write(tmp_path: Path, content: list[bytes], keeper: str = "city") -> Path:
    path = tmp_path / RECORD_FILE
    write_record_file(path, content, keeper=keeper, identity=IDENTITY)
    return path


def refused(path: Path) -> None:
    with pytest.raises(FedwardError):
        read_record_file(path).check_signature(IDENTITY.public)


def test_no_byte_of_a_record_file_can_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path, records())
    read_record_file(path).check_signature(IDENTITY.public)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused(path)
    path.write_bytes(whole + b"\x00")
    refused(path)


@pytest.mark.parametrize("change", ["drop", "swap", "repeat", "none", "foreign"])
def test_records_cannot_be_dropped_moved_or_added_under_the_old_seal(
    tmp_path: Path, change: str
) -> None:
    path = write(tmp_path, records())
    *frames, seal = read_frames(path)
    frames = {
        "drop": frames[:-1],
        "swap": [frames[1], frames[0], *frames[2:]],
        "repeat": [*frames, frames[-1]],
        "none": [],
        "foreign": [*frames, seal],
    }[change]
    write_frames(path, [*frames, seal])
    refused(path)


def test_a_seal_by_another_key_or_for_another_keeper_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, records())
    with pytest.raises(ProtocolError, match="city"):
        read_record_file(path).check_signature(Identity.generate().public)
    write_record_file(path, records(), keeper="city", identity=None)
    with pytest.raises(ProtocolError, match="not signed"):
        read_record_file(path).check_signature(IDENTITY.public)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_record_file(tmp_path / "absent")
    path.write_bytes(b"FWE1")
    with pytest.raises(ProtocolError, match="no record"):
        read_record_file(path)


def test_what_led_nowhere_is_left_out() -> None:
    made = records()
    first = decode(RoundEnded, made[0])
    abandoned = encode(Abort(first.descriptor, "the server stopped"))
    entry = log_entry(made[-1])
    assert entry is not None
    final = entry.transcript
    random.Random(1).shuffle(made)
    assert along((made[0], abandoned, *made[1:]), final) == tuple(made)
    with pytest.raises(ProtocolError, match="does not lead"):
        along(tuple(made), bytes(32))


def test_a_spool_keeps_what_is_new_and_sums_only_where_asked(tmp_path: Path) -> None:
    spool = Spool(tmp_path, keep_sums=False)
    for record in (*records(), *records()):
        spool.keep(record)
    spool.publish(records()[1])
    assert spool.records == tuple(records())
    assert list(spool.sums()) == []
    spool.close()
