"""The report's sections on what the study achieved: curves, comparison, hospitals."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from server import facts
from server.charts import Level, Line, line_chart
from server.charts_blocks import Bar, bar_chart
from server.facts import Results, amount
from server.report_counts import noise_note
from server.report_groups import groups_part, importance_part
from shared.markup import Html, element, join
from shared.page_parts import (
    Column,
    Row,
    figure,
    legend,
    paragraph,
    section,
    table,
    unfold,
)

MOST_OPEN_ROWS = 24
_COMPARED = ("auroc", "balanced_accuracy", "recall", "f1", "c_index", "integrated_brier", "r2")
_DRAWN = (
    *("auroc", "accuracy", "balanced_accuracy", "recall", "f1", "brier", "ece"),
    *("c_index", "integrated_brier", "r2", "mae"),
)


def result_section(results: Results) -> Html:
    """How good the model became, per round and at the end."""
    metric = facts.main_metric(results)
    if metric is None:
        return section(
            "result",
            "Result",
            paragraph("This run recorded no test metrics: how good the model is, is not known."),
        )
    return section(
        "result",
        "Result",
        _tested_on(results),
        noise_note(results),
        _main_curve(results, metric),
        _other_curves(results, metric),
        _comparison(results),
        _alone(results, metric),
        importance_part(results),
        groups_part(results),
    )


def _tested_on(results: Results) -> Html:
    patients = facts.test_patients(results)
    noisy = facts.interval(results, facts.main_metric(results) or "") is not None
    who = "the hospitals' test patients"
    if patients is not None:
        about = "about " if noisy else ""
        who = f"{about}{facts.plural(patients, 'test patient')} of all hospitals together"
    said = f"All figures are on {who}, none of whom took part in training."
    known = (
        {}
        if noisy
        else {
            "AUROC": facts.auroc_interval(results),
            "accuracy": facts.accuracy_interval(results),
        }
    )
    ranges = [f"{name} between {i[0]:.3f} and {i[1]:.3f}" for name, i in known.items() if i]
    if ranges:
        said += (
            f" So many patients place the final {', the '.join(ranges)} (95 % intervals); "
            "smaller differences between models may be chance."
        )
    return paragraph(said)


def _points(results: Results, metric: str) -> tuple[tuple[float, float], ...]:
    """(round, value) for the rounds after which the model was tested."""
    found = []
    for i, entry in enumerate(facts.rounds(results)):
        value = facts.number(entry, "metrics", metric)
        if value is not None:
            found.append((float(facts.round_number(entry, i)), value))
    return tuple(found)


def _levels(results: Results, metric: str) -> list[Level]:
    return [
        Level(f"{model.name} {value:.3f}", value, model.key)
        for model in facts.compared_models(results)[1:]
        if (value := facts.number(model.metrics, metric)) is not None
    ]


def _main_curve(results: Results, metric: str) -> Html | None:
    points, name = _points(results, metric), facts.METRICS[metric][0]
    if not points:
        return paragraph("The model was not tested between the rounds, so there is no curve.")
    if len(points) == 1:
        return paragraph("The model was tested at the end alone, so there is no curve.")
    levels = _levels(results, metric)
    own = facts.compared_models(results)[0].name
    line = Line(f"{own} {points[-1][1]:.3f}", points, "study")
    alt = (
        f"{name} after each round: {points[0][1]:.3f} after round {points[0][0]:.0f}, "
        f"{points[-1][1]:.3f} after round {points[-1][0]:.0f}."
    )
    if levels:
        alt += " For comparison: " + "; ".join(v.name for v in levels) + "."
    limits = facts.limits(metric)
    wide = line_chart(alt, [line], levels, width=860, height=300, x_label="round", limits=limits)
    narrow = line_chart(
        alt, [line], levels, width=400, height=240, x_label="round", limits=limits, labels=False
    )
    return join(
        [
            element("h3", f"{name} after each round"),
            element("figure", wide, class_="wide"),
            element("figure", narrow, class_="narrow"),
            legend([("study", line.name), *((v.style, v.name) for v in levels)], narrow=True),
            element(
                "p",
                "Dashed lines are the final values of the models this study is compared with. ",
                "The scale does not start at 0. At ↓ less is better. ",
                element("a", "Every round in numbers", href="#numbers"),
                class_="note",
            ),
        ]
    )


def _other_curves(results: Results, main: str) -> Html | None:
    charts = []
    for metric in _DRAWN:
        name, better_high = facts.METRICS[metric]
        points = _points(results, metric)
        if metric == main or len(points) < 2:
            continue
        levels = _levels(results, metric)
        alt = f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f}"
        alt += "." if better_high else "; less is better."
        chart = line_chart(
            alt,
            [Line(name, points, "study")],
            levels,
            width=290,
            height=170,
            x_label="round",
            limits=facts.limits(metric),
            labels=False,
        )
        title = f"{name[0].upper()}{name[1:]}{'' if better_high else ' ↓'}"
        charts.append(figure(element("h4", f"{title}: {points[-1][1]:.3f}"), chart))
    return element("div", charts, class_="multiples") if charts else None


def _comparison(results: Results) -> Html:
    """Bars and a table of all models that were tested; also the table of the final metrics."""
    models = facts.compared_models(results)
    present = [
        m for m in facts.METRICS if any(facts.number(x.metrics, m) is not None for x in models)
    ]
    columns = [Column("Model", numeric=False)]
    columns += [Column(facts.METRICS[m][0]) for m in present]
    rows = [
        Row(
            (m.name, *(amount(facts.number(m.metrics, k), 3) for k in present)),
            "strong" if m.key == "study" else "",
        )
        for m in models
    ]
    note = None
    if len(models) == 1:
        note = "No baseline was run: what privacy or cooperation cost or won is not known."
    elif any(m.key.startswith("local") for m in models):
        note = (
            "“Hospitals alone” is the mean over the hospitals, each with a model of its own that "
            "is tested on the patients of all."
        )
    caption = "Final models; the Brier score and the calibration error are better when smaller"
    return join(
        [
            element("h3", "Compared with other ways to train" if models[1:] else "Final metrics"),
            _bars(models, [m for m in _COMPARED if m in present]) if models[1:] else None,
            table(caption, columns, rows),
            paragraph(note, style="note") if note else None,
        ]
    )


def _bars(models: list[facts.Model], metrics: list[str]) -> Html:
    """One chart per metric; a baseline's bar also gives its difference to this study."""
    charts = []
    for metric in metrics:
        known = [(m, v) for m in models if (v := facts.number(m.metrics, metric)) is not None]
        own = facts.number(models[0].metrics, metric)
        drawn = [Bar(m.name, v, m.key, _note(v, own, m.key)) for m, v in known]
        name = facts.METRICS[metric][0]
        alt = f"{name}: " + "; ".join(f"{m.name} {v:.3f}" for m, v in known) + "."
        title = element("h4", name[0].upper() + name[1:])
        charts.append(figure(title, bar_chart(alt, drawn, width=400)))
    return element("div", charts, class_="halves")


