"""The report's sections on how the study ran: privacy, traffic, participation, time, evidence."""

from __future__ import annotations

import math

from server import facts
from server.charts import Column as Stack
from server.charts import Level, Line, State, cohort_grid, column_chart, gauge, line_chart
from server.facts import Results, amount, number, spent_amount, text
from server.markup import Child, Html, element, join
from server.report_parts import (
    Column,
    Row,
    figure,
    legend,
    paragraph,
    section,
    table,
    unfold,
)
from server.report_parts import (
    facts as fact_list,
)

MOST_GRID_ROWS = 30
MOST_GRID_COLUMNS = 80
MOST_BARS = 60
MOST_TABLE_ROWS = 500


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
    if sampling.casefold() == "poisson":
        sampling += ": in each step every patient is drawn or not, independently of the others"
    return [
        ("Unit", "the patient of one hospital, with all records there"),
        ("Neighbouring data", text(results, "privacy", "relation")),
        ("Sampling", sampling),
        ("Accountant", text(results, "privacy", "accountant")),
        ("Mode", _MODES.get(mode, mode)),
        ("δ", f"{facts.delta_text(delta)}, a chance of {facts.small_chance(delta)}"),
        (
            "Clip norm",
            f"{_plain(clip)}, the most that one patient's gradient may weigh in a step",
        ),
    ]


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def traffic_section(results: Results) -> Html:
    """What was sent, and what the server could read of it."""
    return section(
        "traffic",
        "What was sent",
        _what_the_server_saw(results),
        _volumes(results),
        _phases(results),
    )


def _what_the_server_saw(results: Results) -> Html:
    least, threshold = facts.least_contributors(results), number(results, "cohort", "threshold")
    colluders = number(results, "cohort", "colluders")
    said = (
        "In each round every hospital sent one masked vector, and the server could read one "
        "thing: the sum over the hospitals that contributed."
    )
    if least is not None:
        said += f" No sum here was over fewer than {facts.plural(least, 'hospital')}"
        said += "." if threshold is None else f"; at least {threshold:.0f} are required."
    said += " No hospital's own update and no patient's record was sent in the clear"
    if colluders:
        said += (
            f"; this holds against the server together with up to "
            f"{facts.plural(int(colluders), 'hospital')}"
        )
    return paragraph(said + ".")


def _volumes(results: Results) -> Html:
    rounds = facts.rounds(results)
    up = number(results, "wire", "bytes_up")
    down = number(results, "wire", "bytes_down")
    turns = sum(len(facts.names(r, "cohort")) for r in rounds)
    parameters = number(results, "model", "parameters")
    round_up = sum(number(r, "bytes_up") or 0 for r in rounds)
    round_down = sum(number(r, "bytes_down") or 0 for r in rounds)
    pairs: list[tuple[str, Child]] = [
        (
            "All hospitals, whole study",
            f"{facts.size(round_up if up is None else up)} up to the "
            f"server, {facts.size(round_down if down is None else down)} down to the hospitals",
        ),
    ]
    if turns:
        pairs.append(
            (
                "One hospital, one round",
                f"{facts.size(round_up / turns)} up, "
                f"{facts.size(round_down / turns)} down, on average",
            )
        )
    if turns and parameters:
        pairs.append(
            (
                "Per model parameter and round",
                f"{amount(round_up / turns / parameters)} bytes up, "
                f"{amount(round_down / turns / parameters)} bytes down (a float32 in the "
                "clear: 4 bytes)",
            )
        )
    if (messages := number(results, "wire", "messages")) is not None:
        largest = number(results, "wire", "largest_message")
        more = "" if largest is None else f", the largest {facts.size(largest)}"
        pairs.append(("Messages", facts.whole(messages) + more))
    coordinates, bits = (number(results, "secure_sum", k) for k in ("coordinates", "bits"))
    if coordinates is not None and bits is not None:
        pairs.append(("Secure sum", f"{facts.whole(coordinates)} numbers of {bits:.0f} bits"))
    return fact_list(pairs)


