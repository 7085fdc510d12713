"""Runs members against a relay in plain function calls, for the tests to meddle with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from client.secagg import Member, Outcome
from server.secagg import Relay
from shared.identity import Identity
from shared.secagg.graph import mask_degree
from shared.secagg.ring import RingVector
from shared.secagg.session import Session

MODEL = bytes(range(32))


def identities(n: int) -> dict[str, Identity]:
    """Sites "s00", "s01", ... with fixed keys: tests only."""
    return {f"s{i:02d}": Identity.from_bytes(bytes([i + 1]) * 32) for i in range(n)}


def make_session(
    n: int = 4, threshold: int | None = None, colluders: int = 1, **changes: object
) -> Session:
    """A small session; `changes` replace fields."""
    threshold = threshold if threshold is not None else max((n + colluders) // 2 + 1, colluders + 2)
    fields: dict[str, object] = {
        "run_id": "test-run",
        "plan_sha256": bytes(32),
        "roster": tuple((name, who.public) for name, who in sorted(identities(n).items())),
        "threshold": threshold,
        "colluders": colluders,
        "degree": mask_degree(n, threshold, colluders),
        "bits": 24,
        "length": 5,
        "prekey_rounds": 8,
    }
    return Session(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class World:
    """A session, its members with their stores, and a relay."""

    session: Session
    stores: dict[str, dict[str, bytes]] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    relay: Relay = field(init=False)
    results: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.relay = Relay(self.session)
        for name in self.session.names:
            self.stores.setdefault(name, {})
            self.restart(name)

    def restart(self, name: str) -> None:
        """Forget the member, rebuild it from its store."""
        who = identities(len(self.session.roster))[name]
        self.members[name] = Member(self.session, who, self.stores[name])

    def fork(self) -> World:
        """A world that goes on from here on its own."""
        twin = World(self.session, {name: dict(store) for name, store in self.stores.items()})
        twin.relay = copy.deepcopy(self.relay)
        return twin

    def set_up(self, *, until: int = 5) -> dict[str, bytes]:
        """S1 to S5, or to an earlier step; returns the requests for the step that comes next."""
        members, relay = self.members, self.relay
        requests = relay.advertised({n: m.advertise() for n, m in members.items()})
        if until >= 2:
            requests = relay.encapsulated(
                {n: m.encapsulate(requests[n]) for n, m in members.items()}
            )
        if until >= 3:
            requests = relay.dealt({n: m.prekeys(requests[n]) for n, m in members.items()})
        if until >= 4:
            requests = relay.confirmed({n: m.confirm(requests[n]) for n, m in members.items()})
        if until >= 5:
            for name, member in members.items():
                member.activate(requests[name])
        return dict(requests)

    def inputs(
        self,
        round_no: int,
        *,
        gone: Iterable[str] = (),
        vectors: Mapping[str, RingVector] | None = None,
    ) -> dict[str, bytes]:
        """R0 and R1 of all but `gone`; returns R2's requests."""
        vectors = vectors or self.vectors(round_no)
        r0 = self.relay.open_round(round_no, model_hash=MODEL)
        for name in sorted(set(r0) - set(gone)):
            self.relay.add_masked(name, self.upload(name, r0[name], vectors[name]))
        return self.relay.close_inputs()

    def upload(self, name: str, r0: bytes, vector: RingVector) -> bytes:
        """R0 and R1 of one site."""
        ticket = self.members[name].open_round(r0, model_hash=MODEL)
        return ticket.reply or self.members[name].masked_input(ticket, vector)

    def vectors(self, seed: int) -> dict[str, RingVector]:
        """A different small vector for every site."""
        rng = np.random.default_rng(seed)
        size = self.session.length
        high = 1 << self.session.bits
        return {
            name: rng.integers(0, high, size, dtype=np.uint64).astype(np.uint32)
            for name in self.session.names
        }

    def run_round(
        self,
        round_no: int,
        vectors: Mapping[str, RingVector],
        *,
        lost_before_r1: Iterable[str] = (),
        lost_before_r2: Iterable[str] = (),
        lost_before_r3: Iterable[str] = (),
        cohort: tuple[str, ...] | None = None,
    ) -> dict[str, Outcome]:
        """One whole round; sites drop out where they are named. All sites get the result."""
        relay, gone = self.relay, set(lost_before_r1)
        r0 = relay.open_round(round_no, model_hash=MODEL, cohort=cohort)
        for name in sorted(set(r0) - gone):
            relay.add_masked(name, self.upload(name, r0[name], vectors[name]))
        for name in r0:
            for package in relay.recheck_packages(name):
                relay.add_recheck(name, self.members[name].check_chunks(package))
        r2 = relay.close_inputs()
        gone |= set(lost_before_r2)
        for name in sorted(set(r2) - gone):
            relay.add_agreement(name, self.members[name].agree(r2[name]))
        gone |= set(lost_before_r3)
        for name, request in relay.close_agreement().items():
            if name not in gone:
                relay.add_release(name, self.members[name].release(request))
        relay.unmask()
        return self.publish(relay.publish())

    def publish(self, result: bytes) -> dict[str, Outcome]:
        """Give a result or an abort to every site."""
        self.results.append(result)
        return {name: member.accept_result(result) for name, member in self.members.items()}


def ready(n: int = 4, threshold: int | None = None, colluders: int = 1, **changes: object) -> World:
    """A world after set-up."""
    world = World(make_session(n, threshold, colluders, **changes))
    world.set_up()
    return world


def plain_sum(
    session: Session, vectors: Mapping[str, RingVector], names: Iterable[str]
) -> RingVector:
    """What the secure sum must equal."""
    total = np.zeros(session.length, np.uint64)
    for name in names:
        total += vectors[name]
    return (total % (1 << session.bits)).astype(np.uint32)
