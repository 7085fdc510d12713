"""The report's section on privacy: what was promised, what was spent, how it was counted."""

from __future__ import annotations

import math

from server import facts
from server.charts import Level, Line, line_chart
from server.charts_blocks import gauge
from server.facts import Results, amount, number, spent_amount, text
from shared.markup import Child, Html, element, join
from shared.page_parts import (
    fact_list,
    figure,
    legend,
    paragraph,
    section,
)


def privacy_section(results: Results) -> Html:
    """What was promised to a patient, what was spent, and how it was counted."""
    title = "Privacy"
    if not facts.is_private(results):
        said = (
            "Hospitals sent their updates without noise. The secure sum hid each hospital's "
            "update from the server, but nothing bounds what the sums and the final model reveal "
            "about a patient. Such a run is for simulation only: every real hospital refuses it."
        )
        return section("privacy", title, paragraph(element("strong", "No privacy. "), said))
    spent, promised = facts.spent_epsilon(results), number(results, "privacy", "target_epsilon")
    delta = number(results, "privacy", "delta")
    return section(
        "privacy",
        title,
        _budget(spent, promised),
        _plain_words(promised if spent is None else spent, delta),
        _evaluation(results),
        _epsilon_curve(results, promised),
        element("h3", "How it was counted"),
        fact_list(_counting(results)),
    )


def _budget(spent: float | None, promised: float | None) -> Html | None:
    if spent is None or promised is None:
        return None
    alt = f"Epsilon {spent_amount(spent)} spent of {amount(promised)} promised."
    return figure(
        gauge(alt, spent, promised, width=860),
        caption=f"ε = {spent_amount(spent)} spent of the {amount(promised)} promised "
        "(red mark), for the hospital that spent most.",
    )


def _evaluation(results: Results) -> Html | None:
    """What the noisy metrics cost the patients whom the model was tested on."""
    sites = facts.mapping(facts.get(results, "privacy", "sites")).values()
    spent = [e for s in sites if (e := number(s, "evaluation", "epsilon")) is not None]
    promised = number(results, "privacy", "evaluation", "target_epsilon")
    if not spent or promised is None:
        return None
    delta = number(results, "privacy", "evaluation", "delta")
    releases = max(int(number(s, "evaluation", "releases") or 0) for s in sites)
    return paragraph(
        element("strong", "Test patients "),
        f"have a budget of their own: {facts.plural(releases, 'release')} of their scores' "
        f"histograms cost at most ε = {spent_amount(max(spent))} of the {amount(promised)} "
        f"promised at δ = {facts.delta_text(delta)}.",
    )


def _plain_words(epsilon: float | None, delta: float | None) -> Html | None:
    if epsilon is None:
        return paragraph("The record holds no epsilon: what the study cost is not known.")
    chance = f", except with a chance of {facts.small_chance(delta)} (δ)" if delta else ""
    factor = f"{math.exp(epsilon):,.3g}" if epsilon < 14 else f"more than {10**6:,}"
    guess = facts.guess_bound(epsilon, delta or 0.0)
    return join(
        [
            paragraph(
                "Take any one patient of one hospital, with all of that patient's records there, "
                "and either add them to the study or leave them out. Whatever anyone concludes "
                "from all that the study released, every round and the final model included, "
                "becomes at most e",
                element("sup", "ε"),
                f" = {factor} times as likely{chance}.",
            ),
            paragraph(
                "Put differently: someone who knows everything else, and would toss a coin on "
                "whether this patient took part, can be right at most "
                f"{_percent_up(guess)} of the time instead of 50 %. That is the worst case that "
                "the mathematics allows, not what an attack has achieved."
            ),
        ]
    )


def _percent_up(share: float) -> str:
    """A bound in percent, rounded up: 99.99 % is not to read as 100 %, nor as less."""
    return f"{min(math.ceil(share * 1000 - 1e-9) / 10, 100):.1f} %"


def _epsilon_curve(results: Results, promised: float | None) -> Html | None:
    points = tuple(
        (float(facts.round_number(r, i)), e)
        for i, r in enumerate(facts.rounds(results))
        if (e := number(r, "epsilon")) is not None
    )
    if len(points) < 2:
        return None
    levels = (
        [] if promised is None else [Level(f"promised {amount(promised)}", promised, "promise")]
    )
    line = Line(f"spent {spent_amount(points[-1][1])}", points, "study", step=True, area=True)
    alt = (
        f"Epsilon spent after each round, from {amount(points[0][1])} to "
        f"{spent_amount(points[-1][1])}" + (f"; promised {amount(promised)}." if levels else ".")
    )
    wide, narrow = (
        line_chart(
            alt,
            [line],
            levels,
            width=w,
            height=h,
            x_label="round",
            limits=(0.0, None),
            labels=labels,
            from_zero=True,
        )
        for w, h, labels in ((860, 240, True), (400, 220, False))
    )
    return join(
        [
            element("h3", "ε spent, round by round"),
            element("figure", wide, class_="wide"),
            element("figure", narrow, class_="narrow"),
            legend([("study", line.name), *((v.style, v.name) for v in levels)], narrow=True),
        ]
    )


_CLIP = "the most that one patient's gradient may weigh in a step"
_MODES = {
    "local": "local: each hospital adds all the noise itself before it encrypts, so neither the "
    "server nor another hospital has to be trusted for this bound",
    "distributed": "distributed: each hospital adds a share of the noise before it encrypts; "
    "the bound needs the secure sum and enough honest hospitals",
}


def _counting(results: Results) -> list[tuple[str, Child]]:
    mode = facts.mode(results) or ""
    sampling = text(results, "privacy", "sampling")
    delta, clip = number(results, "privacy", "delta"), number(results, "privacy", "clip_norm")
    last = number(results, "privacy", "last_clip_norm")
    if sampling.casefold() == "poisson":
        sampling += ": in each step every patient is drawn or not, independently of the others"
    return [
        ("Unit", "the patient of one hospital, with all records there"),
        ("Neighbouring data", text(results, "privacy", "relation")),
        ("Sampling", sampling),
        ("Accountant", text(results, "privacy", "accountant")),
        ("Mode", _MODES.get(mode, mode)),
        ("δ", f"{facts.delta_text(delta)}, a chance of {facts.small_chance(delta)}"),
        *([("Clip norm", _clip_norm(clip, last))] if clip is not None else []),
    ]


def _clip_norm(start: float, last: float | None) -> str:
    if last is None:
        return f"{facts.short(start)}, {_CLIP}"
    return (
        f"{facts.short(start)} at the start and {last:.3g} at the end, {_CLIP}; it "
        "follows a noised vote of the patients, which the noise covers"
    )
