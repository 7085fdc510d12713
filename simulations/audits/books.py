"""A site's exported ledger against the run: was all that left charged, and at which price?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger_export import check_export
from shared import rfc9162
from shared.errors import PolicyError
from shared.identity import fingerprint
from shared.messages import decode
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from shared.study import Receipt
from simulations.audits.accounting import Account, account
from simulations.audits.chain import History, Round
from simulations.audits.checks import demand

Event = Mapping[str, Any]
TRAINING = "training"


@dataclass(frozen=True)
class LedgerFile:
    """An exported ledger whose chain and signatures hold.

    Attributes:
        site: Whose it says it is.
        events: The signed bodies, oldest first, each with its `number` and `link`.
        heads: Every link that the chain ever ended in.
    """

    site: str
    events: tuple[Event, ...]
    heads: frozenset[bytes]

    def of(self, kind: str, run: str | None = None) -> Iterator[Event]:
        """Events of one kind, all or one run's."""
        for event in self.events:
            if event["kind"] == kind and run in (None, event.get("run")):
                yield event


def read_ledger(path: Path, site: str, public: bytes) -> LedgerFile:
    """Read an export and check every line, down to its last byte.

    Raises:
        AuditError: another site's, or not written as the export writes.
        ConfigError: not such a file.
        PolicyError: a line was changed, removed, added or moved; it is named.
    """
    try:
        _, heads = check_export(path, fingerprint(public))
    except PolicyError as error:
        raise PolicyError(f"{path.name} of {site}: {error}") from None
    lines = path.read_text(encoding="utf-8").split("\n")
    demand(lines[-1] == "", f"{path.name} of {site} does not end with a line's end")
    records = [json.loads(line) for line in lines[:-1]]
    for number, (line, record) in enumerate(zip(lines, records, strict=False)):
        known = {"number", "body", "chain", "signature"} if number else {"schema", "site", "public"}
        demand(
            set(record) == known and json.dumps(record) == line,
            f"{path.name} of {site}: line {number} was not written by an export",
        )
    demand(records[0]["site"] == site, f"{path.name} is of site {records[0]['site']!r}")
    events = tuple(
        json.loads(r["body"]) | {"number": r["number"], "link": bytes.fromhex(r["chain"])}
        for r in records[1:]
    )
    opened = events[0] if events else {"kind": ""}
    demand(
        opened["kind"] == "opened" and opened["site"] == site and opened["public"] == public.hex(),
        f"{path.name} of {site} does not begin as its ledger",
    )
    return LedgerFile(site, events, heads)


def check_charges(ledger: LedgerFile, history: History, trained: Mapping[int, bool]) -> int:
    """Every vector that left this site was charged before, for the very round; returns how many.

    Args:
        ledger: The site's.
        history: The run's rounds.
        trained: Round number -> whether it trained.

    Raises:
        AuditError: a round is missing or charged under another descriptor; it is named.
    """
    plan, run = history.plan, history.session.run_id
    rounds = {r.number: r for r in history.rounds}
    charges = _by_round(ledger.of("charge", run), TRAINING)
    released = _by_round(ledger.of("released", run), TRAINING)
    for number, charge in charges.items():
        demand(number in rounds, f"round {number} is charged, but is not in the record")
        _check_charge(charge, rounds[number], plan)
    if plan.privacy.mode == "none":
        return 0
    left = [r for r in history.rounds if ledger.site in r.contributors and trained[r.number]]
    for one in left:
        demand(one.number in charges, f"round {one.number} left this site without a charge")
        demand(one.number in released, f"round {one.number} left before it was marked as released")
        demand(
            charges[one.number]["number"] < released[one.number]["number"],
            f"round {one.number} was charged after it had left",
        )
    return len(left)


def _check_charge(charge: Event, what: Round, plan: StudyPlan) -> None:
    where = f"the charge of round {what.number}"
    demand(charge["descriptor"] == what.digest.hex(), f"{where} is for another descriptor")
    demand(charge["plan_sha256"] == plan.sha256, f"{where} is for another plan")
    demand(charge["noise_multiplier"] == noise_multiplier_of(plan), f"{where} has other noise")
    demand(charge["sample_rate"] == plan.training.sample_rate, f"{where} has another rate")
    demand(charge["steps"] == plan.training.local_steps, f"{where} has other steps")


def _by_round(events: Iterator[Event], use: str) -> dict[int, Event]:
    return {e["round_no"]: e for e in events if e.get("used_for", TRAINING) == use}


