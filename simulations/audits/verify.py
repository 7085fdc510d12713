"""Offline verification of a run directory, or of one site's export alone.

Nothing here needs a network, a site's folder, or trust in whoever kept the files. Three things have
to come from elsewhere: the plan's hash, which the officer approved, and the fingerprints of the
sites and of the coordinator, which people read to each other. Without them the records are only
checked against themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shared import plan as plans
from shared.errors import ConfigError, FedwardError
from shared.evidence import LEDGER_FILE, RECORD_FILE
from simulations.audits import books
from simulations.audits import outcome as outcomes
from simulations.audits.checks import NotTestableError, demand
from simulations.audits.verification import Expected, Say, Verification, Verified, no_progress
from simulations.audits.verify_run import RunVerification


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
        return RunVerification(path, expected, say).verify()
    if (path / RECORD_FILE).is_file():
        return _Export(path, expected, say).verify()
    raise ConfigError(
        f"{path} is neither a run directory nor a site's export: it has no evidence/ and no "
        f"{RECORD_FILE}."
    )


class _Export(Verification):
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


def read_expected(
    plan: Path | None,
    roster: Mapping[str, str],
    plan_sha256: str | None = None,
    coordinator: str = "",
) -> Expected:
    """What the command line knows: a plan's TOML or hash, and fingerprints."""
    if plan is not None:
        try:
            plan_sha256 = plans.load(plan).sha256
        except FedwardError as error:
            raise ConfigError(str(error)) from None
    return Expected(plan_sha256, roster, coordinator)
