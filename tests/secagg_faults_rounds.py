"""Lies within a round, R0 to R3; see secagg_faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from secagg_driver import identities
from secagg_faults import AT, NETWORK, RELAY, SITE, Case, Change, at, flipped
from secagg_play import COLLUDER, MEDDLED, OTHER, SITES, TARGET, Hook, Play

from shared.errors import ProtocolError
from shared.messages import decode, encode
from shared.secagg import merkle, transcript
from shared.secagg.messages import (
    Agreed,
    Attestation,
    Contribution,
    Descriptor,
    Included,
    Masked,
    Opening,
    Quorum,
    Released,
)
from shared.secagg.ring import Quantised

HERE = identities(SITES)
NAMES = tuple(HERE)
MAX_COUNT = 1000
Entries = Sequence[Contribution]


def round_cases() -> Iterator[Case]:
    """All of them."""
    for fault, liar, where, change, *gone in (*R0, *R1, *R2, *R3):
        yield Case(fault, liar, where, at(where, change), *gone)
    for fault, liar, where, hook in SEVERAL:
        yield Case(fault, liar, where, hook)
    for answered, where in (("vector", "R1↑"), ("signature", "R2↑"), ("share", "R3↑")):
        gone = (COLLUDER,) if where == "R3↑" else ()
        yield Case(f"fewer than t sites send a {answered}", NETWORK, where, silence(where), gone)


# R0.


def descriptor(**changes: Any) -> Change:
    """R0 with another descriptor, and nothing beside it."""

    def change(play: Play, data: bytes) -> bytes:
        message = decode(Opening, data)
        other = dataclasses.replace(decode(Descriptor, message.descriptor), **changes)
        return encode(dataclasses.replace(message, descriptor=encode(other)))

    return change


R0: list[tuple[Any, ...]] = [
    ("a round of another session", RELAY, "R0↓", descriptor(session=bytes(32))),
    ("another history", RELAY, "R0↓", descriptor(transcript=bytes(32))),
    ("one site is shown another model", RELAY, "R0↓", descriptor(model=bytes(32))),
    ("other prekeys", RELAY, "R0↓", descriptor(batch=bytes(32))),
    ("a used round number", RELAY, "R0↓", descriptor(round=1)),
    ("a round beyond the prekeys", RELAY, "R0↓", descriptor(round=99)),
    ("a cohort that is too small", RELAY, "R0↓", descriptor(cohort=NAMES[2:5])),
    ("a cohort without the site", RELAY, "R0↓", descriptor(cohort=(*NAMES[:AT], *NAMES[AT + 1 :]))),
    ("a cohort with a stranger", RELAY, "R0↓", descriptor(cohort=(*NAMES[:5], "s99"))),
    ("a cohort that names a site twice", RELAY, "R0↓", descriptor(cohort=(*NAMES, NAMES[5]))),
    ("one site is shown another cohort", RELAY, "R0↓", descriptor(cohort=NAMES[:5])),
]


# R1.


def masked(**changes: Any) -> Change:
    """R1 with other fields."""
    return lambda play, data: encode(dataclasses.replace(decode(Masked, data), **changes))


def another_vector(play: Play, data: bytes) -> bytes:
    """A second vector, rightly signed by the site."""
    message = decode(Masked, data)
    vector = bytes(len(message.vector))
    root = merkle.root(vector, play.world.session.chunk_bytes)
    signed = transcript.masked_digest(message.digest, TARGET, root)
    signature = HERE[TARGET].sign(transcript.MASKED, signed)
    return encode(dataclasses.replace(message, vector=vector, root=root, signature=signature))


def two_vectors(play: Play, data: bytes) -> bytes:
    """The true one has come when another one comes."""
    play.world.relay.add_masked(TARGET, data)
    return another_vector(play, data)


def masks_twice(play: Play, data: bytes) -> bytes:
    """The snapshot was taken after R0: the site does not know that it has sent a vector."""
    store = play.world.stores[TARGET]
    store.clear()
    store.update(play.stores[TARGET])
    play.world.restart(TARGET)
    play.world.relay.add_masked(TARGET, data)
    play.inputs[TARGET] = play.world.vectors(99)[TARGET]
    second = play.mask(play.member(TARGET), play.kept[f"R0↓ {TARGET} {MEDDLED}"])
    assert decode(Masked, second).vector != decode(Masked, data).vector
    return second


def late_vector(play: Play, message: str, name: str, data: bytes) -> bytes | None:
    """Kept back, and sent once another site is asked to agree."""
    if message == "R1↑" and name == TARGET and play.round_no == MEDDLED:
        play.kept["late"] = data
        return None
    if message == "R2↓" and "late" in play.kept:
        try:
            play.world.relay.add_masked(TARGET, play.kept.pop("late"))
        except ProtocolError as error:
            play.refuse("relay", "R1↑", error)
    return data


def input_of(make: Callable[[Play], Any]) -> Change:
    """The site's vector is another one."""

    def change(play: Play, data: bytes) -> bytes:
        play.inputs[TARGET] = make(play)
        return data

    return change


