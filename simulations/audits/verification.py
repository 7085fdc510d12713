"""What verifying a run directory and a site's export have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared import plan as plans
from shared.evidence import (
    PLAN_FILE,
    read_record_file,
)
from shared.identity import fingerprint
from shared.models import plan_spec
from shared.plan import StudyPlan
from shared.privacy import costs_of
from shared.study import Receipt
from simulations.audits import books
from simulations.audits.accounting import check_agreement
from simulations.audits.chain import History, replay
from simulations.audits.checks import Checks, NotTestableError, demand
from simulations.audits.finding import Finding

Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Expected:
    """What the auditor knows from elsewhere.

    Attributes:
        plan_sha256: Of the plan that was approved; None where unknown.
        fingerprints: Site name -> fingerprint; empty where unknown.
        coordinator: Its fingerprint; empty where unknown.
    """

    plan_sha256: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    coordinator: str = ""


@dataclass
class Verified:
    """The outcome of a verification.

    Attributes:
        path: What was verified.
        findings: Every check, in order.
        plan: The plan, where it could be read.
        history: The rounds, where they could be replayed.
        receipts: The sites' receipts.
        unsigned: Keys of results.json that nothing signed covers.
    """

    path: Path
    findings: list[Finding]
    plan: StudyPlan | None = None
    history: History | None = None
    receipts: dict[str, Receipt] = field(default_factory=dict)
    unsigned: list[str] = field(default_factory=list)

    @property
    def violated(self) -> bool:
        """Whether a claim was refuted."""
        return any(f.verdict == "violated" for f in self.findings)


def no_progress(step: str, share: float) -> None:
    """Say nothing."""


class Verification:
    """What both kinds have in common: one folder, what is expected of it, and the findings."""

    def __init__(self, path: Path, evidence: Path, expected: Expected, say: Say) -> None:
        self.path, self.evidence, self.expected, self.say = path, evidence, expected, say
        self.checks = Checks()
        self.result = Verified(path, self.checks.findings)

    def name_of(self, file: Path) -> str:
        return str(file.relative_to(self.path))

    def read_plan(self) -> StudyPlan | None:
        file = self.evidence / PLAN_FILE
        with self.checks.check(
            "plan", "The plan is in its one canonical form.", file=self.name_of(file)
        ) as remark:
            self.result.plan = plan = plans.from_bytes(file.read_bytes())
            remark.text = f"sha256 {plan.sha256}"
        if self.result.plan is not None:
            self._check_plan_hash(self.result.plan)
        return self.result.plan

    def _check_plan_hash(self, plan: StudyPlan) -> None:
        with self.checks.check("plan-approved", "It is the plan that the auditor knows.") as remark:
            if self.expected.plan_sha256 is None:
                raise NotTestableError(
                    "no plan was named. Compare this hash with the approved one, or give --plan: "
                    f"{plan.sha256}"
                )
            demand(
                plan.sha256 == self.expected.plan_sha256,
                f"the run is of plan {plan.sha256}, not of {self.expected.plan_sha256}",
            )
            remark.text = "the hashes agree"

    def read_history(
        self, file: Path, plan: StudyPlan, keeper: str | None, site: str = ""
    ) -> History | None:
        """Replay one record file; `keeper` None stands for whoever the file says."""
        found: History | None = None
        with self.checks.check(
            "rounds",
            "Every round is signed by at least the threshold of sites, follows from the one "
            "before, and rests on a set-up that all its members confirmed.",
            file=self.name_of(file),
            site=site,
        ) as remark:
            record = read_record_file(file)
            demand(keeper in (None, record.keeper), f"it was kept by {record.keeper}")
            history = replay(record.records, record.keeper, plan, plan_spec(plan).length)
            if record.keeper != "server":
                demand(record.keeper in history.roster, "its keeper is not in the roster")
                record.check_signature(history.roster[record.keeper])
            found = history
            aborted = len(history.rounds) - len(history.sums)
            remark.text = (
                f"{len(history.rounds)} rounds ({aborted} aborted), {len(record.records)} records"
            )
        return found

    def check_identities(self, history: History) -> None:
        known = self.expected.fingerprints
        with self.checks.check(
            "identities", "The sites' keys are the ones that were read over the telephone."
        ) as remark:
            found = {name: fingerprint(key) for name, key in history.roster.items()}
            if not known:
                listed = "; ".join(f"{name} {text}" for name, text in found.items())
                raise NotTestableError(
                    "no fingerprint was given, so all signatures are checked under the keys that "
                    f"the records name. Compare them, or give --roster: {listed}"
                )
            for name, text in found.items():
                demand(name in known, f"no fingerprint was given for {name}")
                demand(known[name] == text, f"{name} signed with {text}, not with {known[name]}")
            remark.text = f"{len(found)} fingerprints agree"

    def check_thresholds(self, history: History) -> None:
        session, sums = history.session, history.sums
        with self.checks.check(
            "cohorts",
            "No sum is over so few sites that those who may collude could subtract themselves.",
        ) as remark:
            demand(bool(sums), "no round ended with a sum")
            least = min(len(r.contributors) for r in sums)
            t, c = session.threshold, session.colluders
            demand(least >= t and least - c >= 2, f"a sum over {least} sites was opened")
            distinct = len({r.contributors for r in sums})
            remark.value, remark.expected = float(least), float(t)
            remark.text = (
                f"smallest sum over {least} of {len(session.names)} sites; threshold {t}, up to "
                f"{c} may collude, so at least {least - c} others are in every sum; {distinct} "
                "distinct sets of contributors"
            )
            remark.assumptions.append(f"at most {c} of the sites side with the server")
        with self.checks.check(
            "recheck", "More sites than may collude recomputed every chunk of the published sums."
        ) as remark:
            demand(history.last_sum_settled, "nobody is seen to have recomputed the last sum")
            missing = len(sums) - len(history.settled)
            demand(
                history.keeper != "server" or not missing,
                f"nobody is seen to have recomputed {missing} of the published sums",
            )
            remark.text = (
                f"{len(history.settled)} of {len(sums)} sums with the signatures of "
                f"{session.colluders + 1} or more checkers a chunk; the last one is among them, "
                "and no site signs a next round before"
            )

    def check_ledger(
        self, file: Path, history: History, receipt: Receipt | None, models: Mapping[int, int]
    ) -> None:
        site, plan = history.keeper, history.plan
        ledger: books.LedgerFile | None = None
        with self.checks.check(
            "ledger",
            "The ledger is chained and signed, line by line.",
            file=self.name_of(file),
            site=site,
        ) as remark:
            ledger = books.read_ledger(file, site, history.roster[site])
            remark.text = f"{len(ledger.events)} events"
            if earlier := ledger.events[0].get("follows"):
                ies = "identity" if len(earlier) == 1 else "identities"
                remark.text += f"; begun under {len(earlier)} earlier {ies}, and signed anew"
        if ledger is None:
            return
        with self.checks.check(
            "charges",
            f"{site}: all that left the hospital was approved and charged before, at the plan's "
            "noise.",
            site=site,
        ) as remark:
            books.check_approval(ledger, plan, history.session.run_id)
            count = books.check_charges(ledger, history, models)
            if receipt is not None:
                books.check_receipt(ledger, plan, receipt)
            remark.text = f"{count} vectors left, each charged for its own round"
        if plan.privacy.mode != "none":
            self._check_accounts(site, ledger, plan)

    def _check_accounts(self, site: str, ledger: books.LedgerFile, plan: StudyPlan) -> None:
        with self.checks.check(
            "accounting",
            f"{site}: three independent accountants agree on what was charged.",
            site=site,
        ) as remark:
            found = books.accounts(ledger, plan.privacy.budget[1])
            demand(bool(found), f"the ledger of {site} charges nothing")
            for one in found.values():
                check_agreement(one)
            worst = max(found.values(), key=lambda a: a.pld)
            remark.value, remark.text = worst.pld, worst.text()

    def check_promise(self, plan: StudyPlan, receipts: Mapping[str, Receipt]) -> None:
        with self.checks.check(
            "promise", "No patient was charged more than the plan promises."
        ) as remark:
            if plan.privacy.mode == "none":
                raise NotTestableError("the plan promises no privacy: mode none, simulation only")
            demand(bool(receipts), "no receipt says what was charged")
            told = []
            for use in costs_of(plan):
                spent, target, delta = books.worst_price(plan, use, receipts)
                demand(
                    spent <= target,
                    f"epsilon {spent:.4f} was charged for {use}; {target:g} was promised",
                )
                told.append(f"{use}: {spent:.4f} of {target:g} at delta {delta:g}")
                if remark.value is None:
                    remark.value, remark.expected = spent, target
            remark.text = "at most, for one site's patient: " + "; ".join(told)
