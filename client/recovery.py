"""After the worst: a lost or stolen key, and a machine restored from an older snapshot.

A new identity takes over the old one's ledger line by line, so that nothing that was spent is
forgotten. A restored snapshot has forgotten what happened since: whatever could have been spent in
the meantime counts as spent, and no run that was open goes on, since its mask keys could be used
twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client import enrolment
from client.budget import NO_COST
from client.chain import START, link
from client.config import SiteConfig, SiteFolder
from client.consent import LEDGER_FILE, Books, People, approval_fields
from client.journal import FILE as JOURNAL_FILE
from client.ledger import SCHEMA, Body, Charge, HeadMovedError, Ledger, check_lines
from client.patients import Population, digest_of
from client.store import connect
from shared.config import canonical_json, require
from shared.errors import ConfigError, PolicyError
from shared.files import make_folder
from shared.identity import Identity
from shared.plan import StudyPlan
from shared.privacy import Use, costs_of
from shared.study import Receipt

KEPT_ASIDE = (
    *("identity.pem", "node_key", "node_key.pub", "kit.json", "request.json"),
    *("coordinator.json", "roster.json", JOURNAL_FILE),
)


def new_identity(folder: SiteFolder, invitation: bytes, now: float) -> Path:
    """Enrol again under a new identity; the ledger goes on under it.

    Args:
        folder: Of the site; its ledger and patients' key must be there.
        invitation: A new one, once the coordinator revoked the old identity; its signer's
            fingerprint was compared.
        now: Unix seconds.

    Returns:
        The folder in which everything of the old identity is kept.

    Raises:
        PolicyError: the ledger is gone, or was changed.
        ProtocolError: the invitation is refused.
        ConfigError: it is for another site.
    """
    invited = enrolment.read_invitation(invitation, now).record.site
    require(
        invited == folder.config().name,
        f"the invitation is for {invited!r}; this site is {folder.config().name!r}",
    )
    ledger = folder.path / LEDGER_FILE
    if not ledger.exists():
        raise PolicyError(
            f"{ledger} is gone. Without it nobody knows what this site's patients have spent; "
            "restore it from a backup first."
        )
    rows, populations = _read_ledger(ledger)
    aside = _aside(folder, "identity", now)
    for name in KEPT_ASIDE:
        if (folder.path / name).exists():
            (folder.path / name).rename(aside / name)
    enrolment.enrol(folder, invitation, now)
    successor = folder.path / f".{LEDGER_FILE}"
    _write_successor(successor, folder.identity(), rows, populations)
    ledger.rename(aside / LEDGER_FILE)
    for tail in ("-wal", "-shm"):
        Path(f"{ledger}{tail}").unlink(missing_ok=True)
    successor.rename(ledger)
    if (folder.path / "runs").exists():
        (folder.path / "runs").rename(aside / "runs")
    with closing(Ledger(ledger, folder.identity())) as books:
        for run in _open_runs(books):
            books.close_run(run)
    return aside


def _read_ledger(path: Path) -> tuple[list[str], list[tuple[str, bytes]]]:
    """Every line's text, once chain and signatures hold under the key that began the ledger."""
    try:
        with closing(connect(path, durable=True)) as database:
            lines = database.execute(
                "SELECT number, body, chain, signature FROM event ORDER BY number"
            ).fetchall()
            populations = database.execute("SELECT digest, members FROM population").fetchall()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        first = _record(lines[0][1])
        public = bytes.fromhex(first["public"])
    except (sqlite3.Error, IndexError, KeyError, ValueError) as error:
        raise PolicyError(f"{path} is damaged ({error}). Restore a backup.") from None
    check_lines(((n, b, bytes(c), bytes(s)) for n, b, c, s in lines), public)
    return [line[1] for line in lines], [(d, bytes(m)) for d, m in populations]


def _write_successor(
    path: Path, identity: Identity, rows: Sequence[str], populations: Sequence[tuple[str, bytes]]
) -> None:
    """The same events, signed by the new identity; the first line says whose they were."""
    path.unlink(missing_ok=True)
    Ledger(path, identity).close()
    head = START
    for row in rows:
        head = link(SCHEMA, head, row.encode())
    first = _record(rows[0])
    follows = {"public": first["public"], "head": head.hex(), "events": len(rows)}
    opened = first | {"public": identity.public.hex(), "salt": os.urandom(16).hex()}
    opened["follows"] = [*first.get("follows", []), follows]
    chain = START
    with closing(connect(path, durable=True)) as database:
        database.execute("BEGIN IMMEDIATE")
        for number, body in enumerate([canonical_json(opened).decode(), *rows[1:]], start=1):
            chain = link(SCHEMA, chain, body.encode())
            database.execute(
                "INSERT INTO event (number, body, chain, signature) VALUES (?, ?, ?, ?)",
                (number, body, chain, identity.sign("ledger", chain)),
            )
        database.executemany("INSERT INTO population VALUES (?, ?)", populations)
        database.execute("COMMIT")


@dataclass(frozen=True)
class WrittenOff:
    """What a restored site counts as spent although it may not have been.

    Attributes:
        steps: By study and use, added to the ledger.
        aside: Where the open runs' state is kept.
    """

    steps: tuple[tuple[str, str, int], ...]
    aside: Path