def not_finite(play: Play) -> Quantised:
    """Not-a-number counts as zero, infinities are clipped; the plain sum is told alike."""
    values = np.zeros(play.world.session.length, np.float32)
    values[:4] = np.nan, np.inf, -np.inf, 1
    return Quantised(values, play.world.session.ring, clip_range=2.0, key=bytes(32))


R1: list[tuple[Any, ...]] = [
    ("another vector than the root names", SITE, "R1↑", masked(vector=bytes(60))),
    ("a vector that is too short", SITE, "R1↑", masked(vector=bytes(57))),
    ("a vector signed by a stranger", "a stranger", "R1↑", masked(signature=bytes(64))),
    ("a vector in another's name", SITE, "R1↑", masked(sender=OTHER)),
    ("a vector for another round", SITE, "R1↑", masked(digest=bytes(32))),
    ("two different vectors", SITE, "R1↑", two_vectors),
    ("state restored within the round: a second vector", "the site's machine", "R1↑", masks_twice),
    ("not-a-number and infinity in x", SITE, "R0↓", input_of(not_finite)),
    ("x of another length", SITE, "R0↓", input_of(lambda play: np.zeros(3, np.uint32))),
]


# R2.


def included(change: Callable[[Play, Entries], Entries]) -> Change:
    """R2 with another U3."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Included, data)
        entries = tuple(change(play, message.contributions))
        return encode(dataclasses.replace(message, contributions=entries))

    return changed


def root_at(place: int, root: bytes) -> Change:
    """U3 in which one H(y) is another."""
    return included(
        lambda play, entries: [
            dataclasses.replace(entry, root=root) if at == place else entry
            for at, entry in enumerate(entries)
        ]
    )


def swapped(play: Play, entries: Entries) -> Entries:
    """Two sites' H(y) change places."""
    a, b = entries[0], entries[1]
    roots = dataclasses.replace(a, root=b.root), dataclasses.replace(b, root=a.root)
    return (*roots, *entries[2:])


def of_round_before(play: Play, entries: Entries) -> Entries:
    """One site's entry is the one that it signed for the round before."""
    old = decode(Included, play.kept[f"R2↓ {OTHER} 1"]).contributions
    return (entries[0], old[1], *entries[2:])


def attested(change: Callable[[Sequence[Attestation]], Sequence[Attestation]]) -> Change:
    """R2 with other attestations."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Included, data)
        return encode(
            dataclasses.replace(message, attestations=tuple(change(message.attestations)))
        )

    return changed


def agreed(**changes: Any) -> Change:
    """R2's answer with other fields."""
    return lambda play, data: encode(dataclasses.replace(decode(Agreed, data), **changes))


def false_share(play: Play, data: bytes) -> bytes:
    """One share on the fast path."""
    shares = decode(Agreed, data).self_shares
    return encode(dataclasses.replace(decode(Agreed, data), self_shares=flipped(shares, 40)))


SMALLER = included(lambda play, entries: entries[:-1])
R2: list[tuple[Any, ...]] = [
    ("a U3 that is too small", RELAY, "R2↓", included(lambda play, e: e[:3])),
    ("a member is listed twice", RELAY, "R2↓", included(lambda play, e: (*e, e[5]))),
    ("a U3 that is not sorted", RELAY, "R2↓", included(lambda play, e: (*e[::-1],))),
    ("a U3 without the site", RELAY, "R2↓", included(lambda play, e: (*e[:AT], *e[AT + 1 :]))),
    ("a U3 with a stranger", RELAY, "R2↓",
     included(lambda play, e: (*e, dataclasses.replace(e[5], name="s99")))),
    ("a swapped contribution", RELAY, "R2↓", included(swapped)),
    ("a forged contribution", RELAY, "R2↓", root_at(4, bytes(32))),
    ("another contribution than the site's own", RELAY, "R2↓", root_at(AT, bytes(32))),
    ("a contribution to another round", RELAY, "R2↓", included(of_round_before)),
    ("nobody rechecked the sum before", RELAY, "R2↓", attested(lambda given: ())),
    ("too few rechecked the sum before", RELAY, "R2↓", attested(lambda given: given[:1])),
    ("a forged attestation", RELAY, "R2↓",
     attested(lambda given: (dataclasses.replace(given[0], sender=given[1].sender), *given[1:]))),
    ("a forged signature over U3", SITE, "R2↑", agreed(signature=bytes(64))),
    ("a bad share, before dropouts", SITE, "R2↑", false_share),
    ("no shares, before dropouts", SITE, "R2↑", agreed(self_shares=b"")),
]  # fmt: skip


