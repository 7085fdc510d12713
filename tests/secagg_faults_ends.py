"""Lies at the end of a round, in the recheck and in a refill; see secagg_faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from secagg_driver import identities
from secagg_faults import NETWORK, RELAY, SITE, Case, Change, at, deals, flipped
from secagg_play import COLLUDER, MEDDLED, OTHER, SITES, Hook, Play

from shared.errors import ProtocolError
from shared.messages import decode, encode
from shared.secagg.messages import (
    Abort,
    Attestation,
    Deliveries,
    Masked,
    Opening,
    Recheck,
    RefillStep,
    Result,
    Settlement,
)

NAMES = tuple(identities(SITES))
MAX_COUNT = 1000
GONE = (COLLUDER,)


def end_cases() -> Iterator[Case]:
    """All of them."""
    for fault, liar, where, change, *gone in (*END, *RECHECKS):
        yield Case(fault, liar, where, at(where, change), *gone)
    for fault, liar, where, hook in SEVERAL:
        yield Case(fault, liar, where, hook)
    for fault, liar, where, hook in REFILLS:
        yield Case(fault, liar, where, hook, rounds_after=6)


# The end.


def result(change: Callable[[Play, Result], Result]) -> Change:
    """Another result."""
    return lambda play, data: encode(change(play, decode(Result, data)))


def with_false_sum(message: Result) -> bytes:
    """The result with one bit of the sum flipped."""
    return encode(dataclasses.replace(message, total=flipped(message.total, 0)))


def an_abort(play: Play, data: bytes) -> bytes:
    """One site is told that the round was aborted."""
    return encode(Abort(decode(Result, data).descriptor, "never happened"))


def falsify(play: Play, message: str, name: str, data: bytes) -> bytes:
    """Before the round is published, one bit of the sum is flipped."""
    if play.round_no == MEDDLED and message == "R2↑" and name == NAMES[-1]:
        opened = play.world.relay._open()
        unmask = opened.unmask

        def false_sum(*args: Any) -> Any:
            total = unmask(*args)
            total[0] ^= np.uint32(1)
            return total

        opened.unmask = false_sum  # type: ignore[method-assign]
    return data


def falsify_and_skip_recheck(play: Play, message: str, name: str, data: bytes) -> bytes:
    """The same, and the relay asks nobody to recheck the sum."""
    if play.round_no == MEDDLED and message == "E↓":
        play.world.relay._rechecks = None
    return falsify(play, message, name, data)


def counts(play: Play, message: str, name: str, data: bytes) -> bytes:
    """The colluder's count is larger than the plan allows; all see it in the sum."""
    if play.round_no == MEDDLED and message == "R0↓":
        length = play.world.session.length
        size = 10**6 if name == COLLUDER else 1
        play.inputs[name] = np.full(length, size, np.uint32)
    if play.round_no == MEDDLED and message == "E↓":
        ring = play.world.session.ring
        total = ring.from_wire(decode(Result, data).total, play.world.session.length)
        try:
            ring.lanes_to_counts(total, max_count=MAX_COUNT)
        except ProtocolError as error:
            play.refuse(name, message, error)
    return data


END: list[tuple[Any, ...]] = [
    ("too few signatures over the result's U3", RELAY, "E↓",
     result(lambda p, r: dataclasses.replace(r, signatures=dict(list(r.signatures.items())[:2])))),
    ("a result over another U3", RELAY, "E↓",
     result(lambda p, r: dataclasses.replace(r, contributions=r.contributions[:5]))),
    ("a sum that is too short", RELAY, "E↓",
     result(lambda p, r: dataclasses.replace(r, total=r.total[:-3]))),
    ("one site is told a false sum", RELAY, "E↓", lambda p, d: with_false_sum(decode(Result, d))),
    ("one site is told of an abort", RELAY, "E↓", an_abort),
]  # fmt: skip
SEVERAL: list[tuple[str, str, str, Hook]] = [
    ("all sites are told one false sum", RELAY, "E↓", falsify),
    (
        "all sites are told one false sum, which nobody rechecks",
        RELAY,
        "E↓",
        falsify_and_skip_recheck,
    ),
    ("a colluder's count is beyond the plan", SITE, "E↓", counts),
]


# The recheck.