def check_approval(ledger: LedgerFile, plan: StudyPlan, run: str) -> Event:
    """The approval that the run took, within the cap of the policy that was in force.

    Raises:
        AuditError: there is none, it came after the run began, or it is above the cap.
    """
    taken = {e["approval"] for e in ledger.of("bound", run)}
    approvals = [
        e for e in ledger.of("approved") if e["number"] in taken and e["plan_sha256"] == plan.sha256
    ]
    demand(bool(approvals), f"{ledger.site} never approved this plan for run {run}")
    approval = approvals[0]
    first = next(ledger.of("bound", run))
    demand(approval["number"] < first["number"], "the run began before it was approved")
    cap, after = approval.get("cap"), approval.get("epsilon_after")
    if isinstance(cap, float) and isinstance(after, float):
        demand(after <= cap, f"approved at epsilon {after:.3f}, above the policy's cap {cap:g}")
    return approval


def check_receipt(ledger: LedgerFile, receipt: Receipt) -> None:
    """The receipt says of this ledger what the ledger says.

    Raises:
        AuditError: steps or head differ; the ledger was replaced, or the receipt is of another.
    """
    run = receipt.run_id
    demand(
        receipt.ledger_head in ledger.heads,
        f"the ledger of {ledger.site} lacks the state {receipt.ledger_head.hex()[:16]} that its "
        "receipt names: it was replaced by an older copy, or cut",
    )
    steps = sum(
        e["steps"] for e in ledger.of("charge", run) if e.get("used_for", TRAINING) == TRAINING
    )
    demand(
        steps == receipt.steps,
        f"{ledger.site} charged {steps} steps; its receipt says {receipt.steps}",
    )
    closed = [e["link"] for e in ledger.of("closed", run)]
    demand(closed == [receipt.ledger_head], "the receipt's ledger head is not the one that closed")


def accounts(ledger: LedgerFile, delta: float) -> dict[str, Account]:
    """Epsilon of all that each population of the ledger was ever charged, over all runs.

    Patients of several populations pay for each: only the site, which can tell who is in which,
    knows the worst patient's sum. Every population's own sum is a lower bound of it.
    """
    kinds: dict[str, dict[tuple[float, float], int]] = {}
    for charge in ledger.of("charge"):
        key = (float(charge["noise_multiplier"]), float(charge["sample_rate"]))
        table = kinds.setdefault(charge["population"], {})
        table[key] = table.get(key, 0) + int(charge["steps"])
    return {population: account(table, delta) for population, table in kinds.items()}


def receipts_of(history: History) -> dict[str, Receipt]:
    """Every site's receipt."""
    return {name: decode(Receipt, signed.receipt) for name, signed in history.receipts.items()}


def check_receipts(
    history: History, receipts: Mapping[str, Receipt], trained: Sequence[Round]
) -> None:
    """All sites hold one model and one history, and each says what it charged.

    Raises:
        AuditError: a site disagrees; it is named.
    """
    plan, leaves = history.plan, history.leaves
    first = next(iter(receipts.values()))
    for name, receipt in receipts.items():
        demand(receipt.run_id == history.session.run_id, f"{name}: its receipt is of another run")
        demand(receipt.plan_sha256.hex() == plan.sha256, f"{name}: of another plan")
        demand(
            receipt.transcript == history.transcript,
            f"{name} signed another history than the record holds: it was shown other rounds, or "
            "the record was cut",
        )
        demand(receipt.model_sha256 == first.model_sha256, f"{name} holds another model")
        demand(receipt.rounds == plan.training.rounds, f"{name} counts {receipt.rounds} rounds")
        _check_log(name, receipt, leaves)
        _check_price(name, receipt, history, trained)


def _check_log(name: str, receipt: Receipt, leaves: Sequence[bytes]) -> None:

    size = receipt.log_size
    demand(0 < size <= len(leaves), f"{name} signed a log of {size} rounds; here are {len(leaves)}")
    demand(
        rfc9162.root_of(leaves[-size:]) == receipt.log_root,
        f"{name} signed another log of its {size} rounds than the record gives",
    )


def _check_price(name: str, receipt: Receipt, history: History, trained: Sequence[Round]) -> None:
    plan = history.plan
    sigma = noise_multiplier_of(plan)
    if sigma is None:
        demand(receipt.epsilon == 0 and receipt.steps == 0, f"{name} charged a plan without noise")
        return
    demand(receipt.noise_multiplier == sigma, f"{name}: other noise than the plan's {sigma:g}")
    demand(receipt.sample_rate == plan.training.sample_rate, f"{name}: another sample rate")
    each = plan.training.local_steps
    least = each * sum(name in r.contributors for r in trained)
    most = each * sum(name in r.cohort for r in trained)
    demand(
        least <= receipt.steps <= most,
        f"{name} charged {receipt.steps} steps; its rounds make {least} to {most}",
    )
    found = account({(sigma, receipt.sample_rate): receipt.steps}, plan.privacy.promise[1])
    demand(
        abs(found.pld - receipt.epsilon) <= 1e-6,
        f"{name} states epsilon {receipt.epsilon:.4f}; its steps cost {found.pld:.4f}",
    )
    demand(receipt.epsilon_alone >= receipt.epsilon - 1e-9, f"{name}: its own noise is not less")