def _note(value: float, own: float | None, key: str) -> str:
    if key == "study" or own is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({facts.gap(value, own)})"


def _alone(results: Results, metric: str) -> Html | None:
    """Whether a hospital does better with a model of its own: said either way."""
    better = facts.better_alone(results, metric)
    if better is None:
        return None
    name = facts.METRICS[metric][0]
    title = element("h3", "Would a hospital do better alone?")
    if not better:
        said = (
            "No: on its own test patients, no hospital's own model, trained alone without "
            f"privacy, has a better {name} than the model of this study."
        )
        return join([title, paragraph(said)])
    said = (
        f"Yes: for {facts.plural(len(better), 'hospital')} "
        f"({facts.listing([b.site for b in better])}) a model trained alone, without any privacy, "
        f"has a better {name} on the hospital's own test patients. Few test patients make such a "
        "difference uncertain; where it is real, the hospital gains from the study only if it "
        "wants the privacy, or a model for patients unlike its own."
    )
    return join([title, paragraph(said), _folded(_better_table(better, name), len(better))])


def _better_table(better: list[facts.BetterAlone], name: str) -> Html:
    rows = [
        Row(
            (
                b.site,
                facts.whole(b.test_patients),
                amount(b.alone, 3),
                amount(b.together, 3),
                facts.gap(b.alone, b.together),
            )
        )
        for b in better
    ]
    columns = [
        Column("Hospital", numeric=False),
        Column("own test patients"),
        Column(f"{name}, alone without privacy"),
        Column(f"{name}, this study"),
        Column("difference"),
    ]
    return table("Hospitals that do better alone", columns, rows)


