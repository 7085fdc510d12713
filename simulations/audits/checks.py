"""Checks of evidence, gathered: one that fails is a finding and does not stop the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from shared.errors import AuditError, FedwardError
from simulations.audits.finding import Finding, Verdict


class NotTestableError(Exception):
    """Raised inside a check that has nothing to look at; the text says why."""


@dataclass
class Remark:
    """What a check that held found; filled in inside `Checks.check`."""

    text: str = ""
    value: float | None = None
    expected: float | None = None
    assumptions: list[str] = field(default_factory=list)


class Checks:
    """Findings of the family "verify", in order."""

    def __init__(self) -> None:
        """None yet."""
        self.findings: list[Finding] = []

    def check(self, name: str, claim: str, *, file: str = "", site: str = "") -> _Check:
        """One claim, as a context manager; an error inside refutes it, and its text says where.

        Args:
            name: Short and stable, such as "rounds".
            claim: What should hold.
            file: What was read, relative to what is verified.
            site: Whom it concerns, where it is one site.
        """
        return _Check(self.findings, name, claim, {"file": file, "site": site})


@dataclass
class _Check:
    """One claim under test; it ends as a finding."""

    findings: list[Finding]
    name: str
    claim: str
    place: dict[str, str]
    remark: Remark = field(default_factory=Remark)

    def __enter__(self) -> Remark:
        return self.remark

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        verdict: Verdict = "not refuted"
        if isinstance(error, NotTestableError):
            verdict, self.remark.text = "not testable", str(error)
        elif error is not None:
            fact = self._fact(error)
            if fact is None:
                return False
            verdict, self.remark.text = "violated", fact
        self.findings.append(self._finding(verdict))
        return True

    def _fact(self, error: BaseException) -> str | None:
        """What an error says of the evidence; None for what is a bug or an interruption."""
        what = self.place["file"] or self.name
        if isinstance(error, FedwardError):
            return str(error)
        if isinstance(error, OSError):
            return f"{what} cannot be read: {error.strerror}"
        if isinstance(error, ValueError | KeyError | TypeError | IndexError | AttributeError):
            return f"{what} is malformed ({type(error).__name__}: {error})"
        return None

    def _finding(self, verdict: Verdict) -> Finding:
        remark, file = self.remark, self.place["file"]
        return Finding(
            probe="verify",
            name=self.name,
            claim=self.claim,
            statistic=f"every byte of {file}" if file else "the records",
            value=remark.value,
            interval=None,
            alpha=0.0,
            assumptions=tuple(remark.assumptions),
            verdict=verdict,
            explanation=remark.text,
            expected=remark.expected,
            details={key: value for key, value in self.place.items() if value},
        )


def demand(condition: bool, fact: str) -> None:
    """Raise AuditError with `fact` unless `condition` holds."""
    if not condition:
        raise AuditError(fact)
