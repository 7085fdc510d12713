"""Building blocks of every page: the page itself, sections, tables, figures, lists of facts.

A page refers to nothing outside itself, and its own content-security policy forbids it: no script,
no network, no font.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.markup import Child, Html, element, join

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: Child, style: str, *, pictures: bool = False) -> str:
    """A whole page.

    Args:
        title: Of the browser's tab.
        body: What is in it.
        style: Its style sheet, from the program.
        pictures: Whether it holds pictures, as data within the page.
    """
    policy = _POLICY + ("; img-src data:" if pictures else "")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Html(style)),
    )
    whole = element("html", head, element("body", element("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


@dataclass(frozen=True)
class Column:
    """A table's column; numbers are set flush right."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """A table's row, its first cell a heading; `style` is "", "strong" or "quiet"."""

    cells: tuple[str, ...]
    style: str = ""


def section(anchor: str, title: str, *children: Child) -> Html:
    """A part of the report that can be linked to."""
    heading = element("h2", title, id=f"{anchor}-title")
    labelled = {"aria-labelledby": f"{anchor}-title"}
    return element("section", heading, children, id=anchor, **labelled)


def table(caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Html:
    """A table that scrolls sideways where the screen is narrower; reachable by keyboard."""
    head = element(
        "tr",
        (element("th", c.title, scope="col", class_="n" if c.numeric else None) for c in columns),
    )
    body = element("tbody", (_row(columns, row) for row in rows))
    dense = "dense" if len(columns) > 8 else None
    label = {"aria-label": caption}
    inner = element("table", element("thead", head), body, class_=dense, **label)
    scrolled = element("div", inner, class_="scroll", role="region", tabindex="0", **label)
    return element("figure", element("figcaption", caption), scrolled, class_="tabled")


def _row(columns: Sequence[Column], row: Row) -> Html:
    cells = [
        element("td", cell, class_="n" if column.numeric else None)
        for column, cell in zip(columns[1:], row.cells[1:], strict=True)
    ]
    heading = element("th", row.cells[0], scope="row", class_="n" if columns[0].numeric else None)
    return element("tr", heading, cells, class_=row.style or None)


def fact_list(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Names and values, one under the other."""
    return element(
        "dl",
        (join([element("dt", name), element("dd", value)]) for name, value in pairs),
        class_="facts",
    )


def tiles(entries: Iterable[tuple[str, str, Child]], **attributes: str) -> Html:
    """The few figures that matter most, given as (name, value, note)."""
    each = (
        element(
            "div",
            element("dt", name),
            element("dd", value, class_="big"),
            element("dd", note, class_="small"),
            class_="tile",
        )
        for name, value, note in entries
    )
    return element("dl", each, class_="tiles", **attributes)


def figure(*children: Child, caption: Child = None) -> Html:
    """A chart with what to see in it."""
    return element("figure", children, element("figcaption", caption) if caption else None)


def swatch(style: str, kind: Literal["line", "box"] = "line") -> Html:
    """A legend's sample of a line or a filled part; its meaning stands beside it as text."""
    if kind == "line":
        inner = element("line", x1=0, x2=26, y1=6, y2=6, class_=f"level {style}")
    else:
        inner = element("rect", x=1, y=1, width=11, height=11, rx=2, class_=style)
    width = 26 if kind == "line" else 13
    attributes = {"viewBox": f"0 0 {width} 13", "aria-hidden": "true"}
    return element("svg", inner, class_="swatch", width=width, height=13, **attributes)


def legend(
    entries: Sequence[tuple[str, str]], *, boxes: bool = False, narrow: bool = False
) -> Html:
    """Samples with their meaning, given as (style, meaning); `narrow`: on small screens only."""
    return element(
        "ul",
        (
            element("li", swatch(style, "box" if boxes else "line"), element("span", meaning))
            for style, meaning in entries
        ),
        class_="legend narrow" if narrow else "legend",
    )


def unfold(summary: str, *children: Child) -> Html:
    """Detail that opens on demand, and always on paper."""
    return element("details", element("summary", summary), children)


def paragraph(*children: Child, style: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=style)