@dataclass(frozen=True)
class _Field:
    """A column of a table of hospitals: where its number is found, and how it is shown."""

    title: str
    value: Callable[[str], float | None]
    show: Callable[[float | None], str]


def hospital_section(results: Results) -> Html:
    """Every hospital's privacy and results, side by side."""
    sites = facts.site_names(results)
    if not sites:
        return section("hospitals", "Hospitals", paragraph("No hospital is recorded."))
    parts = [_privacy_table(results, sites), _metric_table(results, sites)]
    return section("hospitals", "Hospital by hospital", parts)


def _privacy_table(results: Results, sites: list[str]) -> Html:
    table_of = facts.mapping(facts.get(results, "privacy", "sites"))
    rounds = facts.rounds(results)

    def field(title: str, key: str, show: Callable[[float | None], str]) -> _Field:
        return _Field(title, lambda site: facts.number(table_of, site, key), show)

    given = {s: float(sum(s in facts.names(r, "contributors") for r in rounds)) for s in sites}
    last = _Field(f"rounds of {len(rounds):,}", given.get, facts.whole)
    if not table_of:
        return _hospitals("Rounds that each hospital contributed to", sites, [last])
    caption = (
        "Privacy. The noise on a step's clipped sum has a standard deviation of noise multiplier "
        "× clip norm; the sample rate is each patient's chance to be in a step"
    )
    fields = [
        field("ε spent", "epsilon", _spent),
        field("ε if all others collude", "epsilon_alone", _spent),
        _Field(
            "ε of test patients",
            lambda site: facts.number(table_of, site, "evaluation", "epsilon"),
            _spent,
        ),
        field("noise multiplier", "noise_multiplier", _three),
        field("sample rate", "sample_rate", lambda v: "–" if v is None else f"{v:.4g}"),
        field("steps", "steps", facts.whole),
        field("patients", "patients", facts.whole),
        last,
    ]
    always = ("ε spent", last.title)
    known = [f for f in fields if f.title in always or any(f.value(s) is not None for s in sites)]
    return _hospitals(caption, sites, known)


def _spent(value: float | None) -> str:
    return facts.spent_amount(value, 3)


def _three(value: float | None) -> str:
    return amount(value, 3)


def _metric_table(results: Results, sites: list[str]) -> Html | None:
    table_of = facts.mapping(facts.get(results, "final", "per_site"))
    shown = {
        "train_patients": ("train patients", facts.whole),
        "test_patients": ("test patients", facts.whole),
        "positives": ("of them positive", facts.whole),
    } | {metric: (facts.METRICS[metric][0], _three) for metric in _DRAWN}
    fields = [
        _Field(title, lambda site, key=key: facts.number(table_of, site, key), show)  # type: ignore[misc]
        for key, (title, show) in shown.items()
        if any(facts.number(t, key) is not None for t in table_of.values())
    ]
    caption = "Result. The study's final model on each hospital's own test patients"
    return _hospitals(caption, sites, fields) if fields else None


def _hospitals(caption: str, sites: list[str], fields: list[_Field]) -> Html:
    """One row per hospital; many hospitals are folded behind least, median and most."""
    columns = [Column("Hospital", numeric=False), *(Column(f.title) for f in fields)]
    rows = [Row((s, *(f.show(f.value(s)) for f in fields))) for s in sites]
    if len(rows) <= MOST_OPEN_ROWS:
        return table(caption, columns, rows)
    known = [sorted(v for s in sites if (v := f.value(s)) is not None) for f in fields]
    summary = []
    for name, pick in (("least", min), ("median", statistics.median_low), ("most", max)):
        cells = (f.show(pick(v) if v else None) for f, v in zip(fields, known, strict=True))
        summary.append(Row((f"{name} of {len(sites):,}", *cells)))
    return join(
        [table(caption, columns, summary), _folded(table(caption, columns, rows), len(rows))]
    )


def _folded(content: Html, rows: int) -> Html:
    """A long table opens on demand, so that the page stays readable."""
    if rows <= MOST_OPEN_ROWS:
        return content
    return unfold(f"Show all {rows:,} hospitals", content)
