"""sweep.html: one page on what accuracy a study reaches at which epsilon, drawn from sweep.json.

Like report.html it needs nothing else: no script, no network, no font. Every text is escaped,
whoever wrote it.
"""

from __future__ import annotations

from server import facts
from server.charts import Level
from server.facts import number, text
from shared.markup import Html, element
from shared.page_parts import document, figure, paragraph, section
from shared.page_style import STYLE
from simulations.sweep_chart import Curve, epsilon_chart
from simulations.sweep_reading import (
    METRICS,
    Table,
    both_modes,
    cell_of,
    ends,
    estimates,
    metric_title,
    pooled_key,
    reference,
    shown,
)
from simulations.sweep_tables import (
    difference_section,
    figure_section,
    limit_section,
    run_section,
    setting_section,
)

_PARTS = (
    ("result", "Result"),
    ("differences", "Differences"),
    ("figures", "All figures"),
    ("settings", "Settings"),
    ("limits", "What this does not show"),
    ("runs", "Runs"),
)
_STYLE = (
    ":root{--mode-local:#9333ea}"
    "@media screen and (prefers-color-scheme:dark){:root{--mode-local:#c9a2ff}}"
    ".mode-local{color:var(--mode-local)}"
    ".error{fill:none;stroke:currentColor;stroke-width:1.3;opacity:.75;stroke-dasharray:none}"
    ".hollow{fill:var(--sheet);stroke:currentColor;stroke-width:1.8;stroke-dasharray:none}"
    ".curve.pooled_dp{stroke-dasharray:4 3}"
)


def render(sweep: Table) -> str:
    """The page of a sweep.

    Args:
        sweep: As `sweep_summary.sweep_table` makes it.

    Returns:
        HTML that refers to nothing outside itself.
    """
    title = f"Accuracy against ε: {text(sweep, 'scenario')}"  # the scenario's title has an ε
    sections = [
        _result_section(sweep),
        difference_section(sweep),
        figure_section(sweep),
        setting_section(sweep),
        limit_section(sweep),
        run_section(sweep),
    ]
    made = f"Fedward {text(sweep, 'version', default='')}".strip()
    footer = element("footer", f"{made}. Drawn from sweep.json; holds no script, loads nothing.")
    return document(
        f"{title} (Fedward sweep)", [_masthead(sweep, title), sections, footer], STYLE + _STYLE
    )


def _masthead(sweep: Table, title: str) -> Html:
    meta = [text(sweep, "data", "description"), facts.plural(len(sweep["seeds"]), "seed")]
    meta.append(f"made {text(sweep, 'made')}")
    links = (element("li", element("a", name, href=f"#{anchor}")) for anchor, name in _PARTS)
    label = {"aria-label": "Parts of this page"}
    return element(
        "header",
        element("p", "Fedward sweep", class_="eyebrow"),
        element("h1", title),
        element("p", " · ".join(meta), class_="meta"),
        paragraph(_summary(sweep), style="lead"),
        _warnings(sweep),
        element("nav", element("ul", links), **label),
    )


def _summary(sweep: Table) -> str:
    """The answer in a few sentences."""
    said = [
        f"{facts.plural(len(sweep['cohort']['sites']), 'hospital')} with "
        f"{facts.whole(number(sweep, 'train_patients'))} patients train one model together; "
        "every figure is of whole studies, encrypted updates included, tested on "
        f"{facts.whole(number(sweep, 'test_patients'))} other patients."
    ]
    for epsilon in ends(sweep):
        found = [
            f"{name} {shown(cell)}"
            for key, name in (
                (("distributed", "study"), "mode distributed"),
                (("local", "study"), "mode local"),
                (pooled_key(sweep), "pooled data under the same promise"),
            )
            if (cell := cell_of(sweep, key, epsilon, "auroc"))
        ]
        if found:
            said.append(f"At ε = {epsilon:g}, AUROC: {facts.listing(found)}.")
    pooled = reference(sweep, "pooled", "auroc")
    if pooled is not None:
        said.append(f"Pooled data without any privacy: {pooled[1]:.3f}.")
    return " ".join(said)


def _warnings(sweep: Table) -> Html | None:
    found = [
        "Test metrics are exact: simulation only. Counts without noise never leave a real "
        "hospital, and ε does not cover them."
    ]
    if sweep["insecure_reproducible"]:
        found.insert(0, facts.INSECURE)
    planned, done = int(sweep["runs_planned"]), len(sweep["runs"])
    if done < planned:
        found.insert(0, f"Not finished: {done} of {planned} runs are in these figures.")
    if len(sweep["seeds"]) < 3:
        found.append("So few seeds say little about chance: no difference here is established.")
    if sweep.get("synthetic") is True:
        found.append("Synthetic data: the figures say how the system works, nothing on patients.")
    label = {"aria-label": "Warnings"}
    items = element("ul", (element("li", w) for w in found))
    return element("aside", element("h2", "Read with care"), items, class_="warnings", **label)


def _result_section(sweep: Table) -> Html:
    charts = [_chart(sweep, metric) for metric in METRICS]
    said = (
        "Points are means over seeds; a bar reaches one standard deviation either way. The lines "
        "across are without privacy: pooled data, and each hospital alone with its model tested "
        "on everybody’s patients (the mean over hospitals)"
    )
    said += ", each under the better of the two modes’ settings." if both_modes(sweep) else "."
    both = element("div", charts, class_="halves")
    return section("result", "Result", both, paragraph(said, style="note"))


def _chart(sweep: Table, metric: str) -> Html | None:
    keys = [
        (("distributed", "study"), "Mode distributed", "study", "disc"),
        (("local", "study"), "Mode local", "mode-local", "square"),
        (pooled_key(sweep), "Pooled, private", "pooled_dp", "ring"),
    ]
    curves = [
        Curve(name, points, style, mark)  # type: ignore[arg-type]
        for key, name, style, mark in keys
        if (points := estimates(sweep, key, metric))
    ]
    if not curves:
        return None
    levels = [
        Level(name, found[1], method)
        for method, name in (("pooled", "Pooled, no privacy"), ("local", "Alone, no privacy"))
        if (found := reference(sweep, method, metric))
    ]
    name = metric_title(metric)
    said = [
        f"{c.name} " + ", ".join(f"{p.mean:.3f} at epsilon {p.epsilon:g}" for p in c.points)
        for c in curves
    ] + [f"{level.name} {level.value:.3f}" for level in levels]
    alt = f"{name} against epsilon. {'; '.join(said)}."
    chart = epsilon_chart(alt, curves, levels, width=430, height=300)
    return figure(element("h3", f"{name} against ε"), chart)
