"""Truncated, oversized, malformed bytes at every message: refused, without a trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secagg_driver import MODEL, World, identities, make_session

from client.secagg import Member, Outcome
from server.secagg import Relay
from shared.errors import ConfigError, ProtocolError

# A bad refill or recheck that rides with R0 or R1 is refused on its own; the round goes on.
RIDES = {"member R0", "relay R1", "relay refill"}


@dataclass(frozen=True, repr=False)
class Case:
    """One message on its way to an actor in the state in which it is due."""

    label: str
    actor: Member | Relay
    store: dict[str, bytes]
    call: Callable[[Any, bytes], object]
    data: bytes

    def __repr__(self) -> str:
        return self.label

    @functools.cached_property
    def honest(self) -> object:
        """What the honest bytes give."""
        return self.deliver(self.data)

    def deliver(self, data: bytes) -> object:
        """Give `data` to a copy of the actor; returns what it returns."""
        store = dict(self.store)
        if isinstance(self.actor, Relay):
            return self.call(copy.deepcopy(self.actor), data)
        session = self.actor._site.session
        member = Member(session, identities(len(session.roster))[self.actor.name], store)
        try:
            return self.call(member, data)
        except ProtocolError:
            if self.label not in RIDES:
                assert store == self.store, f"{self.label}: a refused message left a trace"
            raise


class Recorder:
    """Keeps a case for every message that passes."""

    def __init__(self, world: World) -> None:
        self.world, self.cases = world, list[Case]()

    def member(self, label: str, name: str, call: Callable[[Any, bytes], Any], data: bytes) -> Any:
        """A message to a site."""
        member = self.world.members[name]
        self.cases.append(
            Case(f"member {label}", member, dict(self.world.stores[name]), call, data)
        )
        return call(member, data)

    def relay(self, label: str, call: Callable[[Any, bytes], Any], data: bytes) -> None:
        """A message to the relay."""
        relay = copy.deepcopy(self.world.relay)
        self.cases.append(Case(f"relay {label}", relay, {}, call, data))
        call(self.world.relay, data)


def set_up_step(step: str, replies: dict[str, bytes]) -> Callable[[Relay, bytes], object]:
    """The relay takes all sites' replies at once; s00's is the one that is meddled with."""

    def call(relay: Relay, data: bytes) -> object:
        return getattr(relay, step)({**replies, "s00": data})

    return call


def by_name(method: str) -> Callable[[Any, bytes], Any]:
    """Call a member's method."""
    return lambda member, data: getattr(member, method)(data)


def from_site(method: str, name: str) -> Callable[[Any, bytes], Any]:
    """Call a relay's method with a site's message."""
    return lambda relay, data: getattr(relay, method)(name, data)


@functools.cache
def cases() -> tuple[Case, ...]:
    """One case of each kind, from an honest epoch with a refill, a recheck and a dropout."""
    world = World(make_session(4, 3, 1, length=20, chunk=8, prekey_rounds=4))
    record, members = Recorder(world), world.members
    record.cases.clear()
    requests: dict[str, bytes] = {}
    replies = {name: member.advertise() for name, member in members.items()}
    for step, (name_of_step, method) in enumerate(
        (("advertised", "encapsulate"), ("encapsulated", "prekeys"), ("dealt", "confirm")), 1
    ):
        record.cases.append(
            Case(
                f"relay S{step}",
                copy.deepcopy(world.relay),
                {},
                set_up_step(name_of_step, replies),
                replies["s00"],
            )
        )
        requests = getattr(world.relay, name_of_step)(replies)
        replies = {
            name: record.member(f"S{step + 1}", name, by_name(method), data)
            for name, data in requests.items()
        }
    record.cases.append(
        Case(
            "relay S4",
            copy.deepcopy(world.relay),
            {},
            set_up_step("confirmed", replies),
            replies["s00"],
        )
    )
    for name, data in world.relay.confirmed(replies).items():
        record.member("S5", name, by_name("activate"), data)
    for round_no, gone in ((1, ()), (2, ("s03",)), (3, ())):
        one_round(record, round_no, gone)
    for name in world.session.names:
        for package in world.relay.recheck_packages(name):
            reply = record.member("recheck", name, by_name("check_chunks"), package)
            world.relay.add_recheck(name, reply)
    settlement = world.relay.settlement()
    record.member("settlement", "s00", by_name("settle"), settlement)
    aborted = world.relay.open_round(4, model_hash=MODEL)
    world.members["s00"].open_round(aborted["s00"], model_hash=MODEL)
    abort = world.relay.abort("enough")
    record.member("abort", "s00", by_name("accept_result"), abort)
    world.members["s01"].accept_result(abort)
    for name, data in world.relay.refill_requests().items():
        reply = record.member("refill", name, by_name("refill"), data)
        record.relay("refill", from_site("add_refill", name), reply)
    snapshot = world.relay.snapshot()
    record.cases.append(
        Case(
            "relay snapshot",
            world.relay,
            {},
            lambda relay, data: Relay.restore(relay.session, data),
            snapshot,
        )
    )
    return tuple(record.cases)


