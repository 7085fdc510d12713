"""The release gate: where the plan asks for it, no model is exported without a passing audit.

The plan names the auditor's key, so every site agreed to who judges. The gate decides on export
alone: sites and server hold the model all the same, since each computes it from the published sums.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from server.record import write_model
from server.rounds import StudyOutcome
from shared import plan as plans
from shared.errors import AuditError, ConfigError, ProtocolError
from shared.evidence import PLAN_FILE, RECORD_FILE, STATE_FILE
from shared.messages import decode
from shared.plan import StudyPlan
from shared.statement import open_statement
from shared.study import Receipt, state_from_bytes

AUDIT_FILE = "audit.json"
_WAY_OUT = "Run fedward-audit report on it with the auditor's key, then fedward-audit release."


def require_audit(plan: StudyPlan, run: Path) -> None:
    """Let a model be exported, or refuse; a plan without a gate lets every model through.

    Args:
        plan: The study's plan.
        run: Its run directory, with evidence/ and, from the auditor, audit.json.

    Raises:
        AuditError: the audit is missing, by another auditor, of another run, partial, or refuted
            a claim.
    """
    if not plan.audit.gate:
        return
    file = run / AUDIT_FILE
    if not file.is_file():
        raise AuditError(
            f"the model is withheld: the plan asks for an audit before export, and {file} is "
            f"missing. {_WAY_OUT}"
        )
    try:
        record = open_statement(file.read_text(encoding="utf-8"), bytes.fromhex(plan.audit.auditor))
    except (ProtocolError, UnicodeDecodeError) as error:
        raise AuditError(f"the model is withheld: {file}: {error}. {_WAY_OUT}") from None
    _judge(plan, run, record)


def _judge(plan: StudyPlan, run: Path, record: dict[str, Any]) -> None:
    found = record["predicate"]
    if found.get("plan", {}).get("sha256") != plan.sha256:
        raise AuditError(f"the model is withheld: the audit is of another plan. {_WAY_OUT}")
    audited = {s["name"]: s["digest"]["sha256"] for s in record["subject"]}
    for name in (PLAN_FILE, RECORD_FILE, STATE_FILE):
        digest = hashlib.sha256((run / "evidence" / name).read_bytes()).hexdigest()
        if audited.get(f"evidence/{name}") != digest:
            raise AuditError(
                f"the model is withheld: evidence/{name} is not what was audited. {_WAY_OUT}"
            )
    if found["extent"] == "partial":
        raise AuditError(f"the model is withheld: the audit left families out. {_WAY_OUT}")
    if found["verdict"] != "not refuted":
        broken = [f["name"] for f in found["findings"] if f["verdict"] == "violated"]
        raise AuditError(
            "the model is withheld: its audit did not pass (" + ", ".join(broken) + "). Read "
            "audit.html; a run whose claim was refuted is not released by another audit of it."
        )


def release_model(run: Path) -> None:
    """Write model.safetensors and model.json of a finished run, if its plan's gate lets it.

    Raises:
        AuditError: the gate refuses, or the state is not the one that the sites signed for.
        ConfigError: not a run directory.
    """
    try:
        plan = plans.from_bytes((run / "evidence" / PLAN_FILE).read_bytes())
        state = state_from_bytes((run / "evidence" / STATE_FILE).read_bytes())
        receipts = json.loads((run / "evidence" / "receipts.json").read_text(encoding="utf-8"))
        signed = [bytes.fromhex(r["receipt"]) for r in receipts["receipts"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run} is not a run directory ({type(error).__name__}).") from None
    require_audit(plan, run)
    models = {decode(Receipt, data).model_sha256 for data in signed}
    if models != {state.digest()}:
        raise AuditError("the state in evidence/ is not the model that the sites signed for")
    write_model(plan, StudyOutcome(state, (), {}, b""), run)
