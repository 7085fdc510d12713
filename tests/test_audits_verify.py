"""Offline verification: an untouched run holds; whatever is altered in it is found and named."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from audit_run import SITES, make_run, reseal

from server.manifest import write_manifest
from server.report import render
from shared import plan as plans
from shared.errors import AuditError, ConfigError, FedwardError
from shared.evidence import (
    RECORD_FILE,
    DealsSeen,
    RoundEnded,
    read_frames,
    read_record_file,
    write_frames,
)
from shared.identity import Identity
from shared.messages import decode, encode, kind_of
from shared.secagg.messages import Descriptor, Settlement
from shared.study import Receipt, SignedReceipt
from simulations.audits.accounting import Account, account, check_agreement
from simulations.audits.books import check_receipts, receipts_of
from simulations.audits.chain import replay
from simulations.audits.outcome import models_before
from simulations.audits.verification import Expected, Verified
from simulations.audits.verify import verify

Made = tuple[Path, dict[str, Identity]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("verify") / "run"
    return out, make_run(out)


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def broken(found: Verified) -> dict[str, str]:
    """File, or name where there is none, of each refuted claim -> what was said."""
    return {
        f.details.get("file", f.name): f.explanation
        for f in found.findings
        if f.verdict == "violated"
    }


def expected_of(made: Made) -> Expected:
    plan = verify(made[0]).plan
    assert plan is not None
    return Expected(plan.sha256, {name: key.fingerprint for name, key in made[1].items()})


def test_an_untouched_run_holds_and_says_what_nobody_signed(made: Made) -> None:
    found = verify(made[0], expected_of(made))
    assert broken(found) == {}
    assert {f.verdict for f in found.findings} == {"not refuted"}
    assert {"rounds[].wall_s", "final.per_site", "started"} <= set(found.unsigned)
    assert not {k for k in found.unsigned if "epsilon" in k or "contributors" in k}


def test_a_site_export_holds_alone(made: Made) -> None:
    found = verify(made[0] / "evidence" / "sites" / "rural", expected_of(made))
    assert {f.verdict for f in found.findings} == {"not refuted"}
    assert {f.name for f in found.findings} >= {"rounds", "ledger", "charges", "accounting"}


def test_what_the_auditor_does_not_know_is_said(made: Made) -> None:
    open_questions = {f.name for f in verify(made[0]).findings if f.verdict == "not testable"}
    assert open_questions == {"plan-approved", "identities"}
    keys = {name: key.fingerprint for name, key in made[1].items()}
    stranger = Identity.generate().fingerprint
    wrong = verify(made[0], Expected("0" * 64, keys | {"city": stranger}))
    assert set(broken(wrong)) == {"plan-approved", "identities"}
    assert "city" in broken(wrong)["identities"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run directory nor"):
        verify(tmp_path)


def files_of(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


@pytest.mark.slow
def test_any_altered_byte_of_any_file_is_found_and_its_file_named(run: Path) -> None:
    places = random.Random(1)
    for name in files_of(run):
        path = run / name
        whole = path.read_bytes()
        spots = {len(whole) - 1, *places.sample(range(len(whole)), 3)}
        for at in spots:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert name in broken(verify(run)), (name, at)
        for other in (whole[:-1], whole + b"\n"):
            path.write_bytes(other)
            assert name in broken(verify(run)), name
        path.unlink()
        assert name in broken(verify(run)), name
        path.write_bytes(whole)
    assert broken(verify(run)) == {}


def test_a_forger_who_rewrites_the_manifest_is_found_in_every_file_but_the_unsigned_values(
    run: Path,
) -> None:
    places = random.Random(2)
    for name in files_of(run):
        if name in ("evidence/manifest.json", "results.json"):
            continue
        path = run / name
        whole = path.read_bytes()
        for at in {0, len(whole) - 1, places.randrange(len(whole))}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            write_manifest(run)
            assert broken(verify(run)), (name, at)
        path.write_bytes(whole)
        write_manifest(run)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value inside a JSON value, with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def other_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, int | float) else value + "x"


def test_every_value_of_the_results_is_covered_or_listed_as_unsigned(run: Path) -> None:
    file = run / "results.json"
    results = json.loads(file.read_text())
    unsigned = verify(run).unsigned
    covered = 0
    for path, value in leaves(results):
        dotted = ".".join("[]" if isinstance(k, int) else k for k in path).replace(".[]", "[]")
        if any(dotted == u or dotted.startswith((u + ".", u + "[]")) for u in unsigned):
            continue
        forged = json.loads(file.read_text())
        inner = forged
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = other_value(value)
        assert not forged_results_hold(run, forged), dotted
        covered += 1
    assert covered > 50


def forged_results_hold(run: Path, forged: dict[str, Any]) -> bool:
    """Whether a forger's results.json, with its report and manifest, passes."""
    file, report = run / "results.json", run / "report.html"
    kept = file.read_bytes(), report.read_bytes()
    file.write_text(json.dumps(forged, indent=2, ensure_ascii=False) + "\n")
    with contextlib.suppress(FedwardError):
        report.write_text(render(forged))
    write_manifest(run)
    bad = set(broken(verify(run)))
    file.write_bytes(kept[0])
    report.write_bytes(kept[1])
    write_manifest(run)
    return not bad


