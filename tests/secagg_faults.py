"""Everything that a network, a machine, the relay or a site can do wrong in a secure sum.

Each case is a hook for secagg_play: what goes wrong, at which message. Where nothing else is said,
it happens to the site s03; s05 is the site that colludes or drops out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from secagg_driver import World, identities, make_session
from secagg_play import (
    BEFORE,
    COLLUDER,
    MEDDLED,
    MESSAGES,
    OTHER,
    ROUND,
    SET_UP,
    SITES,
    TARGET,
    Hook,
    Play,
)

from client.secagg import Member
from server.secagg import Relay
from shared.errors import ConfigError, ProtocolError
from shared.identity import Identity, check_certificate, issue_certificate
from shared.messages import decode, encode
from shared.secagg import shamir, transcript
from shared.secagg.keys import EphemeralKeys
from shared.secagg.messages import Activation, Dealt, Delivered, Deliveries, Shares

STRANGER = Identity.from_bytes(b"\xee" * 32)
AT = int(TARGET[1:])
"""The site's place in the roster."""

NETWORK, MACHINE, RELAY, SITE = "the network", "the site's machine", "the relay", "a site"

Change = Callable[[Play, bytes], bytes | None]


@dataclass(frozen=True, repr=False)
class Case:
    """One fault at one message."""

    fault: str
    liar: str
    where: str
    hook: Hook
    gone: tuple[str, ...] = ()
    rounds_after: int = 1

    def __repr__(self) -> str:
        return f"{self.fault} at {self.where}"


def at(where: str, change: Change, name: str = TARGET) -> Hook:
    """A hook that changes one message of one site, in the round that is meddled with."""

    def hook(play: Play, message: str, site: str, data: bytes) -> bytes | None:
        due = play.round_no in (0, MEDDLED)
        return change(play, data) if due and message == where and site == name else data

    return hook


def everyone(where: str, change: Callable[[Play, str, bytes], bytes | None]) -> Hook:
    """A hook that changes a message for every site."""

    def hook(play: Play, message: str, site: str, data: bytes) -> bytes | None:
        due = play.round_no in (0, MEDDLED)
        return change(play, site, data) if due and message == where else data

    return hook


def gone_at(where: str) -> tuple[str, ...]:
    """R3 exists only after a dropout."""
    return (COLLUDER,) if where.startswith("R3") else ()


# Whatever the message is.


def bytes_of_another_run(where: str) -> Change:
    """The same step, of a run that was set up apart."""

    @functools.cache
    def other() -> dict[str, bytes]:
        session = make_session(SITES, 4, 1, prekey_rounds=16, length=20, chunk=8, run_id="another")
        play = Play(World(session))
        play.set_up()
        play.run_round(BEFORE)
        play.run_round(MEDDLED, gone_at(where))
        play.settle()
        return play.kept

    round_no = 0 if where in SET_UP else MEDDLED
    return lambda play, data: other()[f"{where} {TARGET} {round_no}"]


def of_the_round_before(where: str) -> Change:
    """The same step, of the round before."""
    return lambda play, data: play.kept[f"{where} {TARGET} {BEFORE}"]


def of_another_site(where: str) -> Change:
    """The message that was made for, or by, another site."""

    def change(play: Play, data: bytes) -> bytes:
        round_no = 0 if where in SET_UP else MEDDLED
        return play.kept.get(f"{where} {OTHER} {round_no}", data)

    return change


def twice(where: str) -> Hook:
    """The same bytes come twice; a site must give the very same answer."""
    calls: dict[str, Callable[[Play], Callable[[Member, bytes], bytes | None]]] = {
        "S2↓": lambda play: Member.encapsulate,
        "S3↓": lambda play: Member.prekeys,
        "S4↓": lambda play: Member.confirm,
        "R0↓": lambda play: play.mask,
        "R2↓": lambda play: play.agree,
        "R3↓": lambda play: play.release,
        "E↓": lambda play: lambda member, data: member.accept_result(data).transcript,
        "C↓": lambda play: Member.check_chunks,
    }
    takes = {"R1↑": "add_masked", "R2↑": "add_agreement", "R3↑": "add_release"}

    def change(play: Play, data: bytes) -> bytes:
        if where in calls:
            call = calls[where](play)
            first = call(play.member(TARGET), data)
            play.world.restart(TARGET)
            again = call(play.member(TARGET), data)
            assert first == again, f"{where}: another answer to the same bytes"
        elif where in takes:
            getattr(play.world.relay, takes[where])(TARGET, data)
        return data

    return at(where, change)


def restarted(play: Play, data: bytes) -> bytes:
    """The site's process stops and starts again, on the same store."""
    play.world.restart(TARGET)
    return data


def state_lost(play: Play, data: bytes) -> bytes:
    """The site's disk is gone."""
    play.world.stores[TARGET].clear()
    play.world.restart(TARGET)
    return data


