"""The site's privacy ledger: what its patients have spent, charged before anything leaves.

One SQLite file per site, outside every run, append-only. Each event is a line of JSON that is
chained by sha256 to the one before and signed by the site:

opened      once: the site, its public key, the check of its patients' key
population  a set of patients, by the digest of their keyed hashes
approved    a plan may cost so many steps on a population; they are reserved from now on
bound       a run takes an approval; again when the run's data changed
charge      a round is about to train, or to count its test patients; it counts as spent
released    its masked update is about to leave
closed      a run is over
withdrawn   an approval that no run has taken is given up

What it cannot notice alone: a whole file replaced by an older copy of itself, or its last lines cut
off. Chain heads held elsewhere show that: each run's store and the receipts of its peers have one.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from client.chain import START, ChainKind, check_rows, link
from client.patients import Members, Population, digest_of
from client.store import connect
from shared.config import canonical_json
from shared.errors import PolicyError
from shared.identity import Identity
from shared.privacy import Use

SCHEMA = "fedward-ledger/3"
Body = dict[str, Any]

# Columns are computed by SQLite from the signed text, so that none can say anything else.
_TABLES = """
CREATE TABLE IF NOT EXISTS event (
    number INTEGER PRIMARY KEY,
    body TEXT NOT NULL, chain BLOB NOT NULL, signature BLOB NOT NULL,
    kind TEXT AS (json_extract(body, '$.kind')),
    run TEXT AS (json_extract(body, '$.run')),
    epoch INTEGER AS (json_extract(body, '$.epoch')),
    round INTEGER AS (json_extract(body, '$.round_no')),
    used_for TEXT AS (json_extract(body, '$.used_for')),
    steps INTEGER AS (json_extract(body, '$.steps'))
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON event (run, kind, epoch, round, used_for);
CREATE INDEX IF NOT EXISTS by_kind ON event (kind, run, used_for, steps);
CREATE UNIQUE INDEX IF NOT EXISTS by_chain ON event (chain);
CREATE TABLE IF NOT EXISTS population (digest TEXT PRIMARY KEY, members BLOB NOT NULL);
"""
CHAIN = ChainKind(
    schema=SCHEMA,
    context="ledger",
    name="the ledger",
    remedy="Restore the ledger from a backup before any study.",
    error=PolicyError,
)


@dataclass(frozen=True)
class Charge:
    """What one round costs a patient of this site: Poisson-sampled Gaussian steps.

    Attributes:
        run: Id of the run.
        plan_sha256: The study's plan.
        round_no: The secure sum's round, unique within run and epoch.
        descriptor: Hex digest of the round's descriptor.
        noise_multiplier: Noise over clip norm, per step; over sensitivity, for counts.
        alone: The same of this site's own noise, if every other site sides with the server.
        sample_rate: Poisson rate per step; 1 for counts.
        steps: Local steps; 1 for counts.
        population: Digest of the patients that the steps draw from.
        used_for: What of the round costs it: one round may train some and count others.
        epoch: Of the secure sum's set-up.
    """

    run: str
    plan_sha256: str
    round_no: int
    descriptor: str
    noise_multiplier: float
    alone: float
    sample_rate: float
    steps: int
    population: str
    used_for: Use = "training"
    epoch: int = 0


class Kind(NamedTuple):
    """A kind of step, as charged."""

    used_for: Use
    noise_multiplier: float
    alone: float
    sample_rate: float


class Ledger:
    """The events of one site."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        durable: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the ledger, or begin an empty one; client/consent.py decides which.

        Raises:
            PolicyError: the file is not a ledger of this version.
        """
        self._path, self._identity, self._clock = path, identity, clock
        try:
            self._db = connect(path, durable=durable)
            self._db.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise PolicyError(
                f"{path} is not a ledger that this version reads ({error}). Restore it."
            ) from None

    def open_for(self, site: str, key_check: str) -> None:
        """Write the first event, or check it.

        Raises:
            PolicyError: the ledger is another site's, or its patients were hashed with another
                key than `key_check` names.
        """
        with self._writing():
            first = next(self.events("opened"), None)
            if first is None:
                # The salt hides the chain's head from anyone who could guess the rest.
                fields = {"schema": SCHEMA, "site": site, "key_check": key_check}
                fields |= {"public": self._identity.public.hex(), "salt": os.urandom(16).hex()}
                self._append("opened", fields)
                return
        if first["key_check"] != key_check:
            raise PolicyError(
                f"{self._path} was kept with another patients' key, so no patient in it can be "
                "recognised. Restore the key that belongs to it before any study."
            )
        if first["public"] != self._identity.public.hex() or first["site"] != site:
            raise PolicyError(
                f"{self._path} was begun by site {first['site']!r} under another identity. A new "
                "identity does not empty a ledger: restore the old one."
            )

    @contextmanager
    def _writing(self, expected_head: bytes | None = None) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if expected_head is not None and self.head != expected_head:
                raise HeadMovedError
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def append(self, kind: str, fields: Body, *, expected_head: bytes) -> None:
        """Add one event that was decided upon when the chain ended in `expected_head`.

        Raises:
            HeadMovedError: another process wrote in between; decide again.
        """
        with self._writing(expected_head):
            self._append(kind, fields)

    def _append(self, kind: str, fields: Body) -> None:
        last = self._db.execute("SELECT MAX(number) FROM event").fetchone()[0] or 0
        body = canonical_json({**fields, "kind": kind, "time": round(self._clock(), 3)})
        chain = link(SCHEMA, self.head, body)
        signature = self._identity.sign("ledger", chain)
        self._db.execute(
            "INSERT INTO event (number, body, chain, signature) VALUES (?, ?, ?, ?)",
            (last + 1, body.decode(), chain, signature),
        )

    @property
    def head(self) -> bytes:
        """The chain's last link, 32 bytes; zeros while empty."""
        row = self._db.execute("SELECT chain FROM event ORDER BY number DESC LIMIT 1").fetchone()
        return bytes(row[0]) if row else START

    def require_head(self, head: bytes, holder: str) -> None:
        """Raise PolicyError unless the chain once ended in `head`, which `holder` kept."""
        known = self._db.execute("SELECT 1 FROM event WHERE chain = ?", (head,)).fetchone()
        if known is None:
            raise PolicyError(
                f"the ledger lacks the state {head.hex()[:16]} that {holder} saw: it was replaced "
                "by an older copy, or cut. Restore the newest backup before any study."
            )

    def add_population(self, population: Population, dataset: str) -> None:
        """Write down who a population is; the same one again changes nothing."""
        if self._known(population.digest):
            return
        with self._writing():
            if self._known(population.digest):
                return
            members = population.members.astype("<u8").tobytes()
            self._db.execute("INSERT INTO population VALUES (?, ?)", (population.digest, members))
            self._append("population", {"digest": population.digest, "dataset": dataset})

    def _known(self, digest: str) -> bool:
        row = self._db.execute("SELECT 1 FROM population WHERE digest = ?", (digest,)).fetchone()
        return row is not None

    def members(self, digest: str) -> Members:
        """The keyed hashes of a population's patients, sorted uint64."""
        row = self._db.execute(
            "SELECT members FROM population WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None or digest_of(found := np.frombuffer(row[0], dtype="<u8")) != digest:
            raise PolicyError(
                f"the ledger's population {digest[:16]} is missing or was changed. Restore the "
                "ledger from a backup before any study."
            )
        return found.astype(np.uint64, copy=False)

    def reserve(self, charge: Charge, *, limit: int) -> None:
        """Write a charge before its round trains; the same charge again changes nothing.

        Args:
            charge: What the round costs.
            limit: Steps that the run may cost altogether for the same use.

        Raises:
            PolicyError: the round is charged with another descriptor or cost; or the run is over
                or would pass its limit. Nothing is written then.
        """
        body = asdict(charge)
        with self._writing():
            row = self._db.execute(
                "SELECT body FROM event WHERE run = ? AND kind = 'charge' AND epoch = ?"
                " AND round = ? AND used_for = ?",
                (charge.run, charge.epoch, charge.round_no, charge.used_for),
            ).fetchone()
            if row is None:
                self._refuse_beyond(charge, limit)
                self._append("charge", body)
            elif not body.items() <= json.loads(row[0]).items():
                raise PolicyError(
                    f"round {charge.round_no} of this run is already charged to the ledger under "
                    "another descriptor. A round is trained once; start a new round instead."
                )

    def _refuse_beyond(self, charge: Charge, limit: int) -> None:
        after = self.steps(charge.run, charge.used_for) + charge.steps
        if after > limit:
            step = "local step" if charge.used_for == "training" else "release of counts"
            raise PolicyError(
                f"round {charge.round_no} would be {step} {after} of this run; the plan's "
                f"epsilon covers {limit}. Plan more spare_rounds."
            )
        if self._has("closed", charge.run):
            raise PolicyError("this run is over; another round needs a new run and approval.")

    def release(self, charge: Charge) -> None:
        """Note that a reserved charge's update is about to leave; once."""
        fields: Body = {"run": charge.run, "epoch": charge.epoch, "round_no": charge.round_no}
        fields |= {"used_for": charge.used_for}
        with self._writing():
            known = self._db.execute(
                "SELECT 1 FROM event WHERE run = ? AND kind = 'released' AND epoch = ?"
                " AND round = ? AND used_for = ?",
                (charge.run, charge.epoch, charge.round_no, charge.used_for),
            ).fetchone()
            if known is None:
                self._append("released", fields)

    def close_run(self, run: str) -> None:
        """Note that a run is over: nothing can be charged to it any more."""
        with self._writing():
            if not self._has("closed", run):
                self._append("closed", {"run": run})

    def head_of_run(self, run: str) -> bytes:
        """The chain's link that closed a run; the head while the run goes on."""
        row = self._db.execute(
            "SELECT chain FROM event WHERE kind = 'closed' AND run = ?", (run,)
        ).fetchone()
        return bytes(row[0]) if row else self.head

    def _has(self, kind: str, run: str) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM event WHERE kind = ? AND run = ?", (kind, run)
        ).fetchone()
        return row is not None

    def events(self, kind: str) -> Iterator[Body]:
        """Events of one kind, oldest first, each with its `number`."""
        rows = self._db.execute(
            "SELECT number, body FROM event WHERE kind = ? ORDER BY number", (kind,)
        )
        for number, body in rows.fetchall():
            yield json.loads(body) | {"number": number}

    def since(self, number: int) -> tuple[Body, ...]:
        """Events after the one of this number, oldest first, each with its `number`."""
        rows = self._db.execute(
            "SELECT number, body FROM event WHERE number > ? ORDER BY number", (number,)
        )
        return tuple(json.loads(body) | {"number": n} for n, body in rows.fetchall())

    @property
    def count(self) -> int:
        """How many events there are."""
        return int(self._db.execute("SELECT MAX(number) FROM event").fetchone()[0] or 0)

    def charges(self, run: str | None = None) -> tuple[Charge, ...]:
        """All charges, or those of one run, oldest first; reserved ones count as spent."""
        names = Charge.__dataclass_fields__
        found = (Charge(**{n: e[n] for n in names}) for e in self.events("charge"))
        return tuple(c for c in found if run in (None, c.run))

    def spent(self) -> dict[tuple[str, str], dict[Kind, int]]:
        """Steps charged, by (run, population) and then by kind of step."""
        rows = self._db.execute(
            "SELECT run, json_extract(body, '$.population'), used_for,"
            " json_extract(body, '$.noise_multiplier'), json_extract(body, '$.alone'),"
            " json_extract(body, '$.sample_rate'),"
            " SUM(steps) FROM event WHERE kind = 'charge'"
            " GROUP BY 1, 2, 3, 4, 5, 6"
        )
        table: dict[tuple[str, str], dict[Kind, int]] = {}
        for run, population, used_for, sigma, alone, rate, steps in rows:
            kind = Kind(used_for, sigma, alone, rate)
            table.setdefault((run, population), {})[kind] = int(steps)
        return table

    def steps(self, run: str, used_for: Use = "training") -> int:
        """Steps charged to one run so far for one use."""
        row = self._db.execute(
            "SELECT SUM(steps) FROM event WHERE run = ? AND kind = 'charge' AND used_for = ?",
            (run, used_for),
        ).fetchone()
        return int(row[0] or 0)

    def lines(self) -> Iterator[tuple[int, str, bytes, bytes]]:
        """(number, body, chain, signature) of every event, oldest first."""
        rows = self._db.execute("SELECT number, body, chain, signature FROM event ORDER BY number")
        for number, body, chain, signature in rows:
            yield number, body, bytes(chain), bytes(signature)

    def verify(self, *, every_signature: bool = True) -> int:
        """Check the file, the chain, the signatures and the populations; the number of events.

        Args:
            every_signature: False checks the last one alone, which covers the whole chain.

        Raises:
            PolicyError: a line was changed, removed, added or moved; the first bad one is named.
        """
        try:
            check = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            if check != "ok":
                raise PolicyError(f"{self._path} is damaged ({check}). Restore a backup.")
            count = check_lines(self.lines(), self._identity.public, every_signature)
            for event in self.events("population"):
                self.members(event["digest"])
        except (sqlite3.DatabaseError, UnicodeDecodeError, ValueError) as error:
            raise PolicyError(f"{self._path} is damaged ({error}). Restore a backup.") from None
        return count

    def close(self) -> None:
        """Release the file."""
        self._db.close()


class HeadMovedError(Exception):
    """The ledger grew between a decision and its writing."""


def check_lines(
    lines: Iterator[tuple[int, str, bytes, bytes]], public: bytes, every_signature: bool = True
) -> int:
    """Check lines of a ledger, of the file or of an export; returns how many there are.

    Raises:
        PolicyError: a line does not follow from the one before it, or is not signed.
    """
    return check_rows(CHAIN, lines, public, every_signature=every_signature)
