"""Writes the fault matrix into SECURITY.md, between two marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.fault_list import FAULTS

PAGE = Path(__file__).resolve().parent.parent / "SECURITY.md"
BEGIN, END = "<!-- fault matrix: begin, generated -->", "<!-- fault matrix: end -->"


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


def write_page(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put the table where the page's marks are."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]
