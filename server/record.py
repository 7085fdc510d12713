"""What the server itself can say of a finished study: results, model and evidence files."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.evidence import Spool, along
from server.results import write_text
from server.rounds import RoundReport, StudyOutcome
from server.transport import GridTransport
from shared.counts import count_kind, count_noise
from shared.evidence import (
    PLAN_FILE,
    RECEIPTS_FILE,
    RECORD_FILE,
    STATE_FILE,
    SUMS_FILE,
    write_frames,
    write_record_file,
)
from shared.identity import Identity
from shared.layout import VectorLayout
from shared.messages import decode
from shared.metrics import LEVEL, Reading
from shared.models import plan_spec
from shared.optimizers import ModelState
from shared.plan import StudyPlan
from shared.privacy import GRID, count_promise_of, epsilon_of, noise_multiplier_of
from shared.released import model_files
from shared.secagg.graph import tolerated_dropouts
from shared.study import Receipt, state_to_bytes

PROTOCOL_NAME = "fedward-secagg/1"
_EPSILON_POINTS = 50


def version() -> str:
    """The installed version of Fedward."""
    return importlib.metadata.version("fedward")


class EpsilonSoFar:
    """Epsilon after a number of trained rounds, for progress and curves.

    Composition takes a tenth of a second, so a long study is computed at 50 points; between
    them the next point's value is shown, which is never too small.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._sigma = noise_multiplier_of(plan)
        rounds = plan.training.rounds + plan.training.spare_rounds
        self._stride = max(1, -(-rounds // _EPSILON_POINTS))
        self._last = rounds

    def after(self, rounds: int) -> float | None:
        """Epsilon of one patient after `rounds` trained rounds; None where privacy is off."""
        plan = self._plan
        if self._sigma is None or plan.training.sample_rate is None or plan.privacy.delta is None:
            return None
        point = min(-(-rounds // self._stride) * self._stride, self._last)
        steps = point * plan.training.local_steps
        return epsilon_of(self._sigma, plan.training.sample_rate, steps, plan.privacy.delta)


def readings_by_round(plan: StudyPlan, reports: Sequence[RoundReport]) -> dict[int, Reading]:
    """What the released counts say of the model after each trained round, 0 for the start."""
    found = {}
    for report in reports:
        if not report.reason and len(report.counts):
            deviation = count_noise(plan).spread(len(report.contributors))
            reading = count_kind(plan).read(plan, report.counts, deviation)
            if "count" in reading.metrics:
                reading.metrics["patients"] = reading.metrics.pop("count")
            found[report.model_round] = reading
    return found


def metrics_by_round(
    plan: StudyPlan, reports: Sequence[RoundReport]
) -> dict[int, dict[str, float]]:
    """The metrics of `readings_by_round`, without their intervals."""
    readings = readings_by_round(plan, reports)
    return {finished: reading.metrics for finished, reading in readings.items()}


def server_results(
    plan: StudyPlan, outcome: StudyOutcome, transport: GridTransport
) -> dict[str, Any]:
    """The keys of results.json that the server knows; see server/results.py."""
    spec = plan_spec(plan)
    cohort = plan.cohort
    readings = readings_by_round(plan, outcome.reports)
    last = readings.get(plan.training.rounds, Reading({}))
    return {
        "version": version(),
        "plan_sha256": plan.sha256,
        "mode": plan.privacy.mode,
        "unit": plan.privacy.unit,
        "model": {
            "name": plan.model.name,
            "parameters": spec.length,
            "sha256": outcome.state.digest().hex(),
        },
        "cohort": {
            "sites": list(cohort.names),
            "threshold": cohort.threshold,
            "colluders": cohort.colluders,
            "tolerated_dropouts": tolerated_dropouts(len(cohort.names), cohort.threshold),
        },
        "secure_sum": {
            "bits": plan.secure_sum.bits,
            "coordinates": VectorLayout(plan, spec.length).length,
            "clip_range": plan.secure_sum.clip_range,
            "protocol": PROTOCOL_NAME,
        },
        "rounds": _rounds(plan, outcome.reports, readings),
        "final": {"metrics": last.metrics, **_intervals(last), **_more(last)},
        **({} if plan.learns else {"statistics": _statistics(last)}),
        "privacy": _privacy(plan, outcome),
        "wire": _wire(transport),
    }


def _intervals(reading: Reading) -> dict[str, Any]:
    """The intervals that the noise on the counts leaves, as results.json has them."""
    if not reading.intervals:
        return {}
    return {"intervals": {name: list(ends) for name, ends in reading.intervals.items()}}


def _more(reading: Reading) -> dict[str, Any]:
    """What the last evaluation released beside the scores."""
    parts = {"importances": list(reading.importances), "groups": list(reading.groups)}
    return {name: part for name, part in parts.items() if part}


def _statistics(reading: Reading) -> dict[str, Any]:
    """What a statistics study found, as results.json has it."""
    return {"level": LEVEL, "features": list(reading.features)}


def _rounds(
    plan: StudyPlan, reports: Sequence[RoundReport], readings: Mapping[int, Reading]
) -> list[dict[str, Any]]:
    epsilon, attempts, rounds = EpsilonSoFar(plan), 0, []
    for report in reports:
        if not report.trained:
            continue
        attempts += 1
        after = None if report.reason else readings.get(report.model_round + 1)
        rounds.append(
            {
                "round": report.round_no,
                "cohort": list(report.cohort),
                "contributors": list(report.contributors),
                "dropped": list(report.dropped),
                "aborted": bool(report.reason),
                "wall_s": report.wall_s,
                "bytes_up": report.bytes_up,
                "bytes_down": report.bytes_down,
                "epsilon": epsilon.after(attempts),
                "metrics": after and after.metrics,
                **_intervals(after or Reading({})),
            }
        )
    return rounds


def _privacy(plan: StudyPlan, outcome: StudyOutcome) -> dict[str, Any]:
    if plan.privacy.mode == "none":
        return {"mode": "none", "sites": {}}
    epsilon, delta = plan.privacy.budget
    sites: dict[str, dict[str, Any]] = {}
    for name, signed in outcome.receipts.items():
        receipt = decode(Receipt, signed.receipt)
        counted = {
            "epsilon": receipt.count_epsilon,
            "epsilon_alone": receipt.count_epsilon_alone,
            "noise_multiplier": receipt.count_noise_multiplier,
            "releases": receipt.count_releases,
        }
        if not plan.learns:
            sites[name] = counted
            continue
        sites[name] = {
            "epsilon": receipt.epsilon,
            "epsilon_alone": receipt.epsilon_alone,
            "noise_multiplier": receipt.noise_multiplier,
            "sample_rate": receipt.sample_rate,
            "steps": receipt.steps,
        }
        if receipt.count_releases:
            sites[name]["evaluation"] = counted
    return {
        "mode": plan.privacy.mode,
        "delta": delta,
        "target_epsilon": epsilon,
        "clip_norm": plan.privacy.clip_norm,
        **_adapted(outcome.state),
        "accountant": f"PLD (dp-accounting), grid {GRID:g}",
        "relation": "add or remove one patient",
        "sampling": "Poisson" if plan.learns else "none: every patient counts once",
        "sites": sites,
        **_evaluation(plan),
    }


def _adapted(state: ModelState) -> dict[str, float]:
    """Where the clip norm stood at the end, of a plan that adapts it."""
    return {"last_clip_norm": float(state.clip_norm[0])} if len(state.clip_norm) else {}


def _evaluation(plan: StudyPlan) -> dict[str, Any]:
    """What the released counts were to cost the test patients."""
    promise = count_promise_of(plan)
    if promise is None or not plan.learns:
        return {}
    epsilon, delta = promise
    return {"evaluation": {"target_epsilon": epsilon, "delta": delta, "level": LEVEL}}


def _wire(transport: GridTransport) -> dict[str, Any]:
    traffic = transport.traffic
    return {
        "bytes_up": transport.bytes_up,
        "bytes_down": transport.bytes_down,
        "messages": sum(t.messages for t in traffic.values()),
        "largest_message": max((t.largest for t in traffic.values()), default=0),
        "by_phase": {
            phase: {
                "messages": t.messages,
                "bytes_up": t.bytes_up,
                "bytes_down": t.bytes_down,
            }
            for phase, t in traffic.items()
        },
    }


def write_model(plan: StudyPlan, outcome: StudyOutcome, folder: Path) -> None:
    """Write model.safetensors and model.json: the tensors, and what is needed to use them."""
    state = outcome.state
    facts = {"state_sha256": state.digest().hex(), "rounds": state.round_no}
    for name, data in model_files(plan, state.parameters, facts).items():
        _write_bytes(data, folder / name)


def write_evidence(
    plan: StudyPlan,
    outcome: StudyOutcome,
    spool: Spool,
    folder: Path,
    identity: Identity | None = None,
) -> None:
    """Write what an auditor checks; shared/EVIDENCE.md says what each file holds.

    Args:
        plan: The study's plan.
        outcome: How it ended.
        spool: What the study loop recorded.
        folder: RUN/evidence.
        identity: The coordinator's, which seals the server's record; None where it has none.
    """
    folder.mkdir(exist_ok=True)
    _write_bytes(plan.canonical_bytes, folder / PLAN_FILE)
    records = along(spool.records, outcome.transcript)
    write_record_file(folder / RECORD_FILE, records, keeper="server", identity=identity)
    if plan.audit.keep_sums:
        write_frames(folder / SUMS_FILE, spool.sums())
    _write_bytes(state_to_bytes(outcome.state), folder / STATE_FILE)
    write_text(receipts_text(plan, outcome), folder / RECEIPTS_FILE)


def receipts_text(plan: StudyPlan, outcome: StudyOutcome) -> str:
    """receipts.json: the sites' signed receipts, and the rounds in plain words."""
    receipts = {
        name: {"receipt": signed.receipt.hex(), "signature": signed.signature.hex()}
        for name, signed in sorted(outcome.receipts.items())
    }
    record = {
        "schema": "fedward-evidence/1",
        "plan_sha256": plan.sha256,
        "transcript": outcome.transcript.hex(),
        "rounds": [
            {
                "round": r.round_no,
                "trained": r.trained,
                "cohort": list(r.cohort),
                "contributors": list(r.contributors),
                "aborted": r.reason,
            }
            for r in outcome.reports
        ],
        "receipts": receipts,
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _write_bytes(data: bytes, path: Path) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(data)
    temporary.replace(path)
