"""What a round of the in-process engine costs beyond training and cryptography.

    python -m simulations.benchmarks.engine [--rounds N] [--quick] [--json FILE]

The default study (breast_cancer: four hospitals, logistic regression, counts of test patients in
every round) with one private step a round. First a long study as a user runs it, results and
report included; then shorter ones in which a stopwatch splits each round among its parts. Times
are CPU seconds of this process, one torch thread, so that other programs do not count; wall time
stands beside them. Simulated hospitals do not wait for the disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

import client.app
import server.rounds
import shared.flower
import shared.identity
import shared.messages
import shared.metrics
import shared.secagg.encoding
import shared.secagg.keys
import shared.secagg.masking
import shared.secagg.merkle
import shared.secagg.shamir
from client.ledger import Ledger
from client.run import SiteRun
from client.store import RunStore
from client.training import LocalTrainer
from server.transport import GridTransport
from shared.identity import Identity
from shared.secagg.merkle import Tree
from shared.secagg.ring import Ring
from simulations.benchmarks.report import Row, one_thread, parser, publish
from simulations.benchmarks.stopwatch import Place, Stopwatch, measured
from simulations.grid import InProcessGrid
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

SCENARIO = "breast_cancer"
TARGET_OVERHEAD_MS = 10.0
TARGET_STUDY_S = 60.0
TARGET_ROUNDS = 1000

PARTS: dict[str, Sequence[Place]] = {
    "training": [(LocalTrainer, "train_round")],
    "evaluation": [(LocalTrainer, "predict"), (shared.metrics, "score_histogram")],
    "signatures": [(shared.identity, "verify"), (Identity, "sign")],
    "masks": [
        (shared.secagg.masking, "add_masks"),
        (Ring, "to_wire"),
        (Ring, "from_wire"),
    ],
    "hashes and keys": [
        (shared.secagg.merkle, "root"),
        (shared.secagg.merkle, "check_chunk"),
        (Tree, "__init__"),
        (shared.secagg.encoding, "digest"),
        (shared.secagg.keys, "hkdf"),
        (shared.secagg.keys, "seal"),
        (shared.secagg.keys, "unseal"),
        (shared.secagg.shamir, "split"),
        (shared.secagg.shamir, "combine"),
    ],
    "codec": [(shared.messages, "encode"), (shared.messages, "decode")],
    "store": [
        (RunStore, "_write"),
        (RunStore, "refresh"),
        (Ledger, "reserve"),
        (Ledger, "release"),
        (Ledger, "head"),
        (Ledger, "require_head"),
        (SiteRun, "_log"),
    ],
    "Flower": [
        (ClientApp, "__call__"),
        (GridTransport, "exchange"),
        (InProcessGrid, "push_messages"),
        (InProcessGrid, "pull_messages"),
        (shared.flower, "content"),
        (shared.flower, "body_of"),
    ],
    "site": [(client.app, "answer")],
    "server": [(server.rounds.Study, "run")],
}
OVERHEAD = ("codec", "Flower", "site", "server")
"""Parts that are neither training, cryptography nor writing to disk."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--rounds", type=int, help="of the long study (default 1000)")
    chosen = options.parse_args(arguments)
    one_thread()
    rounds = chosen.rounds or (4 if chosen.quick else TARGET_ROUNDS)
    rows, ratios = long_study(rounds)
    more_rows, more_ratios = split_rounds(chosen)
    publish([*rows, *more_rows], ratios | more_ratios, chosen.json)


def long_study(rounds: int) -> tuple[list[Row], dict[str, float]]:
    """One study, as `fedward-sim run` does it, and where its time went."""
    marks = [_now()]
    marks += _run(rounds)
    marks.append(_now())
    rows: list[Row] = [
        _span("prepare, set up, first round", 1, marks[0], marks[1]),
        _span("the other rounds", rounds, marks[1], marks[-2]),
        _span("finish, results, report", 1, marks[-2], marks[-1]),
        _span("whole study", rounds + 1, marks[0], marks[-1]),
    ]
    # Measured as it is with 1,000 rounds; shorter studies are continued at the same pace.
    thousand_s = rows[-1]["cpu_s"] + rows[1]["ms_per_round"] / 1000 * (TARGET_ROUNDS - rounds)
    return rows, {
        "cpu_s_of_1000_rounds": thousand_s,
        "target_to_1000_rounds": TARGET_STUDY_S / thousand_s,
    }


def split_rounds(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """The parts of a round: means over the fastest tenth of all rounds of several studies."""
    rounds, repetitions = (6, 1) if chosen.quick else (80, chosen.repetitions)
    spent = [part for _ in range(repetitions) for part in _watched(rounds)]
    spent.sort(key=lambda one: sum(one["ms"].values()))
    fastest = spent[: max(1, len(spent) // 10)]
    rows: list[Row] = [
        {
            "what": f"  {part}",
            "ms_per_round": _mean(fastest, "ms", part),
            "calls_per_round": _mean(fastest, "calls", part),
            "overhead": "yes" if part in OVERHEAD else "no",
        }
        for part in PARTS
    ]
    overhead = sum(row["ms_per_round"] for row in rows if row["overhead"] == "yes")
    total = sum(row["ms_per_round"] for row in rows)
    rows.insert(0, {"what": "one round, watched", "ms_per_round": total})
    rows.append({"what": "overhead", "ms_per_round": overhead})
    return rows, {
        "overhead_ms_per_round": overhead,
        "target_to_overhead": TARGET_OVERHEAD_MS / overhead,
    }


Spent = dict[str, dict[str, float]]
"""Milliseconds ("ms") and calls ("calls") of each part in one round."""


def _mean(rounds: Sequence[Spent], what: str, part: str) -> float:
    return sum(one[what].get(part, 0.0) for one in rounds) / len(rounds)


def _watched(rounds: int) -> list[Spent]:
    """What each round of a study took, its first and last aside."""
    watch = Stopwatch()
    spent: list[Spent] = []

    def observe() -> None:
        milliseconds = {part: 1000 * seconds for part, seconds in watch.read().items()}
        spent.append({"ms": milliseconds, "calls": dict[str, float](watch.calls)})
        watch.reset()

    with measured(PARTS, watch):
        _run(rounds, observe)
    return spent[1:-1]


def _run(rounds: int, observe: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
    """Run the scenario with one step a round; the times at which its rounds ended."""
    overrides = [f"training.rounds={rounds}", "training.local_steps=1"]
    scenario = load_scenario(SCENARIO, overrides)
    marks: list[dict[str, float]] = []

    def round_ended(report: object) -> None:
        del report
        marks.append(_now())
        observe()

    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        options = RunOptions(out=Path(folder) / "run", device="cpu")
        execute(prepare(scenario, options), round_ended)
    return marks


def _now() -> dict[str, float]:
    return {"cpu_s": time.process_time(), "wall_s": time.perf_counter()}


def _span(what: str, rounds: int, start: dict[str, float], end: dict[str, float]) -> dict[str, Any]:
    spent = {key: end[key] - start[key] for key in start}
    return {"what": what, "rounds": rounds, **spent, "ms_per_round": 1000 * spent["cpu_s"] / rounds}


if __name__ == "__main__":
    main()
