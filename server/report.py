"""report.html: one page that tells a researcher and a data-protection officer what a run did.

The page is drawn from results.json alone and needs nothing else: no script, no network, no font.
Its own content-security policy forbids all of them, so that even a flaw here could not send
anything anywhere. Whatever a record lacks is left out or said to be missing.
"""

from __future__ import annotations

from pathlib import Path

from server import facts
from server.facts import Results, amount, number, spent_amount, text
from server.report_counts import statistics_section
from server.report_privacy import privacy_section
from server.report_record import audit_section, traffic_section
from server.report_results import hospital_section, result_section
from server.report_rounds import numbers_section, participation_section, time_section
from server.results import write_text
from shared.markup import Html, element, join
from shared.page_parts import document, paragraph, section, tiles
from shared.page_style import STYLE

_PARTS = (
    ("privacy", "Privacy"),
    ("result", "Result"),
    ("hospitals", "Hospitals"),
    ("traffic", "What was sent"),
    ("participation", "Who took part"),
    ("time", "Time"),
    ("limits", "What this does not show"),
    ("auditors", "For auditors"),
    ("numbers", "Numbers"),
)


def write_report(results: Results, path: Path) -> None:
    """Write the report of a run as one HTML file, whole or not at all."""
    write_text(render(results), path)


def render(results: Results) -> str:
    """The report of a run as one HTML page.

    Args:
        results: A record as `server.results` describes it. Missing keys are tolerated; every
            text is escaped, whoever wrote it.

    Returns:
        The page; it refers to nothing outside itself.
    """
    title = text(results, "title", default=text(results, "scenario", default="Study"))
    sections = [
        privacy_section(results),
        statistics_section(results) or result_section(results),
        hospital_section(results),
        traffic_section(results),
        participation_section(results),
        time_section(results),
        limits_section(results),
        audit_section(results),
        numbers_section(results),
    ]
    return document(
        f"{title}: Fedward study report",
        [_masthead(results, title), sections, _footer(results)],
        STYLE,
    )


def _masthead(results: Results, title: str) -> Html:
    meta = [f"scenario {text(results, 'scenario')}", f"engine {text(results, 'engine')}"]
    if started := text(results, "started", default=""):
        meta.append(f"started {started}")
    links = (element("li", element("a", name, href=f"#{anchor}")) for anchor, name in _PARTS)
    label = {"aria-label": "Parts of this report"}
    return element(
        "header",
        element("p", "Fedward study report", class_="eyebrow"),
        element("h1", title),
        element("p", " · ".join(meta), class_="meta"),
        _banner(results),
        paragraph(_summary(results), style="lead"),
        _tiles(results),
        _warnings(results),
        element("nav", element("ul", links), **label),
    )


def _banner(results: Results) -> Html | None:
    """The gravest facts, above everything else."""
    grave = [w for w in facts.warnings(results) if w.startswith(facts.GRAVE)]
    if not grave:
        return None
    boxes = []
    for warning in grave:
        start, _, rest = warning.partition(". ")
        boxes.append(element("div", element("strong", f"{start}."), rest, class_="banner"))
    return join(boxes)


def _warnings(results: Results) -> Html | None:
    rest = [w for w in facts.warnings(results) if not w.startswith(facts.GRAVE)]
    if not rest:
        return None
    label = {"aria-label": "Warnings"}
    items = element("ul", (element("li", w) for w in rest))
    return element("aside", element("h2", "Read with care"), items, class_="warnings", **label)


def _summary(results: Results) -> str:
    """The study in three sentences."""
    sites, count = len(facts.site_names(results)), len(facts.rounds(results))
    parameters = number(results, "model", "parameters")
    model = text(results, "model", "name", default="a model")
    sized = "" if parameters is None else f" of {parameters:,.0f} parameters"
    said = [
        f"{facts.plural(sites, 'hospital')} trained one model ({model}{sized}) together in "
        f"{facts.plural(count, 'round')}; the server saw only sums of their updates."
    ]
    if facts.features(results):
        counted = facts.plural(len(facts.features(results)), "feature")
        said = [
            f"{facts.plural(sites, 'hospital')} counted {counted} of their patients together; the "
            "server saw only sums of their counts."
        ]
    spent, promised = facts.spent_epsilon(results), number(results, "privacy", "target_epsilon")
    if facts.is_private(results) and spent is not None:
        of = "" if promised is None else f" of the {amount(promised)} promised"
        delta = number(results, "privacy", "delta")
        at = "" if delta is None else f" at δ = {facts.delta_text(delta)}"
        said.append(
            f"Each patient of a hospital was charged at most ε = {spent_amount(spent)}{of}{at}."
        )
    metric = facts.main_metric(results)
    final = None if metric is None else number(results, "final", "metrics", metric)
    if metric is not None and final is not None:
        name = facts.METRICS[metric][0]
        line = f"The final model reaches {name} {final:.3f}"
        if ends := facts.interval(results, metric):
            line += f" (without the noise on its counts between {ends[0]:.3f} and {ends[1]:.3f})"
        pooled = number(results, "baselines", "pooled", "metrics", metric)
        if pooled is not None:
            line += f"; trained on pooled data without privacy it would reach {pooled:.3f}"
        said.append(line + ".")
    return " ".join(said)


