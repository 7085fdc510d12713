"""SVG charts from plain numbers: no script, no network, colours from the page's style sheet.

A chart is drawn at a fixed size in its own units and scaled by the page, so each is given the
size at which its letters stay readable. Every chart carries its content as a sentence (`alt`);
the report puts the numbers into a table as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.markup import Html, element, join

Point = tuple[float, float]


CHARACTER = 6.3  # mean advance of a letter at the charts' 12 units, to keep labels apart


LABEL_GAP = 15.0


MOST_DOTS = 24  # more would hide the curve


MOST_TIPS = 200


@dataclass(frozen=True)
class Line:
    """A curve; `style` is the CSS class that gives its colour and dashes."""

    name: str
    points: tuple[Point, ...]
    style: str
    step: bool = False  # the value holds until the next point
    area: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Frame:
    """The plotting area: data ranges, and where they lie in the drawing."""

    x: Point
    y: Point
    left: float
    right: float
    top: float
    bottom: float

    def place(self, x: float, y: float) -> Point:
        """Drawing coordinates of a data point."""
        along = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return (
            self.left + along * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )


def nice_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round values that cover [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(s * power for s in steps if s * power >= rough * 0.999999)
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's number with the decimals that its axis needs."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    if max(abs(t) for t in ticks) >= 1e6 or step < 1e-6:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return f"{value:,.{decimals}f}"


def line_chart(
    alt: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    width: int,
    height: int,
    x_label: str,
    limits: tuple[float | None, float | None] = (None, None),
    labels: bool = True,
    from_zero: bool = False,
) -> Html:
    """Curves over rounds, with reference lines.

    Args:
        alt: What the chart shows, in a sentence, for those who cannot see it.
        lines: At least one point in all; x are round numbers.
        levels: Reference lines over the whole width.
        width: Of the drawing; letters are 12 units high.
        height: Of the drawing.
        x_label: Of the x axis.
        limits: Least and greatest y that can occur at all; the axis never passes them.
        labels: Name lines and levels at the right edge (else give a legend).
        from_zero: Let the y axis start at 0.
    """
    frame, ticks = _frame(
        lines, levels, (width, height), limits, labels=labels, from_zero=from_zero
    )
    drawn = [grid_lines(frame, ticks), x_axis(frame, x_label)]
    for level in levels:
        (x1, y), (x2, _) = (
            frame.place(frame.x[0], level.value),
            frame.place(frame.x[1], level.value),
        )
        drawn.append(element("line", x1=x1, x2=x2, y1=y, y2=y, class_=f"level {level.style}"))
    drawn += [_curve(frame, line) for line in lines if line.points]
    if labels:
        ends = [(line.points[-1][1], line.name, line.style) for line in lines if line.points]
        ends += [(level.value, level.name, level.style) for level in levels]
        drawn.append(_edge_labels(frame, [(frame.place(0, y)[1], n, s) for y, n, s in ends]))
    return svg(alt, width, height, drawn)


def _frame(
    lines: Sequence[Line],
    levels: Sequence[Level],
    size: tuple[int, int],
    limits: tuple[float | None, float | None],
    *,
    labels: bool,
    from_zero: bool,
) -> tuple[Frame, list[float]]:
    xs = [p[0] for line in lines for p in line.points]
    ys = [p[1] for line in lines for p in line.points] + [v.value for v in levels]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.06 or abs(high) * 0.02 or 0.1
    low, high = (0.0 if from_zero else low - margin), high + margin
    if limits[0] is not None:
        low = max(low, limits[0])
    if limits[1] is not None:
        high = min(high, limits[1])
    width, height = size
    ticks = nice_ticks(low, high, max(3, height // 48))
    longest = max(map(len, [*(v.name for v in lines), *(v.name for v in levels)]), default=0)
    right = min(longest * CHARACTER + 16, width * 0.34) if labels else 10
    left = max(len(tick_text(t, ticks)) for t in ticks) * CHARACTER + 14
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 0.5, last + 0.5
    frame = Frame((first, last), (ticks[0], ticks[-1]), left, width - right, 10, height - 38)
    return frame, ticks


def _curve(frame: Frame, line: Line) -> Html:
    points = [frame.place(*p) for p in line.points]
    path = f"M{pair(points[0])}"
    for (_, y0), (x, y) in itertools.pairwise(points):
        path += f"L{pair((x, y0))}L{pair((x, y))}" if line.step else f"L{pair((x, y))}"
    parts = []
    if line.area and len(points) > 1:
        floor = f"L{pair((points[-1][0], frame.bottom))}L{pair((points[0][0], frame.bottom))}Z"
        parts.append(element("path", d=path + floor, class_=f"area {line.style}"))
    parts.append(element("path", d=path, class_=f"curve {line.style}"))
    if len(points) <= MOST_TIPS:
        shown = len(points) == 1 or (len(points) <= MOST_DOTS and not line.step)
        style, radius = (f"dot {line.style}", 2.6) if shown else ("tip", 7)
        for (x, y), (n, value) in zip(points, line.points, strict=True):
            tip = element("title", f"round {n:,.0f}: {value:.4g}")
            parts.append(element("circle", tip, cx=x, cy=y, r=radius, class_=style))
    return join(parts)


def _edge_labels(frame: Frame, tags: list[tuple[float, str, str]]) -> Html:
    """Names beside the right edge, pushed apart so that none covers another."""
    ordered = sorted(tags)
    places = spread([y for y, _, _ in ordered], LABEL_GAP, frame.top, frame.bottom)
    parts = []
    for (y, name, style), place in zip(ordered, places, strict=True):
        x = frame.right
        hook = f"M{pair((x + 2, y))}L{pair((x + 9, place))}"
        parts.append(element("path", d=hook, class_=f"hook {style}"))
        parts.append(element("text", name, x=x + 12, y=place + 4, class_=f"name {style}"))
    return join(parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted places as near to the wanted ones as a least gap and two ends allow.

    Where they cannot all fit, the upper end is passed.
    """
    blocks: list[tuple[float, int]] = []  # centre, count; neighbours that touch become one block
    for want in wanted:
        blocks.append((want, 1))
        while True:
            centre, count = blocks[-1]
            half = (count - 1) * gap / 2
            centre = max(min(centre, high - half), low + half)
            blocks[-1] = (centre, count)
            if len(blocks) < 2:
                break
            before, previous = blocks[-2]
            if centre - half - (before + (previous - 1) * gap / 2) >= gap:
                break
            total = previous + count
            blocks[-2:] = [((before * previous + centre * count) / total, total)]
    return [centre + (i - (count - 1) / 2) * gap for centre, count in blocks for i in range(count)]