# The coordinator's seal.


def sealed(run: Path, seal: Identity | None, manifest: Identity | None) -> None:
    """Sign a simulated run's record and list of files as a coordinator does."""
    records = list(read_record_file(run / "evidence" / RECORD_FILE).records)
    reseal(run, "server", records, seal)
    write_manifest(run, manifest)


def test_the_coordinators_seal_is_checked(run: Path, made: Made) -> None:
    desk, stranger = Identity.generate(), Identity.generate()
    expected = dataclasses.replace(expected_of(made), coordinator=desk.fingerprint)
    # Nobody sealed a simulated run: to an auditor who expects a coordinator that is a violation.
    assert set(broken(verify(run, expected))) == {"evidence/record.fwe", "coordinator"}
    sealed(run, desk, desk)
    assert {f.verdict for f in verify(run, expected).findings} == {"not refuted"}
    unknown = verify(run, expected_of(made))
    assert broken(unknown) == {}
    said = next(f for f in unknown.findings if f.name == "coordinator")
    assert said.verdict == "not testable"
    assert desk.fingerprint in said.explanation
    for seal, manifest, wrong in (
        (stranger, desk, {"evidence/record.fwe"}),
        (None, desk, {"evidence/record.fwe"}),
        (desk, None, {"evidence/record.fwe", "coordinator"}),
        (stranger, stranger, {"coordinator"}),
    ):
        sealed(run, seal, manifest)
        assert set(broken(verify(run, expected))) == wrong


# Records, forged one field at a time and sealed again.


def mutations(value: Any) -> Iterator[Any]:
    """Values that differ from `value` in one field each, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for changed in mutations(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: changed})
    elif isinstance(value, bytes):
        yield bytes([value[0] ^ 1]) + value[1:]
        yield value[:-1] + bytes([value[-1] ^ 128])
    elif isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for changed in mutations(value[key]):
                yield value | {key: changed}
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield value[:i] + value[i + 1 :]
            for changed in mutations(inner):
                yield (*value[:i], changed, *value[i + 1 :])
        if len(value) > 1:
            yield (value[1], value[0], *value[2:])
    else:
        yield value + ("x" if isinstance(value, str) else 1)


def holds(records: list[bytes], run: Path) -> bool:
    """Whether the records pass all that concerns the server's record alone."""
    plan = verify_plan(run)
    try:
        history = replay(records, "server", plan, 31)
        receipts = receipts_of(history)
        check_receipts(history, receipts, models_before(history))
    except (FedwardError, KeyError, StopIteration):
        return False
    complete = len(history.settled) == len(history.sums)
    return complete and set(receipts) == set(SITES) and history.last_sum_settled


_PLANS: dict[Path, Any] = {}


def verify_plan(run: Path) -> Any:
    if run not in _PLANS:
        _PLANS[run] = plans.from_bytes((run / "evidence" / "plan.json").read_bytes())
    return _PLANS[run]


def changed(record: bytes) -> Iterator[bytes]:
    """The record with one field changed, at any depth; what cannot be encoded is left out."""
    value = decode(kind_of(record), record)
    inner: list[tuple[type[Any], str]] = [(Descriptor, "descriptor"), (Receipt, "receipt")]
    forms: list[Any] = list(mutations(value))
    for kind, name in inner:
        if hasattr(value, name):
            for other in mutations(decode(kind, getattr(value, name))):
                try:
                    forms.append(dataclasses.replace(value, **{name: encode(other)}))
                except FedwardError:
                    continue
    for form in forms:
        with contextlib.suppress(FedwardError):
            forged = encode(form)
            if forged != record:
                yield forged


def test_every_field_of_every_record_is_bound(made: Made) -> None:
    run, _ = made
    records = list(read_record_file(run / "evidence" / RECORD_FILE).records)
    assert holds(records, run)
    tried = 0
    for place, record in enumerate(records):
        for forged in changed(record):
            assert not holds([*records[:place], forged, *records[place + 1 :]], run), (
                place,
                decode(kind_of(forged), forged),
            )
            tried += 1
    assert tried > 300


