"""Offline verification of a run directory, or of one site's export alone.

Nothing here needs a network, a site's folder, or trust in whoever kept the files. Two things have
to come from elsewhere: the plan's hash, which the officer approved, and the sites' fingerprints,
which people read to each other. Without them the records are only checked against themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.manifest import MANIFEST_FILE, read_manifest
from server.results import read_results
from server.rounds import StudyOutcome
from shared import plan as plans
from shared.errors import AuditError, ConfigError, FedwardError
from shared.evidence import (
    LEDGER_FILE,
    PLAN_FILE,
    RECEIPTS_FILE,
    RECORD_FILE,
    STATE_FILE,
    SUMS_FILE,
    read_record_file,
)
from shared.identity import fingerprint
from shared.models import build_model, parameter_spec
from shared.plan import StudyPlan
from shared.privacy import costs_of
from shared.study import Receipt, state_to_bytes
from simulations.audits import books
from simulations.audits import outcome as outcomes
from simulations.audits.accounting import check_agreement
from simulations.audits.chain import History, check_same_rounds, replay
from simulations.audits.checks import Checks, NotTestableError, demand
from simulations.audits.finding import Finding

Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Expected:
    """What the auditor knows from elsewhere.

    Attributes:
        plan_sha256: Of the plan that was approved; None where unknown.
        fingerprints: Site name -> fingerprint; empty where unknown.
    """

    plan_sha256: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


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


def verify(path: Path, expected: Expected | None = None, say: Say = no_progress) -> Verified:
    """Verify a run directory, or a site's export.

    Args:
        path: A run directory (it holds evidence/), or a folder that a site exported.
        expected: What is known from elsewhere.
        say: Told what is being checked, and the share that is done.

    Raises:
        ConfigError: `path` is neither.
    """
    expected = expected or Expected()
    if (path / "evidence").is_dir():
        return _Run(path, expected, say).verify()
    if (path / RECORD_FILE).is_file():
        return _Export(path, expected, say).verify()
    raise ConfigError(
        f"{path} is neither a run directory nor a site's export: it has no evidence/ and no "
        f"{RECORD_FILE}."
    )


class _Verification:
    """What both kinds have in common."""

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
            history = replay(
                record.records, record.keeper, plan, parameter_spec(build_model(plan)).length
            )
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


class _Export(_Verification):
    """One site's export, alone."""

    def __init__(self, path: Path, expected: Expected, say: Say) -> None:
        super().__init__(path, path, expected, say)

    def verify(self) -> Verified:
        plan = self.read_plan()
        history = None if plan is None else self.read_history(self.path / RECORD_FILE, plan, None)
        if plan is None or history is None:
            return self.result
        self.result.history = history
        self.check_identities(history)
        self.say("rounds", 0.4)
        self.check_thresholds(history)
        models = outcomes.models_before(history)
        receipts = self.result.receipts = books.receipts_of(history)
        with self.checks.check(
            "receipt", "The site's own receipt fits the rounds that it holds."
        ) as remark:
            if not receipts:
                raise NotTestableError("the run was not over when the site exported")
            demand(set(receipts) == {history.keeper}, "it holds another site's receipt")
            books.check_receipts(history, receipts, models)
            remark.text = f"{len(history.rounds)} rounds, one model"
        mine = receipts.get(history.keeper)
        self.say("ledger", 0.6)
        self.check_ledger(self.path / LEDGER_FILE, history, mine, models)
        self.check_promise(plan, receipts)
        return self.result


