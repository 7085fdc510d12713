"""One small simulated run whose sites' keys a test knows: it can forge as insiders could."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from unittest import mock

from server.manifest import write_manifest
from shared.evidence import RECORD_FILE, write_record_file
from shared.identity import Identity
from simulations.cli import main

SITES = ("city", "county", "rural", "university")
ROUNDS = 2


def make_run(out: Path, *more: str) -> dict[str, Identity]:
    """Simulate two rounds into `out`; returns the sites' identities."""
    made = [Identity.from_bytes(hashlib.sha256(b"%d" % i).digest()) for i in range(len(SITES))]
    order = itertools.cycle(made)
    with mock.patch("simulations.sites.Identity.generate", side_effect=lambda: next(order)):
        quick = ("--quiet", "--rounds", str(ROUNDS), "--set", "evaluation.bins=16")
        assert main(["run", "--out", str(out), *quick, *more]) == 0
    receipts = json.loads((out / "evidence" / "receipts.json").read_text())["receipts"]
    by_key = {i.public.hex(): i for i in made}
    found = {}
    for name in receipts:
        head = (out / "evidence" / "sites" / name / "ledger.jsonl").read_text().split("\n")[0]
        found[name] = by_key[json.loads(head)["public"]]
    return found


def reseal(run: Path, keeper: str, records: list[bytes], identity: Identity | None) -> None:
    """Write a keeper's record anew, as a forger with its key would, and the manifest with it."""
    folder = run / "evidence" if keeper == "server" else run / "evidence" / "sites" / keeper
    write_record_file(folder / RECORD_FILE, records, keeper=keeper, identity=identity)
    write_manifest(run)