def write_off(
    folder: SiteFolder,
    config: SiteConfig,
    receipts: Sequence[Receipt],
    plans: Sequence[StudyPlan],
    now: float,
) -> WrittenOff:
    """Make a ledger that may be too old safe again: all that was open counts as spent.

    Args:
        folder: Of the site, as it was restored.
        config: Its settings.
        receipts: This site's own, signed, as others kept them.
        plans: Plans that may have been approved after the snapshot; their whole cost is charged.
        now: Unix seconds.

    Raises:
        PolicyError: the ledger was changed; or a receipt shows a run that the ledger does not
            know, and its plan is not among `plans`.
    """
    with closing(folder.books(config, folder.identity())) as books:
        books.ledger.verify()
        _refuse_unknown(books.ledger, receipts, plans)
        for plan in plans:
            _approve_as_spent(books, plan)
        steps = tuple(_charge_the_rest(books.ledger))
    aside = _aside(folder, "snapshot", now)
    if (folder.path / "runs").exists():
        (folder.path / "runs").rename(aside / "runs")
    return WrittenOff(steps, aside)


def _refuse_unknown(
    ledger: Ledger, receipts: Sequence[Receipt], plans: Sequence[StudyPlan]
) -> None:
    known = {event["run"] for event in ledger.events("bound")}
    given = {bytes.fromhex(plan.sha256) for plan in plans}
    open_plans = {bytes.fromhex(event["plan_sha256"]) for event in ledger.events("approved")}
    for receipt in receipts:
        if receipt.run_id not in known and receipt.plan_sha256 not in given | open_plans:
            raise PolicyError(
                f"the receipt of run {receipt.run_id} is of plan {receipt.plan_sha256.hex()[:16]}, "
                "which this ledger never saw: it is older than that study. Restore a newer "
                "ledger.db, or give the plan with --plan, to count its whole cost as spent."
            )


def _approve_as_spent(books: Books, plan: StudyPlan) -> None:
    """Note an approval that was given after the snapshot, on every patient that is known."""
    population = _everyone(books.ledger)
    people: People = dict.fromkeys(costs_of(plan), population)
    books.ledger.add_population(population, books.facts.dataset)
    while True:
        fields = approval_fields(plan, people, NO_COST, books.limits) | {"basis": "schedule"}
        try:
            books.ledger.append("approved", fields, expected_head=books.ledger.head)
        except HeadMovedError:
            continue
        return


def _everyone(ledger: Ledger) -> Population:
    digests = [event["digest"] for event in ledger.events("population")]
    if not digests:
        raise PolicyError(
            "this ledger knows no patient yet, so no plan can be charged to any. Restore a newer "
            "ledger.db."
        )
    members = np.unique(np.concatenate([ledger.members(digest) for digest in digests]))
    return Population(digest_of(members), members)


def _charge_the_rest(ledger: Ledger) -> list[tuple[str, str, int]]:
    """Charge what every open approval could still have cost, and close its run."""
    bound: dict[int, list[Body]] = {}
    for event in ledger.events("bound"):
        bound.setdefault(event["approval"], []).append(event)
    closed = {event["run"] for event in ledger.events("closed")}
    gone = {event["approval"] for event in ledger.events("withdrawn")}
    written = []
    for approval in ledger.events("approved"):
        number = approval["number"]
        takers = bound.get(number, [])
        if (takers and takers[-1]["run"] in closed) or (number in gone and not takers):
            continue
        run = takers[-1]["run"] if takers else f"written-off-{number}"
        where = {use: part["population"] for use, part in approval["parts"].items()}
        where |= takers[-1]["populations"] if takers else {}
        if not takers:
            _bind(ledger, approval, run, where)
        for use, part in approval["parts"].items():
            left = part["steps"] - ledger.steps(run, use)
            if left > 0:
                ledger.reserve(_charge(run, approval, use, left, where), limit=part["steps"])
                written.append((approval["name"], use, left))
        ledger.close_run(run)
    return written


def _bind(ledger: Ledger, approval: Body, run: str, where: dict[str, str]) -> None:
    fields: Body = {"run": run, "approval": approval["number"], "basis": "schedule"}
    fields |= {"plan_sha256": approval["plan_sha256"], "populations": where}
    ledger.append("bound", fields, expected_head=ledger.head)


def _charge(run: str, approval: Body, use: Use, steps: int, where: dict[str, str]) -> Charge:
    part = approval["parts"][use]
    return Charge(
        run=run,
        plan_sha256=approval["plan_sha256"],
        round_no=0,  # rounds begin at 1; nothing that a server asks for collides with it
        descriptor="written off",
        noise_multiplier=part["noise_multiplier"],
        alone=part["alone"],
        sample_rate=part["sample_rate"],
        steps=steps,
        population=where[use],
        used_for=use,
    )


def _open_runs(ledger: Ledger) -> list[str]:
    closed = {event["run"] for event in ledger.events("closed")}
    return sorted({event["run"] for event in ledger.events("bound")} - closed)


def _aside(folder: SiteFolder, why: str, now: float) -> Path:
    aside = folder.path / "former" / f"{why}-{int(now)}"
    if aside.exists():
        raise ConfigError(f"{aside} exists; wait a second and try again.")
    make_folder(aside)
    return aside


def _record(text: str) -> Body:
    record = json.loads(text)
    require(isinstance(record, dict), "the ledger's first line is damaged; restore a backup")
    return dict(record)
