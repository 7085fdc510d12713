"""audit.html: one page that a data-protection officer can read and an auditor can follow up.

Drawn from the signed statement alone: no script, no network, no font; pictures are inside the page.
It says "violated", "not refuted" or "not testable", and nothing stronger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.facts import plural
from shared.markup import Child, Html, element, join
from shared.page_parts import (
    Column,
    Row,
    document,
    fact_list,
    paragraph,
    section,
    table,
    tiles,
    unfold,
)
from shared.page_style import STYLE
from simulations.audits.page_chart import chart

Record = Mapping[str, Any]

_BASE64 = re.compile(r"[A-Za-z0-9+/=]+")
_STYLE = (
    ".badge{display:inline-block;padding:.05rem .5rem;border-radius:999px;font-size:.8rem;"
    "font-weight:650;white-space:nowrap;border:1px solid currentColor}"
    ".badge.violated{color:var(--stop);background:var(--stop-wash)}"
    ".badge.held{color:var(--pooled);background:var(--wash)}"
    ".badge.open{color:var(--warn);background:var(--warn-wash)}"
    ".finding p{overflow-wrap:anywhere}"
    ".finding{border-top:1px solid var(--rule);padding:.9rem 0 .2rem}"
    ".finding h4{font-size:1rem;margin:0 0 .4rem;display:flex;gap:.7rem;align-items:baseline;"
    "flex-wrap:wrap;justify-content:space-between}"
    ".pictures{display:flex;flex-wrap:wrap;gap:.9rem;margin:.8rem 0}"
    ".pictures figure{margin:0;max-width:100%}"
    ".pictures img{image-rendering:pixelated;max-width:100%;min-width:96px;border:1px solid "
    "var(--rule)}"
    ".verdict{margin:1.2rem 0;padding:.8rem 1rem;border-radius:8px;border:2px solid var(--rule)}"
    ".verdict.violated{border-color:var(--stop-rule);background:var(--stop-wash);color:var(--stop)}"
    ".verdict.held{border-color:var(--pooled)}"
    ".verdict strong{display:block;font-size:1.15rem}"
)
_TITLES = {
    "verify": "Evidence",
    "implementation": "Implementation",
    "neighbour": "Neighbouring datasets",
    "one_run": "One training run, attacked",
    "transcript": "What the server saw",
    "collusion": "Colluding hospitals",
    "membership": "Membership inference",
    "reconstruction": "Reconstruction",
}
_BADGES = {"violated": "violated", "not refuted": "held", "not testable": "open"}
_CLAIM = {
    "guarantee": "Guarantee",
    "unit": "Unit",
    "relation": "Neighbouring relation",
    "epsilon": "Epsilon promised",
    "epsilon_spent": "Epsilon spent",
    "delta": "Delta",
    "mode": "Privacy mode",
    "mechanism": "Mechanism",
    "clip_norm": "Sensitivity (clip norm)",
    "noise_multiplier": "Noise multiplier",
    "sampling": "Sampling",
    "steps": "Steps accounted for",
    "composition": "Composition",
    "accountant": "Accountant",
    "trust_model": "Trust model",
    "floating_point": "Floating point",
    "randomness": "Randomness source",
    "public": "Public by design",
}


def render(statement: Record) -> str:
    """The page of an audit.

    Args:
        statement: What audit.json's envelope carries.

    Returns:
        HTML that refers to nothing outside itself.
    """
    record: Record = statement["predicate"]
    title = f"Privacy audit: {record.get('plan', {}).get('name', 'unreadable plan')}"
    families = [f["name"] for f in record["families"]]
    sections = [
        _claim(record),
        *(_family(record, name) for name in families),
        _risks(record),
        _limits(record),
        _checking(statement),
    ]
    return document(
        f"{title} (Fedward)",
        [_masthead(record, title, families), sections],
        STYLE + _STYLE,
        pictures=True,
    )


def _masthead(record: Record, title: str, families: Sequence[str]) -> Html:
    tool = record["tool"]
    meta = f"{tool['name']} {tool['version']} · {record['time']} · {record['extent']} audit"
    parts = [("claim", "Claim"), *((name, _TITLES.get(name, name)) for name in families)]
    parts += [("risks", "Risks"), ("limits", "Limits"), ("checking", "How to check this")]
    links = (element("li", element("a", name, href=f"#{anchor}")) for anchor, name in parts)
    label = {"aria-label": "Parts of this page"}
    return element(
        "header",
        element("p", "Fedward privacy audit", class_="eyebrow"),
        element("h1", title),
        element("p", meta, class_="meta"),
        _verdict(record),
        _tiles(record),
        element("nav", element("ul", links), **label),
    )


def _verdict(record: Record) -> Html:
    counts = _counts(record["findings"])
    broken = [f for f in record["findings"] if f["verdict"] == "violated"]
    if broken:
        named = "; ".join(f"{_TITLES.get(f['probe'], f['probe'])}: {f['name']}" for f in broken[:6])
        more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
        said = f"{plural(len(broken), 'claim')} did not hold: {named}{more}."
        return element("div", element("strong", "Violated."), said, class_="verdict violated")
    said = (
        f"{plural(counts['not refuted'], 'claim')} tested and not refuted, "
        f"{counts['not testable']} not testable here. This is no proof: an audit can refute a "
        "claim, it cannot prove one."
    )
    return element("div", element("strong", "Not refuted."), said, class_="verdict held")


def _counts(findings: Sequence[Record]) -> dict[str, int]:
    return {verdict: sum(f["verdict"] == verdict for f in findings) for verdict in _BADGES}


def _tiles(record: Record) -> Html:
    claim, counts = record.get("claim", {}), _counts(record["findings"])
    bound = _strongest(record["findings"])
    entries = [
        ("Epsilon promised", _number(claim.get("epsilon")), "per patient of one hospital"),
        ("Epsilon spent", _number(claim.get("epsilon_spent")), "by the hospitals' receipts"),
        ("Strongest attack", _number(bound), "lower bound of epsilon reached"),
        ("Violated", str(counts["violated"]), f"of {sum(counts.values())} claims"),
    ]
    return tiles(entries)


def _strongest(findings: Sequence[Record]) -> float | None:
    """The largest lower bound of epsilon that an attack of `one_run` reached.

    Not among them: the measured components, which are no attack, and the bound that takes a
    sampled mechanism for a Gaussian one.
    """
    found = [
        f["value"]
        for f in findings
        if f["probe"] == "one_run"
        and f["name"] not in ("component", "gaussian")
        and f["value"] is not None
    ]
    return max(found, default=None)


def _claim(record: Record) -> Html:
    claim = record.get("claim", {})
    pairs: list[tuple[str, Child]] = [
        (name, _number(claim[key]) if isinstance(claim[key], int | float) else claim[key])
        for key, name in _CLAIM.items()
        if claim.get(key) is not None
    ]
    if not pairs:
        return section("claim", "Claim", paragraph("The plan could not be read."))
    note = "What the study promises, in the terms that NIST SP 800-226 asks for."
    return section("claim", "Claim", paragraph(note), fact_list(pairs))


def _family(record: Record, name: str) -> Html:
    own = [f for f in record["findings"] if f["probe"] == name]
    family = next(f for f in record["families"] if f["name"] == name)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in family["counts"].items() if n)
    said = f"{counts}."
    if family["alpha"]:
        said += (
            f" If nothing is wrong, the chance of any false alarm here is at most "
            f"{family['alpha']:.2g}."
        )
    title = _TITLES.get(name, name.replace("_", " "))
    heading = paragraph(_badge(family["verdict"]), " ", said)
    if name == "verify":
        return section(name, title, heading, _evidence(own))
    return section(name, title, heading, [_finding(f) for f in own])


def _evidence(findings: Sequence[Record]) -> Html:
    """Checks that broke or stayed open in full; those that held as a list, sites folded."""
    held = [f for f in findings if f["verdict"] == "not refuted"]
    files = [f for f in held if f["name"] == "file"]
    pairs: list[tuple[str, Child]] = [
        (f["name"].replace("-", " "), _held(f))
        for f in held
        if f["name"] != "file" and not f["details"].get("site")
    ]
    sites = dict.fromkeys(f["details"]["site"] for f in held if f["details"].get("site"))
    for site in sites:
        own = [f for f in held if f["details"].get("site") == site]
        priced = [f["explanation"] for f in own if f["name"] == "accounting"]
        names = ", ".join(f["name"].replace("-", " ") for f in own)
        pairs.append((f"site {site}", "; ".join([names, *priced])))
    if files:
        pairs.append(("files", f"{plural(len(files), 'file')} as written, by the list of hashes"))
    broken = [_finding(f) for f in findings if f["verdict"] != "not refuted"]
    return join([broken, element("h3", "Checks that held"), fact_list(pairs)])


def _held(finding: Record) -> str:
    found = finding["explanation"]
    return f"{finding['claim']} Found: {found}." if found else str(finding["claim"])


def _finding(finding: Record) -> Html:
    name = finding["name"].replace("-", " ").replace("_", " ")
    pairs: list[tuple[str, Child]] = [("Claim", finding["claim"])]
    if finding["details"].get("file"):
        pairs.append(("File", element("code", str(finding["details"]["file"]))))
    if finding["value"] is not None:
        pairs.append(("Measured", f"{finding['statistic']}: {_number(finding['value'])}"))
    if finding["expected"] is not None:
        pairs.append(("Should be, or limit", _number(finding["expected"])))
    if finding["interval"] is not None:
        low, high = (_number(edge) for edge in finding["interval"])
        level = f" ({1 - finding['alpha']:.2%} confidence)" if finding["alpha"] else ""
        pairs.append(("Interval", f"{low} to {high}{level}"))
    if finding["assumptions"]:
        pairs.append(("Assumes", "; ".join(finding["assumptions"])))
    if finding["artefact_sha256"]:
        pairs.append(("Observations", element("code", finding["artefact_sha256"][:32])))
    return element(
        "article",
        element("h4", element("span", name.capitalize()), _badge(finding["verdict"])),
        paragraph(finding["explanation"]) if finding["explanation"] else None,
        fact_list(pairs),
        [_table(t) for t in finding["tables"]],
        [chart(c) for c in finding["charts"]],
        _pictures(finding["pictures"]),
        class_="finding",
    )


def _badge(verdict: str) -> Html:
    return element("span", verdict, class_=f"badge {_BADGES.get(verdict, 'open')}")


def _table(record: Record) -> Html:
    rows = record["rows"]
    numeric = [
        all(isinstance(row[i], int | float) or row[i] is None for row in rows) and i > 0
        for i in range(len(record["columns"]))
    ]
    columns = [
        Column(n, numeric=number) for n, number in zip(record["columns"], numeric, strict=True)
    ]
    cells = [Row(tuple(_cell(cell) for cell in row)) for row in rows]
    return table(record["title"], columns, cells)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else _number(value)


def _pictures(pictures: Sequence[Record]) -> Html | None:
    shown = [p for p in pictures if _BASE64.fullmatch(p["png"])]
    if not shown:
        return None
    return element(
        "div",
        (
            element(
                "figure",
                element("img", alt=p["title"], src=f"data:image/png;base64,{p['png']}"),
                element("figcaption", join([element("strong", p["title"]), " ", p["caption"]])),
            )
            for p in shown
        ),
        class_="pictures",
    )


def _risks(record: Record) -> Html | None:
    risks = record.get("risks")
    if not risks:
        return None
    blocks = []
    for key, title in (("extraction", "Extraction"), ("query", "Query")):
        risk = risks[key]
        named = ", ".join(risk["findings"]) or "no probe ran"
        blocks += [
            element("h3", title, " ", _badge(risk["verdict"])),
            paragraph(risk["question"]),
            paragraph(f"Findings: {named}.", style="note"),
        ]
    note = "The two questions of the EDPB's opinion 28/2024 on models trained on personal data."
    return section("risks", "Risks", paragraph(note), blocks, paragraph(risks["conclusion"]))


def _limits(record: Record) -> Html:
    unsigned = record["unsigned"]
    listed = unfold(
        f"{plural(len(unsigned), 'value')} of results.json that nothing signed covers",
        paragraph(", ".join(unsigned)),
    )
    return section(
        "limits",
        "Limits",
        element("ul", (element("li", text) for text in record["limits"])),
        listed if unsigned else None,
    )


def _checking(statement: Record) -> Html:
    record = statement["predicate"]
    run = record.get("run", {})
    pairs: list[tuple[str, Child]] = [
        ("Signature", element("code", "fedward-audit show audit.json --auditor KEY")),
        ("Evidence again", element("code", "fedward-audit verify RUN --roster roster.json")),
        ("Code (sha256)", element("code", record["code_sha256"])),
    ]
    for key, name in (
        ("run_id", "Run"),
        ("model_sha256", "Model state"),
        ("transcript", "History"),
    ):
        if run.get(key):
            pairs.append((name, element("code", str(run[key]))))
    for site, text in run.get("sites", {}).items():
        pairs.append((f"Fingerprint of {site}", element("code", text)))
    files = [(s["name"], s["digest"]["sha256"]) for s in statement["subject"]]
    listed = fact_list([(name, element("code", digest)) for name, digest in files])
    said = (
        "audit.json beside this page holds the same record, signed: an in-toto statement in a DSSE "
        "envelope. This page is drawn from it; where they differ, the signed record counts."
    )
    return section(
        "checking", "How to check this", paragraph(said), fact_list(pairs),
        unfold(f"{plural(len(files), 'file')} that the statement is about", listed),
    )  # fmt: skip


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.4g}"
