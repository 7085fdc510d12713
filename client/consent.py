"""Consent: what a plan may cost this site's patients is decided here, before it costs anything.

Approving a plan reserves its whole cost in the ledger, spare rounds included. A run of the plan
takes one approval with its first round; a second run needs a second approval, since it costs again.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.budget import (
    NO_COST,
    Commitment,
    Cost,
    History,
    beyond_cap,
    commitments,
    cost_of,
    histories,
    rounds_that_fit,
)
from client.data.dataset import PatientDataset
from client.ledger import Body, HeadMovedError, Ledger
from client.opt_out import OptOutList
from client.patients import KEY_FILE, Members, PatientKey, Population, digest_of
from client.policy import DatasetPolicy, PolicyFile, refuse_unless_allowed, require_open
from shared.errors import PolicyError
from shared.identity import Identity
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import PrivacyEvent, Use, costs_of
from shared.version import fedward_version, require_version

LEDGER_FILE = "ledger.db"
People = Mapping[Use, Population]
"""Whom a plan charges, by what it charges them for."""


@dataclass(frozen=True)
class SiteFacts:
    """What consent needs to know of the site.

    Attributes:
        name: In plans and roster.
        dataset: Which [[dataset]] of policy.toml holds.
        simulation: Whether this is a pretended hospital.
        roster: The identities that the site pinned.
    """

    name: str
    dataset: str
    simulation: bool
    roster: dict[str, bytes]


class Books:
    """A site's policy, ledger and patients' key; all that decides whether a study may run."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        facts: SiteFacts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the books of a site, or begin them.

        Raises:
            PolicyError: ledger or key is missing while the other, or a run, is there.
        """
        self.facts, self._clock = facts, clock
        self.policy = PolicyFile(folder)
        _refuse_lost_books(folder)
        self.ledger = Ledger(
            folder / LEDGER_FILE, identity, durable=not facts.simulation, clock=clock
        )
        fresh = self.ledger.head == bytes(32)
        key_file = folder / KEY_FILE
        make_key = fresh and not key_file.exists()
        self.key = (PatientKey.create if make_key else PatientKey.load)(key_file)
        self.ledger.open_for(facts.name, self.key.check)
        self.opt_out = OptOutList(folder, self.key)
        if fresh:
            self.opt_out.begin()
        self._checked: tuple[object, ...] = ()

    @property
    def limits(self) -> DatasetPolicy:
        """The policy of the site's dataset, as it is on disk now; PolicyError without one."""
        return self.policy.read().of(self.facts.dataset)

    def allow(self, plan: StudyPlan) -> DatasetPolicy:
        """The limits, once the plan was held against all of them but the budget.

        Raises:
            PolicyError: the policy is missing or unusable, or does not allow the plan.
            ConfigError: the plan needs another version of fedward.
        """
        limits = self.limits
        if plan.requires_fedward:
            require_version(plan.requires_fedward, fedward_version(), f"plan {plan.name!r}")
        refuse_unless_allowed(
            plan,
            limits,
            site=self.facts.name,
            roster=self.facts.roster,
            simulation=self.facts.simulation,
        )
        return limits

    def population(self, patient_ids: Iterable[str]) -> Population:
        """The patients of a dataset, as the ledger knows them."""
        limits = self.limits
        if limits.rows_are_patients:
            return self.key.whole(limits.name)
        return self.key.population(patient_ids)

    def people(self, plan: StudyPlan, patient_ids: Mapping[Use, Iterable[str]]) -> People:
        """Whom a plan charges, of the patients that it would touch."""
        return {use: self.population(patient_ids[use]) for use in costs_of(plan)}

    def consider(self, plan: StudyPlan, people: People) -> Cost:
        """What the plan would bring the worst of these patients to.

        Raises:
            PolicyError: the policy does not allow the plan, or a cap would be passed; then with
                the number of rounds that still fit.
        """
        limits = self.allow(plan)
        planned = parts_of(plan, people)
        if not planned:
            return NO_COST
        past = self._histories([*commitments(self.ledger), *planned], people)
        cost = cost_of(planned, past, limits)
        if not cost.passes(limits):
            fit = None
            if "training" in people:
                fit = rounds_that_fit(planned, plan.training.local_steps, past, limits)
            raise PolicyError(_beyond(plan, limits, cost, fit))
        return cost

    def without_spent(self, plan: StudyPlan, people: People) -> tuple[People, int]:
        """These people less those whom the plan would bring beyond a cap, and how many those are.

        Whether a patient is left out depends on that patient's own charges alone, so it says
        nothing of anybody's data; client/BUDGETS.md, section 5, has the argument.

        Raises:
            PolicyError: nobody would be left, or the policy does not allow the plan.
        """
        limits, planned = self.allow(plan), parts_of(plan, people)
        if not planned:
            return people, 0
        everyone, members = self._everyone(people)
        known = [*commitments(self.ledger), *planned]
        spent = beyond_cap(planned, everyone, known, members, limits)
        kept: dict[Use, Population] = {}
        for use, population in people.items():
            left = population.members[~np.isin(population.members, spent)]
            if not len(left):
                raise PolicyError(
                    f"plan {plan.name!r} would bring every patient of this site's {use} part "
                    f"beyond max_epsilon {limits.max_epsilon:g} or max_epsilon_alone "
                    f"{limits.max_epsilon_alone:g}; without them nobody is left."
                )
            kept[use] = Population(digest_of(left), left)
        return kept, len(spent)

    def _everyone(self, people: People) -> tuple[Members, Callable[[str], Members]]:
        """All of these people, of whom some may be new to the ledger; and who a population is."""
        fresh = {p.digest: p.members for p in people.values()}

        def members(digest: str) -> Members:
            found = fresh.get(digest)
            return self.ledger.members(digest) if found is None else found

        return np.unique(np.concatenate(list(fresh.values()))), members

    def _histories(self, known: list[Commitment], people: People) -> tuple[History, ...]:
        everyone, members = self._everyone(people)
        return histories(everyone, known, members)

    def approve(self, plan: StudyPlan, people: People, *, left_out: bool = False) -> Cost:
        """Consider a plan, and reserve its whole cost for one run; signed in the ledger.

        Args:
            plan: The plan.
            people: Whom it may charge.
            left_out: These are only some of the site's patients, from `without_spent`; a run
                takes nobody else.

        Raises:
            PolicyError: as for `consider`.
        """
        self.ledger.verify(every_signature=False)
        for population in people.values():
            self.ledger.add_population(population, self.facts.dataset)
        while True:
            head = self.ledger.head
            cost = self.consider(plan, people)
            try:
                fields = approval_fields(plan, people, cost, self.limits) | {"left_out": left_out}
                self.ledger.append("approved", fields, expected_head=head)
            except HeadMovedError:
                continue
            return cost

    def as_approved(
        self, plan: StudyPlan, run: str, use: Use, data: PatientDataset
    ) -> PatientDataset:
        """The data without patients whom the run's approval left out.

        Raises:
            PolicyError: no approval is left for the run, or nobody of these data is in it.
        """
        approval = self.require_approved(plan, run)
        if not approval.get("left_out") or use not in approval["parts"]:
            return data
        approved = self.ledger.members(approval["parts"][use]["population"])
        keep = np.flatnonzero(np.isin(self.key.tags(data.patient_ids), approved))
        if not len(keep):
            raise PolicyError(
                f"no patient of this site's {use} part is in the approval of plan {plan.name!r}, "
                "which left out those who have spent their budget. Approve the plan again."
            )
        return data.select(keep)

    def require_approved(self, plan: StudyPlan, run: str) -> Body:
        """The approval that this run has taken or may take.

        Raises:
            PolicyError: there is none left; a changed byte of a plan needs a new approval, and so
                does a second run.
        """
        approvals = [e for e in self.ledger.events("approved") if e["plan_sha256"] == plan.sha256]
        taken = {e["approval"]: e["run"] for e in self.ledger.events("bound")}
        withdrawn = {e["approval"] for e in self.ledger.events("withdrawn")}
        for approval in approvals:
            if taken.get(approval["number"]) == run:
                return approval
        for approval in approvals:
            if approval["number"] not in taken and approval["number"] not in withdrawn:
                return approval
        if taken.keys() & {e["number"] for e in approvals}:
            raise PolicyError(
                f"plan {plan.name!r} was approved for one run, and another run has taken that. A "
                "second run costs the patients again: approve the plan again to allow it."
            )
        raise PolicyError(
            f"plan {plan.name!r} with sha256 {plan.sha256} is not approved at this site; "
            "a changed byte needs a new approval."
        )

    def admit(self, plan: StudyPlan, run: str, people: People) -> None:
        """Let a run go on to its next round.

        The policy on disk is held against the plan again whenever it changed, and the budget
        whenever the policy or the patients did.

        Args:
            plan: The run's plan.
            run: Its id.
            people: The patients it trains on and counts; none where privacy is off.

        Raises:
            PolicyError: the policy, its hours or the budget do not allow another round.
        """
        policy = self.policy.read()
        limits = policy.of(self.facts.dataset)
        require_open(limits, lambda: datetime.datetime.fromtimestamp(self._clock()))
        digests = tuple(sorted((use, p.digest) for use, p in people.items()))
        state = (policy, plan.sha256, run, digests)
        if state != self._checked:
            self.allow(plan)
            if people:
                self._bind(plan, run, people, limits)
            self._checked = state

    def _bind(self, plan: StudyPlan, run: str, people: People, limits: DatasetPolicy) -> None:
        for population in people.values():
            self.ledger.add_population(population, self.facts.dataset)
        digests = {use: population.digest for use, population in sorted(people.items())}
        while True:
            head = self.ledger.head
            approval = self.require_approved(plan, run)
            cost = self._cost_of_rest(plan, run, people, limits, approval)
            bound = [e for e in self.ledger.events("bound") if e["run"] == run]
            if bound and bound[-1]["populations"] == digests:
                return
            fields = {"run": run, "approval": approval["number"], "basis": cost.basis}
            fields |= {"plan_sha256": plan.sha256, "populations": digests}
            try:
                self.ledger.append("bound", fields, expected_head=head)
            except HeadMovedError:
                continue
            return

    def _cost_of_rest(
        self,
        plan: StudyPlan,
        run: str,
        people: People,
        limits: DatasetPolicy,
        approval: Body,
    ) -> Cost:
        """What the run's remaining steps cost these very patients, whoever was approved."""
        done: Mapping[Use, int] = {use: self.ledger.steps(run, use) for use in people}
        rest = parts_of(plan, people, done)
        if not rest:
            return NO_COST
        known = [c for c in commitments(self.ledger) if c.spent or c.approval != approval["number"]]
        cost = cost_of(rest, self._histories([*known, *rest], people), limits, own=run)
        if not cost.passes(limits):
            raise PolicyError(
                f"the rest of plan {plan.name!r} would bring a patient of this site to epsilon "
                f"{cost.held:.3f} at delta {limits.max_delta:g} ({cost.alone_held:.3f} if every "
                f"other site sided with the server); policy.toml allows {limits.max_epsilon:g} "
                f"({limits.max_epsilon_alone:g}). The policy or the patients changed since the "
                "approval."
            )
        return cost

    def withdraw(self, plan: StudyPlan) -> int:
        """Give up every approval of a plan: its runs are over; how many approvals there were."""
        taken = {e["approval"]: e["run"] for e in self.ledger.events("bound")}
        gone = {e["approval"] for e in self.ledger.events("withdrawn")}
        gone |= {n for n, run in taken.items() if run in self._closed_runs()}
        count = 0
        for approval in self.ledger.events("approved"):
            number = approval["number"]
            if approval["plan_sha256"] != plan.sha256 or number in gone:
                continue
            count += 1
            if number in taken:
                self.ledger.close_run(taken[number])
            else:
                self._withdraw(plan, number)
        return count

    def _withdraw(self, plan: StudyPlan, approval: int) -> None:
        while True:
            head = self.ledger.head
            run = {e["approval"]: e["run"] for e in self.ledger.events("bound")}.get(approval)
            if run is not None:
                self.ledger.close_run(run)
                return
            fields = {"approval": approval, "plan_sha256": plan.sha256}
            try:
                self.ledger.append("withdrawn", fields, expected_head=head)
            except HeadMovedError:
                continue
            return

    def _closed_runs(self) -> set[str]:
        return {e["run"] for e in self.ledger.events("closed")}

    def close(self) -> None:
        """Release the ledger's file."""
        self.ledger.close()