def _phases(results: Results) -> Html | None:
    phases = facts.mapping(facts.get(results, "wire", "by_phase"))
    if not phases:
        return None
    total = sum((number(p, k) or 0) for p in phases.values() for k in ("bytes_up", "bytes_down"))
    rows = []
    for name, phase in phases.items():
        both = sum(number(phase, k) or 0 for k in ("bytes_up", "bytes_down"))
        rows.append(
            Row(
                (
                    name.replace("_", " "),
                    facts.whole(number(phase, "messages")),
                    facts.size(number(phase, "bytes_up")),
                    facts.size(number(phase, "bytes_down")),
                    f"{100 * both / total:.1f} %" if total else "–",
                )
            )
        )
    columns = [
        Column("Phase", numeric=False),
        Column("messages"),
        Column("up"),
        Column("down"),
        Column("share of all bytes"),
    ]
    return table("Traffic by phase of the protocol, all hospitals", columns, rows)


def participation_section(results: Results) -> Html:
    """Who contributed to which round."""
    rounds, sites = facts.rounds(results), facts.site_names(results)
    if not rounds or not sites:
        return section("participation", "Who took part", paragraph("No round was recorded."))
    gone = facts.dropouts(results)
    aborted = [facts.round_number(r, i) for i, r in enumerate(rounds) if facts.aborted(r)]
    said = _participation_words(results, gone, aborted)
    missed = {s: sum(s in names for _, names in gone) for s in sites}
    shown = sites
    if len(sites) > MOST_GRID_ROWS:
        shown = sorted((s for s in sites if missed[s]), key=lambda s: -missed[s])[:MOST_GRID_ROWS]
    grid = _grid(results, shown, said) if shown else None
    note = None
    if 0 < len(shown) < len(sites):
        note = paragraph(
            f"Shown: the {facts.plural(len(shown), 'hospital')} that dropped out most often, of "
            f"{len(sites):,}.",
            style="note",
        )
    rows = [Row((f"{n:,}", facts.listing(names, 12))) for n, names in gone]
    listed = None
    if rows:
        columns = [Column("Round"), Column("dropped out", numeric=False)]
        listed = unfold("Dropouts as a table", table("Dropouts by round", columns, rows))
    return section("participation", "Who took part", paragraph(said), grid, note, listed)


def _participation_words(
    results: Results, gone: list[tuple[int, list[str]]], aborted: list[int]
) -> str:
    count, sites = len(facts.rounds(results)), len(facts.site_names(results))
    if not gone and not aborted:
        return f"All {sites:,} hospitals contributed to all {facts.plural(count, 'round')}."
    said = f"{facts.plural(sum(len(n) for _, n in gone), 'dropout')} in "
    said += f"{facts.plural(len(gone), 'round')} of {count:,}."
    if aborted:
        which = facts.listing([f"{n:,}" for n in aborted])
        verb = "was" if len(aborted) == 1 else "were"
        said += (
            f" {'Round' if len(aborted) == 1 else 'Rounds'} {which} {verb} aborted: too few "
            "hospitals answered, no sum was opened, and the model stayed as it was. What was "
            "spent on it stays spent."
        )
    else:
        said += " The secure sum finished every round without those that had gone."
    return said


def _grid(results: Results, sites: list[str], alt: str) -> Html:
    rounds = facts.rounds(results)
    group = _group(len(rounds), MOST_GRID_COLUMNS)
    blocks = [range(i, min(i + group, len(rounds))) for i in range(0, len(rounds), group)]
    labels = []
    for block in blocks:
        first = facts.round_number(rounds[block[0]], block[0])
        last = facts.round_number(rounds[block[-1]], block[-1])
        labels.append(f"{first}" if first == last else f"{first}–{last}")
    sets = [
        {k: set(facts.names(r, k)) for k in ("cohort", "contributors", "dropped")} for r in rounds
    ]
    failed = [facts.aborted(r) for r in rounds]
    states = [[_state(site, block, sets, failed) for block in blocks] for site in sites]
    used = {s for line in states for s in line}
    meaning = {
        "in": "contributed",
        "dropped": "dropped out",
        "aborted": "round aborted",
        "absent": "not asked",
    }
    entries = [(f"cell-{s}", m) for s, m in meaning.items() if s in used]
    chart = element(
        "div",
        cohort_grid(alt, sites, labels, states),
        class_="scroll",
        role="region",
        tabindex="0",
        **{"aria-label": "Hospitals by round"},
    )
    caption = None
    if group > 1:
        caption = f"One column stands for {group} rounds; it is marked if any of them was."
    return figure(chart, legend(entries, boxes=True), caption=caption)


