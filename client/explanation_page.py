"""The page that a doctor reads: what a model says of one patient, and what moved it to say so.

It names the patient, so it is written for the hospital's own disk. It holds no script and loads
nothing: a browser that shows it sends nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.attribution import ORDERS, STEPS, Reals
from client.explanation import Contribution, Explanation, Maps
from client.pictures import data_url, heated, pixels_of, signed
from shared.markup import Child, Html, element, join
from shared.page_parts import (
    Column,
    Row,
    document,
    fact_list,
    legend,
    paragraph,
    section,
    table,
    tiles,
    unfold,
)
from shared.page_style import STYLE
from shared.plan import StudyPlan
from shared.privacy import count_promise_of, describe
from shared.released import ReleasedModel

MOST_BARS = 12
"""More features are added up in one bar."""

MOST_SLICES = 4
"""Of a volume: those that matter most."""

_STYLE = (
    ".parts{list-style:none;padding:0;margin:1.2rem 0;max-width:none}"
    ".parts li{display:grid;grid-template-columns:15rem 1fr 6.5rem;gap:.1rem 1rem;"
    "align-items:center;margin:0;padding:.4rem 0;border-bottom:1px solid var(--rule)}"
    ".parts .of{color:var(--soft);font-size:.85rem;display:block}"
    ".parts b{font-weight:600;overflow-wrap:anywhere}"
    ".lane{position:relative;height:1.1rem;background:var(--wash);border-radius:3px}"
    ".lane::after{content:'';position:absolute;left:50%;top:-.2rem;bottom:-.2rem;"
    "border-left:1px solid var(--soft)}"
    ".lane i{position:absolute;top:0;bottom:0;border-radius:3px}"
    ".up{background:var(--local);fill:var(--local)}.down{background:var(--pooled);"
    "fill:var(--pooled)}"
    ".parts .n{font-weight:600;font-variant-numeric:tabular-nums;text-align:right;"
    "white-space:nowrap}"
    ".pictures{display:grid;grid-template-columns:repeat(3,1fr);gap:1rem;margin:1.2rem 0}"
    ".pictures figure{margin:0}.pictures img{display:block;width:100%;image-rendering:pixelated;"
    "border:1px solid var(--rule);border-radius:6px}"
    "@media (max-width:44rem){.pictures{grid-template-columns:1fr}.pictures img{max-width:340px}"
    ".parts li{grid-template-columns:1fr 6.5rem}.parts li>span:first-child{grid-column:1/-1}}"
    "@media print{.lane,.lane i,.pictures img{print-color-adjust:exact;"
    "-webkit-print-color-adjust:exact}}"
)


def render(
    model: ReleasedModel,
    patient: str,
    found: Sequence[Explanation],
    *,
    records: int,
    made: str,
    own: bool = False,
) -> str:
    """The page about one patient.

    Args:
        model: Whose answers are explained.
        patient: The hospital's own identifier.
        found: One explanation for each record that is shown.
        records: How many records the patient has.
        made: When, as text.
        own: Whether the model is this hospital's own version of a released one.
    """
    plan = model.plan
    title = f"{plan.name}: one patient's prediction, explained"
    many = "" if records == 1 else f" · {len(found)} of {records} records"
    body = [
        element("p", "Fedward explanation", class_="eyebrow"),
        element("h1", plan.name),
        element("p", f"patient {patient}{many} · {made}", class_="meta"),
        paragraph(plan.description.strip(), style="note") if plan.description else None,
        _caution(),
        [
            _record(plan, one, f" (record {number})" if len(found) > 1 else "", number)
            for number, one in enumerate(found, start=1)
        ],
        _reading(found[0]),
        _origin(model, own),
        element(
            "footer",
            "Names a patient: keep it at the hospital. Made here by fedward-site explain; it holds "
            "no script and loads nothing.",
        ),
    ]
    return document(title, body, STYLE + _STYLE, pictures=True)


def _caution() -> Html:
    return element(
        "div",
        element("strong", "This is no diagnosis."),
        "It shows how a model came to its number from what it was given. That a value moves the "
        "number does not mean that it made the patient ill. Check the values below first: a wrong "
        "input is explained as readily as a right one.",
        class_="banner",
    )


def _record(plan: StudyPlan, one: Explanation, which: str, number: int) -> Html:
    said = [_tiles(plan, one)]
    if len(one.answers) > 1:
        rows = [Row((_named(plan, name), _amount(plan, v))) for name, v in one.answers.items()]
        columns = [Column("What the model says", numeric=False), Column("")]
        said.append(unfold("All its answers", table("All answers of the model", columns, rows)))
    shown = _bars(plan, one) if one.maps is None else _pictures(one.maps)
    return section(f"record-{number}", f"What the model says{which}", said, shown)


def _tiles(plan: StudyPlan, one: Explanation) -> Html:
    against = "a black image" if one.maps is not None else "the baseline"
    entries = (
        (
            _capital(_named(plan, one.name)),
            _amount(plan, one.risk),
            "what the model says of this record",
        ),
        ("Compared with", _amount(plan, one.start), f"what it says of {against}"),
        ("Difference", _change(plan, one.risk - one.start), "what is explained below"),
    )
    return tiles(entries, style="grid-template-columns:repeat(auto-fit,minmax(11rem,1fr))")


def _bars(plan: StudyPlan, one: Explanation) -> Html:
    shown, rest = one.contributions[:MOST_BARS], one.contributions[MOST_BARS:]
    most = max((abs(part.shapley) for part in shown), default=0.0) or 1.0
    items = [
        _lane(plan, p.feature.name, f"{p.value}; compared with {p.baseline}", p.shapley, most)
        for p in shown
    ]
    if rest:
        others = sum(part.shapley for part in rest)
        items.append(_lane(plan, f"the other {len(rest)} features together", "", others, most))
    name = _named(plan, one.name)
    key = legend([("up", f"raises: {name}"), ("down", f"lowers: {name}")], boxes=True)
    return join([
        element("h3", "What moved it"), key, element("ul", items, class_="parts"), _table(plan, one)
    ])  # fmt: skip


def _lane(plan: StudyPlan, name: str, of: str, value: float, most: float) -> Html:
    """One bar from the middle: to the right where it raises, to the left where it lowers."""
    width = min(abs(value) / most, 1.0) * 50
    start = 50.0 if value >= 0 else 50 - width
    inside = element(
        "i", class_="up" if value >= 0 else "down", style=f"left:{start:.2f}%;width:{width:.2f}%"
    )
    label = element("span", element("b", name), element("span", of, class_="of") if of else None)
    lane = element("span", inside, class_="lane")
    return element("li", label, lane, element("span", _change(plan, value), class_="n"))


def _table(plan: StudyPlan, one: Explanation) -> Html:
    columns = [
        Column("Feature", numeric=False),
        Column("this patient"),
        Column("baseline"),
        Column("plausible range"),
        Column("Shapley value"),
        Column("Integrated Gradients"),
    ]
    rows = [
        Row(
            (
                part.feature.name,
                part.value,
                part.baseline,
                _range(part),
                _change(plan, part.shapley),
                "–" if part.gradients is None else _change(plan, part.gradients),
            )
        )
        for part in one.contributions
    ]
    return unfold("All features, by both methods", table("All features", columns, rows))


def _range(part: Contribution) -> str:
    feature = part.feature
    if feature.type == "category":
        return ", ".join(feature.categories)
    return f"{feature.minimum:g} to {feature.maximum:g} {feature.unit}".rstrip()


def _pictures(maps: Maps) -> Html:
    places = _slices(maps)
    rows = [join(_views(maps, place)) for place in places]
    note = None
    if maps.heat is not None and not maps.heat.max() > 0:
        note = paragraph("GradCAM found nothing in this image that raises the model's number.")
    return join([element("h3", "Where it looked"), note, *rows])


def _slices(maps: Maps) -> Sequence[int | None]:
    """Of a volume the slices with the most weight, in order; of a flat image itself."""
    if maps.gradients.ndim == 2:
        return [None]
    strength = np.abs(maps.gradients) if maps.heat is None else maps.heat
    weights = strength.sum(axis=(1, 2))
    return sorted(int(i) for i in np.argsort(-weights, kind="stable")[:MOST_SLICES])


def _views(maps: Maps, place: int | None) -> list[Child]:
    at = ... if place is None else place
    where = "" if place is None else f", slice {place + 1} of {len(maps.gradients)}"
    picture = maps.picture if place is None else maps.picture[:, place]
    plain = pixels_of(picture)
    views: list[tuple[str, str, str]] = [
        (data_url(plain), f"The image{where}", "as the model saw it")
    ]
    if maps.heat is not None:
        over = heated(plain, maps.heat[at], float(maps.heat.max()))
        views.append((data_url(over), f"GradCAM{where}", "orange: what raises the number"))
    fine = signed(plain, maps.gradients[at], _strong(maps.gradients))
    caption = "red raises the number, blue lowers it"
    views.append((data_url(fine), f"Integrated Gradients{where}", caption))
    figures = [
        element(
            "figure",
            element("img", src=url, alt=f"{name}: {what}"),
            element("figcaption", element("strong", name), f": {what}"),
        )
        for url, name, what in views
    ]
    return [element("div", figures, class_="pictures")]


def _strong(values: Reals) -> float:
    """What is drawn in full colour: nearly the largest, lest one pixel hides the rest."""
    return float(np.quantile(np.abs(values), 0.995))


def _reading(one: Explanation) -> Html:
    if one.maps is None:
        texts = [
            "The baseline is a record made of the plan's public ranges alone: each number in the "
            "middle of its plausible range, every category alike. It is nobody's record, and not "
            "the average patient. A value outside its plausible range is read as the range's end.",
            f"A Shapley value is what the number changes by when a feature of the baseline is put "
            f"to the patient's value, averaged over {ORDERS} random orders of the features; they "
            "add up to the difference. Integrated Gradients follow the straight path from baseline "
            "to patient. Where the two disagree, features act together, and neither figure is the "
            "feature's own. Models that move in jumps, such as trees, have no gradients.",
        ]
    else:
        texts = [
            "GradCAM weighs the network's last pictures by how much they raise the number; it is "
            "coarse, and shows a region, never an outline. Integrated Gradients follow the path "
            f"from a black image in {STEPS} points; they show single pixels, edges above all.",
            "Neither says what a pixel means. A model that looks at the right place may still be "
            "wrong, and one that looks elsewhere (a marker, a border, a device) deserves distrust.",
        ]
    return section("reading", "How to read this", [paragraph(text) for text in texts])


def _origin(model: ReleasedModel, own: bool) -> Html:
    plan = model.plan
    facts: list[tuple[str, Child]] = [
        ("Study", plan.name),
        ("Model", f"{plan.model.name}, trained by {len(plan.cohort.sites)} hospitals together"),
        ("Version", "this hospital's own, trained on here" if own else "as released"),
        ("Model's hash", element("code", f"sha256 {model.sha256}")),
        ("Plan's hash", element("code", f"sha256 {plan.sha256}")),
        ("Privacy of those it was trained on", privacy_line(plan)),
    ]
    more = unfold("What that promises, exactly", paragraph(describe(plan)))
    return section("origin", "Where the model comes from", fact_list(facts), more)


def privacy_line(plan: StudyPlan) -> str:
    """The study's promise in one line."""
    if plan.privacy.mode == "none":
        return "none: trained without differential privacy, in a simulation"
    epsilon, delta = plan.privacy.budget
    line = f"ε = {epsilon:g} at δ = {delta:g} for each patient of one hospital"
    counted = count_promise_of(plan)
    if counted is not None and plan.learns:
        line += f"; test patients ε = {counted[0]:g} at δ = {counted[1]:g} for the metrics"
    return line


def _amount(plan: StudyPlan, value: float) -> str:
    return f"{value:.4g}" if plan.task.kind == "regression" else f"{100 * value:.1f} %"


def _change(plan: StudyPlan, value: float) -> str:
    if plan.task.kind == "regression":
        return f"{value:+.3g}"
    return f"{100 * value:+.1f} points"


def _named(plan: StudyPlan, name: str) -> str:
    """An answer's name for readers who have not seen the plan, such as "death by days = 365"."""
    task, (what, _, value) = plan.task, name.rpartition(" ")
    if task.kind == "survival":
        return f"{task.label} by {task.time} = {value}"
    bare = value.lstrip("-").isdigit() and task.kind != "regression"
    return f"{what} {task.label} = {value}" if bare else name


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
