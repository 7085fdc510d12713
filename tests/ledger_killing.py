"""A site's round as it touches the disk, in a process that is killed without warning."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from client.ledger import Charge, Ledger
from client.store import RunStore
from shared.identity import Identity

IDENTITY = Identity.from_bytes(bytes(range(32)))
STEPS = 5
LAST = 3
"""The round that counts alone, after the last that trains."""


def due(round_no: int) -> tuple[Charge, ...]:
    """What a round costs, always the same: training and evaluation, at last statistics alone."""
    descriptor, people = f"{round_no:064x}", "0" * 64
    if round_no == LAST:
        return (
            Charge("run-2", "1" * 64, round_no, descriptor, 3.0, 3.0, 1.0, 1, people, "statistics"),
        )
    training = Charge("run-1", "0" * 64, round_no, descriptor, 2.0, 2.0, 0.5, STEPS, people)
    counted = Charge(
        "run-1", "0" * 64, round_no, descriptor, 9.0, 9.0, 1.0, 1, "2" * 64, "evaluation"
    )
    return training, counted


def work(folder: Path, rounds: int, pause_s: float, die_at: str, die_round: int) -> None:
    """Answer rounds in the order of client/run.py until done or killed.

    Args:
        folder: Of the site.
        rounds: Of the study; those that the store knows are answered with the same bytes again.
        pause_s: How long training takes.
        die_at: Where to kill this process, in `die_round`; empty: somebody else will.
        die_round: See `die_at`.
    """

    def reached(place: str, round_no: int) -> None:
        if (place, round_no) == (die_at, die_round):
            os.kill(os.getpid(), signal.SIGKILL)

    store = RunStore(folder / "state.db")
    ledger = Ledger(folder / "ledger.db", IDENTITY)
    ledger.open_for("city", "check")
    for number in range(1, rounds + 1):
        name = f"reply {number}"
        if name not in store:
            with store.transaction():
                if "ledger_head" in store:
                    ledger.require_head(store["ledger_head"], "run run-1")
                for place, charge in enumerate(due(number)):
                    reached("half reserved" if place else "before reserve", number)
                    ledger.reserve(charge, limit=rounds * STEPS)
                reached("reserved", number)
                store["ledger_head"] = ledger.head
                time.sleep(pause_s)
                reply = os.urandom(16)
                reached("trained", number)
                store[name] = reply
                for place, charge in enumerate(due(number)):
                    reached("half released" if place else "masked", number)
                    ledger.release(charge)
                reached("released", number)
        reached("committed", number)
        with (folder / "wire").open("ab") as wire:
            wire.write(number.to_bytes(4, "little") + store[name])
            wire.flush()
            os.fsync(wire.fileno())
        reached("sent", number)