def _group(count: int, most: int) -> int:
    """How many rounds share a column, so that at most `most` are drawn; a round number."""
    size = 1
    while count > most * size:
        size = size * 5 // 2 if str(size)[0] == "2" else size * 2
    return size


def _state(site: str, block: range, sets: list[dict[str, set[str]]], failed: list[bool]) -> State:
    """A site's state over a block of rounds: the worst one."""
    if any(site in sets[i]["dropped"] for i in block):
        return "dropped"
    if any(failed[i] and site in sets[i]["cohort"] for i in block):
        return "aborted"
    return "in" if any(site in sets[i]["contributors"] for i in block) else "absent"


def time_section(results: Results) -> Html:
    """How long rounds took, and what for."""
    timed = [(i, r) for i, r in enumerate(facts.rounds(results)) if number(r, "wall_s") is not None]
    if not timed:
        return section("time", "Time", paragraph("No times were recorded."))
    parts = []
    for i, entry in timed:
        wall = number(entry, "wall_s") or 0.0
        train, secagg = number(entry, "train_s") or 0.0, number(entry, "secagg_s") or 0.0
        parts.append(
            (facts.round_number(entry, i), train, secagg, max(0.0, wall - train - secagg), wall)
        )
    total = sum(p[4] for p in parts)
    said = f"A round took {facts.duration(total / len(parts))} on average"
    pieces = [sum(p[k] for p in parts) for k in (1, 2, 3)]
    if (whole := sum(pieces)) > 0:
        shares = [f"{100 * v / whole:.0f} %" for v in pieces]
        said += f": {shares[0]} training, {shares[1]} secure sum, {shares[2]} the rest"
    said += "."
    if (run := number(results, "wall_s")) is not None:
        said += f" The whole run took {facts.duration(run)}."
    return section("time", "Time", paragraph(said), _time_chart(parts, said))


def _time_chart(parts: list[tuple[int, float, float, float, float]], said: str) -> Html:
    group = _group(len(parts), MOST_BARS)
    columns = []
    longest = max(p[1] + p[2] + p[3] for p in parts)
    scale, unit = (1000.0, "milliseconds") if longest < 1 else (1.0, "seconds")
    if longest >= 600:
        scale, unit = 1 / 60, "minutes"
    for start in range(0, len(parts), group):
        block = parts[start : start + group]
        mean = [sum(p[k] for p in block) / len(block) for k in (1, 2, 3)]
        name = f"round {block[0][0]}" + (f" to {block[-1][0]}" if len(block) > 1 else "")
        tip = (
            f"{name}: training {facts.duration(mean[0])}, secure sum {facts.duration(mean[1])}, "
            f"rest {facts.duration(mean[2])}"
        )
        middle = (block[0][0] + block[-1][0]) / 2
        columns.append(Stack(middle, tuple(v * scale for v in mean), tip))
    styles = ("train", "sum", "other")
    alt = f"Time per round. {said}"
    wide, narrow = (
        column_chart(alt, columns, styles, width=w, height=h, unit=unit)
        for w, h in ((860, 240), (400, 220))
    )
    entries = [
        ("train", "training at the hospitals"),
        ("sum", "secure sum"),
        ("other", "the rest"),
    ]
    caption = f"Each column is the mean of {group} rounds." if group > 1 else None
    return join(
        [
            element("figure", wide, class_="wide"),
            element("figure", narrow, class_="narrow"),
            legend(entries, boxes=True),
            paragraph(caption, style="note") if caption else None,
        ]
    )