def _tiles(results: Results) -> Html:
    """Four figures that a reader looks for first."""
    metric = facts.main_metric(results)
    final = None if metric is None else number(results, "final", "metrics", metric)
    patients = facts.test_patients(results)
    tested = "not tested" if final is None else "at the end of the study"
    if final is not None and patients is not None:
        about = "about " if facts.interval(results, metric or "") else ""
        tested = f"on {about}{facts.plural(patients, 'test patient')}"
    spent, promised = facts.spent_epsilon(results), number(results, "privacy", "target_epsilon")
    budget = "no bound at all" if not facts.is_private(results) else "of an unknown promise"
    if facts.is_private(results) and promised is not None:
        budget = f"of {amount(promised)} promised"
    rounds = facts.rounds(results)
    done = sum(not facts.aborted(r) for r in rounds)
    lost = sum(len(gone) for _, gone in facts.dropouts(results))
    threshold = number(results, "cohort", "threshold")
    needed = "" if threshold is None else f"any {threshold:.0f} finish a round"
    counted = facts.features(results)
    first = ("Features", f"{len(counted):,}", "counted over all hospitals")
    entries = [
        first
        if counted
        else ("AUROC" if metric is None else facts.METRICS[metric][0], amount(final, 3), tested),
        ("ε spent", spent_amount(spent), budget)
        if facts.is_private(results)
        else ("Privacy", "none", budget),
        ("Hospitals", f"{len(facts.site_names(results)):,}", needed),
        (
            "Rounds completed",
            f"{done:,}" if done == len(rounds) else f"{done:,} of {len(rounds):,}",
            facts.plural(lost, "dropout"),
        ),
    ]
    return tiles(entries)


def limits_section(results: Results) -> Html:
    """What a reader might wrongly take from this page."""
    items = _privacy_limits(results) + _result_limits(results)
    points = (element("li", element("strong", f"{start} "), rest) for start, rest in items)
    return section("limits", "What this does not show", element("ul", points))


def _privacy_limits(results: Results) -> list[tuple[str, str]]:
    sums = (
        "The secure sum protects a round, not a study.",
        "A server that chooses over many rounds who drops out can estimate one hospital's average "
        "update. Only the noise bounds what that reveals.",
    )
    if not facts.is_private(results):
        model = "Without differential privacy nothing bounds what it tells about a patient."
        return [sums, ("The model is not protected.", model)]
    per_site = facts.mapping(facts.get(results, "privacy", "sites")).values()
    known = sorted((e for s in per_site if (e := number(s, "epsilon")) is not None), reverse=True)
    several = (
        "A patient of k hospitals has k times the sensitivity, and the charges of those "
        "hospitals add up"
    )
    if len(known) >= 2:
        several += f": for two of them here, to ε = {spent_amount(known[0] + known[1])}"
    return [
        ("The bound is for a patient of one hospital.", several + "."),
        sums,
        (
            "The model is bounded by differential privacy alone.",
            "Everyone who receives it can question it for ever; encryption does not help there. "
            "Facts that hold for patients in general can be learnt from it, and should be.",
        ),
        (
            "ε counts this study only.",
            "What the same patients have spent in other studies, or in other runs of this one, "
            "adds to it. Neither does it cover test metrics that are shown without noise.",
        ),
        (
            "ε is a calculated bound, not a measured attack.",
            "It presumes that each hospital runs this software unaltered and counts its patients "
            "rightly.",
        ),
    ]


def _result_limits(results: Results) -> list[tuple[str, str]]:
    found = _cooperation_limits(results)
    found += [
        (
            "One run is one draw.",
            "Run again, noise and figures are others; another seed also gives another start and, "
            "where it is drawn, another split. Test patients come from the same hospitals, so "
            "nothing here is about a new hospital.",
        ),
        (
            "Poisoned data is not detected.",
            "A hospital that trains on false data is limited in how far it moves a sum, not found "
            "out.",
        ),
    ]
    if text(results, "engine") in ("in-process", "ray"):
        found.append(
            (
                "This was a simulation.",
                "All hospitals ran on machines of one person, who could see all data. Bytes are "
                "those of the real messages; times have no network in them, and dropouts were "
                "made up.",
            )
        )
    found.append(
        ("This is no clinical evaluation.", "The model has not been validated for use on patients.")
    )
    return found


def _cooperation_limits(results: Results) -> list[tuple[str, str]]:
    metric = facts.main_metric(results)
    better = None if metric is None else facts.better_alone(results, metric)
    if metric is None or better is None:
        return [
            (
                "Whether cooperation pays for a given hospital was not measured.",
                "A hospital alone, without differential privacy, may do better.",
            )
        ]
    count = facts.plural(len(better), "hospital")
    said = f"{count} had a better {facts.METRICS[metric][0]} alone, without privacy."
    return [("Cooperation does not pay for everyone.", said)] if better else []


def _footer(results: Results) -> Html:
    version = text(results, "version", default="")
    made = f"Fedward {version}".strip()
    return element("footer", f"{made}. Drawn from results.json; holds no script and loads nothing.")
