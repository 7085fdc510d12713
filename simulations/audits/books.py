"""A site's exported ledger against the run: was all that left charged, and at which price?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger_export import check_export
from shared import rfc9162
from shared.counts import due_counts
from shared.errors import PolicyError
from shared.identity import fingerprint
from shared.messages import decode
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import Use, costs_of, count_promise_of, count_use
from shared.study import Receipt
from simulations.audits.accounting import Account, account
from simulations.audits.chain import History, Round
from simulations.audits.checks import demand

Event = Mapping[str, Any]


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


def check_charges(ledger: LedgerFile, history: History, models: Mapping[int, int]) -> int:
    """Every vector that left this site was charged before, for the very round and use.

    Args:
        ledger: The site's.
        history: The run's rounds.
        models: Round number -> finished training rounds before it.

    Returns:
        How many vectors left.

    Raises:
        AuditError: a round is missing or charged under another descriptor; it is named.
    """
    plan, run = history.plan, history.session.run_id
    rounds = {r.number: r for r in history.rounds}
    for use in costs_of(plan):
        charges = _by_round(ledger.of("charge", run), use)
        released = _by_round(ledger.of("released", run), use)
        for number, charge in charges.items():
            demand(number in rounds, f"round {number} is charged, but is not in the record")
            _check_charge(charge, rounds[number], plan, use)
        for one in history.rounds:
            if ledger.site in one.contributors and costs_in(plan, use, models[one.number]):
                _check_left(one.number, use, charges, released)
    return sum(ledger.site in r.contributors for r in history.rounds)


def costs_in(plan: StudyPlan, use: Use, model_round: int) -> bool:
    """Whether a round that goes on from this model costs patients for this use."""
    if use == "training":
        return plan.learns and model_round < plan.training.rounds
    return due_counts(plan, model_round)


def _check_left(
    number: int, use: Use, charges: Mapping[int, Event], released: Mapping[int, Event]
) -> None:
    demand(number in charges, f"round {number} left this site without a charge for {use}")
    demand(number in released, f"round {number} left before it was marked as released")
    demand(
        charges[number]["number"] < released[number]["number"],
        f"round {number} was charged after it had left",
    )


def _check_charge(charge: Event, what: Round, plan: StudyPlan, use: Use) -> None:
    where, event = f"the charge of round {what.number} for {use}", costs_of(plan)[use]
    expected = {
        "descriptor": what.digest.hex(),
        "plan_sha256": plan.sha256,
        "noise_multiplier": event.noise_multiplier,
        "alone": alone_multipliers(plan)[use],
        "sample_rate": event.sample_rate,
        "steps": plan.training.local_steps if use == "training" else 1,
        "epoch": what.session.epoch,
    }
    for key, value in expected.items():
        demand(charge[key] == value, f"{where} has {key} {charge[key]!r:.70}, not {value!r:.70}")


def _by_round(events: Iterator[Event], use: Use) -> dict[int, Event]:
    return {e["round_no"]: e for e in events if e["used_for"] == use}


def check_approval(ledger: LedgerFile, plan: StudyPlan, run: str) -> Event:
    """The approval that the run took, within the cap of the policy that was in force.

    Mode none costs nothing and takes no approval's budget; the result is empty then.

    Raises:
        AuditError: there is none, it came after the run began, or it is above the cap.
    """
    if plan.privacy.mode == "none":
        return {}
    taken = {e["approval"] for e in ledger.of("bound", run)}
    approvals = [
        e for e in ledger.of("approved") if e["number"] in taken and e["plan_sha256"] == plan.sha256
    ]
    demand(bool(approvals), f"{ledger.site} never approved this plan for run {run}")
    approval = approvals[0]
    first = next(ledger.of("bound", run))
    demand(approval["number"] < first["number"], "the run began before it was approved")
    after, cap = approval["epsilon_after"], approval["cap"]
    demand(after <= cap, f"approved at epsilon {after:.3f}, above the policy's cap {cap:g}")
    for use, part in approval["parts"].items():
        spent = sum(e["steps"] for e in ledger.of("charge", run) if e["used_for"] == use)
        demand(
            spent <= part["steps"],
            f"{ledger.site} charged {spent} steps of {use}; {part['steps']} were approved",
        )
    return approval


def check_receipt(ledger: LedgerFile, plan: StudyPlan, receipt: Receipt) -> None:
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
    for use, price in prices_of(plan, receipt).items():
        stated = price.steps
        steps = sum(e["steps"] for e in ledger.of("charge", run) if e["used_for"] == use)
        demand(
            steps == stated,
            f"{ledger.site} charged {steps} steps of {use}; its receipt says {stated}",
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
    history: History, receipts: Mapping[str, Receipt], models: Mapping[int, int]
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
        _check_price(name, receipt, history, models)


def _check_log(name: str, receipt: Receipt, leaves: Sequence[bytes]) -> None:

    size = receipt.log_size
    demand(0 < size <= len(leaves), f"{name} signed a log of {size} rounds; here are {len(leaves)}")
    demand(
        rfc9162.root_of(leaves[-size:]) == receipt.log_root,
        f"{name} signed another log of its {size} rounds than the record gives",
    )


def _check_price(name: str, receipt: Receipt, history: History, models: Mapping[int, int]) -> None:
    plan = history.plan
    costs, own = costs_of(plan), alone_multipliers(plan)
    for use, price in prices_of(plan, receipt).items():
        if use not in costs:
            demand(price == _FREE, f"{name} charged for {use}, which the plan has at no cost")
            continue
        event = costs[use]
        demand(
            price.noise_multiplier == event.noise_multiplier,
            f"{name}: the noise for {use} is {price.noise_multiplier:g}; the plan has "
            f"{event.noise_multiplier:g}",
        )
        each = plan.training.local_steps if use == "training" else 1
        due = [r for r in history.rounds if costs_in(plan, use, models[r.number])]
        least = each * sum(name in r.contributors for r in due)
        most = each * sum(name in r.cohort for r in due)
        demand(
            least <= price.steps <= most,
            f"{name} charged {price.steps} steps of {use}; its rounds make {least} to {most}",
        )
        _check_epsilon(name, price, event.sample_rate, own[use], promise_of(plan, use)[1])
    demand(
        receipt.sample_rate == (costs["training"].sample_rate if "training" in costs else 0.0),
        f"{name}: another sample rate than the plan's",
    )


def _check_epsilon(name: str, price: Price, rate: float, own: float, delta: float) -> None:
    for stated, sigma, word in (
        (price.epsilon, price.noise_multiplier, "epsilon"),
        (price.alone, own, "epsilon by its own noise alone"),
    ):
        found = account({(sigma, rate): price.steps}, delta)
        demand(
            abs(found.pld - stated) <= 1e-6,
            f"{name} states {word} {stated:.4f}; its steps cost {found.pld:.4f}",
        )


@dataclass(frozen=True)
class Price:
    """What a receipt says of one use."""

    steps: int
    noise_multiplier: float
    epsilon: float
    alone: float


_FREE = Price(0, 0.0, 0.0, 0.0)


def prices_of(plan: StudyPlan, receipt: Receipt) -> dict[Use, Price]:
    """What a receipt says of training, and of released counts of patients."""
    return {
        "training": Price(
            receipt.steps, receipt.noise_multiplier, receipt.epsilon, receipt.epsilon_alone
        ),
        count_use(plan): Price(
            receipt.count_releases,
            receipt.count_noise_multiplier,
            receipt.count_epsilon,
            receipt.count_epsilon_alone,
        ),
    }


def promise_of(plan: StudyPlan, use: Use) -> tuple[float, float]:
    """(epsilon, delta) that the plan promises for one use."""
    counts = count_promise_of(plan) if use == count_use(plan) else None
    return counts or plan.privacy.budget


def worst_price(
    plan: StudyPlan, use: Use, receipts: Mapping[str, Receipt]
) -> tuple[float, float, float]:
    """(epsilon charged at most, epsilon promised, delta) of one use."""
    rate, (target, delta) = costs_of(plan)[use].sample_rate, promise_of(plan, use)
    prices = [prices_of(plan, receipt)[use] for receipt in receipts.values()]
    spent = max(account({(p.noise_multiplier, rate): p.steps}, delta).pld for p in prices)
    return spent, target, delta
