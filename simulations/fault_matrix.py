"""The fault matrix: what becomes of a study when something breaks, on a real deployment.

    python -m simulations.fault_matrix [--only NAME ...] [--again] [--list]

Each fault strikes a running study of four sites (SuperLink, proxy, SuperNodes and workers over TLS)
in one phase of its second round, or of its set-up or end, or in every phase. Then it is checked,
and written into simulations/fault_matrix.json and SECURITY.md with the date:

- the study ends, at once or after `fedward-server run --resume`;
- its model is, to the bit, that of one process with the same contributors in each round;
- every site's ledger holds each round once, and every round that the site is part of;
- no site's update lay open behind the TLS or in the SuperLink's database while the study ran.

Faults that were checked are not checked again without --again, so that the matrix may be stopped
and continued.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from client.config import SiteFolder
from client.ledger import Charge
from shared.counts import due_counts
from shared.errors import FedwardError
from shared.supervise import free_port, write_json
from simulations.deployment import (
    Deployment,
    breast_cancer,
    deployed,
    wait_for,
)
from simulations.fault_list import FAULTS
from simulations.fault_page import write_page
from simulations.fault_play import VICTIM, Fault, NotHeldError, Play
from simulations.meddler import Meddler, meddling, pass_on

ROUNDS = 3
RESULTS = Path(__file__).with_name("fault_matrix.json")


def check(fault: Fault, play: Play) -> str:
    """What was found; raises NotHeldError where the study did not end as it must."""
    live = play.live
    status = live.status()
    if status["state"] != fault.ends:
        raise NotHeldError(f"the study is {status['state']}: {status.get('error', '')}")
    rounds = live.rounds()
    _check_ledgers(live, rounds)
    if fault.ends != "finished":
        if any(_charges(live, name) for name in live.names):
            raise NotHeldError("a study that could not begin was charged")
        return "; ".join([*play.notes, f"stops and says: {status['error'].split('.')[0]}"])
    missing = [r["round"] for r in rounds if VICTIM not in r["contributors"] and not r["aborted"]]
    aborted = [r["round"] for r in rounds if r["aborted"]]
    if fault.drops and not missing and not aborted:
        raise NotHeldError("nothing shows that the fault took place")
    same = play.replayed()
    if status["sha256"] != same.sha256:
        raise NotHeldError("the model is not that of one process with the same contributors")
    if found := play.in_the_clear(same.updates):
        raise NotHeldError(f"an update lay open in: {', '.join(sorted(found))}")
    said = [*play.notes]
    said += [f"{VICTIM} not in {_count(len(missing), 'round')}"] if missing else []
    said += [f"{_count(len(aborted), 'round')} aborted and repeated"] if aborted else []
    return "; ".join(said) or "no round lost"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _charges(live: Deployment, name: str) -> Sequence[Charge]:
    folder = SiteFolder(live.site(name))
    with closing(folder.books(folder.config(), folder.identity())) as books:
        books.ledger.verify()
        return books.ledger.charges(live.latest_run().name)


def _check_ledgers(live: Deployment, rounds: Sequence[dict[str, Any]]) -> None:
    for name in live.names:
        charges = _charges(live, name)
        charged = [(c.epoch, c.round_no, c.used_for) for c in charges]
        if len(set(charged)) != len(charged):
            raise NotHeldError(f"{name} charged a round twice")
        mine = [r for r in rounds if name in r["contributors"]]
        for use, due in (
            ("training", {r["round"] for r in mine if r["trained"]}),
            ("evaluation", {r["round"] for r in mine if due_counts(live.plan, r["model_round"])}),
        ):
            paid = {c.round_no for c in charges if c.used_for == use}
            if not due <= paid:
                raise NotHeldError(f"{name} is in rounds {sorted(due - paid)} without a charge")


def play_all(faults: Sequence[Fault], results: dict[str, Any], limit_s: float) -> None:
    """Check faults on one deployment, until they are done or the time is up."""
    started = time.monotonic()
    behind = free_port()
    with tempfile.TemporaryDirectory() as base:
        scenario = breast_cancer(ROUNDS, timeout_s=90.0, spare_rounds=6)
        with deployed(Path(base), scenario, behind=behind) as live:
            project = live.project
            upstream = f"https://{project.bind}"
            files = (project.ca_certificate, project.tls_certificate, project.tls_key)
            with meddling(behind, upstream, *files) as meddler:
                live.start_all()
                for fault in faults:
                    if time.monotonic() - started > limit_s:
                        return
                    results[fault.name] = _one(fault, Play(live, meddler))
                    _save(results)
                    print(f"{fault.name:<28} {results[fault.name]['found']}", flush=True)
                    heal(live, meddler)


def heal(live: Deployment, meddler: Meddler) -> None:
    """All sites connected again, and nobody in the middle."""
    meddler.rule = pass_on
    if live.processes["server"].ended:
        live.start_server()
    for name in live.names:
        if live.processes[name].ended:
            live.start_site(name)
    wait_for("all sites", lambda: live.online() == set(live.names), 400)


def _one(fault: Fault, play: Play) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        with play.watching():
            fault.strike(play)
        held, found = True, check(fault, play)
    except (FedwardError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        held, found = False, f"{type(error).__name__}: {error}"
        play.abandon()
    return {
        "what": fault.what,
        "held": held,
        "found": found,
        "seconds": round(time.monotonic() - begun, 1),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


def read_results() -> dict[str, Any]:
    """What was checked so far."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def _save(results: dict[str, Any]) -> None:
    write_json(results, RESULTS)
    write_page(results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if all that was checked held."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", choices=[f.name for f in FAULTS])
    options.add_argument("--again", action="store_true", help="also those that were checked")
    options.add_argument("--list", action="store_true", help="name the faults and stop")
    options.add_argument("--limit", type=float, default=4 * 3600.0, metavar="S")
    chosen = options.parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{f.name:<28} {f.what}" for f in FAULTS))
        return 0
    results = read_results()
    wanted = [f for f in FAULTS if chosen.only is None or f.name in chosen.only]
    todo = [f for f in wanted if chosen.again or not results.get(f.name, {}).get("held")]
    if todo:
        play_all(todo, results, chosen.limit)
    return 0 if all(results.get(f.name, {}).get("held") for f in wanted) else 4


if __name__ == "__main__":
    raise SystemExit(main())
