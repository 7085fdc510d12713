"""Charts: the numbers land where they belong, and no label covers another."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree as ET  # S405: the charts are our own

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.charts import Frame, Level, Line, line_chart, nice_ticks, spread, tick_text
from server.charts_blocks import Bar, Column, bar_chart, cohort_grid, column_chart, gauge

moderate = st.floats(-1e6, 1e6).filter(lambda v: abs(v) > 1e-6 or v == 0)
series = st.lists(moderate, min_size=1, max_size=40)


def draw(*args: Any, **kwargs: Any) -> ET.Element:
    return ET.fromstring(line_chart(*args, **kwargs))  # noqa: S314


def classed(chart: ET.Element, name: str) -> list[ET.Element]:
    return [e for e in chart.iter() if name in (e.get("class") or "").split()]


@given(moderate, moderate, st.integers(2, 10), st.booleans())
def test_ticks_cover_the_range_evenly(a: float, b: float, count: int, whole: bool) -> None:
    low, high = sorted((a, b))
    ticks = nice_ticks(low, high, count, whole=whole)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 2 * count + 3
    steps = [y - x for x, y in itertools.pairwise(ticks)]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= slack
    if whole:
        assert all(t == int(t) for t in ticks) or high - low < 1


@given(st.integers(-100, 100), st.sampled_from([0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 1000]))
def test_tick_labels_tell_ticks_apart(first: int, step: float) -> None:
    ticks = [round((first + i) * step, 12) for i in range(6)]
    labels = [tick_text(t, ticks) for t in ticks]
    assert len(set(labels)) == 6
    assert [float(t.replace(",", "")) for t in labels] == pytest.approx(ticks)


@given(st.lists(st.floats(0, 300), max_size=12).map(sorted), st.floats(5, 20))
def test_spread_keeps_labels_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap, 0, 300)
    assert len(places) == len(wanted)
    for a, b in itertools.pairwise(places):
        assert b - a >= gap - 1e-6
    if places and gap * (len(wanted) - 1) <= 300:
        assert places[0] >= -1e-6
        assert places[-1] <= 300 + 1e-6


def test_spread_leaves_labels_alone_that_do_not_touch() -> None:
    assert spread([10, 50, 90], 15, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 10, 0, 100) == [45, 55]
    assert spread([99, 99], 10, 0, 100) == [90, 100]


def test_a_point_lands_where_its_number_says() -> None:
    frame = Frame(x=(1, 11), y=(0, 2), left=100, right=200, top=10, bottom=110)
    assert frame.place(1, 0) == (100, 110)
    assert frame.place(11, 2) == (200, 10)
    assert frame.place(6, 0.5) == (150, 85)


@given(series, st.booleans(), st.booleans())
def test_curves_stay_inside_the_drawing(values: list[float], step: bool, labels: bool) -> None:
    points = tuple((float(i + 1), v) for i, v in enumerate(values))
    line = Line("this", points, "study", step=step, area=True)
    level = Level("that", values[0], "pooled")
    chart = draw("alt", [line], [level], width=400, height=240, x_label="round", labels=labels)
    for path in classed(chart, "curve") + classed(chart, "area"):
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d") or "")]
        assert all(0 <= x <= 400 for x in numbers[::2])
        assert all(0 <= y <= 240 for y in numbers[1::2])


def test_higher_values_are_drawn_higher() -> None:
    line = Line("this", ((1.0, 0.5), (2.0, 0.9), (3.0, 0.7)), "study")
    chart = draw("alt", [line], width=400, height=240, x_label="round")
    dots = [float(d.get("cy") or 0) for d in classed(chart, "dot")]
    assert dots[1] < dots[2] < dots[0]


def test_the_axis_never_leaves_what_can_occur() -> None:
    line = Line("this", ((1.0, 0.999), (2.0, 1.0)), "study")
    chart = draw("alt", [line], width=400, height=240, x_label="round", limits=(0.0, 1.0))
    ticks = [e.text for e in classed(chart, "end")]
    assert max(float(t or 0) for t in ticks) == 1.0


def test_a_reference_lies_on_its_value() -> None:
    line = Line("this", ((1.0, 0.5), (2.0, 0.9)), "study")
    chart = draw("a", [line], [Level("r", 0.9, "pooled")], width=400, height=200, x_label="round")
    (level,) = classed(chart, "level")
    assert float(level.get("y1") or 0) == float(classed(chart, "dot")[1].get("cy") or 1)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 1.0, "study", "1"), Bar("b", 0.25, "local", "2"), Bar("c", -1, "local", "3")]
    chart = ET.fromstring(bar_chart("alt", bars, width=400))  # noqa: S314
    first, second, third = (float(b.get("width") or 0) for b in classed(chart, "bar"))
    assert second == pytest.approx(first / 4, abs=0.01)
    assert third < 2


def test_columns_stack_without_gap() -> None:
    columns = [Column(1, (1.0, 2.0, 0.0), "one"), Column(2, (0.5, 0.5, 1.0), "two")]
    drawn = column_chart("alt", columns, ("train", "sum", "other"), width=400, height=220, unit="s")
    chart = ET.fromstring(drawn)  # noqa: S314
    train, sums = (classed(chart, name)[0] for name in ("train", "sum"))
    top, height = float(train.get("y") or 0), float(sums.get("height") or 0)
    assert float(sums.get("y") or 0) + height == pytest.approx(top, abs=0.02)
    assert height == pytest.approx(2 * float(train.get("height") or 0), abs=0.02)


def test_states_differ_by_shape_and_not_by_colour_alone() -> None:
    states: list[list[Any]] = [["in", "dropped", "aborted", "absent"]]
    chart = ET.fromstring(cohort_grid("alt", ["a"], ["1", "2", "3", "4"], states))  # noqa: S314
    assert len(classed(chart, "mark-dropped")) == 1
    assert len(classed(chart, "mark-aborted")) == 1
    tips = [e.text for e in chart.iter() if e.tag == "title"]
    assert tips == [
        "a, round 1: contributed",
        "a, round 2: dropped out",
        "a, round 3: aborted",
        "a, round 4: not asked",
    ]


def test_an_overspent_promise_is_drawn_past_its_mark() -> None:
    chart = ET.fromstring(gauge("alt", 5.0, 4.0, width=204))  # noqa: S314
    (bar,) = classed(chart, "over")
    (mark,) = classed(chart, "promise-mark")
    assert float(bar.get("width") or 0) == 200
    assert float(mark.get("x1") or 0) == 162
