"""The report's sections for the data-protection officer: what was sent, what can be checked."""

from __future__ import annotations

from server import facts
from server.facts import Results, amount, number, text
from shared.markup import Child, Html, element
from shared.page_parts import (
    Column,
    Row,
    fact_list,
    paragraph,
    section,
    table,
)


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
    return fact_list(pairs + _vector(results))


def _vector(results: Results) -> list[tuple[str, Child]]:
    coordinates, bits = (number(results, "secure_sum", k) for k in ("coordinates", "bits"))
    if coordinates is None or bits is None:
        return []
    what = "numbers: the parameters, and the counts that are summed with them"
    return [("A masked vector", f"{facts.whole(coordinates)} {bits:.0f}-bit {what}")]


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


def audit_section(results: Results) -> Html:
    """What an auditor compares with the approved plan and the evidence."""
    return section(
        "auditors",
        "For auditors",
        paragraph(
            "Compare the plan's hash with the one that each hospital approved, and the model's "
            "with the one in the model's own file. This page is drawn from results.json alone; it "
            "is a summary, not itself a proof."
        ),
        fact_list(_evidence(results)),
    )


def _evidence(results: Results) -> list[tuple[str, Child]]:
    def code(*keys: str) -> Html | str:
        value = text(results, *keys, default="")
        return element("code", value) if value else facts.NOT_RECORDED

    def count(*keys: str) -> str:
        return facts.whole(number(results, *keys))

    clamp = facts.short(number(results, "secure_sum", "clip_range"))
    answer = f"{count('cohort', 'threshold')} of {len(facts.site_names(results)):,}"
    vanish = f"{count('cohort', 'tolerated_dropouts')} may drop out of a round"
    run = f"scenario {text(results, 'scenario')}, seed {text(results, 'seed')}"
    where = f"engine {text(results, 'engine')}, device {text(results, 'device')}"
    source, licence = text(results, "data", "source"), text(results, "data", "licence")
    data = text(results, "data", "description")
    return [
        ("Plan, sha256", code("plan_sha256")),
        ("Model's state, sha256", code("model", "sha256")),
        ("Model", f"{text(results, 'model', 'name')}, {count('model', 'parameters')} parameters"),
        ("Protocol", code("secure_sum", "protocol")),
        ("Ring", f"{count('secure_sum', 'bits')} bits, coordinates clamped to ± {clamp}"),
        ("Hospitals that must answer", f"{answer}; {vanish}"),
        ("Hospitals that may collude", f"{count('cohort', 'colluders')} with the server"),
        ("Fedward", f"version {text(results, 'version')}, record {text(results, 'schema')}"),
        ("Run", f"{run}, {where}"),
        ("Started", text(results, "started")),
        ("Data", f"{data} (source: {source}; licence: {licence})"),
    ]
