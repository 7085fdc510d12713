"""What the fuzzer feeds: a target for every decoder, valid values of it, and ways to meddle."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, get_type_hints

import numpy as np

import client.secagg_state
import server.secagg
import shared.identity
import shared.study
from shared import messages, plan
from shared.config import canonical_json
from shared.errors import ConfigError
from shared.messages import Blob, ByName, Fixed, Flag, Many, Maybe, Nested, Real, Text, Unsigned
from shared.optimizers import ModelState
from shared.study import state_from_bytes, state_to_bytes
from simulations.scenario import list_scenarios, load_scenario

EDGES = (0, 1, 2, 3, 254, 255, 256, 257, 1025, 65_535, 65_536, 1 << 24, 2**31 - 1, 2**31, 2**32 - 1)
ODD_JSON = (
    b"null", b"true", b"0", b"-1", b"-0.0", b"1.0", b"1e308", b"1e999", b"5e-324", b"NaN", b"1.",
    b"Infinity", b"9" * 400, b"9" * 5000, b"9223372036854775808", b'""', b'"\\u0000"', b'"\\ud800"',
    '"\u00e9"'.encode(), b'"\xff"', b'"' + b"x" * 5000 + b'"', b"[]", b"{}", b"[[]]", b'{"":0}',
    b"[" * 30_000, b'{"":' * 30_000, b"\xef\xbb\xbf",
)  # fmt: skip
REGISTERING = (client.secagg_state, server.secagg, shared.identity, shared.study)
"""Importing these modules, and what they import, registers every message."""

PACKAGES = ("client", "server", "shared", "simulations")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\[\]{},:"]+')

Pieces = list[bytes]
Others = Sequence[bytes]
PieceWay = Callable[[Pieces, Others, random.Random], None]


@dataclass(frozen=True)
class Drawn:
    """A valid message in the pieces of which it was written: header, counts, contents."""

    pieces: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        """All bytes."""
        return b"".join(self.pieces)


@dataclass(frozen=True)
class Target:
    """One decoder, its inverse, and a source of valid messages.

    `weight` is its share of the inputs; `ways` are ways to meddle with it beside the common ones.
    """

    name: str
    draw: Callable[[random.Random], Drawn]
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    weight: float = 1.0
    ways: Sequence[PieceWay] = ()


def targets() -> list[Target]:
    """Every decoder of Fedward: all registered messages, the plan, the stored model state."""
    found = [of_message(cls) for _, cls in sorted(messages._registry.items()) if _is_ours(cls)]
    plans = [load_scenario(name).plan for name in list_scenarios()]
    found += [
        Target(
            name="StudyPlan",
            draw=partial(_draw_plan, [json.loads(known.canonical_bytes) for known in plans]),
            decode=plan.from_bytes,
            encode=canonical_json,
            ways=(_odd_json,) * 9,
        ),
        Target("ModelState", _draw_state, state_from_bytes, state_to_bytes),
    ]
    return found


def of_message(cls: type[Any]) -> Target:
    """The decoder of one registered message class."""

    def draw(rng: random.Random) -> Drawn:
        value = draw_value(Nested(cls), rng)
        pieces = [messages.encode(value)[: messages._HEADER.size]]
        Nested(cls).write(pieces, value, cls.__name__)
        return Drawn(tuple(pieces))

    return Target(cls.__name__, draw, partial(messages.decode, cls), messages.encode)


def draw_value(kind: Any, rng: random.Random) -> Any:  # noqa: PLR0911  # one for each kind
    """A value that this kind of field may hold; containers stay small."""
    match kind:
        case Unsigned(size):
            return rng.choice([0, 1, 256**size - 1, rng.randrange(256**size)])
        case Flag():
            return rng.random() < 0.5
        case Real():
            return rng.choice([0.0, -0.0, 1.5, -1e308, 5e-324, rng.gauss(0, 1)])
        case Fixed(size):
            return rng.randbytes(size)
        case Blob(limit):
            return rng.randbytes(min(limit, rng.choice([0, 1, 16, 32, 64, 200])))
        case Text(limit):
            return _draw_text(limit, rng)
        case Many(item, limit):
            return tuple(draw_value(item, rng) for _ in range(min(limit, rng.randrange(4))))
        case ByName(item, limit):
            size = min(limit, rng.randrange(4))
            return {_draw_text(64, rng): draw_value(item, rng) for _ in range(size)}
        case Maybe(item):
            return draw_value(item, rng) if rng.random() < 0.5 else None
        case Nested(of):
            hints = get_type_hints(of, include_extras=True)
            return of(**{name: draw_value(hints[name].__metadata__[0], rng) for name in hints})
    raise TypeError(f"no values are known for the field kind {kind!r}")


def meddle(
    target: Target, drawn: Drawn, others: Sequence[Drawn], rng: random.Random
) -> tuple[str, bytes]:
    """Change a message in one to four ways; returns the ways' names and the bytes."""
    names, pieces = [], list(drawn.pieces)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.choice((*PIECE_WAYS, *target.ways))
        names.append(way.__name__.strip("_"))
        way(pieces, rng.choice(others).pieces, rng)
    data = b"".join(pieces)
    if rng.random() < 0.5 or data == drawn.data:
        change = rng.choice(BYTE_WAYS)
        names.append(change.__name__.strip("_"))
        data = change(data, rng.choice(others).data, rng)
    return "+".join(names) if data != drawn.data else "valid", data


