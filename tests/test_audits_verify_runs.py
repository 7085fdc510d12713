"""Runs of every kind verify: dropouts, aborts, refills, both modes, noised counts, statistics."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from study_cases import Sites

from client import recovery
from client.config import SiteFolder
from client.evidence import export_run
from client.ledger import Ledger
from shared.identity import Identity
from simulations.audits.verify import verify
from simulations.cli import main
from simulations.grid import Delivery, Direction
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario
from simulations.sites import approve

SMALL = ("--quiet", "--set", "evaluation.bins=16")


@pytest.mark.parametrize(
    "more",
    [
        ("breast_cancer", "--rounds", "3", "--set", "privacy.mode=distributed"),
        ("breast_cancer", "--rounds", "3", "--set", "evaluation.release=noised",
         "--set", "evaluation.epsilon=2", "--set", "evaluation.every=2"),
        ("breast_cancer", "--rounds", "2", "--set", "optimizer.name=fedadam",
         "--set", "audit.keep_sums=false"),
    ],
    ids=["distributed", "noised counts", "no sums kept"],
)  # fmt: skip
def test_a_run_of_this_kind_holds(tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(["run", *more, *SMALL, "--out", str(tmp_path / "run")]) == 0
    found = verify(tmp_path / "run")
    assert [f.name for f in found.findings if f.verdict == "violated"] == []
    open_questions = {f.name for f in found.findings if f.verdict == "not testable"}
    without_sums = {"sums"} if "audit.keep_sums=false" in more else set()
    assert open_questions == {"plan-approved", "identities"} | without_sums


def test_a_ledger_that_went_on_under_a_second_identity_holds(tmp_path: Path) -> None:
    """City lost its key, recovered, and took part in a study with the ledger it had."""
    base = tmp_path / "sites"
    scenario = load_scenario("breast_cancer", ["training.rounds=2", "evaluation.bins=16"])
    study = Sites(scenario, base)
    study.study("run-1")
    folder, renewed = study.folders["city"], Identity.generate()
    old = Identity.load(folder / "identity.pem")
    before = list(open_ledger(folder, old).lines())
    rows, populations = recovery._read_ledger(folder / "ledger.db")
    recovery._write_successor(folder / "new.db", renewed, rows, populations)
    for file in folder.glob("ledger.db*"):
        file.unlink()
    (folder / "new.db").rename(folder / "ledger.db")
    (folder / "identity.pem").unlink()
    renewed.save(folder / "identity.pem")
    for site in study.folders.values():  # everyone compares the new fingerprint, and pins it
        for name in ("roster.json", "policy.toml"):
            text = (site / name).read_text().replace(old.public.hex(), renewed.public.hex())
            text = text.replace(old.fingerprint, renewed.fingerprint)
            text = re.sub(r"(?m)^(max_epsilon\w*) = .*$", r"\1 = 100.0", text)
            (site / name).write_text(text)
    study.roster = SiteFolder(folder).roster()
    for site in study.folders.values():
        approve(SiteFolder(site), study.plan)
    study.study("run-2")
    export = tmp_path / "export"
    export_run(SiteFolder(folder), "run-2", export)
    found = verify(export)
    assert [(f.name, f.explanation) for f in found.findings if f.verdict == "violated"] == []
    said = next(f for f in found.findings if f.name == "ledger").explanation
    assert "begun under 1 earlier identity" in said
    # The old study's charges are in the sum that the accountants agree on.
    accounted = next(f for f in found.findings if f.name == "accounting").value or 0.0
    promise = next(f for f in found.findings if f.name == "promise").value or 0.0
    assert accounted > 1.2 * promise
    # The new key signs all lines: those of the old ledger, under the old key, do not fit in.
    lines = (export / "ledger.jsonl").read_text().split("\n")
    number, body, chain, signature = before[1]
    lines[2] = json.dumps(
        {"number": number, "body": body, "chain": chain.hex(), "signature": signature.hex()}
    )
    (export / "ledger.jsonl").write_text("\n".join(lines))
    assert "ledger" in {f.name for f in verify(export).findings if f.verdict == "violated"}


def open_ledger(folder: Path, identity: Identity) -> Ledger:
    return Ledger(folder / "ledger.db", identity, durable=False)


def test_a_statistics_study_holds(tmp_path: Path) -> None:
    assert main(["run", "statistics", "--quiet", "--out", str(tmp_path / "run")]) == 0
    found = verify(tmp_path / "run")
    assert [f.name for f in found.findings if f.verdict == "violated"] == []
    promise = next(f for f in found.findings if f.name == "promise")
    assert "statistics:" in promise.explanation


def test_dropouts_aborts_and_refills_hold(tmp_path: Path) -> None:
    asked: Counter[tuple[str, str]] = Counter()

    def lose(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        del direction
        asked[site, action] += 1
        gone = "round" in action and (
            (site == "rural" and asked[site, action] in (5, 6))
            or (site in ("city", "county") and asked[site, action] == 12)
        )
        return Delivery(() if gone else (body,))

    settings = ["training.rounds=14", "training.spare_rounds=4", "training.round_timeout_s=2",
                "secure_sum.prekey_rounds=6", "evaluation.bins=16"]  # fmt: skip
    run = tmp_path / "run"
    scenario = load_scenario("breast_cancer", settings)
    execute(prepare(scenario, RunOptions(out=run, device="cpu", faults=lose)), lambda report: None)
    rounds = json.loads((run / "results.json").read_text())["rounds"]
    assert any(r["dropped"] for r in rounds)
    assert any(r["aborted"] for r in rounds)
    found = verify(run)
    assert [(f.name, f.explanation) for f in found.findings if f.verdict == "violated"] == []
    assert found.history is not None
    assert len({r.descriptor.batch for r in found.history.rounds}) > 1  # prekeys were refilled
    left = sum("rural" in r.contributors for r in found.history.sums)
    charged = next(f for f in found.findings if f.name == "charges" and "rural" in f.claim)
    assert charged.explanation.startswith(f"{left} vectors")
    assert left < len(found.history.sums)
