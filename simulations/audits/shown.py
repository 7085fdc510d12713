"""Findings in a terminal, and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from simulations.audits.finding import Finding, violated

WIDTH = 80
_WORDS = {"not refuted": "ok", "violated": "VIOLATED", "not testable": "not testable"}


def print_findings(findings: Sequence[Finding]) -> None:
    """What was found, claim by claim; what held is folded for files and for sites."""
    files = [f for f in findings if f.name == "file" and f.verdict == "not refuted"]
    if files:
        print(_line("ok", "files", f"{len(files)} files are as they were written"))
    shown: set[str] = set()
    for finding in findings:
        site = finding.details.get("site", "")
        if finding in files or (site in shown and finding.verdict == "not refuted"):
            continue
        if site and site not in shown:
            shown.add(site)
            print(_site_line(site, [f for f in findings if f.details.get("site") == site]))
        if not site or finding.verdict != "not refuted":
            print(_finding_line(finding))


def _site_line(site: str, findings: Sequence[Finding]) -> str:
    held = [f for f in findings if f.verdict == "not refuted"]
    priced = [f.explanation for f in held if f.name == "accounting"]
    names = ", ".join(f.name for f in held)
    word = "ok" if len(held) == len(findings) else f"{len(findings) - len(held)} not ok"
    return _line(word, f"site {site}", "; ".join([names, *priced]))


def _finding_line(finding: Finding) -> str:
    name = finding.name
    if finding.probe != "verify":
        name = f"{finding.probe.replace('_', '-')} {name}"
    if place := finding.details.get("file", ""):
        name += f" ({place})"
    said = finding.explanation or finding.claim
    if finding.verdict == "violated":
        said = f"{finding.claim} NOT SO: {said}"
    elif finding.probe != "verify" and finding.value is not None:
        said = f"{finding.statistic}: {finding.value:.4g}. {said}"
    return _line(_WORDS[finding.verdict], name, said)


def _line(word: str, name: str, said: str) -> str:
    """A verdict, what it is about, and the text beneath, where it does not fit beside."""
    head = f"  {word:<13} {name}"
    if len(head) + len(said) + 2 <= WIDTH:
        return f"{head}: {said}"
    indent = " " * 16
    return f"{head}\n" + textwrap.fill(
        said, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def summary(findings: Sequence[Finding]) -> str:
    """The verdict in one sentence."""
    counts = [sum(f.verdict == v for f in findings) for v in _WORDS]
    held, broken, unknown = counts
    if broken:
        names = "; ".join(f.name for f in findings if f.verdict == "violated")
        return f"VIOLATED: {broken} of {len(findings)} claims did not hold ({names})."
    return (
        f"Not refuted: {held} claims hold as far as they were tested; {unknown} not testable here."
    )


def as_json(findings: Sequence[Finding], **more: Any) -> str:
    """The findings as a JSON text."""
    record = {
        "schema": "fedward-findings/1",
        "violated": violated(findings),
        **more,
        "findings": [f.as_dict() for f in findings],
    }
    return json.dumps(record, indent=2, ensure_ascii=False)
