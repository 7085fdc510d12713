"""A secure sum that someone meddles with, message by message, under the eyes of a safety check.

A play runs a set-up, an honest round, the round that is meddled with, and an honest one after it.
A hook sees every message on its way and may change it, keep it back, or meddle with a site. What
was refused, by whom and how it all ended is what the play finds, not what anyone wrote down.
The safety properties of PROTOCOL.md are asserted as it goes; `UnsafeError` is their failure.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from secagg_driver import MODEL, World, make_session
from secagg_watch import Watch

from client.secagg import Member
from shared.errors import FedwardError, ProtocolError
from shared.messages import decode, kind_of
from shared.secagg.masking import Source
from shared.secagg.messages import (
    Abort,
    Descriptor,
    Included,
    Result,
)
from shared.secagg.ring import RingVector

SITES, THRESHOLD, COLLUDERS = 6, 4, 1
TARGET, OTHER, COLLUDER = "s03", "s01", "s05"
"""The site that is meddled with; one of its mask partners; the one that colludes or drops out."""

BEFORE, MEDDLED, AFTER = 1, 2, 3
"""The rounds of a play."""

UP, DOWN = "↑", "↓"
SET_UP = ("S1↑", "S2↓", "S2↑", "S3↓", "S3↑", "S4↓", "S4↑", "S5↓")
ROUND = ("R0↓", "R1↑", "R2↓", "R2↑", "R3↓", "R3↑", "E↓")
RECHECK = ("C↓", "C↑", "Z↓")
MESSAGES = (*SET_UP, *ROUND, *RECHECK)

NOBODY = "nobody"

Hook = Callable[["Play", str, str, bytes], bytes | None]


@dataclass(frozen=True)
class Refusal:
    """A message that was refused."""

    by: str
    message: str
    error: str
    text: str


@dataclass(frozen=True)
class Found:
    """How a play ended."""

    refused_by: str
    at: str
    error: str
    ending: str
    afterwards: str
    texts: tuple[str, ...] = field(compare=False, default=())


def untouched(play: Play, message: str, name: str, data: bytes) -> bytes:
    """The hook that does nothing."""
    del play, message, name
    return data


class Play:
    """One world, a hook, and what has been seen so far."""

    def __init__(self, world: World, hook: Hook = untouched, watch: Watch | None = None) -> None:
        self.world = world
        self.hook = hook
        self.watch = watch or Watch()
        self.round_no = 0
        self.gone: tuple[str, ...] = ()
        self.inputs: dict[str, RingVector | Source] = {}
        self.refusals: list[Refusal] = []
        self.kept: dict[str, bytes] = {}
        self.stores: dict[str, dict[str, bytes]] = {}
        """As they were when the round, or step S3 of the set-up, began."""
        self.snapshot = b""
        self.stopped = ""
        self.faults_seen = 0

    def fork(self, hook: Hook) -> Play:
        """A play that goes on from here on its own."""
        twin = Play(self.world.fork(), hook, copy.deepcopy(self.watch))
        twin.kept = dict(self.kept)
        return twin

    # Sites and relay, each refusal noted.

    def member(self, name: str) -> Member:
        """A site."""
        return self.world.members[name]

    def refuse(self, who: str, message: str, error: FedwardError) -> None:
        """Note a refusal."""
        self.refusals.append(Refusal(who, message, type(error).__name__, str(error)))

    def to_site(
        self, down: str, name: str, data: bytes, call: Callable[[Member, bytes], bytes | None]
    ) -> bytes | None:
        """A request on its way to a site; its answer, or None."""
        self.kept.setdefault(f"{down} {name} {self.round_no}", data)
        changed = self.hook(self, down, name, data)
        return None if changed is None else self.answer(down, name, changed, call)

    def answer(
        self, down: str, name: str, data: bytes, call: Callable[[Member, bytes], bytes | None]
    ) -> bytes | None:
        """What a site makes of a request."""
        store = dict(self.world.stores[name])
        try:
            return call(self.member(name), data)
        except FedwardError as error:
            if "only with a new epoch" not in str(error):
                self.world.stores[name].clear()
                self.world.stores[name].update(store)
                self.world.restart(name)
            self.refuse(name, down, error)
            return None

    def to_relay(
        self, up: str, name: str, data: bytes | None, take: Callable[[str, bytes], object]
    ) -> None:
        """An answer on its way to the relay."""
        if data is None:
            return
        self.kept.setdefault(f"{up} {name} {self.round_no}", data)
        changed = self.hook(self, up, name, data)
        if changed is None:
            return
        try:
            take(name, changed)
        except FedwardError as error:
            self.refuse("relay", up, error)

    # The phases.

    def set_up(self) -> None:
        """S1 to S5; stops where a message is missing."""
        relay = self.world.relay
        requests: Mapping[str, bytes] = dict.fromkeys(self.world.session.names, b"")
        steps: tuple[tuple[str, str, Callable[..., dict[str, bytes]]], ...] = (
            ("S1", "advertise", relay.advertised),
            ("S2", "encapsulate", relay.encapsulated),
            ("S3", "prekeys", relay.dealt),
            ("S4", "confirm", relay.confirmed),
        )
        for step, method, collect in steps:
            replies: dict[str, bytes] = {}
            if step == "S3":
                self.stores = {name: dict(store) for name, store in self.world.stores.items()}
            for name in self.world.session.names:
                self._ask_set_up(step, name, method, requests[name], replies)
            try:
                requests = collect(replies)
            except FedwardError as error:
                self.refuse("relay", f"{step}{UP}", error)
                self.stopped = "the set-up stops"
                return
        self.kept["activation"] = requests[TARGET]
        for name in self.world.session.names:
            self.to_site(f"S5{DOWN}", name, requests[name], lambda m, data: m.activate(data))

    def _ask_set_up(
        self, step: str, name: str, method: str, request: bytes, replies: dict[str, bytes]
    ) -> None:
        if step == "S1":
            answer: bytes | None = self.member(name).advertise()
        else:
            answer = self.to_site(
                f"{step}{DOWN}", name, request, lambda m, data: getattr(m, method)(data)
            )
        self.to_relay(f"{step}{UP}", name, answer, replies.__setitem__)

    def run_round(self, round_no: int, gone: tuple[str, ...] = ()) -> str:
        """One round, to its end; returns how it ended."""
        ending = self._run_round(round_no, gone)
        self.note_faults()
        return ending

    def note_faults(self) -> None:
        """What the relay did not refuse at once, but put down."""
        faults = self.world.relay.faults[self.faults_seen :]
        self.faults_seen = len(self.world.relay.faults)
        for fault in faults:
            where = "refill" if fault.startswith("refill") else f"C{UP}"
            self.refusals.append(Refusal("relay", where, "ProtocolError, logged", fault))

    def _run_round(self, round_no: int, gone: tuple[str, ...]) -> str:
        self.round_no, self.gone = round_no, gone
        self.stores = {name: dict(store) for name, store in self.world.stores.items()}
        self.inputs = dict(self.world.vectors(round_no))
        try:
            r0 = self.world.relay.open_round(round_no, model_hash=MODEL)
        except FedwardError as error:
            self.refuse("relay", f"R0{DOWN}", error)
            return "no round is opened"
        self.snapshot = self.world.relay.snapshot()
        try:
            for name in sorted(set(r0) - set(gone)):
                answer = self.to_site(f"R0{DOWN}", name, r0[name], self.mask)
                self.to_relay(f"R1{UP}", name, answer, self._taken("add_masked"))
            for name, request in self.world.relay.close_inputs().items():
                answer = self.to_site(f"R2{DOWN}", name, request, self.agree)
                self.to_relay(f"R2{UP}", name, answer, self._taken("add_agreement"))
            for name, request in self.world.relay.close_agreement().items():
                answer = self.to_site(f"R3{DOWN}", name, request, self.release)
                self.to_relay(f"R3{UP}", name, answer, self._taken("add_release"))
            self.world.relay.unmask()
        except FedwardError as error:
            self.refuse("relay", "the end", error)
            self.publish(self.world.relay.abort(str(error)))
            return "aborted"
        names = self.world.relay.contributors
        self.publish(self.world.relay.publish())
        missing = [name for name in self.world.session.names if name not in names]
        return f"sum without {', '.join(missing)}" if missing else "sum of all"

    def _taken(self, method: str) -> Callable[[str, bytes], object]:
        return partial(self._take, method)

    def _take(self, method: str, name: str, data: bytes) -> None:
        getattr(self.world.relay, method)(name, data)

    def mask(self, member: Member, r0: bytes) -> bytes:
        """R0 and R1 of a site."""
        ticket = member.open_round(r0, model_hash=MODEL)
        if ticket.reply is not None:
            return ticket.reply
        self.watch.opened(r0)
        source = self.inputs[member.name]
        reply = member.masked_input(ticket, source)
        plain = np.empty(self.world.session.length, np.uint32)
        if isinstance(source, np.ndarray):
            plain[:] = source
        else:
            source.reader(0)(plain)
        plain &= self.world.session.ring.modulus_mask
        self.watch.vectors.setdefault((ticket.digest, member.name), plain)
        return reply

    def agree(self, member: Member, r2: bytes) -> bytes:
        """R2 of a site."""
        reply = member.agree(r2)
        self.watch.agreed(self.world, member.name, r2, reply)
        self.kept[f"contributors {member.name}"] = r2
        return reply

    def release(self, member: Member, r3: bytes) -> bytes:
        """R3 of a site."""
        reply = member.release(r3)
        signed = decode(Included, self.kept[f"contributors {member.name}"]).contributions
        self.watch.released(self.world, member.name, reply, [entry.name for entry in signed])
        return reply

    def publish(self, result: bytes) -> None:
        """The end of a round, to every site."""
        self.kept[f"result {self.round_no}"] = result
        for name in self.world.session.names:
            self.to_site(f"E{DOWN}", name, result, self._accept)

    def send_again(self) -> None:
        """What a site missed, as a relay does that knows of no lie: S5, and all results."""
        for name in self.world.session.names:
            activation = self.kept.get("activation")
            if activation is not None and not self.member(name)._progress().active:
                self.answer(f"S5{DOWN}", name, activation, lambda m, data: m.activate(data))
            for round_no in (BEFORE, MEDDLED):
                result = self.kept.get(f"result {round_no}")
                if result is not None and self._continues(name, result):
                    self.answer(f"E{DOWN}", name, result, self._accept)

    def _continues(self, name: str, result: bytes) -> bool:
        """Whether this result is the next in a site's history, as far as the site tells."""
        raw = decode(Result if kind_of(result) is Result else Abort, result).descriptor
        return decode(Descriptor, raw).transcript == self.member(name).transcript

    def _accept(self, member: Member, data: bytes) -> None:
        self.watch.ended(self.world, member.name, data, member.accept_result(data))

    def settle(self) -> None:
        """The recheck of the last sum apart from a round, and its settlement."""
        relay, names = self.world.relay, self.world.session.names
        rechecks = relay._rechecks
        if rechecks is None:
            return
        for name, chunks in sorted(rechecks.assign(names, SITES).items()):
            package = rechecks.package(chunks)
            answer = self.to_site(f"C{DOWN}", name, package, lambda m, data: m.check_chunks(data))
            self.to_relay(f"C{UP}", name, answer, relay.add_recheck)
        self.note_faults()
        try:
            settlement = relay.settlement()
        except FedwardError as error:
            self.refuse("relay", f"Z{DOWN}", error)
            return

        def settled(member: Member, data: bytes) -> None:
            member.settle(data)
            self.watch.settled(member.name)

        for name in self.world.session.names:
            self.to_site(f"Z{DOWN}", name, settlement, settled)


