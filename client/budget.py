"""What a study would cost this site's patients on top of all they have spent: the worst one counts.

Patients differ in what they took part in. They are grouped by the studies that they share, and
only the groups whose history no other group's contains are composed, so that the cost does not
grow with the number of patients or of rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.ledger import Body, Ledger
from client.patients import Members
from client.policy import DatasetPolicy
from shared.privacy import PrivacyEvent, epsilon_of_events, filtered_epsilon

Basis = Literal["schedule", "filter"]


@dataclass(frozen=True)
class Commitment:
    """Steps that were charged to populations, or are reserved for them.

    Attributes:
        approval: Number of the ledger's event that approved the study.
        study: The plan's name.
        run: Id of the run; empty while none has taken the approval.
        populations: Digests; a patient of any of them bears the event once.
        event: Noise, rate and steps.
        spent: True for charges, False for a reservation.
    """

    approval: int
    study: str
    run: str
    populations: frozenset[str]
    event: PrivacyEvent
    spent: bool


History = tuple[Commitment, ...]


@dataclass(frozen=True)
class Cost:
    """What a study would bring the worst patient to.

    Attributes:
        before: Epsilon, at the policy's delta, of all that is spent or reserved.
        after: The same with the study; an upper bound where all was fixed beforehand.
        held: What is compared with the cap: `after`, or the filter's figure, which is larger.
        basis: "filter" where the study passes the filter, so that what it leaves unspent may be
            given back; "schedule" where it stays reserved for good.
    """

    before: float
    after: float
    held: float
    basis: Basis


def commitments(ledger: Ledger) -> History:
    """All that was spent and all that is reserved, by study and population."""
    books = _Approvals(ledger)
    return (*books.spent(), *books.reserved())


class _Approvals:
    """The approvals, and what became of each."""

    def __init__(self, ledger: Ledger) -> None:
        self.approved = list(ledger.events("approved"))
        self.bound: dict[int, list[Body]] = {}
        for event in ledger.events("bound"):
            self.bound.setdefault(event["approval"], []).append(event)
        self.closed = {e["run"] for e in ledger.events("closed")}
        self.withdrawn = {e["approval"] for e in ledger.events("withdrawn")}
        self.charged = ledger.spent()

    def run_of(self, approval: int) -> str:
        bound = self.bound.get(approval)
        return str(bound[0]["run"]) if bound else ""

    def spent(self) -> Iterator[Commitment]:
        by_run = {self.run_of(a["number"]): a for a in self.approved}
        for (run, population), kinds in self.charged.items():
            approval = by_run.get(run, {"number": 0, "name": "unknown"})
            for (sigma, rate), steps in kinds.items():
                event = PrivacyEvent(sigma, rate, steps)
                where = frozenset({population})
                yield Commitment(approval["number"], approval["name"], run, where, event, True)

    def reserved(self) -> Iterator[Commitment]:
        for approval in self.approved:
            number, run = approval["number"], self.run_of(approval["number"])
            bound = self.bound.get(number, [])
            if not approval["steps"] or (number in self.withdrawn and not run):
                continue
            given_back = run in self.closed and all(
                e["basis"] == "filter" for e in [approval, *bound]
            )
            left = approval["steps"] - self._steps(run)
            if given_back or left <= 0:
                continue
            where = frozenset(e["population"] for e in [approval, *bound])
            event = PrivacyEvent(approval["noise_multiplier"], approval["sample_rate"], left)
            yield Commitment(number, approval["name"], run, where, event, False)

    def _steps(self, run: str) -> int:
        kinds = [k for (of, _), k in self.charged.items() if of == run]
        return sum(steps for k in kinds for steps in k.values())


def histories(
    patients: Members, known: Sequence[Commitment], members: Callable[[str], Members]
) -> tuple[History, ...]:
    """The different histories among these patients, without those that another one contains.

    Args:
        patients: Keyed hashes, sorted, without repetition.
        known: From `commitments`.
        members: Who a population is, by its digest.

    Returns:
        At least one history, which is empty where nothing was spent on any of the patients.
    """
    if not known or not len(patients):
        return ((),)
    columns: dict[frozenset[str], NDArray[np.bool_]] = {}
    for where in {c.populations for c in known}:
        touched = np.zeros(len(patients), dtype=bool)
        for digest in where:
            touched |= np.isin(patients, members(digest), assume_unique=True)
        columns[where] = touched
    table = np.unique(np.stack(list(columns.values()), axis=1), axis=0)
    sets = [frozenset(w for w, on in zip(columns, row, strict=True) if on) for row in table]
    largest = [s for s in sets if not any(s < other for other in sets)]
    return tuple(tuple(c for c in known if c.populations in s) for s in largest)


def cost_of(
    event: PrivacyEvent, past: Sequence[History], limits: DatasetPolicy, *, own: str = ""
) -> Cost:
    """What `event` would bring the worst patient to.

    A study that is the first one of all its patients was not chosen after seeing anything about
    them: composition as fixed beforehand covers it, and nothing may be given back. From the second
    study on the filter decides, unless the policy declares a schedule.

    Args:
        event: The study's steps, or those that a run has left.
        past: The histories of the patients that it would touch.
        limits: Cap, delta and kind of composition.
        own: The run that the event belongs to; its earlier charges are part of the same study.
    """
    costs = [_cost(event, history, limits, own) for history in past]
    basis: Basis = "filter" if all(c.basis == "filter" for c in costs) else "schedule"
    return Cost(
        max(c.before for c in costs),
        max(c.after for c in costs),
        max(c.held for c in costs),
        basis,
    )


def _cost(event: PrivacyEvent, history: History, limits: DatasetPolicy, own: str) -> Cost:
    cap, delta = limits.max_epsilon, limits.max_delta
    earlier = [c.event for c in history]
    others = [c for c in history if not (own and c.run == own)]
    before = epsilon_of_events(earlier, delta)
    after = epsilon_of_events([*earlier, event], delta)
    if limits.composition == "schedule":
        return Cost(before, after, after, "schedule")
    held = filtered_epsilon([*earlier, event], cap, delta)
    if held > cap and not others:
        return Cost(before, after, after, "schedule")
    return Cost(before, after, held, "filter")


def rounds_that_fit(
    event: PrivacyEvent,
    steps_a_round: int,
    past: Sequence[History],
    limits: DatasetPolicy,
) -> int:
    """Rounds of this kind, spare ones included, that stay within the cap; 0 if none does."""
    low, high = 0, event.steps // steps_a_round
    while low < high:
        middle = (low + high + 1) // 2
        fewer = PrivacyEvent(event.noise_multiplier, event.sample_rate, middle * steps_a_round)
        if cost_of(fewer, past, limits).held <= limits.max_epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def by_study(known: Sequence[Commitment]) -> Mapping[int, History]:
    """Commitments grouped by the approval that they belong to, oldest first."""
    table: dict[int, list[Commitment]] = {}
    for commitment in known:
        table.setdefault(commitment.approval, []).append(commitment)
    return {number: tuple(table[number]) for number in sorted(table)}
