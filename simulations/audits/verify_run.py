"""Offline verification of a run directory: files, rounds, sums, model, results, every site."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from server.manifest import MANIFEST_FILE, read_manifest
from server.model_card import CARD_JSON
from server.results import read_results
from server.rounds import StudyOutcome
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
from shared.plan import StudyPlan
from shared.study import Receipt, state_to_bytes
from simulations.audits import books
from simulations.audits import outcome as outcomes
from simulations.audits.chain import History, check_same_rounds
from simulations.audits.checks import NotTestableError, demand
from simulations.audits.verification import Expected, Say, Verification, Verified


class RunVerification(Verification):
    """A run directory."""

    def __init__(self, path: Path, expected: Expected, say: Say) -> None:
        super().__init__(path, path / "evidence", expected, say)

    def verify(self) -> Verified:
        signer = self._check_manifest()
        self._check_coordinator(signer)
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

    def _check_manifest(self) -> bytes:
        """Check the list of files and each file; returns who signed the list, or nothing."""
        hashes: Mapping[str, str] = {}
        by, name = b"", self.name_of(self.evidence / MANIFEST_FILE)
        with self.checks.check("manifest", "The list of files is whole.", file=name) as remark:
            manifest = read_manifest(self.path)
            hashes, by = manifest.files, manifest.signer
            signer = "not signed: it shows accidents, a forger would write it anew"
            if manifest.signer:
                signer = f"signed by {fingerprint(manifest.signer)}"
            remark.text = f"{len(hashes)} files; {signer}"
        for file, digest in hashes.items():
            with self.checks.check("file", f"{file} is as it was written.", file=file):
                manifest.check(self.path, file, digest)
        return by

    def _check_coordinator(self, signer: bytes) -> None:
        """The list of files and the server's record carry one coordinator's signature.

        Nothing to check where no coordinator signed and none is expected: a simulation.
        """
        file = self.evidence / RECORD_FILE
        sealed = False
        with contextlib.suppress(FedwardError, OSError):  # an unreadable record is found later
            sealed = read_record_file(file).seal.signature is not None
        known = self.expected.coordinator
        if not (signer or sealed or known):
            return
        with self.checks.check(
            "seal", "The coordinator sealed the server's record, and listed the files.",
            file=self.name_of(file),
        ) as remark:  # fmt: skip
            demand(bool(signer), "the list of files is not signed")
            read_record_file(file).check_signature(signer)
            remark.text = f"both signed by {fingerprint(signer)}"
        with self.checks.check(
            "coordinator", "The coordinator's key is the one that was read over the telephone."
        ) as remark:
            if not known:
                raise NotTestableError(
                    "no fingerprint was given. Compare it, or give --coordinator: "
                    f"{fingerprint(signer) if signer else 'nobody signed'}"
                )
            demand(bool(signer), "no coordinator signed")
            demand(
                fingerprint(signer) == known,
                f"the coordinator signed with {fingerprint(signer)}, not with {known}",
            )
            remark.text = "the fingerprint agrees"

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
        if self._says_reproducible():
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

        with self.checks.check(
            "model-card", "The model card says what plan and results say.", file=CARD_JSON
        ):
            if not (self.path / CARD_JSON).exists():
                raise NotTestableError("there is no model card")
            results = read_results(self.path / "results.json")
            outcomes.check_model_card(plan, results, self.path)

    def _says_reproducible(self) -> bool:
        """Whether the results are branded; unreadable ones are what another check is about."""
        try:
            results = read_results(self.path / "results.json")
        except ConfigError:
            return False
        return bool(results.get("insecure_reproducible"))

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
