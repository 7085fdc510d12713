"""model-card.html: the model card as one page that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server import facts
from server.facts import amount
from server.model_card import NOT_RELEASED, Card
from server.report_groups import FEW, IMPORTANCE, group_tables, with_interval
from shared.markup import Child, Html, element
from shared.page_parts import (
    Column,
    Row,
    document,
    fact_list,
    paragraph,
    section,
    table,
    unfold,
)
from shared.page_style import STYLE


def render(card: Card) -> str:
    """The card as one HTML page; every text is escaped, whoever wrote it."""
    details = card["model_details"]
    body: list[Child] = [
        element("p", "Fedward model card", class_="eyebrow"),
        element("h1", details["name"]),
        paragraph(details["description"], style="lead") if details["description"] else None,
        _banner(card),
        _use(card["intended_use"]),
        _data(card["training_data"]),
        _performance(card["performance"]),
        _fairness(card["fairness"]),
        _importances(card["importances"]),
        _privacy(card["privacy"]),
        section("caveats", "Caveats", _list(card["caveats"])),
        _details(details),
        element("footer", "The same as model-card.json; holds no script, loads nothing."),
    ]
    return document(f"{details['name']}: model card", body, STYLE)


def _banner(card: Card) -> Html | None:
    if card["privacy"]["mode"] != "none":
        return None
    start, rest = "NO PRIVACY.", "Nothing bounds what this model tells about a patient."
    return element("div", element("strong", start), rest, class_="banner")


def _use(use: Mapping[str, Any]) -> Html:
    pairs: list[tuple[str, Child]] = [
        ("Task", use["task"]),
        ("Label", use["label"]),
        ("What it says", ", ".join(use["answers"])),
        ("Inputs", facts.listing([entry["name"] for entry in use["inputs"]], 8)),
    ]
    columns = [Column("Input", numeric=False), Column("what it may be"), Column("if missing")]
    rows = [
        Row((entry["name"], _range(entry), str(entry.get("missing", "–"))))
        for entry in use["inputs"]
    ]
    return section(
        "use",
        "Intended use",
        fact_list(pairs),
        unfold("All inputs", table("Inputs, by the study's plan", columns, rows)),
        element("h3", "Not for"),
        _list(use["out_of_scope"]),
    )


def _range(entry: Mapping[str, Any]) -> str:
    if "categories" in entry:
        return ", ".join(entry["categories"])
    if "size" in entry:
        return f"{entry['size']} pixels, {entry['channels']} channel(s)"
    return f"{entry['minimum']:g} to {entry['maximum']:g} {entry['unit']}".rstrip()


def _data(data: Mapping[str, Any]) -> Html:
    rows = [
        Row((site["name"], f"{site['declared_patients']:,}", _seen(data, site["name"])))
        for site in data["hospitals"]
    ]
    columns = [
        Column("Hospital", numeric=False),
        Column("patients, as it declared"),
        Column("in a sum"),
    ]
    said = data["description"] or "The hospitals' own patients; the run's record says no more."
    licence = f" Licence: {data['licence']}." if data["licence"] else ""
    return section(
        "data",
        "Training data",
        paragraph(f"{said}.{licence}".replace("..", ".")),
        table("Hospitals; how many patients each really has is private", columns, rows),
    )


def _seen(data: Mapping[str, Any], name: str) -> str:
    return "yes" if name in data["hospitals_seen"] else "no"


def _performance(performance: Mapping[str, Any]) -> Html:
    metrics, per_hospital = performance["metrics"], performance["per_hospital"]
    if metrics == NOT_RELEASED:
        return section("performance", "Performance", paragraph("The plan released no metrics."))
    kind = "exact, as only a simulation may show" if performance["exact"] else "from noisy counts"
    rows = [Row(cells) for cells in _metric_rows(metrics, performance["intervals"])]
    columns = [Column("Metric", numeric=False), Column("all test patients")]
    if performance["intervals"]:
        columns.append(Column("without the noise between"))
    parts: list[Child] = [table(f"All hospitals together ({kind})", columns, rows)]
    if per_hospital == NOT_RELEASED:
        parts.append(paragraph("Figures of single hospitals never left them.", style="note"))
    else:
        parts.append(_per_hospital(per_hospital))
    return section("performance", "Performance", *parts)


def _metric_rows(
    metrics: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Iterator[tuple[str, ...]]:
    for name, (shown, _) in facts.METRICS.items():
        if name in metrics:
            cells = [shown, amount(metrics[name], 3)]
            if intervals:
                ends = intervals.get(name)
                cells.append(f"{amount(ends[0], 3)} to {amount(ends[1], 3)}" if ends else "–")
            yield tuple(cells)


def _per_hospital(per_hospital: Mapping[str, Any]) -> Html:
    known = [n for n in facts.METRICS if any(n in own for own in per_hospital.values())][:6]
    columns = [Column("Hospital", numeric=False), Column("test patients")]
    columns += [Column(facts.METRICS[n][0]) for n in known]
    rows = [
        Row(
            (
                name,
                facts.whole(facts.number(own, "test_patients")),
                *(amount(facts.number(own, n), 3) for n in known),
            )
        )
        for name, own in sorted(per_hospital.items())
    ]
    return table("Each hospital's own test patients (simulation only)", columns, rows)


def _fairness(fairness: Mapping[str, Any]) -> Html:
    if fairness["groups"] == NOT_RELEASED:
        said = f"By sex and age: {NOT_RELEASED}. {fairness['why'].capitalize()}."
        return section("fairness", "Fairness", paragraph(said))
    note = (
        f"From {fairness['why']}. In brackets: where the value without noise lies, 95 % of the "
        f"time. {FEW}"
    )
    return section("fairness", "Fairness", paragraph(note), group_tables(fairness["groups"]))


def _importances(importances: Any) -> Html:
    if importances == NOT_RELEASED:
        said = "The plan releases no importances of features; each hospital can explain its own "
        return section("importances", "What moves it", paragraph(said + "patients' predictions."))
    columns = [Column("Feature", numeric=False), Column("mean move (without the noise)")]
    rows = [Row((own["name"], with_interval(own, "value", "interval"))) for own in importances]
    parts = table("Importance of each feature", columns, rows)
    return section("importances", "What moves it", paragraph(IMPORTANCE), parts)


def _privacy(privacy: Mapping[str, Any]) -> Html:
    pairs: list[tuple[str, Child]] = [("Mode", privacy["mode"]), ("Unit", privacy["unit"])]
    for key, name in (("training", "Training patients"), ("evaluation", "Test patients")):
        if promise := privacy[key]:
            line = f"ε = {promise['promised_epsilon']:g} at δ = {promise['delta']:g} promised"
            spent = promise.get("spent_epsilon")
            pairs.append((name, line + (f", {spent:.3f} spent" if spent is not None else "")))
    secure = privacy["secure_sum"]
    pairs += [
        ("Who is trusted", privacy["trust"]),
        (
            "Secure sum",
            f"any {secure['threshold']} of {secure['hospitals']} hospitals finish a round; up to "
            f"{secure['colluders']} may side with the server",
        ),
    ]
    return section("privacy", "Privacy", fact_list(pairs))


def _details(details: Mapping[str, Any]) -> Html:
    size = details["parameters"]
    pairs: list[tuple[str, Child]] = [
        ("Architecture", details["architecture"]),
        ("Parameters", facts.whole(size)),
        ("Model's state", element("code", f"sha256 {details['state_sha256']}")),
        ("Plan", element("code", f"sha256 {details['plan_sha256']}")),
        ("Trained", details["trained"] or facts.NOT_RECORDED),
        ("Trained with", details["trained_with"]),
    ]
    return section("details", "Model details", fact_list(pairs))


def _list(texts: list[str]) -> Html:
    return element("ul", (element("li", text) for text in texts))
