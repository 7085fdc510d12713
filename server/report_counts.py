"""The report's parts on noisy counts: metrics with their intervals, and federated statistics."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from server import facts
from server.charts_blocks import Bar, bar_chart
from server.facts import Results, amount, number, text
from shared.markup import Html, element, join
from shared.page_parts import Column, Row, figure, paragraph, section, table


def noise_note(results: Results) -> Html | None:
    """What the noise on the released counts leaves of the metrics; None where there is none."""
    intervals = facts.mapping(facts.get(results, "final", "intervals"))
    if not intervals:
        return None
    level = number(results, "privacy", "evaluation", "level") or 0.95
    said = (
        "The counts behind these figures left the hospitals with noise, so that they say little "
        f"of any one test patient. {level:.0%} of the time the value without noise lies in the "
        "interval. How few the test patients are is not in it."
    )
    exact = facts.mapping(facts.get(results, "final", "exact_metrics"))
    columns = [Column("Metric", numeric=False), Column("As released"), Column("Interval")]
    if exact:
        columns.append(Column("Without noise (simulation only)"))
    rows = []
    for name, (shown, _) in facts.METRICS.items():
        ends = facts.interval(results, name)
        if ends is None:
            continue
        cells = [shown, amount(number(results, "final", "metrics", name), 3), _between(ends)]
        rows.append(Row((*cells, *([amount(number(exact, name), 3)] if exact else []))))
    return join([paragraph(said), table("Metrics from noisy counts", columns, rows)])


def _between(ends: tuple[float, float], digits: int = 3) -> str:
    return f"{amount(ends[0], digits)} to {amount(ends[1], digits)}"


def statistics_section(results: Results) -> Html | None:
    """What a study that trains nothing counted; None for other studies."""
    features = facts.features(results)
    if not features:
        return None
    level = number(results, "statistics", "level") or 0.95
    said = (
        "Each patient counts once, however many records there are; means are over patients. The "
        f"counts carry noise, and {level:.0%} of the time the value without noise lies in the "
        "interval. A count below 0 is noise, and is drawn as 0."
    )
    exact = {text(f, "name"): f for f in facts.features(results, "exact")}
    return section(
        "result",
        "Statistics",
        paragraph(said),
        _numbers(features, exact),
        element("div", [_histogram(f) for f in features], class_="halves"),
    )


def _numbers(features: list[Mapping[str, Any]], exact: Mapping[str, Mapping[str, Any]]) -> Html:
    columns = [
        Column("Feature", numeric=False),
        Column("patients"),
        Column("interval"),
        Column("missing"),
        Column("mean"),
        Column("interval"),
        Column("standard deviation"),
    ]
    if exact:
        columns.append(Column("mean without noise (simulation only)"))
    rows = []
    for feature in features:
        name = text(feature, "name")
        cells = (
            _named(feature),
            facts.whole(number(feature, "present")),
            _ends(feature, "present_interval", 0),
            facts.whole(number(feature, "missing")),
            facts.significant(number(feature, "mean")),
            _ends(feature, "mean_interval", None),
            facts.significant(number(feature, "standard_deviation")),
        )
        more = (facts.significant(number(exact.get(name), "mean")),) if exact else ()
        rows.append(Row((*cells, *more)))
    return table("Features, counted over all hospitals together", columns, rows)


def _named(feature: Mapping[str, Any]) -> str:
    unit = text(feature, "unit", default="")
    return f"{text(feature, 'name')} ({unit})" if unit else text(feature, "name")


def _ends(feature: Mapping[str, Any], key: str, digits: int | None) -> str:
    ends = facts.numbers(feature, key)
    if len(ends) != 2:
        return "–"
    shown = [facts.significant(e) if digits is None else facts.whole(e) for e in ends]
    return f"{shown[0]} to {shown[1]}"


def _histogram(feature: Mapping[str, Any]) -> Html:
    counts, edges = facts.numbers(feature, "histogram"), facts.numbers(feature, "edges")
    labels = facts.names(feature, "categories")
    if len(edges) == len(counts) + 1:
        starts = [facts.short(edge) for edge in edges]
        labels = [f"{start} to {end}" for start, end in itertools.pairwise(starts)]
    most = max([*counts, 1.0])
    noise = number(feature, "deviation")
    bars = [
        Bar(label, max(count, 0.0), "study", facts.whole(max(count, 0.0)))
        for label, count in zip(labels, counts, strict=False)
    ]
    name = _named(feature)
    alt = f"{name}: " + "; ".join(f"{b.name} {b.note}" for b in bars) + "."
    caption = None if noise is None else f"each bar ± {facts.whole(1.96 * noise)} patients"
    return figure(element("h4", name), bar_chart(alt, bars, width=400, most=most), caption=caption)
