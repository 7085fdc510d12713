"""shared/secagg/FAULTS.md, which the tests of the faults write and compare."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

FAULTS = Path(__file__).parent.parent / "shared" / "secagg" / "FAULTS.md"
LAST = "## A site enters by a new epoch\n"
"""Where the part begins that plays of whole studies find."""


def written(found: str, *, last: bool) -> str:
    """What the file says in its last section, or before it; with FEDWARD_WRITE_FAULTS=1, `found`.

    Args:
        found: The text that this run found.
        last: Whether it is the last section.
    """
    before, _, after = FAULTS.read_text(encoding="utf-8").partition(LAST)
    if os.environ.get("FEDWARD_WRITE_FAULTS") == "1":
        before, after = (before, found) if last else (found + "\n", after)
        FAULTS.write_text(before + LAST + after, encoding="utf-8")
    return after if last else before.removesuffix("\n")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