def grid_lines(frame: Frame, ticks: Sequence[float]) -> Html:
    """The y axis: a line and a number per tick."""
    parts: list[Html] = []
    for tick in ticks:
        y = frame.place(frame.x[0], tick)[1]
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        label = tick_text(tick, ticks)
        parts.append(element("text", label, x=frame.left - 8, y=y + 4, class_="tick end"))
    return join(parts)


def x_axis(frame: Frame, label: str) -> Html:
    """The x axis over rounds: whole numbers, the first one included."""
    room = max(2, int((frame.right - frame.left) // 70))
    inner = [t for t in nice_ticks(*frame.x, room, whole=True) if frame.x[0] <= t <= frame.x[1]]
    if frame.x[0] == int(frame.x[0]):
        # The first round is 1, not 0: show it unless it would touch the next label.
        gap = (frame.x[1] - frame.x[0]) / (frame.right - frame.left) * 44
        inner = [frame.x[0], *(t for t in inner if t - frame.x[0] > gap)]
    parts = [
        element(
            "line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis"
        )
    ]
    for tick in inner:
        x = frame.place(tick, frame.y[0])[0]
        parts.append(
            element("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="axis")
        )
        parts.append(
            element("text", f"{tick:,.0f}", x=x, y=frame.bottom + 18, class_="tick middle")
        )
    middle = (frame.left + frame.right) / 2
    parts.append(element("text", label, x=middle, y=frame.bottom + 34, class_="tick middle"))
    return join(parts)


def svg(alt: str, width: int, height: int, parts: Sequence[Html], *, fixed: bool = False) -> Html:
    """The drawing around its parts; `fixed` keeps its size where the page is narrower."""
    attributes = {"viewBox": f"0 0 {width} {height}", "aria-label": alt}
    if fixed:
        attributes |= {"width": str(width), "height": str(height)}
    return element("svg", parts, role="img", class_="chart", **attributes)


def pair(point: Point) -> str:
    """A point as a path writes it."""
    return f"{point[0]:.1f},{point[1]:.1f}"
