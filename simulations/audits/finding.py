"""What a probe of an audit says: one claim, one statistic, one verdict, in plain values.

An audit can refute a claim, never prove it. So a finding is "violated", "not refuted" at a stated
error rate, or "not testable" with the reason; there is no "passed".

Each family of probes is a module of this package with one function

    run(target: AuditTarget, options: AuditOptions) -> list[Finding]

    implementation  what really leaves a site against what the accountant was told
    neighbour       a site with n patients against the same site with n - 1
    one_run         lower bounds of epsilon from canaries in one training run
    transcript      whether masked uploads look like uniform noise; cohorts and model hashes
    collusion       what c sites can compute together with the server
    membership      who was in the training data, by shadow models
    reconstruction  pictures from updates

`membership` and `reconstruction` attack the hospitals' data where `AuditTarget.hospitals` has
some, and made-up patients else; all others need the plan alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import require
from shared.plan import StudyPlan
from simulations.hospitals import Hospital

Verdict = Literal["violated", "not refuted", "not testable"]
Cell = str | float | int | None
Progress = Callable[[str, float], None]
"""(what is being done, share of the whole that is done, 0 to 1)."""


def no_progress(step: str, share: float) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class AuditTarget:
    """What is audited: a study's plan, and simulated hospitals where an attack needs patients."""

    plan: StudyPlan
    hospitals: tuple[Hospital, ...] = ()


@dataclass(frozen=True)
class AuditOptions:
    """How an audit runs.

    Attributes:
        seed: Of the auditor's own choices and, where given, of all randomness of the audited
            code, so that a finding can be repeated. None: the operating system's, as at a site.
        quick: Fewer repetitions: all families in about two minutes instead of ten.
        progress: Called with the step and the share of it that is done.
        alpha: Probability, over all probes of one family, of a "violated" where nothing is wrong.
    """

    seed: int | None = None
    quick: bool = False
    progress: Progress = no_progress
    alpha: float = 0.01


@dataclass(frozen=True)
class Table:
    """A table of a finding; every row has one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        require(
            all(len(row) == len(self.columns) for row in self.rows),
            f"table {self.title!r}: a row has another length than the columns",
        )


@dataclass(frozen=True)
class Series:
    """One named line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A line chart of a finding."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Picture:
    """A small picture of a finding: a PNG, base64, a few kilobytes."""

    title: str
    caption: str
    png: str


@dataclass(frozen=True)
class Finding:
    """The outcome of one probe.

    Attributes:
        probe: The family, such as "implementation".
        name: Short and stable within the family, such as "noise-scale".
        claim: What should hold, in one sentence.
        statistic: What was measured, in words, with its unit.
        value: The measured value; None where the claim could not be tested.
        interval: Two-sided confidence interval of the value at `alpha`; None where the statistic
            has none. One side may be infinite; it is None in `as_dict`.
        alpha: Probability of "violated" where the claim holds, for this finding alone.
        assumptions: What the verdict rests on.
        verdict: "violated", "not refuted" or "not testable".
        explanation: For the reader: what this means, or why it could not be tested.
        expected: What the value should be, or its limit; None where there is no one number.
        tables, charts, pictures: To be shown with the finding.
        details: Further plain JSON values.
        artefact_sha256: Hex digest of the observations that the statistic was computed from.
    """

    probe: str
    name: str
    claim: str
    statistic: str
    value: float | None
    interval: tuple[float, float] | None
    alpha: float
    assumptions: tuple[str, ...]
    verdict: Verdict
    explanation: str = ""
    expected: float | None = None
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    artefact_sha256: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON values; numbers that are not finite become None."""
        table: dict[str, Any] = _plain(asdict(self))
        return table


def violated(findings: Sequence[Finding]) -> bool:
    """Whether any claim was refuted: a command exits with AuditError's code then."""
    return any(f.verdict == "violated" for f in findings)


def artefact(*observations: NDArray[Any] | bytes) -> str:
    """Hex digest of observations, for `artefact_sha256`: shapes, types and bytes, in order."""
    digest = hashlib.sha256(b"fedward-artefact/1")
    for item in observations:
        if isinstance(item, bytes):
            head, body = f"bytes {len(item)}", item
        else:
            head, body = f"{item.dtype.str} {item.shape}", np.ascontiguousarray(item).tobytes()
        digest.update(len(head).to_bytes(4, "big") + head.encode() + body)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
