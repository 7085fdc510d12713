"""The site's privacy ledger: what its patients have spent, charged before anything leaves.

One SQLite file per site, outside every run. An event is `reserved` before the round trains and
marked `released` once the masked update is ready to leave; a crash in between counts as spent.
Each event carries the sha256 of the one before it, so a changed or removed line shows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from client.store import connect
from shared.config import canonical_json
from shared.errors import PolicyError

_TABLE = """
CREATE TABLE IF NOT EXISTS event (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL, round INTEGER NOT NULL, descriptor TEXT NOT NULL,
    steps INTEGER NOT NULL, body BLOB NOT NULL, chain BLOB NOT NULL,
    released INTEGER NOT NULL DEFAULT 0,
    UNIQUE (run, round)
)
"""


@dataclass(frozen=True)
class Charge:
    """What one round costs a patient of this site: Poisson-sampled Gaussian steps.

    Attributes:
        run: Hex id of the run.
        plan_sha256: The study's plan.
        round_no: The secure sum's round, unique within the run.
        descriptor: Hex digest of the round's descriptor.
        noise_multiplier: Noise over clip norm, per step.
        sample_rate: Poisson rate per step.
        steps: Local steps.
    """

    run: str
    plan_sha256: str
    round_no: int
    descriptor: str
    noise_multiplier: float
    sample_rate: float
    steps: int


class Ledger:
    """The charges of one site, append-only."""

    def __init__(
        self, path: Path, *, durable: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self._db = connect(path, durable=durable)
        self._clock = clock
        self._db.execute(_TABLE)

    def reserve(self, charge: Charge) -> None:
        """Write a charge before its round trains; the same charge again changes nothing.

        Raises:
            PolicyError: the round is already charged with another descriptor or cost.
        """
        body = canonical_json(asdict(charge))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            row = self._db.execute(
                "SELECT body FROM event WHERE run = ? AND round = ?", (charge.run, charge.round_no)
            ).fetchone()
            if row is None:
                self._append(charge, body)
            elif bytes(row[0]) != body:
                raise PolicyError(
                    f"round {charge.round_no} of this run is already charged to the ledger under "
                    "another descriptor. A round is trained once; start a new round instead."
                )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _append(self, charge: Charge, body: bytes) -> None:
        last = self._db.execute("SELECT chain FROM event ORDER BY number DESC LIMIT 1").fetchone()
        chain = _link(bytes(last[0]) if last else bytes(32), body)
        self._db.execute(
            "INSERT INTO event (run, round, descriptor, steps, body, chain)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (charge.run, charge.round_no, charge.descriptor, charge.steps, body, chain),
        )

    def release(self, charge: Charge) -> None:
        """Mark a reserved charge as released: its update is about to leave."""
        self._db.execute(
            "UPDATE event SET released = 1 WHERE run = ? AND round = ?",
            (charge.run, charge.round_no),
        )

    def charges(self, run: str | None = None) -> tuple[Charge, ...]:
        """All charges, or those of one run, oldest first; reserved ones count as spent."""
        rows = self._db.execute("SELECT body FROM event ORDER BY number").fetchall()
        charges = (Charge(**json.loads(body)) for (body,) in rows)
        return tuple(c for c in charges if run in (None, c.run))

    def steps(self, run: str) -> int:
        """Steps charged to one run so far."""
        row = self._db.execute("SELECT SUM(steps) FROM event WHERE run = ?", (run,)).fetchone()
        return int(row[0] or 0)

    def verify(self) -> None:
        """Recompute the hash chain.

        Raises:
            PolicyError: a line was changed or removed; the message names the first bad one.
        """
        previous = bytes(32)
        for row in self._db.execute(
            "SELECT number, run, round, descriptor, steps, body, chain FROM event ORDER BY number"
        ):
            body = row[5] if isinstance(row[5], bytes) else str(row[5]).encode()
            previous = _link(previous, body)
            if previous != row[6] or row[1:5] != _columns(body):
                raise PolicyError(
                    f"the ledger's line {row[0]} does not follow from the one before it: a line "
                    "was changed or removed. Restore the ledger from a backup before any study."
                )

    def close(self) -> None:
        """Release the file."""
        self._db.close()


def _link(previous: bytes, body: bytes) -> bytes:
    return hashlib.sha256(b"fedward-ledger/1" + previous + body).digest()


def _columns(body: bytes) -> tuple[str, int, str, int]:
    """What the columns beside a body must say."""
    charge = Charge(**json.loads(body))
    return charge.run, charge.round_no, charge.descriptor, charge.steps
