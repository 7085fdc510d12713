"""An SVG chart of a metric against epsilon: curves with error bars, and reference lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.charts import (
    CHARACTER,
    LABEL_GAP,
    Frame,
    Level,
    Point,
    grid_lines,
    nice_ticks,
    pair,
    spread,
    svg,
    tick_text,
)
from shared.markup import Html, element, join

_DODGE = 5.0
"""Drawing units between the error bars of neighbouring curves at one epsilon."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds at one epsilon; `sd` is None where there was one seed."""

    epsilon: float
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Curve:
    """Estimates by rising epsilon; `style` is the CSS class that gives the colour."""

    name: str
    points: tuple[Estimate, ...]
    style: str
    mark: Literal["disc", "square", "ring"]


def epsilon_chart(
    alt: str, curves: Sequence[Curve], levels: Sequence[Level], *, width: int, height: int
) -> Html:
    """Draw curves over epsilon on a logarithmic axis, one standard deviation as a bar.

    Args:
        alt: What the chart shows, in a sentence, for those who cannot see it.
        curves: At least one, each with at least one point.
        levels: Reference lines that do not depend on epsilon.
        width: Of the drawing; letters are 12 units high.
        height: Of the drawing.
    """
    epsilons = sorted({p.epsilon for curve in curves for p in curve.points})
    frame, ticks = _frame(curves, levels, epsilons, (width, height))
    drawn = [grid_lines(frame, ticks), _epsilon_axis(frame, epsilons)]
    for level in levels:
        y = frame.place(frame.x[0], level.value)[1]
        drawn.append(
            element(
                "line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_=f"level {level.style}"
            )
        )
    for number, curve in enumerate(curves):
        drawn.append(_curve(frame, curve, (number - (len(curves) - 1) / 2) * _DODGE))
    tags = [(frame.place(0, c.points[-1].mean)[1], c.name, c.style) for c in curves]
    tags += [(frame.place(0, v.value)[1], v.name, v.style) for v in levels]
    drawn.append(_names(frame, tags))
    return svg(alt, width, height, drawn)


def _frame(
    curves: Sequence[Curve],
    levels: Sequence[Level],
    epsilons: Sequence[float],
    size: tuple[int, int],
) -> tuple[Frame, list[float]]:
    ends = [p.mean + sign * (p.sd or 0.0) for c in curves for p in c.points for sign in (-1, 1)]
    ends += [level.value for level in levels]
    margin = (max(ends) - min(ends)) * 0.06 or 0.02
    low, high = max(min(ends) - margin, 0.0), min(max(ends) + margin, 1.0)
    width, height = size
    ticks = nice_ticks(low, high, max(3, height // 48))
    longest = max(len(n) for n in [*(c.name for c in curves), *(v.name for v in levels)])
    right = min(longest * CHARACTER + 16, width * 0.36)
    left = max(len(tick_text(t, ticks)) for t in ticks) * CHARACTER + 14
    first, last = math.log2(epsilons[0]), math.log2(epsilons[-1])
    room = (last - first) * 0.04 or 0.5
    across = (first - room, last + room)
    return Frame(across, (ticks[0], ticks[-1]), left, width - right, 10, height - 38), ticks


def _epsilon_axis(frame: Frame, epsilons: Sequence[float]) -> Html:
    y = frame.bottom
    parts = [element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="axis")]
    free = -math.inf
    for epsilon in epsilons:
        x = frame.place(math.log2(epsilon), frame.y[0])[0]
        parts.append(element("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"))
        label, half = f"{epsilon:g}", len(f"{epsilon:g}") * CHARACTER / 2
        if x - half > free:  # neighbours that would touch keep their tick alone
            parts.append(element("text", label, x=x, y=y + 18, class_="tick middle"))
            free = x + half + 4
    middle = (frame.left + frame.right) / 2
    name = "ε promised (less is more private)"
    parts.append(element("text", name, x=middle, y=y + 34, class_="tick middle"))
    return join(parts)


def _curve(frame: Frame, curve: Curve, shift: float) -> Html:
    places = [_shifted(frame.place(math.log2(p.epsilon), p.mean), shift) for p in curve.points]
    path = f"M{pair(places[0])}" + "".join(f"L{pair(b)}" for _, b in itertools.pairwise(places))
    parts = [element("path", d=path, class_=f"curve {curve.style}")]
    for place, point in zip(places, curve.points, strict=True):
        if point.sd is not None:
            parts.append(_bar(frame, place[0], point, point.sd, curve.style))
        parts.append(_mark(curve, place, point))
    return join(parts)


def _shifted(place: Point, shift: float) -> Point:
    return place[0] + shift, place[1]


def _bar(frame: Frame, x: float, point: Estimate, sd: float, style: str) -> Html:
    top, bottom = (frame.place(0, min(max(point.mean + s * sd, 0.0), 1.0))[1] for s in (1, -1))
    caps = "".join(f"M{pair((x - 3.5, y))}L{pair((x + 3.5, y))}" for y in (top, bottom))
    path = f"M{pair((x, top))}L{pair((x, bottom))}{caps}"
    return element("path", d=path, class_=f"error {style}")


def _mark(curve: Curve, place: Point, point: Estimate) -> Html:
    """A point's sign: told apart by its shape as well, for eyes and printers without colour."""
    spread_text = "" if point.sd is None else f" ± {point.sd:.3f}"
    tip = element("title", f"{curve.name}, ε {point.epsilon:g}: {point.mean:.3f}{spread_text}")
    x, y = place
    if curve.mark == "square":
        style = f"dot {curve.style}"
        return element("rect", tip, x=x - 3.4, y=y - 3.4, width=6.8, height=6.8, class_=style)
    style = f"{'hollow' if curve.mark == 'ring' else 'dot'} {curve.style}"
    return element("circle", tip, cx=x, cy=y, r=3.8, class_=style)


def _names(frame: Frame, tags: Sequence[tuple[float, str, str]]) -> Html:
    """Names beside the right edge, pushed apart so that none covers another."""
    ordered = sorted(tags)
    places = spread([y for y, _, _ in ordered], LABEL_GAP, frame.top, frame.bottom)
    parts = []
    for (y, name, style), place in zip(ordered, places, strict=True):
        hook = f"M{pair((frame.right + 2, y))}L{pair((frame.right + 9, place))}"
        parts.append(element("path", d=hook, class_=f"hook {style}"))
        label = element("text", name, x=frame.right + 12, y=place + 4, class_=f"name {style}")
        parts.append(label)
    return join(parts)