def audit_section(results: Results) -> Html:
    """What an auditor compares with the approved plan and the evidence."""

    def code(*keys: str) -> Html | str:
        value = text(results, *keys, default="")
        return element("code", value) if value else facts.NOT_RECORDED

    def count(*keys: str) -> str:
        return facts.whole(number(results, *keys))

    pairs: list[tuple[str, Child]] = [
        ("Plan, sha256", code("plan_sha256")),
        ("Model, sha256", code("model", "sha256")),
        ("Model", f"{text(results, 'model', 'name')}, {count('model', 'parameters')} parameters"),
        ("Protocol", code("secure_sum", "protocol")),
        (
            "Ring",
            f"{count('secure_sum', 'bits')} bits, coordinates clamped to ± "
            f"{_plain(number(results, 'secure_sum', 'clip_range'))}",
        ),
        (
            "Hospitals that must answer",
            f"{count('cohort', 'threshold')} of "
            f"{len(facts.site_names(results)):,}; "
            f"{count('cohort', 'tolerated_dropouts')} may drop out of "
            "a round",
        ),
        ("Hospitals that may collude", f"{count('cohort', 'colluders')} with the server"),
        ("Fedward", f"version {text(results, 'version')}, record {text(results, 'schema')}"),
        (
            "Run",
            f"scenario {text(results, 'scenario')}, seed {text(results, 'seed')}, engine "
            f"{text(results, 'engine')}, device {text(results, 'device')}",
        ),
        ("Started", text(results, "started")),
        ("Data", _data(results)),
    ]
    return section(
        "auditors",
        "For auditors",
        paragraph(
            "Compare the plan's hash with the one that each hospital approved, and the model's "
            "with the file that was handed out. This page is drawn from results.json alone; it "
            "is a summary, not itself a proof."
        ),
        fact_list(pairs),
    )


def _data(results: Results) -> str:
    source, licence = text(results, "data", "source"), text(results, "data", "licence")
    return f"{text(results, 'data', 'description')} (source: {source}; licence: {licence})"


def numbers_section(results: Results) -> Html | None:
    """Every round in one table: what the charts show, for those who cannot see them."""
    rounds = facts.rounds(results)
    if not rounds:
        return None
    step = math.ceil(len(rounds) / MOST_TABLE_ROWS)
    metrics = [m for m in facts.METRICS if any(number(r, "metrics", m) is not None for r in rounds)]
    private = any(number(r, "epsilon") is not None for r in rounds)
    columns = [Column("Round"), Column("hospitals"), Column("dropped out", numeric=False)]
    columns += [Column(facts.METRICS[m][0]) for m in metrics]
    columns += [Column("ε")] if private else []
    columns += [Column(t) for t in ("training", "secure sum", "whole", "up", "down")]
    rows = []
    for i, entry in enumerate(rounds):
        if i % step and i != len(rounds) - 1 and not facts.aborted(entry):
            continue
        gone = facts.listing(facts.names(entry, "dropped"), 3) or "–"
        present = len(facts.names(entry, "contributors"))
        cells = [
            f"{facts.round_number(entry, i):,}",
            "aborted"
            if facts.aborted(entry)
            else f"{present} of {len(facts.names(entry, 'cohort'))}",
            gone,
            *(amount(number(entry, "metrics", m), 3) for m in metrics),
            *([spent_amount(number(entry, "epsilon"), 3)] if private else []),
            *(facts.duration(number(entry, k)) for k in ("train_s", "secagg_s", "wall_s")),
            *(facts.size(number(entry, k)) for k in ("bytes_up", "bytes_down")),
        ]
        rows.append(Row(tuple(cells), "quiet" if facts.aborted(entry) else ""))
    note = None
    if step > 1:
        note = paragraph(
            f"One round in {step}, every aborted one and the last; results.json has all.",
            style="note",
        )
    inner = table("All that was recorded of each round", columns, rows)
    return section(
        "numbers", "Every round in numbers", unfold(f"Show {len(rows):,} rounds", note, inner)
    )