def _draw_text(limit: int, rng: random.Random) -> str:
    size = min(limit, rng.choice((0, 1, 3, 8, 64)))
    text = "".join(rng.choice("abcz09-_ ~\u00e9\u00df\u20ac") for _ in range(size))
    return text.encode()[:limit].decode(errors="ignore")


def _draw_plan(known: Sequence[dict[str, Any]], rng: random.Random) -> Drawn:
    """A scenario's plan, with a few numbers changed where it stays a plan, cut into JSON tokens."""
    table = copy.deepcopy(rng.choice(known))
    for _ in range(rng.randrange(4)):
        changed = copy.deepcopy(table)
        section = changed[rng.choice([key for key in changed if isinstance(changed[key], dict)])]
        numbers = [key for key, value in section.items() if type(value) in (int, float)]
        if numbers:
            key = rng.choice(numbers)
            section[key] = type(section[key])(section[key] * rng.choice((0.5, 0.9, 2, 3)))
        try:
            plan.from_bytes(canonical_json(changed))
        except ConfigError:
            continue
        table = changed
    return Drawn(tuple(_TOKEN.findall(canonical_json(table))))


def _draw_state(rng: random.Random) -> Drawn:
    draws = np.random.default_rng(rng.randrange(2**32))
    length, second, clip = rng.randrange(5), rng.choice((0, 3)), rng.choice((0, 1))
    vectors = [draws.normal(size=n).astype(np.float32) for n in (length, length, second, clip)]
    model, first, moments, norm = vectors
    data = state_to_bytes(ModelState(model, first, moments, rng.randrange(2**40), norm))
    ends = np.cumsum([36, 4 * length, 4 * length, 4 * second]).tolist()
    cuts = (0, 4, 12, 20, 28, *ends, len(data))
    return Drawn(tuple(data[a:b] for a, b in pairwise(cuts)))


def _is_ours(cls: type) -> bool:
    """Not a message that a test registered."""
    return cls.__module__.split(".")[0] in PACKAGES


def _odd_json(pieces: Pieces, others: Others, rng: random.Random) -> None:
    """A JSON token that few programs expect, mostly in a value's place."""
    values = [at for at in range(1, len(pieces)) if pieces[at - 1] == b":"]
    if pieces:
        pieces[rng.choice(values or range(len(pieces)))] = rng.choice(ODD_JSON)


def _number(pieces: Pieces, others: Others, rng: random.Random) -> None:
    """Overwrite a length, a count or a number with one at an edge."""
    places = [at for at, piece in enumerate(pieces) if len(piece) in (1, 2, 4, 8)]
    if places:
        at = rng.choice(places)
        size = len(pieces[at])
        value = int.from_bytes(pieces[at], "little")
        edge = rng.choice((*EDGES, value + 1, value - 1, value ^ 1 << rng.randrange(8 * size)))
        pieces[at] = (edge % 256**size).to_bytes(size, "little")


def _drop_piece(pieces: Pieces, others: Others, rng: random.Random) -> None:
    if pieces:
        del pieces[rng.randrange(len(pieces))]


def _double_piece(pieces: Pieces, others: Others, rng: random.Random) -> None:
    if pieces:
        at = rng.randrange(len(pieces))
        pieces[at:at] = [pieces[at]] * rng.choice((1, 1, 2, 300))


def _swap_pieces(pieces: Pieces, others: Others, rng: random.Random) -> None:
    if pieces:
        a, b = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        pieces[a], pieces[b] = pieces[b], pieces[a]


def _foreign_piece(pieces: Pieces, others: Others, rng: random.Random) -> None:
    if pieces and others:
        pieces[rng.randrange(len(pieces))] = rng.choice(others)


def _foreign_tail(pieces: Pieces, others: Others, rng: random.Random) -> None:
    pieces[rng.randrange(len(pieces) + 1) :] = others[rng.randrange(len(others) + 1) :]


def _resize_piece(pieces: Pieces, others: Others, rng: random.Random) -> None:
    """Another content, with the length before it put right: reaches what lies behind lengths."""
    places = [
        at
        for at in range(1, len(pieces))
        if len(pieces[at - 1]) == 4 and pieces[at - 1] == struct.pack("<I", len(pieces[at]))
    ]
    if places:
        at = rng.choice(places)
        size = rng.choice((0, 1, 63, 64, 65, 500, 501, 4097))
        text = rng.choice((b"\n", b"\xc3\xa9", b"a", b"\xff", b"\xed\xa0\x80", b"\x7f", b"\x00"))
        content = rng.choice((rng.randbytes(size), (text * size)[:size]))
        pieces[at - 1 : at + 1] = [struct.pack("<I", len(content)), content]


def _flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _longer(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 2, 40)))


def _insert(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 40))) + data[at:]


def _overwrite(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 32))
    noise = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size)))
    return data[:at] + noise + data[at + size :]


def _splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _noise(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Random bytes, behind the valid header more often than not."""
    return data[: rng.choice((0, 6, 6, 10))] + rng.randbytes(rng.randrange(200))


PIECE_WAYS: tuple[PieceWay, ...] = (
    _number, _number, _drop_piece, _double_piece, _swap_pieces, _foreign_piece, _foreign_tail,
    _resize_piece, _resize_piece,
)  # fmt: skip
BYTE_WAYS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    _flip, _flip, _cut, _longer, _insert, _overwrite, _splice, _noise,
)  # fmt: skip
