"""A finding's line chart, drawn from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from server.charts import Frame, Point, grid_lines, nice_ticks, pair, svg, tick_text
from shared.markup import Html, element, join
from shared.page_parts import figure, legend

STYLES = ("study", "local", "pooled", "promise")
WIDTH, HEIGHT = 640, 300


def chart(record: Mapping[str, Any]) -> Html | None:
    """The chart, with a legend; None where it has no point that can be drawn.

    Args:
        record: A `Chart` of a finding, as JSON values.
    """
    axes = (bool(record["log_x"]), bool(record["log_y"]))
    lines = [(s["name"], _points(s["points"], axes)) for s in record["series"]]
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return None
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    across, up = nice_ticks(min(xs), max(xs), 7), nice_ticks(min(ys), max(ys), 6)
    frame = Frame(
        (across[0], across[-1]), (up[0], up[-1]), left=64, right=WIDTH - 12, top=10,
        bottom=HEIGHT - 44,
    )  # fmt: skip
    drawn = [grid_lines(frame, up), _x_axis(frame, across, _axis(record["x"], axes[0]))]
    for place, (_, points) in enumerate(lines):
        drawn.append(_line(frame, points, STYLES[place % len(STYLES)]))
    names = [(STYLES[i % len(STYLES)], name) for i, (name, _) in enumerate(lines)]
    title = f"{record['title']}. Upwards: {_axis(record['y'], axes[1])}."
    return figure(svg(title, WIDTH, HEIGHT, drawn), legend(names), caption=title)


def _axis(name: str, logarithmic: bool) -> str:
    return f"{name} (power of ten)" if logarithmic else name


def _points(points: Sequence[Sequence[float | None]], axes: tuple[bool, bool]) -> list[Point]:
    found = []
    for x, y in points:
        if x is None or y is None or (axes[0] and x <= 0) or (axes[1] and y <= 0):
            continue
        found.append((math.log10(x) if axes[0] else x, math.log10(y) if axes[1] else y))
    return sorted(found)


def _line(frame: Frame, points: Sequence[Point], style: str) -> Html:
    places = [frame.place(*point) for point in points]
    path = "M" + "L".join(pair(place) for place in places)
    parts = [element("path", d=path, class_=f"curve {style}")]
    if len(points) <= 24:
        for (x, y), place in zip(points, places, strict=True):
            tip = element("title", f"{x:.4g}: {y:.4g}")
            parts.append(
                element("circle", tip, cx=place[0], cy=place[1], r=2.6, class_=f"dot {style}")
            )
    return join(parts)


def _x_axis(frame: Frame, ticks: Sequence[float], label: str) -> Html:
    parts = [
        element(
            "line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis"
        )
    ]
    for tick in ticks:
        x = frame.place(tick, frame.y[0])[0]
        text = tick_text(tick, ticks)
        parts.append(element("text", text, x=x, y=frame.bottom + 18, class_="tick middle"))
    middle = (frame.left + frame.right) / 2
    parts.append(element("text", label, x=middle, y=frame.bottom + 36, class_="tick middle"))
    return join(parts)
