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


def charge(round_no: int) -> Charge:
    """The charge of one round, always the same."""
    return Charge("run-1", "0" * 64, round_no, f"{round_no:064x}", 2.0, 2.0, 0.5, STEPS, "0" * 64)


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
                reached("before reserve", number)
                ledger.reserve(charge(number), limit=rounds * STEPS)
                reached("reserved", number)
                store["ledger_head"] = ledger.head
                time.sleep(pause_s)
                reply = os.urandom(16)
                reached("trained", number)
                store[name] = reply
                reached("masked", number)
                ledger.release(charge(number))
                reached("released", number)
        reached("committed", number)
        with (folder / "wire").open("ab") as wire:
            wire.write(number.to_bytes(4, "little") + store[name])
            wire.flush()
            os.fsync(wire.fileno())
        reached("sent", number)