def test_no_record_can_be_dropped_repeated_or_moved_to_another_round(made: Made) -> None:
    run, _ = made
    records = list(read_record_file(run / "evidence" / RECORD_FILE).records)
    for place in range(len(records)):
        assert not holds(records[:place] + records[place + 1 :], run), place
    for place, record in enumerate(records):
        if kind_of(record) in (RoundEnded, SignedReceipt):
            assert not holds([*records[: place + 1], record, *records[place + 1 :]], run)
    rounds = [i for i, r in enumerate(records) if kind_of(r) is RoundEnded]
    for one, two in itertools.pairwise(rounds):
        moved = list(records)
        moved[one], moved[two] = moved[two], moved[one]
        assert not holds(moved, run)
    for end in range(1, len(records)):
        assert not holds(records[:end], run)


# Insiders, who hold keys.


def test_a_site_that_cuts_its_own_record_is_found_by_the_others(run: Path, made: Made) -> None:
    keys = made[1]
    record = read_record_file(run / "evidence" / "sites" / "city" / RECORD_FILE)
    last = max(i for i, r in enumerate(record.records) if kind_of(r) is RoundEnded)
    kept = [r for r in record.records[:last] if kind_of(r) is not SignedReceipt]
    reseal(run, "city", kept, keys["city"])
    said = broken(verify(run, expected_of(made)))
    assert "lacks 1 round(s)" in said["same-rounds"]
    assert "city" in said["same-rounds"]


def test_a_receipt_for_another_history_is_found_and_its_site_named(run: Path, made: Made) -> None:
    for field, word in (
        ("transcript", "another history"),
        ("model_sha256", "another model"),
        ("log_root", "another log"),
        ("steps", "charged"),
        ("epsilon", "states epsilon"),
    ):
        forge_receipt(run, made, field)
        said = broken(verify(run, expected_of(made)))
        assert word in said["receipts"], field
        assert "rural" in said["receipts"] or field == "model_sha256"


def forge_receipt(run: Path, made: Made, field: str) -> None:
    server = read_record_file(made[0] / "evidence" / RECORD_FILE)
    records = []
    for record in server.records:
        if kind_of(record) is SignedReceipt:
            receipt = decode(Receipt, decode(SignedReceipt, record).receipt)
            if receipt.site == "rural":
                value = getattr(receipt, field)
                other = bytes(32) if isinstance(value, bytes) else value + 1
                body = encode(dataclasses.replace(receipt, **{field: other}))
                record = encode(SignedReceipt(body, made[1]["rural"].sign("receipt", body)))  # noqa: PLW2901
        records.append(record)
    reseal(run, "server", records, None)


def test_an_older_copy_of_a_ledger_is_found(run: Path, made: Made) -> None:
    file = run / "evidence" / "sites" / "county" / "ledger.jsonl"
    lines = file.read_text().split("\n")
    cut: Callable[[int], str] = lambda count: "\n".join(lines[: len(lines) - 1 - count]) + "\n"  # noqa: E731
    for count, word in ((1, "was replaced by an older copy"), (4, "was replaced by an older copy")):
        file.write_text(cut(count))
        write_manifest(run)
        said = broken(verify(run, expected_of(made)))
        assert any(word in text or "left" in text for text in said.values()), said


def test_a_sum_that_nobody_signed_is_found(run: Path) -> None:
    sums = list(read_frames(run / "evidence" / "sums.fwe"))
    for forged in (sums[::-1], sums[:-1], [*sums, sums[-1]], [sums[0], *sums]):
        write_frames(run / "evidence" / "sums.fwe", forged)
        write_manifest(run)
        assert "evidence/sums.fwe" in broken(verify(run))


def test_fewer_signatures_than_the_threshold_are_too_few(made: Made) -> None:
    run, _ = made
    records = list(read_record_file(run / "evidence" / RECORD_FILE).records)
    place = next(i for i, r in enumerate(records) if kind_of(r) is RoundEnded)
    ended = decode(RoundEnded, records[place])
    few = dict(list(ended.signatures.items())[:2])
    records[place] = encode(dataclasses.replace(ended, signatures=few))
    with pytest.raises(AuditError, match="2 sites signed the contributors; 3 must"):
        replay(records, "server", verify_plan(run), 31)


def test_the_records_are_of_the_kinds_that_the_tests_alter(made: Made) -> None:
    records = read_record_file(made[0] / "evidence" / RECORD_FILE).records
    kinds = {kind_of(r) for r in records}
    assert {DealsSeen, RoundEnded, Settlement, SignedReceipt} <= kinds


def test_accountants_that_disagree_are_noticed() -> None:
    found = account({(1.0, 0.1): 50}, 1e-5)
    check_agreement(found)
    assert found.prv == pytest.approx(found.pld, abs=0.02)
    for other in ({"prv": found.pld * 0.9}, {"fine": found.pld + 0.1}, {"rdp": found.pld * 0.95}):
        with pytest.raises(AuditError, match="disagrees"):
            check_agreement(dataclasses.replace(found, **other))
    assert account({}, 1e-5) == Account(1e-5, 0.0, 0.0, 0.0, 0.0)