def parts_of(
    plan: StudyPlan, people: People, done: Mapping[Use, int] | None = None
) -> list[Commitment]:
    """What a plan may still cost each of these populations, training first.

    Args:
        plan: The plan.
        people: Whom it charges; every use that costs something must be there.
        done: Steps that were charged already, by use.

    Raises:
        PolicyError: nobody is named for a use: its patients could not be charged.
    """
    alone, parts = alone_multipliers(plan), []
    for use, event in costs_of(plan).items():
        if use not in people:
            raise PolicyError(
                f"plan {plan.name!r} costs patients for {use}, and none are named for it. Name "
                "the data that it would use in site.toml."
            )
        left = event.steps - (done or {}).get(use, 0)
        if left > 0:
            where = frozenset({people[use].digest})
            own = PrivacyEvent(alone[use], event.sample_rate, left)
            part = replace(event, steps=left)
            parts.append(Commitment(PLANNED, plan.name, use, where, part, False, own))
    return parts


PLANNED = -1


def approval_fields(plan: StudyPlan, people: People, cost: Cost, limits: DatasetPolicy) -> Body:
    """What the ledger notes of an approval."""
    alone = alone_multipliers(plan)
    parts = {
        use: {
            "population": people[use].digest,
            "noise_multiplier": event.noise_multiplier,
            "alone": alone[use],
            "sample_rate": event.sample_rate,
            "steps": event.steps,
        }
        for use, event in costs_of(plan).items()
    }
    return {
        "plan_sha256": plan.sha256,
        "name": plan.name,
        "parts": parts,
        "basis": cost.basis,
        "cap": limits.max_epsilon,
        "cap_alone": limits.max_epsilon_alone,
        "delta": limits.max_delta,
        "epsilon_before": cost.before,
        "epsilon_after": cost.after,
    }


