"""What the ledger and the noise cost: appending, composing 10,000 events, normals against torch.

    python -m simulations.benchmarks.ledger [--json FILE] [--quick]

Appending waits for the disk (SQLite, synchronous=FULL), with one signature a line; composing reads
the history of the worst patient and composes it. Noise: ChaCha20-keyed normals and discrete
Gaussians, beside torch.randn. All in milliseconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from client.budget import commitments
from client.discrete import discrete_gaussian
from client.ledger import Charge, Ledger
from client.noise import ChaChaRandom
from client.patients import PatientKey
from shared.identity import Identity
from shared.privacy import epsilon_of_events
from simulations.benchmarks.report import best_of, parser, publish

DURABLE = 100
KINDS = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__ or "").parse_args(argv)
    events, numbers = (500, 1 << 16) if options.quick else (10_000, 1 << 20)
    torch.set_num_threads(1)
    rows = [*_ledger(events), *_noise(numbers, options.repetitions)]
    found = {row["what"]: row["ms"] for row in rows}
    ratios = {
        "append against its limit of 20 ms": found["append, durable"] / 20,
        "compose against its limit of 2 s": found[f"compose {events} events"] / 2000,
        "normals against torch.randn": found["ChaCha20 normals"] / found["torch.randn"],
        "discrete Gaussians against torch.randn": found["discrete Gaussians"]
        / found["torch.randn"],
    }
    publish(rows, ratios, options.json)


def _charge(number: int, population: str) -> Charge:
    noise = 20.0 + number % KINDS
    return Charge("run-1", "0" * 64, number, f"{number:064x}", noise, noise, 0.1, 5, population)


def _ledger(events: int) -> list[dict[str, Any]]:
    ward = PatientKey(bytes(32)).population(["a", "b"])
    identity = Identity.generate()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        with closing(Ledger(path, identity)) as ledger:
            ledger.open_for("city", "check")
            ledger.add_population(ward, "ward")
            waited = []
            for number in range(DURABLE):
                started = time.perf_counter()
                ledger.reserve(_charge(number, ward.digest), limit=10**9)
                waited.append(time.perf_counter() - started)
        with closing(Ledger(path, identity, durable=False)) as ledger:
            for number in range(DURABLE, events):
                ledger.reserve(_charge(number, ward.digest), limit=10**9)
            started = time.process_time()
            spent = [c.event for c in commitments(ledger)]
            epsilon_of_events(spent, 1e-5)
            composed = time.process_time() - started
    return [
        {"what": "append, durable", "ms": 1000 * statistics.median(waited)},
        {"what": f"compose {events} events", "ms": 1000 * composed},
    ]


def _noise(numbers: int, repetitions: int) -> list[dict[str, Any]]:
    random = ChaChaRandom.from_system()
    tasks = {
        "torch.randn": lambda: torch.randn(numbers),
        "ChaCha20 normals": lambda: random.gaussian(numbers),
        "discrete Gaussians": lambda: discrete_gaussian(random, 1000.0, numbers),
    }
    best = best_of(tasks, repetitions)
    return [{"what": what, "ms": 1000 * seconds} for what, seconds in best.items()]


if __name__ == "__main__":
    main()
