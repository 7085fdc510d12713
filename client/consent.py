"""Consent: what a plan may cost this site's patients is decided here, before it costs anything.

Approving a plan reserves its whole cost in the ledger, spare rounds included. A run of the plan
takes one approval with its first round; a second run needs a second approval, since it costs again.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from client.budget import Cost, commitments, cost_of, histories, rounds_that_fit
from client.ledger import Body, HeadMovedError, Ledger
from client.opt_out import OptOutList
from client.patients import KEY_FILE, PatientKey, Population
from client.policy import DatasetPolicy, PolicyFile, refuse_unless_allowed, require_open
from shared.errors import PolicyError
from shared.identity import Identity
from shared.plan import StudyPlan
from shared.privacy import PrivacyEvent, noise_multiplier_of, steps_of
from shared.version import fedward_version, require_version

LEDGER_FILE = "ledger.db"


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

    def consider(self, plan: StudyPlan, population: Population) -> Cost:
        """What the plan would bring the worst of these patients to.

        Raises:
            PolicyError: the policy does not allow the plan, or the cap would be passed; then with
                the number of rounds that still fit.
        """
        limits = self.allow(plan)
        event = event_of(plan)
        if event is None:
            return Cost(0.0, 0.0, 0.0, "filter")
        past = histories(population.members, commitments(self.ledger), self.ledger.members)
        cost = cost_of(event, past, limits)
        if cost.held > limits.max_epsilon:
            per_round = plan.training.local_steps
            fit = rounds_that_fit(event, per_round, past, limits)
            raise PolicyError(_beyond(plan, limits, cost, fit))
        return cost

    def approve(self, plan: StudyPlan, population: Population) -> Cost:
        """Consider a plan, and reserve its whole cost for one run; signed in the ledger.

        Raises:
            PolicyError: as for `consider`.
        """
        self.ledger.verify(every_signature=False)
        event = event_of(plan)
        self.ledger.add_population(population, self.facts.dataset)
        while True:
            head = self.ledger.head
            cost = self.consider(plan, population)
            try:
                fields = _approval(plan, event, population, cost, self.limits)
                self.ledger.append("approved", fields, expected_head=head)
            except HeadMovedError:
                continue
            return cost

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

    def admit(self, plan: StudyPlan, run: str, population: Population | None) -> int:
        """Let a run go on to its next round; returns the steps it may cost altogether.

        The policy on disk is held against the plan again whenever it changed, and the budget
        whenever the policy or the patients did.

        Args:
            plan: The run's plan.
            run: Its id.
            population: The patients it trains on; None where privacy is off.

        Raises:
            PolicyError: the policy, its hours or the budget do not allow another round.
        """
        policy = self.policy.read()
        limits = policy.of(self.facts.dataset)
        require_open(limits, lambda: datetime.datetime.fromtimestamp(self._clock()))
        digest = population.digest if population else ""
        state = (policy, plan.sha256, run, digest)
        if state != self._checked:
            self.allow(plan)
            if population is not None:
                self._bind(plan, run, population, limits)
            self._checked = state
        return steps_of(plan)

    def _bind(
        self, plan: StudyPlan, run: str, population: Population, limits: DatasetPolicy
    ) -> None:
        self.ledger.add_population(population, self.facts.dataset)
        while True:
            head = self.ledger.head
            approval = self.require_approved(plan, run)
            cost = self._cost_of_rest(plan, run, population, limits, approval)
            bound = [e for e in self.ledger.events("bound") if e["run"] == run]
            if bound and bound[-1]["population"] == population.digest:
                return
            fields = {"run": run, "approval": approval["number"], "basis": cost.basis}
            fields |= {"plan_sha256": plan.sha256, "population": population.digest}
            try:
                self.ledger.append("bound", fields, expected_head=head)
            except HeadMovedError:
                continue
            return

    def _cost_of_rest(
        self,
        plan: StudyPlan,
        run: str,
        population: Population,
        limits: DatasetPolicy,
        approval: Body,
    ) -> Cost:
        """What the run's remaining steps cost these very patients, whoever was approved."""
        event = event_of(plan)
        left = approval["steps"] - self.ledger.steps(run)
        if event is None or left <= 0:
            return Cost(0.0, 0.0, 0.0, "filter")
        rest = PrivacyEvent(event.noise_multiplier, event.sample_rate, left)
        known = [c for c in commitments(self.ledger) if c.spent or c.approval != approval["number"]]
        past = histories(population.members, known, self.ledger.members)
        cost = cost_of(rest, past, limits, own=run)
        if cost.held > limits.max_epsilon:
            raise PolicyError(
                f"the rest of plan {plan.name!r} would bring a patient of this site to epsilon "
                f"{cost.held:.3f} at delta {limits.max_delta:g}; policy.toml allows "
                f"{limits.max_epsilon:g}. The policy or the patients changed since the approval."
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


def event_of(plan: StudyPlan) -> PrivacyEvent | None:
    """All that a plan may cost a patient, spare rounds included; None where privacy is off."""
    sigma, rate = noise_multiplier_of(plan), plan.training.sample_rate
    if sigma is None or rate is None:
        return None
    return PrivacyEvent(sigma, rate, steps_of(plan))


def _approval(
    plan: StudyPlan,
    event: PrivacyEvent | None,
    population: Population,
    cost: Cost,
    limits: DatasetPolicy,
) -> Body:
    return {
        "plan_sha256": plan.sha256,
        "name": plan.name,
        "population": population.digest,
        "noise_multiplier": event.noise_multiplier if event else 0.0,
        "sample_rate": event.sample_rate if event else 0.0,
        "steps": event.steps if event else 0,
        "basis": cost.basis,
        "cap": limits.max_epsilon,
        "delta": limits.max_delta,
        "epsilon_before": cost.before,
        "epsilon_after": cost.after,
    }


def _beyond(plan: StudyPlan, limits: DatasetPolicy, cost: Cost, fit: int) -> str:
    by_filter = (
        f" Studies chosen after earlier results are held by a filter, which counts {cost.held:.3f}."
        if cost.held != cost.after
        else ""
    )
    return (
        f"plan {plan.name!r} would bring a patient of this site from epsilon {cost.before:.3f} to "
        f"{cost.after:.3f} at delta {limits.max_delta:g}; policy.toml allows "
        f"{limits.max_epsilon:g} over all studies.{by_filter} {fit} of its "
        f"{plan.training.rounds + plan.training.spare_rounds} rounds (spare ones included) would "
        "still fit at this noise: ask for a plan with that many, or with more noise."
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
