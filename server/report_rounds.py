"""The report's sections on the rounds: who took part, how long it took, every number."""

from __future__ import annotations

import math

from server import facts
from server.charts_blocks import Column as Stack
from server.charts_blocks import State, cohort_grid, column_chart
from server.facts import Results, amount, number, spent_amount
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

MOST_GRID_ROWS = 30


MOST_GRID_COLUMNS = 80


MOST_BARS = 60


MOST_TABLE_ROWS = 500


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
        columns = [Column("Round", numeric=False), Column("dropped out", numeric=False)]
        listed = unfold("Dropouts as a table", table("Dropouts by round", columns, rows))
    sums = _distinct_sums(results, sites)
    return section("participation", "Who took part", paragraph(said), grid, note, listed, *sums)


def _distinct_sums(results: Results, sites: list[str]) -> list[Html]:
    """The distinct sets of contributors: what a server that chooses dropouts has to work with."""
    sets = facts.contributor_sets(results)
    if len(sets) < 2:
        return []
    total = sum(count for _, count in sets)
    said = paragraph(
        f"{facts.plural(total, 'sum')} were opened, over {len(sets):,} different sets of "
        "hospitals. Sums over different sets can be held against each other: the more sets, the "
        "more can be estimated of one hospital's average update. Noise is what bounds that, not "
        "the encryption.",
        style="note",
    )
    rows = []
    for inside, count in sets[:MOST_TABLE_ROWS]:
        without = [site for site in sites if site not in inside]
        left_out = facts.listing(without, 12) if without else "nobody"
        rows.append(Row((f"{len(inside):,}", left_out, f"{count:,}")))
    columns = [Column("Hospitals"), Column("without", numeric=False), Column("sums")]
    listed = table("Distinct sets of contributors", columns, rows)
    return [said, unfold(f"The {len(sets):,} sets as a table", listed)]


def _participation_words(
    results: Results, gone: list[tuple[int, list[str]]], aborted: list[int]
) -> str:
    count, sites = len(facts.rounds(results)), len(facts.site_names(results))
    there = all(len(facts.names(r, "contributors")) == sites for r in facts.rounds(results))
    if not gone and not aborted and not there:
        return (
            "Nobody dropped out of a round, but not every hospital was in every round: some came "
            "later, or were not asked."
        )
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


def numbers_section(results: Results) -> Html | None:
    """Every round in one table: what the charts show, for those who cannot see them."""
    rounds = facts.rounds(results)
    if not rounds:
        return None
    step = math.ceil(len(rounds) / MOST_TABLE_ROWS)
    metrics = [m for m in facts.METRICS if any(number(r, "metrics", m) is not None for r in rounds)]
    private = any(number(r, "epsilon") is not None for r in rounds)
    columns = [Column("Round"), Column("hospitals")]
    columns += [Column(facts.METRICS[m][0]) for m in metrics]
    columns += [Column("ε")] if private else []
    columns += [Column(t) for t in ("training", "secure sum", "whole", "up", "down")]
    rows = []
    for i, entry in enumerate(rounds):
        if i % step and i != len(rounds) - 1 and not facts.aborted(entry):
            continue
        present = len(facts.names(entry, "contributors"))
        cells = [
            f"{facts.round_number(entry, i):,}",
            "aborted"
            if facts.aborted(entry)
            else f"{present} of {len(facts.names(entry, 'cohort'))}",
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
