"""An audit as a record: what is claimed, what the evidence says, what the attacks reached.

The fields of `claim` are those that NIST SP 800-226 asks of a differential-privacy guarantee;
`risks` are the two questions of the EDPB's opinion 28/2024 on models: what can be extracted from
it, and what can be learnt by querying it. Verdicts are "violated", "not refuted" or "not testable".
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from server.manifest import OUTCOME
from shared.identity import fingerprint
from shared.plan import StudyPlan
from shared.privacy import GRID, noise_multiplier_of, steps_of
from shared.statement import statement
from simulations.audits.accounting import account
from simulations.audits.finding import Finding
from simulations.audits.verification import Verified

SCHEMA = "fedward-audit/1"
AUDIT_FILE = "audit.json"
PAGE_FILE = "audit.html"
SCHEMA_FILE = "audit.schema.json"

LIMITS = (
    "An audit can refute a privacy claim; it cannot prove one. Not refuted means that these "
    "probes, at the error rates stated, found nothing.",
    "The guarantee is for a patient of one hospital. A patient of k hospitals has k times the "
    "sensitivity.",
    "Differential privacy bounds what the released model and sums say of one patient. It does not "
    "bound what they say of a group, of a hospital's population, or of a condition.",
    "Whether a hospital's data were what it says, and whether its machine was sound, no record "
    "shows. A hospital that poisons its own data is outside this audit.",
    "Signatures hold under the fingerprints that the auditor compared with the hospitals. Stolen "
    "keys sign as well as their owners do.",
    "The probes run the code that is installed where the audit runs, not the code that ran at a "
    "hospital: compare its version and hash with the hospital's own.",
    "Noise is drawn in software; side channels on a hospital's machine, timing among them, are not "
    "covered.",
)


@dataclass(frozen=True)
class Audit:
    """Everything that an audit found.

    Attributes:
        run: The run directory.
        verified: What its evidence says.
        findings: What the probes found, family by family.
        extent: "full"; "quick", with fewer repetitions; or "partial", with families left out.
        seed: Of the auditor's choices; None where the operating system drew them.
        seconds: What each family took.
    """

    run: Path
    verified: Verified
    findings: tuple[Finding, ...]
    extent: str
    seed: int | None
    seconds: Mapping[str, float]

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """Those of the evidence, then those of the probes."""
        return (*self.verified.findings, *self.findings)

    @property
    def verdict(self) -> str:
        """ "violated" where any claim was refuted."""
        return verdict_of(self.all_findings)


def verdict_of(findings: Iterable[Finding]) -> str:
    """The worst verdict."""
    verdicts = {f.verdict for f in findings}
    if "violated" in verdicts:
        return "violated"
    return "not refuted" if "not refuted" in verdicts else "not testable"


def audit_statement(audit: Audit, now: datetime.datetime) -> dict[str, Any]:
    """The in-toto statement of an audit: its files, and the audit as predicate.

    Args:
        audit: What was found.
        now: When, with a time zone.
    """
    return statement(_subjects(audit.run), _predicate(audit, now))


def _subjects(run: Path) -> dict[str, str]:
    files = [run / name for name in OUTCOME if (run / name).is_file()]
    files += [p for p in sorted((run / "evidence").rglob("*")) if p.is_file()]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _predicate(audit: Audit, now: datetime.datetime) -> dict[str, Any]:
    plan, history = audit.verified.plan, audit.verified.history
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": {"name": "fedward-audit", "version": importlib.metadata.version("fedward")},
        "time": now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "extent": audit.extent,
        "seed": audit.seed,
        "code_sha256": code_digest(),
        "verdict": audit.verdict,
        "families": _families(audit),
        "findings": [f.as_dict() for f in audit.all_findings],
        "limits": list(LIMITS),
        "unsigned": list(audit.verified.unsigned),
    }
    if plan is not None:
        found["plan"] = {"name": plan.name, "sha256": plan.sha256}
        found["claim"] = claim_of(plan, audit)
        found["risks"] = risks_of(audit)
    if history is not None:
        models = {r.model_sha256.hex() for r in audit.verified.receipts.values()}
        found["run"] = {
            "run_id": history.session.run_id,
            "rounds": len(history.rounds),
            "sums": len(history.sums),
            "model_sha256": models.pop() if len(models) == 1 else None,
            "transcript": history.transcript.hex(),
            "sites": {name: fingerprint(key) for name, key in history.roster.items()},
        }
    return found


def _families(audit: Audit) -> list[dict[str, Any]]:
    names = dict.fromkeys(f.probe for f in audit.all_findings)
    table = []
    for name in names:
        own = [f for f in audit.all_findings if f.probe == name]
        counts = {v: sum(f.verdict == v for f in own) for v in VERDICTS}
        table.append(
            {
                "name": name,
                "verdict": verdict_of(own),
                "counts": counts,
                "seconds": round(audit.seconds.get(name, 0.0), 1),
                "alpha": sum(f.alpha for f in own),
            }
        )
    return table


VERDICTS = ("violated", "not refuted", "not testable")


def claim_of(plan: StudyPlan, audit: Audit) -> dict[str, Any]:
    """The guarantee as NIST SP 800-226 asks for it; texts and numbers for a reader."""
    cohort, privacy = plan.cohort, plan.privacy
    common = {
        "unit": "one patient of one hospital, with all of that patient's records",
        "relation": "add or remove one patient",
        "mode": privacy.mode,
        "trust_model": (
            f"the server is not trusted; up to {cohort.colluders} of {len(cohort.names)} hospitals "
            f"may side with it; a sum is over at least {cohort.threshold} hospitals. "
            + _TRUST[privacy.mode]
        ),
    }
    sigma = noise_multiplier_of(plan)
    if sigma is None or plan.training.sample_rate is None:
        return common | {"guarantee": "none: privacy mode none, simulation only"}
    epsilon, delta, clip = privacy.promise
    spent = max((r.epsilon for r in audit.verified.receipts.values()), default=None)
    rate = plan.training.sample_rate
    found = account({(sigma, rate): steps_of(plan)}, delta)
    return common | {
        "guarantee": f"({epsilon:g}, {delta:g})-differential privacy over the whole study",
        "epsilon": epsilon,
        "delta": delta,
        "epsilon_spent": spent,
        "clip_norm": clip,
        "noise_multiplier": sigma,
        "sampling": f"Poisson, every patient at rate {rate:g} in every step",
        "sample_rate": rate,
        "steps": steps_of(plan),
        "mechanism": _MECHANISM[privacy.mode],
        "composition": "adaptive, over all steps of all rounds, aborted and spare ones included; "
        "studies on the same patients add up in each hospital's ledger",
        "accountant": f"PLD (dp-accounting), grid {GRID:g}; checked: {found.text()}",
        "floating_point": _FLOATS[privacy.mode],
        "randomness": "ChaCha20, keyed by the operating system at every hospital",
        "public": "plan, number of rounds, cohorts, contributors, published sums, the model",
    }


_TRUST = {
    "local": "Each hospital's own noise is enough alone.",
    "distributed": "The noise is the sum of the hospitals' shares: it is enough as long as no more "
    "than that many side with the server; each receipt states epsilon for the case that all do.",
    "none": "No noise at all.",
}
_MECHANISM = {
    "local": "DP-SGD: per-patient gradients clipped, summed, Gaussian noise added at the hospital "
    "in every local step",
    "distributed": "DP-SGD: per-patient gradients clipped, summed and rounded to integers, each "
    "hospital's share of discrete noise added before masking",
    "none": "none",
}
_FLOATS = {
    "local": "Gaussian noise in floating point: the guarantee is that of real numbers, and the "
    "rounding of the machine's numbers is not accounted for; the update is then rounded to "
    "integers by a rule that depends on the noisy values alone",
    "distributed": "the noise is added to integers, so the guarantee holds for what is released, "
    "rounding included",
    "none": "not applicable",
}


def risks_of(audit: Audit) -> dict[str, Any]:
    """What the attacks say about extraction and queries, by the EDPB's opinion 28/2024."""
    return {
        "extraction": _risk(
            audit.findings,
            ("reconstruction", "collusion", "transcript"),
            "Can personal data be obtained from what was sent, or from the model's parameters?",
        ),
        "query": _risk(
            audit.findings,
            ("membership", "one_run", "neighbour"),
            "Can queries to the model, however many, show whether a person's data were used?",
        ),
        "conclusion": "Whether the model may be treated as holding no personal data is a legal "
        "assessment of the controller, case by case; these findings are one input to it.",
    }


def _risk(findings: Sequence[Finding], probes: tuple[str, ...], question: str) -> dict[str, Any]:
    own = [f for f in findings if f.probe in probes]
    return {
        "question": question,
        "verdict": verdict_of(own),
        "findings": [f"{f.probe}/{f.name}" for f in own],
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over the installed Fedward's Python files, to compare two installations by."""
    digest = hashlib.sha256(b"fedward-code/1")
    for package in ("client", "server", "shared", "simulations"):
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*.py")):
            name, body = f"{package}/{path.relative_to(root)}".encode(), path.read_bytes()
            for part in (name, body):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def audit_schema() -> dict[str, Any]:
    """The JSON Schema of the statement inside audit.json."""
    text = (resources.files("simulations.audits") / SCHEMA_FILE).read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