def _beyond(plan: StudyPlan, limits: DatasetPolicy, cost: Cost, fit: int | None) -> str:
    by_filter = (
        f" Studies chosen after earlier results are held by a filter, which counts {cost.held:.3f}."
        if cost.held != cost.after
        else ""
    )
    alone = (
        f" If every other site sided with the server it would be {cost.alone_held:.3f}; "
        f"max_epsilon_alone is {limits.max_epsilon_alone:g}."
        if cost.alone_held > limits.max_epsilon_alone
        else ""
    )
    fewer = "Ask for a plan with more noise."
    if fit is not None:
        fewer = (
            f"{fit} of its {plan.training.rounds + plan.training.spare_rounds} rounds (spare ones "
            "included) would still fit at this noise: ask for a plan with that many, or with more "
            "noise."
        )
    return (
        f"plan {plan.name!r} would bring a patient of this site from epsilon {cost.before:.3f} to "
        f"{cost.after:.3f} at delta {limits.max_delta:g}; policy.toml allows "
        f"{limits.max_epsilon:g} over all studies.{by_filter}{alone} {fewer}"
    )


def _refuse_lost_books(folder: Path) -> None:
    """Fail closed where a file that holds the past is gone: nothing would look spent."""
    if (folder / LEDGER_FILE).exists():
        return
    runs = folder / "runs"
    traces = [(folder / KEY_FILE).exists(), runs.is_dir() and any(runs.iterdir())]
    if any(traces):
        raise PolicyError(
            f"{folder / LEDGER_FILE} is gone, but this site has taken part in studies. Without it "
            "nobody knows what its patients have spent; restore it from a backup."
        )
