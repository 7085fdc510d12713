"""What an evaluation may release beside the scores, as parts of a page: importances, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server import facts
from server.charts_blocks import Bar, bar_chart
from server.facts import Results, amount, number, text
from shared.markup import Html, element, join
from shared.page_parts import Column, Row, figure, paragraph, table

IMPORTANCE = (
    "How far the answer moves when one feature alone is put to the middle of its plausible range "
    "(a category: all alike), averaged over all hospitals' test patients, in parts of the answer's "
    "range. A patient's moves are clipped together. Features that say the same share their "
    "importance, and none of it is a cause."
)
FEW = "Groups of few patients are mostly noise."
_BY_GROUP = ("accuracy", "recall", "specificity")


def importance_part(results: Results) -> Html | None:
    """The mean importance of each feature as bars; None where the plan released none."""
    found = _tables(facts.get(results, "final", "importances"))
    known = [(own, value) for own in found if (value := number(own, "value")) is not None]
    if not known:
        return None
    known.sort(key=lambda pair: -pair[1])
    bars = [Bar(_named(own), value, "study", f"{value:.3f}") for own, value in known]
    half = len(bars) - len(bars) // 2
    parts = (bars[:half], bars[half:])
    said = IMPORTANCE
    if any(_ends(own, "interval") for own, _ in known):
        said += " In brackets: where the value without noise lies, 95 % of the time."
    return join([
        element("h3", "What moves the answer"),
        paragraph(said),
        element("div", [_bars(p, most=known[0][1]) for p in parts if p], class_="halves"),
    ])  # fmt: skip


def _bars(bars: list[Bar], *, most: float) -> Html:
    alt = "Importance: " + "; ".join(f"{b.name} {b.note}" for b in bars) + "."
    return figure(bar_chart(alt, bars, width=400, most=max(most, 1e-9)))


def groups_part(results: Results) -> Html | None:
    """Right and wrong answers by group; None where the plan released none."""
    groups = _tables(facts.get(results, "final", "groups"))
    if not groups:
        return None
    said = "Counts of right and wrong answers by group, summed over all hospitals. "
    noisy = any(_ends(own, "accuracy_interval") for g in groups for own in _members(g))
    said += "In brackets: where the value without noise lies, 95 % of the time. " if noisy else ""
    return join([element("h3", "By group"), paragraph(said + FEW), group_tables(groups)])


def group_tables(groups: Sequence[Mapping[str, Any]]) -> Html:
    """One table for each feature that patients were grouped by."""
    columns = [Column("Group", numeric=False), Column("patients")]
    columns += [Column(name) for name in _BY_GROUP]
    parts = []
    for grouping in groups:
        rows = [_group(own) for own in _members(grouping)]
        parts.append(table(f"By {text(grouping, 'feature')}", columns, rows))
    return join(parts)


def with_interval(own: Mapping[str, Any], value: str, interval: str) -> str:
    """A value, and in brackets the interval of it without noise, where they are known."""
    found, ends = number(own, value), _ends(own, interval)
    if found is None:
        return "–"
    return amount(found, 3) + (f" ({_between(ends)})" if ends else "")


def _group(own: Mapping[str, Any]) -> Row:
    cells = [text(own, "name"), facts.whole(number(own, "patients"))]
    return Row((*cells, *(with_interval(own, n, f"{n}_interval") for n in _BY_GROUP)))


def _named(own: Mapping[str, Any]) -> str:
    ends = _ends(own, "interval")
    return text(own, "name") + (f" ({_between(ends)})" if ends else "")


def _between(ends: list[float]) -> str:
    return f"{amount(ends[0], 3)} to {amount(ends[1], 3)}"


def _ends(own: Mapping[str, Any], key: str) -> list[float]:
    ends = facts.numbers(own, key)
    return ends if len(ends) == 2 else []


def _members(grouping: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _tables(facts.get(grouping, "groups"))


def _tables(value: Any) -> list[Mapping[str, Any]]:
    """The tables of a list, whatever else stands there."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []
