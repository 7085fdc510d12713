"""What a study would cost this site's patients on top of all they have spent: the worst one counts.

Patients differ in what they took part in. They are grouped by the studies that they share, and
only the groups whose history no other group's contains are composed, so that the cost does not
grow with the number of patients or of rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
        alone: The same event with this site's own noise alone, where that is less.
    """

    approval: int
    study: str
    run: str
    populations: frozenset[str]
    event: PrivacyEvent
    spent: bool
    alone: PrivacyEvent | None = None

    @property
    def if_alone(self) -> PrivacyEvent:
        """The event as it is if every other site sides with the server."""
        return self.alone or self.event


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
        alone: As `after`, if every other site sided with the server in every study.
        alone_held: As `held`, compared with the cap for that case.
    """

    before: float
    after: float
    held: float
    basis: Basis
    alone: float
    alone_held: float

    def passes(self, limits: DatasetPolicy) -> bool:
        """Whether it is within both caps."""
        return self.held <= limits.max_epsilon and self.alone_held <= limits.max_epsilon_alone


NO_COST = Cost(0.0, 0.0, 0.0, "filter", 0.0, 0.0)


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
            where = frozenset({population})
            for (_, sigma, own, rate), steps in kinds.items():
                event, alone = PrivacyEvent(sigma, rate, steps), PrivacyEvent(own, rate, steps)
                number, name = approval["number"], approval["name"]
                yield Commitment(number, name, run, where, event, True, alone)

    def reserved(self) -> Iterator[Commitment]:
        for approval in self.approved:
            number, run = approval["number"], self.run_of(approval["number"])
            bound = self.bound.get(number, [])
            if number in self.withdrawn and not run:
                continue
            if run in self.closed and all(e["basis"] == "filter" for e in [approval, *bound]):
                continue  # given back
            for use, part in approval["parts"].items():
                left = part["steps"] - self._steps(run, use)
                if left <= 0:
                    continue
                later = [e["populations"].get(use, part["population"]) for e in bound]
                where = frozenset([part["population"], *later])
                rate = part["sample_rate"]
                event = PrivacyEvent(part["noise_multiplier"], rate, left)
                alone = PrivacyEvent(part["alone"], rate, left)
                yield Commitment(number, approval["name"], run, where, event, False, alone)

    def _steps(self, run: str, use: str) -> int:
        kinds = [k for (of, _), k in self.charged.items() if of == run]
        return sum(steps for k in kinds for kind, steps in k.items() if kind.used_for == use)


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
    sets, _ = _groups(patients, known, members)
    largest = [s for s in sets if not any(s < other for other in sets)]
    return tuple(tuple(c for c in known if c.populations in s) for s in largest)


def _groups(
    patients: Members, known: Sequence[Commitment], members: Callable[[str], Members]
) -> tuple[list[frozenset[frozenset[str]]], NDArray[np.int64]]:
    """The different sets of populations that patients are in, and which one each patient has."""
    columns: dict[frozenset[str], NDArray[np.bool_]] = {}
    for where in {c.populations for c in known}:
        touched = np.zeros(len(patients), dtype=bool)
        for digest in where:
            touched |= np.isin(patients, members(digest), assume_unique=True)
        columns[where] = touched
    stacked = np.stack(list(columns.values()), axis=1)
    table, group = np.unique(stacked, axis=0, return_inverse=True)
    sets = [frozenset(w for w, on in zip(columns, row, strict=True) if on) for row in table]
    return sets, group.reshape(-1)


def beyond_cap(
    planned: Sequence[Commitment],
    patients: Members,
    known: Sequence[Commitment],
    members: Callable[[str], Members],
    limits: DatasetPolicy,
) -> Members:
    """The patients whom `planned` would bring beyond a cap, each judged by the own history alone.

    Args:
        planned: The study's parts.
        patients: Keyed hashes, sorted, without repetition.
        known: All commitments, `planned` included.
        members: Who a population is, by its digest.
        limits: Caps, delta and kind of composition.
    """
    sets, group = _groups(patients, known, members)
    each = [tuple(c for c in known if c.populations in s) for s in sets]
    spent = np.array([not cost_of(planned, [h], limits).passes(limits) for h in each])
    beyond: Members = patients[spent[group]]
    return beyond


def cost_of(
    planned: Sequence[Commitment], past: Sequence[History], limits: DatasetPolicy, *, own: str = ""
) -> Cost:
    """What `planned` would bring the worst patient to.

    A study that is the first one of all its patients was not chosen after seeing anything about
    them: composition as fixed beforehand covers it, and nothing may be given back. From the second
    study on the filter decides, unless the policy declares a schedule.

    Args:
        planned: The study's parts, or those that a run has left.
        past: The histories of the patients that it would touch, `planned` included.
        limits: Caps, delta and kind of composition.
        own: The run that they belong to; its earlier charges are part of the same study.
    """
    costs = [_cost(frozenset(planned), history, limits, own) for history in past]
    basis: Basis = "filter" if all(c.basis == "filter" for c in costs) else "schedule"
    return Cost(
        max(c.before for c in costs),
        max(c.after for c in costs),
        max(c.held for c in costs),
        basis,
        max(c.alone for c in costs),
        max(c.alone_held for c in costs),
    )


def _cost(
    planned: frozenset[Commitment], history: History, limits: DatasetPolicy, own: str
) -> Cost:
    delta = limits.max_delta
    first = all(c in planned or (own and c.run == own) for c in history)
    before = epsilon_of_events([c.event for c in history if c not in planned], delta)
    after = epsilon_of_events([c.event for c in history], delta)
    alone = epsilon_of_events([c.if_alone for c in history], delta)
    if limits.composition == "schedule":
        return Cost(before, after, after, "schedule", alone, alone)
    held = filtered_epsilon([c.event for c in history], limits.max_epsilon, delta)
    own_held = filtered_epsilon([c.if_alone for c in history], limits.max_epsilon_alone, delta)
    if first and (held > limits.max_epsilon or own_held > limits.max_epsilon_alone):
        return Cost(before, after, after, "schedule", alone, alone)
    return Cost(before, after, held, "filter", alone, own_held)


def rounds_that_fit(
    planned: Sequence[Commitment],
    steps_a_round: int,
    past: Sequence[History],
    limits: DatasetPolicy,
) -> int:
    """Rounds of training, spare ones included, that stay within the caps; 0 if none does.

    Args:
        planned: The study's parts; the first one is its training, of which less might fit.
        steps_a_round: Local steps.
        past: The histories, `planned` included.
        limits: Caps, delta and kind of composition.
    """
    training = planned[0]
    low, high = 0, training.event.steps // steps_a_round
    while low < high:
        middle = (low + high + 1) // 2
        fewer = _shortened(training, middle * steps_a_round)
        swapped = [tuple(fewer if c == training else c for c in h) for h in past]
        if cost_of([fewer, *planned[1:]], swapped, limits).passes(limits):
            low = middle
        else:
            high = middle - 1
    return low


def _shortened(part: Commitment, steps: int) -> Commitment:
    alone = part.alone and replace(part.alone, steps=steps)
    return replace(part, event=replace(part.event, steps=steps), alone=alone)


def by_study(known: Sequence[Commitment]) -> Mapping[int, History]:
    """Commitments grouped by the approval that they belong to, oldest first."""
    table: dict[int, list[Commitment]] = {}
    for commitment in known:
        table.setdefault(commitment.approval, []).append(commitment)
    return {number: tuple(table[number]) for number in sorted(table)}
