"""Drop, delay, repeat, reorder, corrupt, restart: the sum is right or the round aborts.

Whatever the network and crashes do, each published sum is the plain sum over its U3, and no site
ever gives shares of both keys of one member in one round. After it all, a quiet round works.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from secagg_driver import MODEL, World, plain_sum, ready

from server.secagg import Relay
from shared.errors import ProtocolError
from shared.messages import decode, kind_of
from shared.secagg.messages import (
    Abort,
    Agreed,
    Included,
    Masked,
    Opening,
    Quorum,
    Recheck,
    Released,
    Result,
)
from shared.secagg.ring import RingVector
from shared.secagg.transcript import descriptor_digest

picks = st.integers(0, 10_000)
rarely = st.sampled_from([False] * 5 + [True])
FATES = [*["arrives"] * 22, "lost", "repeated", "waits"]


@dataclass(frozen=True)
class Sent:
    """A message in flight, to or from one site."""

    name: str
    data: bytes


class Interleavings(RuleBasedStateMachine):
    """Seven sites, two may drop out; the network does what it likes.

    Keys are fresh in each run, so rules without anything to do return, and have no preconditions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world: World = ready(7, 5, 1, length=3, prekey_rounds=40, chunk=2)
        self.names = self.world.session.names
        self.requests: list[Sent] = []
        self.replies: list[Sent] = []
        self.round_no = 0
        self.saved = self.world.relay.snapshot()
        self.results: list[bytes] = []
        self.vectors: dict[tuple[bytes, str], RingVector] = {}
        self.given: dict[tuple[str, bytes], set[bytes]] = {}
        self.stage = "idle"

    @initialize(rounds=st.integers(0, 3))
    def before_the_storm(self, rounds: int) -> None:
        """Some quiet rounds first, so that rechecks and refills are under way when it begins."""
        for _ in range(9 * rounds):
            self.a_quiet_moment(["arrives"])

    # The relay.

    @rule()
    def open_round(self) -> None:
        if self.stage != "idle" or self.round_no >= 25:
            return
        self.round_no += 1
        requests = self.world.relay.open_round(self.round_no, model_hash=MODEL)
        self.requests += [Sent(name, requests[name]) for name in requests]
        self.saved = self.world.relay.snapshot()
        self.stage = "inputs"

    def next_stage(self) -> None:
        relay = self.world.relay
        try:
            if self.stage == "inputs":
                for name in self.names:
                    for package in relay.recheck_packages(name):
                        self.requests.append(Sent(name, package))
                requests = relay.close_inputs()
                self.stage = "agreement"
            elif self.stage == "agreement":
                requests = relay.close_agreement()
                self.stage = "release"
            else:
                relay.unmask()
                self.publish(relay.publish())
                return
            self.requests += [Sent(name, data) for name, data in requests.items()]
        except ProtocolError as error:
            if self.stage != "inputs" or "recheck" not in str(error):
                self.publish(relay.abort(str(error)))

    @rule(what=st.sampled_from([*["site"] * 12, "abort", "relay", "patience"]), pick=picks)
    def stop_something(self, what: str, pick: int) -> None:
        if what == "site":
            self.world.restart(self.names[pick % 7])
        elif what == "abort" and self.stage != "idle":
            self.publish(self.world.relay.abort("the server lost patience"))
        elif what == "patience" and self.stage != "idle":
            self.next_stage()
        elif what == "relay":
            self.world.relay = Relay.restore(self.world.session, self.saved)
            if self.stage != "idle":
                self.publish(self.world.relay.abort("the server was restarted"))

    def publish(self, result: bytes) -> None:
        self.stage = "idle"
        self.saved = self.world.relay.snapshot()
        self.results.append(result)
        self.requests += [Sent(name, result) for name in self.names]
        if kind_of(result) is Result:
            names = decode(Result, result).contributions
            event("a sum was published", "whole" if len(names) == 7 else "after dropouts")
            self.check_sum(decode(Result, result))
        else:
            event("a round was aborted")

    def check_sum(self, result: Result) -> None:
        digest = descriptor_digest(result.descriptor)
        names = [entry.name for entry in result.contributions]
        assert len(names) >= 5
        session = self.world.session
        total = session.ring.from_wire(result.total, session.length)
        vectors = {name: self.vectors[digest, name] for name in names}
        np.testing.assert_array_equal(total, plain_sum(session, vectors, names))

    # The network and the sites.

    @rule(pick=picks, keep=st.booleans(), lost=rarely, crash=rarely)
    def deliver_request(self, pick: int, keep: bool, lost: bool, crash: bool) -> None:
        if not self.requests:
            return
        sent = self.requests[pick % len(self.requests)]
        before = dict(self.world.stores[sent.name])
        try:
            reply = self.handle(sent.name, sent.data)
        except ProtocolError:
            self.roll_back(sent.name, before)
            return  # stays in flight, perhaps it came too early
        if crash:
            # The site stopped before its store was committed, so nothing left it.
            self.roll_back(sent.name, before)
            return
        if reply:
            self.note(sent.name, reply)
        if reply and not lost:
            self.replies.append(Sent(sent.name, reply))
        if not keep:
            self.requests.remove(sent)

    @rule(pick=picks, at=picks, bit=st.integers(0, 7))
    def deliver_corrupted_request(self, pick: int, at: int, bit: int) -> None:
        if not self.requests:
            return
        sent = self.requests[pick % len(self.requests)]
        data = bytearray(sent.data)
        data[at % len(data)] ^= 1 << bit
        before = dict(self.world.stores[sent.name])
        try:
            reply = self.handle(sent.name, bytes(data))
        except ProtocolError:
            self.roll_back(sent.name, before)
            return
        if kind_of(sent.data) in (Result, Abort, Opening):
            self.roll_back(sent.name, before)  # a false history: the site would be out for good
        elif reply:
            self.note(sent.name, reply)

    @rule(pick=picks, really=rarely)
    def drop_request(self, pick: int, really: bool) -> None:
        if not really:
            return
        if not self.requests:
            return
        sent = self.requests[pick % len(self.requests)]
        if kind_of(sent.data) not in (Result, Abort):
            self.requests.remove(sent)

    @rule(pick=picks, keep=st.booleans(), corrupt=st.none() | picks)
    def deliver_reply(self, pick: int, keep: bool, corrupt: int | None) -> None:
        if not self.replies:
            return
        sent = self.replies[pick % len(self.replies)]
        data = bytearray(sent.data)
        if corrupt is not None:
            data[corrupt % len(data)] ^= 1
        elif not keep:
            self.replies.remove(sent)
        relay = self.world.relay
        kind = kind_of(sent.data)
        try:
            if kind is Masked:
                relay.add_masked(sent.name, bytes(data))
            elif kind is Agreed:
                relay.add_agreement(sent.name, bytes(data))
            elif kind is Released:
                relay.add_release(sent.name, bytes(data))
            else:
                relay.add_recheck(sent.name, bytes(data))
        except ProtocolError as error:
            # Whatever is refused, its sender is named.
            assert sent.name in str(error) or "no round is open" in str(error)  # noqa: PT017

    @rule(fates=st.lists(st.sampled_from(FATES), min_size=5, max_size=40))
    def a_quiet_moment(self, fates: list[str]) -> None:
        """Most of what is in flight arrives, and the relay goes on."""
        self.move_on(fates, away=())

    @rule(away=st.sets(st.sampled_from(range(7)), max_size=2))
    def a_round_without_some(self, away: set[int]) -> None:
        """Nothing reaches two sites for a while; what was for them waits, and comes late."""
        for _ in range(4):
            self.move_on(["arrives"], tuple(self.names[place] for place in away))

    def move_on(self, fates: list[str], away: tuple[str, ...]) -> None:
        for at, sent in enumerate(list(self.requests)):
            fate = fates[at % len(fates)]
            if sent in self.requests and fate != "waits" and sent.name not in away:
                where = self.requests.index(sent)
                self.deliver_request(where, fate == "repeated", fate == "lost", False)
        for at, sent in enumerate(list(self.replies)):
            fate = fates[-1 - at % len(fates)]
            if sent in self.replies and fate != "waits":
                self.deliver_reply(self.replies.index(sent), fate == "repeated", None)
        if self.stage != "idle":
            self.next_stage()
        else:
            self.open_round()

    def handle(self, name: str, data: bytes) -> bytes:
        member, kind = self.world.members[name], kind_of(data)
        if kind is Opening:
            ticket = member.open_round(data, model_hash=MODEL)
            if ticket.reply is not None:
                return ticket.reply
            seed = [self.round_no, self.names.index(name), len(self.vectors)]
            vector = np.random.default_rng(seed).integers(0, 1 << 24, 3).astype(np.uint32)
            reply = member.masked_input(ticket, vector)
            self.vectors[ticket.digest, name] = vector
            return reply
        if kind is Included:
            return member.agree(data)
        if kind is Quorum:
            return member.release(data)
        if kind is Recheck:
            return member.check_chunks(data)
        if kind in (Result, Abort):
            member.accept_result(data)
        return b""

    def roll_back(self, name: str, before: dict[str, bytes]) -> None:
        store = self.world.stores[name]
        store.clear()
        store.update(before)
        self.world.restart(name)

    def note(self, name: str, reply: bytes) -> None:
        """Remember what a site has let out of the house, by round and kind of message."""
        kind = kind_of(reply)
        if kind in (Masked, Agreed, Released):
            digest = decode(kind, reply).digest
            self.given.setdefault((name + kind.__name__, digest), set()).add(reply)

    @invariant()
    def nothing_is_said_twice(self) -> None:
        assert all(len(replies) == 1 for replies in self.given.values())

    @invariant()
    def never_both_keys_of_one_member(self) -> None:
        for (key, digest), replies in self.given.items():
            if not key.endswith("Released"):
                continue
            name = key.removesuffix("Released")
            released = decode(Released, next(iter(replies)))
            agreed = self.given.get((name + "Agreed", digest), set())
            assert all(not decode(Agreed, reply).self_shares for reply in agreed)
            # b of U3 and R of the others: all seven, and none twice.
            assert len(released.self_shares) + len(released.recovery_shares) == 7 * 32

    def teardown(self) -> None:
        """When the storm is over, all sites agree on history, and a quiet round works."""
        if self.stage != "idle":
            self.publish(self.world.relay.abort("the storm is over"))
        for name in self.names:
            for result in self.results:
                before = dict(self.world.stores[name])
                try:
                    self.world.members[name].accept_result(result)
                except ProtocolError:
                    self.roll_back(name, before)
            assert self.world.members[name].transcript == self.world.relay.transcript
        round_no = self.round_no + 1
        vectors = self.world.vectors(round_no)
        outcomes = self.world.run_round(round_no, vectors)
        expected = plain_sum(self.world.session, vectors, self.names)
        np.testing.assert_array_equal(outcomes["s00"].total, expected)


Interleavings.TestCase.settings = settings(
    max_examples=30, stateful_step_count=60, deadline=None, print_blob=True
)
TestInterleavings = pytest.mark.slow(Interleavings.TestCase)
