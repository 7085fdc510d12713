"""A run's model and results, computed again from the published sums."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from server.model_card import card_files
from server.record import receipts_text, server_results, write_model
from server.report import render
from server.results import read_results
from server.rounds import RoundReport, StudyOutcome
from server.transport import GridTransport
from shared.evidence import PublishedSum, read_frames
from shared.layout import VectorLayout
from shared.messages import decode
from shared.models import initial_parameters
from shared.optimizers import ModelState, initial_state
from shared.plan import StudyPlan
from shared.secagg import merkle
from simulations.audits.chain import History, Round
from simulations.audits.checks import demand

UNSIGNED = (
    "wall_s",
    "train_s",
    "secagg_s",
    "inputs_s",
    "bytes_up",
    "bytes_down",
    "wire",
    "version",
)
"""Keys of results.json that no site can vouch for: times and sizes, as the server saw them."""


@dataclass(frozen=True)
class _NoTraffic:
    """Stands where the transport's counters stood; what they said is not compared."""

    traffic: Mapping[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


def models_before(history: History) -> dict[int, int]:
    """Round number -> finished training rounds before it; of a record of the whole run."""
    finished, table, last = 0, {}, history.plan.training.rounds
    for one in history.rounds:
        table[one.number] = finished
        finished = min(last, finished + bool(one.total_root))
    return table


def replay_sums(history: History, sums: Path) -> StudyOutcome:
    """Apply every published sum from the plan's starting point on, as each site did.

    Args:
        history: All of the run's rounds.
        sums: The file of published sums.

    Raises:
        AuditError: a sum is not the one that was signed, or a model is not the one that the
            sites went on from; the round is named.
    """
    plan = history.plan
    layout = VectorLayout(plan, history.parameters)
    state = initial_state(plan.optimizer, initial_parameters(plan))
    published = _totals(sums)
    reports = []
    for one in history.rounds:
        demand(
            one.descriptor.model == state.digest(),
            f"round {one.number} went on from another model than the published sums give",
        )
        model_round, counts = state.round_no, np.zeros(0)
        trained = model_round < plan.training.rounds
        if one.total_root:
            total = _next_total(published, one)
            vector = one.session.ring.from_wire(total, one.session.length)
            if trained:
                state = layout.advance(state, vector, one.contributors)
            counts = layout.released_counts(vector, model_round)
        reports.append(_report(one, model_round, trained, counts))
    demand(next(published, None) is None, f"{sums.name} holds more sums than were signed")
    return StudyOutcome(state, tuple(reports), dict(history.receipts), history.transcript)


def _totals(sums: Path) -> Iterator[PublishedSum]:
    for frame in read_frames(sums):
        yield decode(PublishedSum, frame)


def _next_total(published: Iterator[PublishedSum], one: Round) -> bytes:
    found = next(published, None)
    demand(found is not None and found.round == one.number, f"the sum of round {one.number} lacks")
    total = cast(PublishedSum, found).total
    demand(
        merkle.root(total, one.session.chunk_bytes) == one.total_root,
        f"the sum of round {one.number} is not the one that {len(one.contributors)} sites signed",
    )
    return total


def _report(one: Round, model_round: int, trained: bool, counts: Any) -> RoundReport:
    gone = tuple(sorted(set(one.cohort) - set(one.contributors))) if one.contributors else ()
    return RoundReport(
        round_no=one.number,
        model_round=model_round,
        trained=trained,
        cohort=one.cohort,
        contributors=one.contributors,
        dropped=gone,
        reason=one.reason,
        counts=counts,
        wall_s=0.0,
        inputs_s=0.0,
        bytes_up=0,
        bytes_down=0,
    )


def check_state(outcome: StudyOutcome, models: Sequence[bytes]) -> None:
    """The model that the sums give is the one that every site signed for; AuditError."""
    digest = outcome.state.digest()
    demand(bool(models), "no receipt says which model the sites hold")
    demand(
        all(model == digest for model in models),
        "the published sums give another model than the sites signed for",
    )


def check_model_files(plan: StudyPlan, state: ModelState, run: Path) -> None:
    """model.safetensors and model.json are, byte for byte, what the state gives; AuditError."""
    outcome = StudyOutcome(state, (), {}, b"")
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder:
        write_model(plan, outcome, Path(folder))
        for name in ("model.safetensors", "model.json"):
            _same(run / name, (Path(folder) / name).read_bytes(), "the model that the sites hold")


def check_receipts_file(plan: StudyPlan, outcome: StudyOutcome, path: Path) -> None:
    """receipts.json is, byte for byte, what the records give; AuditError."""
    _same(path, receipts_text(plan, outcome).encode(), "the signed records")


def check_report(results: Mapping[str, Any], path: Path) -> None:
    """report.html is, byte for byte, what results.json gives; AuditError."""
    _same(path, render(results).encode("utf-8", errors="replace"), "results.json")


def check_model_card(plan: StudyPlan, results: Mapping[str, Any], folder: Path) -> None:
    """Both forms of the model card are, byte for byte, what plan and results give; AuditError."""
    for name, text in card_files(plan, results).items():
        _same(folder / name, text.encode("utf-8", errors="replace"), "the plan and results.json")


def _same(path: Path, expected: bytes, source: str) -> None:
    found = path.read_bytes()
    if found == expected:
        return
    pairs = zip(found, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    demand(False, f"{path.name} is not what {source} give: it differs from byte {at} on")


def check_results(plan: StudyPlan, outcome: StudyOutcome, path: Path) -> list[str]:
    """results.json says what the evidence says.

    Returns:
        The keys that nothing signed covers: whoever kept the run could have written anything.

    Raises:
        AuditError: a key says something else; it is named.
        ConfigError: the file is not a valid record.
    """
    found = read_results(path)
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _same(path, text.encode(), "its own values written out")
    derived = server_results(plan, outcome, cast(GridTransport, _NoTraffic()))
    _compare(json.loads(json.dumps(derived)), found, "")
    return sorted(_uncovered(derived, found, ""))


def _compare(expected: Any, found: Any, where: str) -> None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            if key not in UNSIGNED:
                demand(key in found, f"results.json lacks {where}{key}")
                _compare(value, found[key], f"{where}{key}.")
        return
    if isinstance(expected, list) and isinstance(found, list):
        name = where.rstrip(".")
        demand(len(expected) == len(found), f"results.json has {len(found)} entries in {name}")
        for i, (one, two) in enumerate(zip(expected, found, strict=True)):
            _compare(one, two, f"{name}[{i}].")
        return
    demand(
        expected == found and type(expected) is type(found),
        f"results.json says {found!r:.60} for {where.rstrip('.')}; the evidence gives "
        f"{expected!r:.60}",
    )


def _uncovered(derived: Any, found: Any, where: str) -> Iterator[str]:
    if isinstance(found, dict):
        for key, value in found.items():
            if key in UNSIGNED or not isinstance(derived, dict) or key not in derived:
                yield f"{where}{key}"
            else:
                yield from _uncovered(derived[key], value, f"{where}{key}.")
    elif isinstance(found, list) and found and isinstance(derived, list):
        yield from {
            name
            for one, two in zip(derived, found, strict=False)
            for name in _uncovered(one, two, f"{where.rstrip('.')}[].")
        }