class _Run(_Verification):
    """A run directory."""

    def __init__(self, path: Path, expected: Expected, say: Say) -> None:
        super().__init__(path, path / "evidence", expected, say)

    def verify(self) -> Verified:
        self._check_manifest()
        plan = self.read_plan()
        file = self.evidence / RECORD_FILE
        history = None if plan is None else self.read_history(file, plan, "server")
        if plan is None or history is None:
            return self.result
        self.result.history = history
        self.say("rounds", 0.2)
        self.check_identities(history)
        self.check_thresholds(history)
        models = outcomes.models_before(history)
        receipts = self.result.receipts = books.receipts_of(history)
        with self.checks.check(
            "receipts",
            "All sites signed for the same model, the same rounds and the log of them.",
        ) as remark:
            demand(
                len(receipts) >= history.session.threshold,
                f"{len(receipts)} receipts; at least {history.session.threshold} are needed",
            )
            books.check_receipts(history, receipts, models)
            remark.text = f"{len(receipts)} of {len(history.session.names)} sites"
        self.say("sums", 0.3)
        self._check_outcome(plan, history, receipts)
        self._check_sites(history, receipts, models)
        self.check_promise(plan, receipts)
        return self.result

    def _check_manifest(self) -> None:
        hashes: Mapping[str, str] = {}
        name = self.name_of(self.evidence / MANIFEST_FILE)
        with self.checks.check("manifest", "The list of files is whole.", file=name) as remark:
            manifest = read_manifest(self.path)
            hashes = manifest.files
            signer = "not signed: it shows accidents, a forger would write it anew"
            if manifest.signer:
                signer = f"signed by {fingerprint(manifest.signer)}"
            remark.text = f"{len(hashes)} files; {signer}"
        for file, digest in hashes.items():
            with self.checks.check("file", f"{file} is as it was written.", file=file):
                manifest.check(self.path, file, digest)

    def _check_outcome(
        self, plan: StudyPlan, history: History, receipts: Mapping[str, Receipt]
    ) -> None:
        outcome: StudyOutcome | None = None
        sums = self.evidence / SUMS_FILE
        with self.checks.check(
            "sums",
            "The published sums, applied from the plan's starting point, give every model that the "
            "sites went on from, and the last one that they signed for.",
            file=self.name_of(sums),
        ) as remark:
            if not sums.exists():
                raise NotTestableError("the sums were not kept; models are known by their hash")
            outcome = outcomes.replay_sums(history, sums)
            outcomes.check_state(outcome, [r.model_sha256 for r in receipts.values()])
            remark.text = f"{len(history.sums)} sums, model {outcome.state.digest().hex()[:16]}"
        if outcome is not None:
            self._check_files(plan, outcome)

    def _check_files(self, plan: StudyPlan, outcome: StudyOutcome) -> None:
        state = self.evidence / STATE_FILE
        with self.checks.check("state", "It is the model's state.", file=self.name_of(state)):
            demand(
                state.read_bytes() == state_to_bytes(outcome.state),
                f"{state.name} is not the state that the published sums give",
            )
        receipts = self.evidence / RECEIPTS_FILE
        with self.checks.check(
            "receipts-file", "It says what the records say.", file=self.name_of(receipts)
        ):
            outcomes.check_receipts_file(plan, outcome, receipts)
        with self.checks.check(
            "model", "The model files hold the model that the sites signed for.",
            file="model.safetensors",
        ) as remark:  # fmt: skip
            if not (self.path / "model.safetensors").exists():
                raise NotTestableError("no model was exported")
            outcomes.check_model_files(plan, outcome.state, self.path)
            remark.text = "byte for byte"
        with self.checks.check(
            "results", "results.json says what the evidence says.", file="results.json"
        ) as remark:
            self.result.unsigned = outcomes.check_results(plan, outcome, self.path / "results.json")
            remark.text = "recomputed from the sums and receipts; signed by nobody: " + ", ".join(
                self.result.unsigned
            )
        if read_results(self.path / "results.json").get("insecure_reproducible"):
            with self.checks.check(
                "randomness", "Nobody outside a hospital can know its noise.", file="results.json"
            ):
                raise AuditError(
                    "the run was asked to take its noise from the scenario's seed "
                    "(--insecure-reproducible): whoever knows the seed subtracts it"
                )
        with self.checks.check(
            "report", "The report shows what results.json says.", file="report.html"
        ):
            outcomes.check_report(
                read_results(self.path / "results.json"), self.path / "report.html"
            )

    def _check_sites(
        self, history: History, receipts: Mapping[str, Receipt], models: Mapping[int, int]
    ) -> None:
        folder = self.evidence / "sites"
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if not names:
            with self.checks.check("sites", "Every site's own record tells the same rounds."):
                raise NotTestableError(
                    "no site's export is here. Ask the sites for theirs (fedward-site evidence)."
                )
        for place, name in enumerate(names):
            self.say(name, 0.5 + 0.5 * place / len(names))
            self._check_site(folder / name, history, receipts, models)

    def _check_site(
        self,
        folder: Path,
        server: History,
        receipts: Mapping[str, Receipt],
        models: Mapping[int, int],
    ) -> None:
        site = folder.name
        with self.checks.check(
            "site-plan",
            f"{site} holds the same plan.",
            file=self.name_of(folder / PLAN_FILE),
            site=site,
        ):
            demand(
                (folder / PLAN_FILE).read_bytes() == server.plan.canonical_bytes,
                f"{site} approved another plan",
            )
        history = self.read_history(folder / RECORD_FILE, server.plan, site, site)
        if history is None:
            return
        with self.checks.check(
            "same-rounds",
            f"{site} was told the same rounds as the server's record holds.",
            site=site,
        ) as remark:
            demand(history.roster == server.roster, f"{site} pinned other keys")
            count = check_same_rounds(server, history)
            mine = history.receipts.get(site)
            demand(mine == server.receipts.get(site), f"{site}: two receipts differ")
            remark.text = f"{count} rounds"
        self.check_ledger(folder / LEDGER_FILE, history, receipts.get(site), models)


def read_expected(
    plan: Path | None, roster: Mapping[str, str], plan_sha256: str | None = None
) -> Expected:
    """What the command line knows: a plan's TOML or hash, and fingerprints by site name."""
    if plan is not None:
        try:
            plan_sha256 = plans.load(plan).sha256
        except FedwardError as error:
            raise ConfigError(str(error)) from None
    return Expected(plan_sha256, roster)