def package(change: Callable[[Recheck], dict[str, Any]]) -> Change:
    """A package with other contents."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Recheck, data)
        return encode(dataclasses.replace(message, **change(message)))

    return changed


def first_chunk(**changes: Any) -> Change:
    """A package whose first chunk is another."""
    return package(
        lambda p: {"chunks": (dataclasses.replace(p.chunks[0], **changes), *p.chunks[1:])}
    )


def spoilt_recovery(field: str) -> Change:
    """A package with another R or E of the site that dropped out."""

    def change(message: Recheck) -> dict[str, Any]:
        entry = message.recovered[COLLUDER]
        spoilt = dataclasses.replace(entry, **{field: flipped(getattr(entry, field), 0)})
        return {"recovered": {COLLUDER: spoilt}}

    return package(change)


def spoilt_piece(message: Recheck) -> dict[str, Any]:
    """A package with another chunk of one vector."""
    first = message.chunks[0]
    piece = dataclasses.replace(first.pieces[0], chunk=flipped(first.pieces[0].chunk, 0))
    changed = dataclasses.replace(first, pieces=(piece, *first.pieces[1:]))
    return {"chunks": (changed, *message.chunks[1:])}


def attestation(**changes: Any) -> Change:
    """A site's attestation with other fields."""
    return lambda play, data: encode(dataclasses.replace(decode(Attestation, data), **changes))


def settlement(change: Callable[[Any], Any]) -> Change:
    """A settlement with other attestations."""
    return lambda play, data: encode(
        Settlement(tuple(change(decode(Settlement, data).attestations)))
    )


RECHECKS: list[tuple[Any, ...]] = [
    ("another self key", RELAY, "C↓",
     package(lambda p: {"self_keys": {**p.self_keys, OTHER: bytes(32)}})),
    ("another recovery key", RELAY, "C↓", spoilt_recovery("key"), GONE),
    ("other wrapped keys", RELAY, "C↓", spoilt_recovery("wrapped"), GONE),
    ("another chunk of a vector", RELAY, "C↓", package(spoilt_piece)),
    ("a chunk with another number", RELAY, "C↓", first_chunk(number=9)),
    ("a chunk that lacks a site", RELAY, "C↓",
     package(lambda p: {"chunks": (dataclasses.replace(p.chunks[0], pieces=()),)})),
    ("a package of another sum", RELAY, "C↓", package(lambda p: {"digest": bytes(32)})),
    ("a forged attestation", SITE, "C↑", attestation(signature=bytes(64))),
    ("an attestation in another's name", SITE, "C↑", attestation(sender=OTHER)),
    ("an attestation of another sum", SITE, "C↑", attestation(transcript=bytes(32))),
    ("too few rechecked the last sum", RELAY, "Z↓", settlement(lambda given: given[:1])),
    ("a forged attestation", RELAY, "Z↓",
     settlement(lambda given: (dataclasses.replace(given[0], sender=given[1].sender), *given[1:]))),
]  # fmt: skip


# Refills that ride with the round.


def refill_item(change: Callable[[Play, bytes], bytes | None]) -> Change:
    """R0 in which the refill's first step is changed."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Opening, data)
        first, *others = decode(RefillStep, message.refill).items
        item = change(play, first)
        assert item is not None
        return encode(dataclasses.replace(message, refill=encode(RefillStep((item, *others)))))

    return changed


def answers_nothing(play: Play, data: bytes) -> bytes:
    """The vector comes without the refill's answer."""
    return encode(dataclasses.replace(decode(Masked, data), refill=b""))


def shorter(message: Deliveries) -> Any:
    """A member left out."""
    return message.items[:-1]


REFILLS: list[tuple[str, str, str, Hook]] = [
    (
        "a refill in which a member was left out",
        RELAY,
        "R0↓",
        at("R0↓", refill_item(deals(shorter))),
    ),
    (
        "a refill's step is noise",
        RELAY,
        "R0↓",
        at("R0↓", refill_item(lambda p, d: d[:6] + b"\xff")),
    ),
    ("a refill is not answered", SITE, "R1↑", at("R1↑", answers_nothing)),
    ("a site is lost while prekeys are confirmed", NETWORK, "R0↓", at("R0↓", lambda p, d: None)),
]