@functools.cache
def before(step: str) -> Play:
    """An honest play to this point: "set-up", or one "round", or one and a "refill" under way."""
    rounds = {"set-up": 4, "round": 16, "refill": 6}[step]
    session = make_session(SITES, THRESHOLD, COLLUDERS, prekey_rounds=rounds, length=20, chunk=8)
    play = Play(World(session))
    play.world.relay._spare_checkers = SITES  # whom chance picks does not matter then
    if step != "set-up":
        play.set_up()
        if play.run_round(BEFORE) != "sum of all" or play.refusals:
            raise ProtocolError(f"the honest round failed: {play.refusals}")
    return play


def perform(
    where: str, hook: Hook, gone: tuple[str, ...] = (), rounds_after: int = 1
) -> tuple[Play, Found]:
    """Meddle with one epoch or round, then leave the sites in peace.

    Args:
        gone: Sites that vanish before the round that is meddled with.
        rounds_after: 1, or as many as show what becomes of a refill.
    """
    setting_up = where in SET_UP
    play = before("set-up" if setting_up else "round" if rounds_after == 1 else "refill").fork(hook)
    if setting_up:
        play.set_up()
        ending = play.stopped or "the set-up is completed"
    else:
        ending = play.run_round(MEDDLED, gone)
        if where in RECHECK:
            play.settle()
    first = list(play.refusals)
    play.hook = untouched
    play.send_again()
    afterwards = ""
    for round_no in () if play.stopped else range(AFTER, AFTER + rounds_after):
        afterwards = play.run_round(round_no, gone if setting_up else ())
    if not play.stopped:
        play.settle()
    return play, _found(play, first, ending, afterwards)


def _found(play: Play, first: list[Refusal], ending: str, afterwards: str) -> Found:
    refusals = first or play.refusals
    refusals = [refusal for refusal in refusals if refusal.message == refusals[0].message]
    by = sorted({refusal.by for refusal in refusals})
    called = {TARGET: "the site", "relay": "the relay"}
    who = "all sites" if len(by) == SITES else ", ".join(called.get(name, name) for name in by)
    texts = tuple(dict.fromkeys(refusal.text for refusal in refusals))
    return Found(
        refused_by=who or NOBODY,
        at=refusals[0].message if refusals else "",
        error=refusals[0].error if refusals else "",
        ending=ending,
        afterwards=afterwards,
        texts=texts,
    )
