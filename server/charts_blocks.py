"""SVG charts of counts and states: bars, stacked columns, who was in which round, a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.charts import (
    CHARACTER,
    Frame,
    Point,
    grid_lines,
    nice_ticks,
    pair,
    svg,
    tick_text,
    x_axis,
)
from shared.markup import Html, element


@dataclass(frozen=True)
class Bar:
    """One bar of a comparison."""

    name: str
    value: float
    style: str
    note: str


def bar_chart(alt: str, bars: Sequence[Bar], *, width: int, most: float = 1.0) -> Html:
    """Horizontal bars from 0 to `most`; the name stands above its bar, the note at its end."""
    row, left, right = 40, 2, 118
    height = row * len(bars) + 6
    parts = []
    for i, bar in enumerate(bars):
        y = i * row + 14
        room = width - left - right
        length = max(1.5, room * min(max(bar.value / (most or 1), 0), 1))
        parts.append(element("text", bar.name, x=left, y=y, class_="label"))
        parts.append(element("rect", x=left, y=y + 6, width=room, height=12, rx=2, class_="track"))
        parts.append(
            element(
                "rect", x=left, y=y + 6, width=length, height=12, rx=2, class_=f"bar {bar.style}"
            )
        )
        parts.append(element("text", bar.note, x=left + room + 8, y=y + 16, class_="figure"))
    return svg(alt, width, height, parts)


@dataclass(frozen=True)
class Column:
    """One column of stacked parts, bottom first; `tip` is shown when pointed at."""

    label: float
    parts: tuple[float, ...]
    tip: str


def column_chart(
    alt: str,
    columns: Sequence[Column],
    styles: Sequence[str],
    *,
    width: int,
    height: int,
    unit: str,
) -> Html:
    """Stacked columns over rounds; one CSS class per part."""
    tallest = max(sum(c.parts) for c in columns) or 1.0
    ticks = nice_ticks(0, tallest, max(3, height // 60))
    first, last = columns[0].label, columns[-1].label
    half = (last - first) / (len(columns) - 1) / 2 if len(columns) > 1 else 0.5
    left = max(len(tick_text(t, ticks)) for t in ticks) * CHARACTER + 14
    frame = Frame((first - half, last + half), (0, ticks[-1]), left, width - 10, 24, height - 38)
    slot = (frame.right - frame.left) / len(columns)
    drawn = [grid_lines(frame, ticks), element("text", unit, x=2, y=12, class_="tick")]
    for column in columns:
        base = 0.0
        stack = [element("title", column.tip)]
        x = frame.place(column.label, 0)[0] - min(slot * 0.38, 16)
        for part, style in zip(column.parts, styles, strict=True):
            top, bottom = frame.place(0, base + part)[1], frame.place(0, base)[1]
            if part > 0:
                stack.append(
                    element(
                        "rect",
                        x=x,
                        y=top,
                        width=min(slot * 0.76, 32),
                        height=max(bottom - top, 0.2),
                        class_=style,
                    )
                )
            base += part
        drawn.append(element("g", stack))
    drawn.append(x_axis(frame, "round"))
    return svg(alt, width, height, drawn)


State = Literal["in", "dropped", "aborted", "absent"]


_WORDS = {
    "in": "contributed",
    "dropped": "dropped out",
    "aborted": "aborted",
    "absent": "not asked",
}


def cohort_grid(
    alt: str, sites: Sequence[str], columns: Sequence[str], states: Sequence[Sequence[State]]
) -> Html:
    """One row per site, one column per round (or group of rounds): who was in, who dropped out.

    Args:
        alt: As in `line_chart`.
        sites: Row names.
        columns: A round's number, or a range of rounds.
        states: Per site, one state per column.
    """
    cell = max(7.0, min(18.0, 640 / max(len(columns), 1)))
    row = 18.0 if len(sites) <= 12 else 14.0
    left = min(max((len(s) for s in sites), default=0), 28) * CHARACTER + 12
    width, height = left + cell * len(columns) + 30, row * len(sites) + 24
    parts = []
    for i, (site, line) in enumerate(zip(sites, states, strict=True)):
        y = i * row + 2
        shown = site if len(site) <= 28 else site[:27] + "…"
        parts.append(element("text", shown, x=left - 8, y=y + row / 2 + 3, class_="tick end"))
        parts += [
            _cell((left + j * cell, y), (cell - 1.5, row - 3), state, f"{site}, round {columns[j]}")
            for j, state in enumerate(line)
        ]
    every = max(1, math.ceil(46 / cell))
    every = next(e for e in (1, 2, 5, 10, 20, 50) if e >= every)
    for j in [0, *range(every - 1, len(columns), every)]:
        if 0 < j < 26 / cell:  # too near to the first label
            continue
        x = left + j * cell + cell / 2
        label = columns[j].split("–")[-1 if j else 0]
        parts.append(element("text", label, x=x, y=height - 6, class_="tick middle"))
    return svg(alt, math.ceil(width), math.ceil(height), parts, fixed=True)


def _cell(place: Point, size: Point, state: State, where: str) -> Html:
    (x, y), (width, height) = place, size
    tip = element("title", f"{where}: {_WORDS[state]}")
    box = element("rect", x=x, y=y, width=width, height=height, rx=1.5, class_=f"cell-{state}")
    if state not in ("dropped", "aborted"):
        return element("g", tip, box)
    # Told apart by a mark as well, for eyes and printers without colour.
    inset = max(min(width, height) / 2 - 2.5, 1.5)
    cx, cy = x + width / 2, y + height / 2
    mark = f"M{pair((cx - inset, cy - inset))}L{pair((cx + inset, cy + inset))}"
    if state == "dropped":
        mark += f"M{pair((cx - inset, cy + inset))}L{pair((cx + inset, cy - inset))}"
    return element("g", tip, box, element("path", d=mark, class_=f"mark-{state}"))


def gauge(alt: str, spent: float, promised: float, *, width: int) -> Html:
    """How much of a promise is spent: a bar whose full length is the larger of the two."""
    full = max(spent, promised) or 1.0
    room = width - 4
    used = max(2.0, room * spent / full)
    mark = 2 + room * promised / full
    style = "bar over" if spent > promised else "bar study"
    return svg(
        alt,
        width,
        22,
        [
            element("rect", x=2, y=6, width=room, height=10, rx=5, class_="track"),
            element("rect", x=2, y=6, width=used, height=10, rx=5, class_=style),
            element("line", x1=mark, x2=mark, y1=1, y2=21, class_="promise-mark"),
        ],
    )