def one_round(record: Recorder, round_no: int, gone: tuple[str, ...]) -> None:
    """R0 to the result, every message recorded."""
    world, relay = record.world, record.world.relay
    vectors = world.vectors(round_no)
    r0 = relay.open_round(round_no, model_hash=MODEL)

    def open_and_mask(member: Member, data: bytes) -> bytes:
        ticket = member.open_round(data, model_hash=MODEL)
        return ticket.reply or member.masked_input(ticket, vectors[member.name])

    for name in sorted(set(r0) - set(gone)):
        reply = record.member("R0", name, open_and_mask, r0[name])
        record.relay("R1", from_site("add_masked", name), reply)
    for name, data in relay.close_inputs().items():
        reply = record.member("R2", name, by_name("agree"), data)
        record.relay("R2", from_site("add_agreement", name), reply)
    for name, data in relay.close_agreement().items():
        reply = record.member("R3", name, by_name("release"), data)
        record.relay("R3", from_site("add_release", name), reply)
    relay.unmask()
    result = relay.publish()
    for name in world.session.names:
        record.member("result", name, by_name("accept_result"), result)


LABELS = sorted(
    {f"member {step}" for step in ("S2", "S3", "S4", "S5", "R0", "R2", "R3")}
    | {f"member {step}" for step in ("result", "abort", "recheck", "settlement", "refill")}
    | {f"relay {step}" for step in ("S1", "S2", "S3", "S4", "R1", "R2", "R3")}
    | {"relay refill", "relay snapshot"}
)


def test_there_is_a_case_for_every_message() -> None:
    assert sorted({case.label for case in cases()}) == LABELS


@st.composite
def meddled(draw: st.DrawFn, data: bytes, others: tuple[bytes, ...]) -> bytes:
    """The bytes, changed in one of the ways in which hostile bytes differ."""
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["cut", "longer", "flip", "noise", "length", "splice", "other"]))
    if how == "cut":
        return data[:at]
    if how == "longer":
        return data + draw(st.binary(min_size=1, max_size=40))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if how == "noise":
        noise = draw(st.binary(min_size=1, max_size=40))
        return data[:at] + noise + data[at + len(noise) :]
    if how == "length":
        return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
    other = draw(st.sampled_from(others))
    return other if how == "other" else data[:at] + other[at:]


@pytest.mark.parametrize("label", LABELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(choice=st.data())
def test_meddled_bytes_are_refused_without_a_trace(label: str, choice: st.DataObject) -> None:
    ours = [case for case in cases() if case.label == label]
    case = choice.draw(st.sampled_from(ours))
    others = tuple(other.data for other in cases())
    data = choice.draw(meddled(case.data, others))
    if data in {other.data for other in ours}:
        return
    try:
        answer = case.deliver(data)
    except (ProtocolError, ConfigError) as error:  # ConfigError: a checkpoint of another session
        message = str(error)
    else:
        message = accepted(case, answer)
    assert message
    assert "\n" not in message


def accepted(case: Case, answer: object) -> str:
    """Bytes that were taken although they differ must not have changed anything that matters."""
    if isinstance(answer, Outcome):
        assert isinstance(case.honest, Outcome)
        # A false sum is taken, and is another history: the next R0, and the recheck, refuse it.
        if answer.transcript == case.honest.transcript:
            np.testing.assert_array_equal(answer.total, case.honest.total)
    elif case.label in {"member R2", "member R3"}:
        assert answer == case.honest
    else:
        # What rides with a round is refused apart; no signature covers a relay's own checkpoint.
        assert case.label in RIDES | {"member refill", "relay snapshot"}
    return "accepted"


@pytest.mark.parametrize("label", LABELS)
def test_the_honest_bytes_pass(label: str) -> None:
    """The positive control of the test above."""
    for case in cases():
        if case.label == label:
            case.deliver(case.data)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("data", [b"", b"FW", bytes(64), b"\xff" * 64])
def test_short_noise_is_refused(label: str, data: bytes) -> None:
    case = next(case for case in cases() if case.label == label)
    if label in RIDES and label.startswith("relay refill"):
        case.deliver(data)  # logged as a fault
        return
    if label == "member refill" and not data:
        case.deliver(data)  # no step is due
        return
    with pytest.raises(ProtocolError):
        case.deliver(data)
