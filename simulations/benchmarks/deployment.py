"""Seconds per message and per round on the deployment engine: Flower as it comes, and ours.

    python -m simulations.benchmarks.deployment [--rounds N] [--only flower|fedward] [--json FILE]

The default study (four hospitals, logistic regression, so that computing takes milliseconds) runs
on this machine over TLS with node authentication: SuperLink, proxy, ServerApp and four SuperNodes.
Once the sites run `flower-supernode` as it comes, which starts a process for every message; once
`fedward-site up`. A round is two messages to each site, one after the other, so a message takes
half a round. All sites share this machine's cores: these figures are what four sites at once cost
here, and a site of its own is faster.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.benchmarks.report import Row, parser, publish
from simulations.deployment import Deployment, breast_cancer, deployed, wait_for

MESSAGES = 2
"""One after the other in a round without dropouts: the masked vector, the agreement."""
FLOWER_POLLS_S = 3 / 2 + 1 / 2 + 0.5 / 2 + 0.2 / 2
"""On average: SuperNode 3 s, SuperExec 1 s, SuperNode for the reply 0.5 s, our server 0.2 s."""
OUR_POLLS_S = 0.25 / 2 + 0.05 / 2 + 0.2 / 2
"""The worker does not ask: its SuperNode rings (client/bell.py)."""
VARIANTS = {"flower": FLOWER_POLLS_S, "fedward": OUR_POLLS_S}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--only", choices=list(VARIANTS), help="one variant")
    chosen = options.parse_args(arguments)
    rounds = 2 if chosen.quick else chosen.rounds
    names = [chosen.only] if chosen.only else list(VARIANTS)
    rows = [measure(name, rounds) for name in names]
    publish(rows, ratios(rows), chosen.json)


def measure(variant: str, rounds: int) -> Row:
    """Run one study; its figures."""
    with tempfile.TemporaryDirectory() as base, deployed(Path(base), breast_cancer(rounds)) as live:
        started = time.perf_counter()
        live.start_server()
        for name in live.names:
            live.start_site(name, stock=variant == "flower")
        wait_for("all sites", lambda: live.online() == set(live.names), 200)
        online_s = time.perf_counter() - started
        started = time.perf_counter()
        process = live.run(str(live.plan_file))
        process.popen.wait()
        study_s = time.perf_counter() - started
        return _row(variant, live, online_s, study_s)


def _row(variant: str, live: Deployment, online_s: float, study_s: float) -> Row:
    results = json.loads((live.latest_run() / "results.json").read_text(encoding="utf-8"))
    whole = [r["wall_s"] for r in live.rounds() if not r["dropped"] and not r["aborted"]]
    round_s = statistics.median(whole)
    return {
        "sites_run": variant,
        "rounds": len(whole),
        "round_s": round_s,
        "slowest_round_s": max(whole),
        "message_s": round_s / MESSAGES,
        "polls_s": VARIANTS[variant],
        "over_polls_s": round_s / MESSAGES - VARIANTS[variant],
        "messages_per_site": results["wire"]["messages"] / 2 / len(live.names),
        "up_to_online_s": online_s,
        "study_s": study_s,
    }


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Ours against Flower's, and against the target of 2 s over the polls."""
    by_name: dict[str, Any] = {row["sites_run"]: row for row in rows}
    found = {}
    if "fedward" in by_name:
        found["fedward_over_polls_s"] = float(by_name["fedward"]["over_polls_s"])
    if len(by_name) == len(VARIANTS):
        found["message_flower_to_fedward"] = (
            by_name["flower"]["message_s"] / by_name["fedward"]["message_s"]
        )
        found["study_flower_to_fedward"] = (
            by_name["flower"]["study_s"] / by_name["fedward"]["study_s"]
        )
    return found


if __name__ == "__main__":
    main()
