"""Writes the fault matrix and the long studies into SECURITY.md, each between two marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.fault_list import FAULTS

PAGE = Path(__file__).resolve().parent.parent / "SECURITY.md"
BEGIN, END = "<!-- fault matrix: begin, generated -->", "<!-- fault matrix: end -->"
SOAK_BEGIN, SOAK_END = "<!-- soak: begin, generated -->", "<!-- soak: end -->"


def table(results: Mapping[str, Any]) -> str:
    """The matrix as a Markdown table, one row a fault that was checked."""
    lines = ["| what breaks | checked | held | what becomes of it |", "|---|---|---|---|"]
    for fault in FAULTS:
        row = results.get(fault.name)
        if row is None:
            lines.append(f"| {fault.what} | not yet | | |")
            continue
        held = "yes" if row["held"] else "**no**"
        lines.append(f"| {fault.what} | {row['date']} | {held} | {_cell(row['found'])} |")
    return "\n".join(lines)


def soak_table(results: Mapping[str, Any]) -> str:
    """The long studies as a Markdown table, one row a study."""
    lines = ["| study | checked | held | what becomes of it |", "|---|---|---|---|"]
    for row in results.values():
        held = "yes" if row["held"] else "**no**"
        found = f"{_cell(row['found'])}; seed {row['seed']}, {row['seconds'] / 60:.0f} min"
        lines.append(f"| {row['what']} | {row['date']} | {held} | {found} |")
    return "\n".join(lines)


def write_page(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put the matrix where the page's marks are."""
    _put(table(results), BEGIN, END, page)


def write_soak(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put the long studies where the page's marks are."""
    _put(soak_table(results), SOAK_BEGIN, SOAK_END, page)


def _put(text: str, begin: str, end: str, page: Path) -> None:
    whole = page.read_text(encoding="utf-8")
    before, rest = whole.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]
