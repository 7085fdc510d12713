"""HTML and SVG from plain functions that escape by default.

A text becomes markup only through `element`, which escapes every child that is not markup
already. So a hospital named `<script>` is shown, never run, and forgetting to escape fails on
the safe side: markup that was joined as ordinary text is shown as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

# Control characters, lone surrogates, and the characters that reorder a line on the screen
# (Unicode TR 9): with them a name could make another line of the report read differently.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_VOID = frozenset({"meta", "br", "hr", "col", "img"})
# In SVG these may close themselves; in HTML every other element needs its end tag.
_EMPTY_SVG = frozenset({"path", "rect", "line", "circle"})


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Attribute = str | int | float | bool | None


def clean(text: str) -> str:
    """Replace characters that no report needs and that could deceive its reader."""
    return _UNSAFE.sub("\ufffd", text)


def escape(text: str) -> Html:
    """Markup that shows `text`; markup is returned as it is."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(clean(text), quote=True))


def element(tag: str, /, *children: Child, **attributes: Attribute) -> Html:
    """One element.

    Args:
        tag: Its name, from the program, never from data.
        children: Texts (escaped), markup (kept), iterables of both, or None (left out).
        attributes: `class_` stands for class, other underscores for hyphens; None and False
            leave the attribute out, True gives it without a value.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    opening = "<" + tag + "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Html(opening + ">")
    if tag in _EMPTY_SVG and not children:
        return Html(opening + "/>")
    return Html(f"{opening}>{join(children)}</{tag}>")


def join(children: Iterable[Child], separator: str = "") -> Html:
    """Markup of all children in order, iterables included."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        parts.append(escape(child) if isinstance(child, str) else join(child))
    return Html(escape(separator).join(parts))


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    key = "class" if name == "class_" else name.replace("_", "-")
    if value is True:
        return f" {key}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key}="{escape(str(text))}"'