# R3.


def signatures(play: Play, names: Sequence[str]) -> dict[str, bytes]:
    """What these sites signed in this round."""
    replies = {n: play.kept.get(f"R2↑ {n} {play.round_no}") for n in names}
    return {name: decode(Agreed, data).signature for name, data in replies.items() if data}


def quorum(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Change:
    """R3 with other signatures."""

    def changed(play: Play, data: bytes) -> bytes:
        message = decode(Quorum, data)
        return encode(dataclasses.replace(message, signatures=change(dict(message.signatures))))

    return changed


def released(**changes: Any) -> Change:
    """R3's answer with other fields."""
    return lambda play, data: encode(dataclasses.replace(decode(Released, data), **changes))


def asked_to_release(play: Play) -> None:
    """R3 to the site, with all signatures that there are."""
    digest = decode(Agreed, play.kept[f"R2↑ {TARGET} {play.round_no}"]).digest
    request = encode(Quorum(digest, signatures(play, NAMES)))
    play.answer("R3↓", TARGET, request, play.release)


def released_twice(play: Play, data: bytes) -> bytes:
    """Shares were given; other signatures ask for them again."""
    asked_to_release(play)
    return data


def second_set(play: Play, data: bytes) -> bytes:
    """U3 was signed; the relay asks for another one."""
    changed = SMALLER(play, play.kept[f"R2↓ {TARGET} {MEDDLED}"])
    assert changed is not None
    play.answer("R2↓", TARGET, changed, play.agree)
    return data


def another_set(play: Play, message: str, name: str, data: bytes) -> bytes | None:
    """One site is shown a smaller U3; what it signs, the relay puts aside."""
    if play.round_no == MEDDLED and name == TARGET and message == "R2↓":
        return SMALLER(play, data)
    aside = play.round_no == MEDDLED and name == TARGET and message == "R2↑"
    return None if aside else data


def then_release(first: Hook) -> Hook:
    """After `first`, and before the round ends, the site is asked for R-shares as well."""

    def hook(play: Play, message: str, name: str, data: bytes) -> bytes | None:
        if play.round_no == MEDDLED and message == "E↓" and name == TARGET:
            asked_to_release(play)
        return first(play, message, name, data)

    return hook


GONE = (COLLUDER,)
R3: list[tuple[Any, ...]] = [
    ("too few signatures over U3", RELAY, "R3↓",
     quorum(lambda s: dict(list(s.items())[:3])), GONE),
    ("a forged signature over U3", RELAY, "R3↓",
     quorum(lambda s: {**s, "s02": s["s01"]}), GONE),
    ("a signature by a site outside U3", RELAY, "R3↓",
     quorum(lambda s: {**s, COLLUDER: s["s01"]}), GONE),
    ("shares are asked for twice", RELAY, "R3↑", released_twice, GONE),
    ("a second U3 in one round", RELAY, "R2↑", second_set),
    ("a second U3 in one round, after a dropout", RELAY, "R2↑", second_set, GONE),
    ("a bad share of a self mask", SITE, "R3↑", released(self_shares=bytes(160)), GONE),
    ("a bad share of a recovery key", SITE, "R3↑", released(recovery_shares=bytes(32)), GONE),
]  # fmt: skip
SEVERAL: list[tuple[Any, ...]] = [
    ("a late vector, after the site was declared dead", NETWORK, "R1↑", late_vector),
    ("a member alive and dead: R after b", RELAY, "R3↓", then_release(lambda p, m, n, data: data)),
    ("a member alive and dead: two U3", RELAY, "R3↓", then_release(another_set)),
    ("one site is shown another U3", RELAY, "R2↓", another_set),
]


def silence(where: str) -> Hook:
    """Three sites, or after a dropout two, fall silent."""
    silent = NAMES[1:3] if where == "R3↑" else NAMES[:3]

    def hook(play: Play, message: str, name: str, data: bytes) -> bytes | None:
        due = play.round_no == MEDDLED and message == where
        return None if due and name in silent else data

    return hook