def rolled_back(play: Play, data: bytes) -> bytes:
    """The site's disk is restored as it was before the round."""
    play.world.stores[TARGET].clear()
    play.world.stores[TARGET].update(play.stores[TARGET])
    play.world.restart(TARGET)
    return data


def relay_restarted(play: Play, data: bytes) -> bytes:
    """The relay goes on from the checkpoint that it made when it opened the round."""
    play.world.relay = Relay.restore(play.world.session, play.snapshot)
    return data


def general_cases() -> Iterator[Case]:
    """Faults that can hit every message."""
    malformed: dict[str, Change] = {
        "truncated": lambda play, data: data[:-1],
        "cut in the middle": lambda play, data: data[: len(data) // 2],
        "empty": lambda play, data: b"",
        "too long": lambda play, data: data + b"\x00",
        "noise behind a valid header": lambda play, data: data[:6] + b"\xff" * 64,
        "a length of 4 GiB": lambda play, data: data[:6] + b"\xff\xff\xff\xff" + data[10:],
        "one bit flipped in the middle": lambda play, data: flipped(data, len(data) // 2),
        "the last bit flipped": lambda play, data: flipped(data, len(data) - 1),
    }
    for where in MESSAGES:
        gone = gone_at(where)
        for fault, change in malformed.items():
            yield Case(f"bytes: {fault}", NETWORK, where, at(where, change), gone)
        yield Case("a message is lost", NETWORK, where, at(where, lambda play, data: None), gone)
        yield Case("a message comes twice", NETWORK, where, twice(where), gone)
        swaps = {"another site": of_another_site, "another run": bytes_of_another_run}
        for fault, swap in swaps.items():
            yield Case(f"a message of {fault}", NETWORK, where, at(where, swap(where)), gone)
        if where in ROUND and not gone:
            old = at(where, of_the_round_before(where))
            yield Case("the message of the round before", NETWORK, where, old)
        yield Case("the site restarts", MACHINE, where, at(where, restarted), gone)
        yield Case("the site's state is lost", MACHINE, where, at(where, state_lost), gone)
        if where not in SET_UP:
            back = at(where, rolled_back)
            yield Case(
                "the site's state is rolled back to before the round", MACHINE, where, back, gone
            )
        if where in ROUND and where not in ("R0↓", "E↓"):
            yield Case("the relay restarts", RELAY, where, at(where, relay_restarted), gone)


def flipped(data: bytes, place: int) -> bytes:
    """One bit changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# Set-up.


def deals(change: Callable[[Deliveries], Sequence[Delivered]]) -> Change:
    """Deliveries with other entries."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Deliveries, data)
        return encode(dataclasses.replace(message, items=tuple(change(message))))

    return changed


def entry_of(sender: str, **changes: Any) -> Change:
    """Deliveries in which one sender's entry is changed."""
    return deals(
        lambda message: [
            dataclasses.replace(item, **changes) if item.sender == sender else item
            for item in message.items
        ]
    )


def signed_deal(play: Play, deal: Dealt, who: Identity) -> Dealt:
    """A deal with a signature by `who`."""
    head = transcript.deal_head(play.world.session, deal.step, deal.batch, deal.first_round)
    hashes = [transcript.part_hash(part) for part in deal.parts]
    signed = transcript.deal_digest(head, deal.sender, deal.common, hashes)
    return dataclasses.replace(deal, signature=who.sign(transcript.DEAL, signed))


def other_keys(sender: str, who: Identity) -> Change:
    """Public keys of `sender` that differ from those that the other sites see, signed by `who`."""

    def change(play: Play, data: bytes) -> bytes | None:
        deal = Dealt(1, 0, 1, sender, EphemeralKeys(b"\x07" * 96).public, (), bytes(64))
        deal = signed_deal(play, deal, who)
        return entry_of(sender, common=deal.common, signature=deal.signature)(play, data)

    return change


def bad_part(field: str) -> Change:
    """The colluder's deal with a bad share, tag or check value for s03, signed by itself."""

    def change(play: Play, data: bytes) -> bytes:
        deal = decode(Dealt, data)
        shares = decode(Shares, deal.parts[AT])
        bad = dataclasses.replace(shares, **{field: flipped(getattr(shares, field), 0)})
        parts = (*deal.parts[:AT], encode(bad), *deal.parts[AT + 1 :])
        deal = dataclasses.replace(deal, parts=parts)
        return encode(signed_deal(play, deal, identities(SITES)[COLLUDER]))

    return change


def dealt_with(module: object, name: str, spoil: Callable[[Any], Any]) -> Change:
    """The colluder deals with one function of its program replaced; everything matches in form."""

    def change(play: Play, data: bytes) -> bytes:
        original = getattr(module, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, lambda *args: spoil(original(*args)))
            play.member(COLLUDER).prekeys(data)  # it gives the same answer when it is asked again
        return data

    return change


def a_share_off_the_polynomial(shares: Any) -> Any:
    """Another first byte in every share of s03."""
    spoilt = shares.copy()
    spoilt[AT, :, 0] ^= 1
    return spoilt


def second_deal(play: Play, data: bytes) -> bytes:
    """The colluder deals twice; s03 is shown the second deal, valid for itself."""
    s2 = play.kept[f"S3↓ {COLLUDER} 0"]
    store = dict(play.stores[COLLUDER])
    twin = Member(play.world.session, identities(SITES)[COLLUDER], store)
    deal = decode(Dealt, twin.prekeys(s2))
    hashes = tuple(transcript.part_hash(part) for part in deal.parts)
    changed = entry_of(
        COLLUDER,
        common=deal.common,
        part_hashes=hashes,
        part=deal.parts[AT],
        signature=deal.signature,
    )(play, data)
    assert changed is not None
    return changed


def a_strangers_certificate(play: Play, data: bytes) -> bytes:
    """Someone else's authority vouches for a key."""
    forged = issue_certificate(STRANGER, project="study", name=COLLUDER, public=STRANGER.public)
    try:
        check_certificate(forged, authority=identities(SITES)[OTHER].public, project="study")
    except ProtocolError as error:
        play.refuse(TARGET, "enrolment", error)
    return data


def a_stranger_joins(play: Play, data: bytes) -> bytes:
    """A program with a key that is not in the roster."""
    try:
        Member(play.world.session, STRANGER, {})
    except ConfigError as error:
        play.refuse("stranger", "start", error)
    return data


def with_a_stranger(message: Deliveries) -> Sequence[Delivered]:
    """One entry more, in a name that is not in the roster."""
    return (*message.items, dataclasses.replace(message.items[-1], sender="s99"))


def set_up_cases() -> Iterator[Case]:
    """Lies about keys, rosters and deals."""
    foreign = EphemeralKeys(b"\x07" * 96).public
    here = identities(SITES)
    lies: list[tuple[str, str, str, Change]] = [
        ("a key is replaced", RELAY, "S2↓", entry_of(OTHER, common=foreign)),
        ("a key is replaced, signed by a stranger", RELAY, "S2↓", other_keys(OTHER, STRANGER)),
        ("a key is replaced, signed by a colluder", RELAY, "S2↓",
         other_keys(OTHER, here[COLLUDER])),
        ("the site's own key is replaced", RELAY, "S2↓", entry_of(TARGET, common=foreign)),
        ("one site is shown another key of a colluder", RELAY, "S2↓",
         other_keys(COLLUDER, here[COLLUDER])),
        ("one site is shown another deal of a colluder", RELAY, "S4↓", second_deal),
        ("a stranger's certificate", RELAY, "S1↑", a_strangers_certificate),
        ("a stranger joins", "a stranger", "S1↑", a_stranger_joins),
        ("a stranger answers for a site", "a stranger", "S1↑",
         lambda play, data: encode(signed_deal(play, decode(Dealt, data), STRANGER))),
    ]  # fmt: skip
    for where in ("S2↓", "S3↓", "S4↓"):
        lies += [
            ("the roster is changed: a site left out", RELAY, where,
             deals(lambda message: message.items[:-1])),
            ("the roster is changed: a site twice", RELAY, where,
             deals(lambda message: (*message.items, message.items[-1]))),
            ("the roster is changed: a stranger added", RELAY, where, deals(with_a_stranger)),
        ]  # fmt: skip
        if where != "S2↓":
            lies.append(
                ("a part is altered on the way", RELAY, where, entry_of(OTHER, part=bytes(1088)))
            )
    lies.append(("the roster is changed: a site left out", RELAY, "S5↓", without_a_signature))
    for fault, liar, where, change in lies:
        yield Case(fault, liar, where, at(where, change))
    for field, what in {"sealed": "share", "tags": "tag", "checks": "check value"}.items():
        yield Case(
            f"a dealer deals a bad {what}", SITE, "S3↑", at("S3↑", bad_part(field), COLLUDER)
        )
    spoilt = {
        "a dealer deals shares that do not fit together": dealt_with(
            shamir, "split", a_share_off_the_polynomial
        ),
        "a dealer wraps false keys, and drops out": dealt_with(
            transcript, "wrap_keys", lambda wrapped: flipped(wrapped, 0)
        ),
    }
    for fault, change in spoilt.items():
        gone = (COLLUDER,) if "drops out" in fault else ()
        yield Case(fault, SITE, "S3↓", at("S3↓", change, COLLUDER), gone)


def without_a_signature(play: Play, data: bytes) -> bytes:
    """S5 that lacks one member."""
    message = decode(Activation, data)
    fewer = {name: signed for name, signed in message.signatures.items() if name != OTHER}
    return encode(dataclasses.replace(message, signatures=fewer))
