"""Real members and a real relay by function calls, with everything that the relay sees kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from client import secagg_round
from client.secagg import Member
from server.secagg import Relay
from shared.identity import Identity
from shared.messages import decode
from shared.plan import StudyPlan
from shared.secagg import transcript
from shared.secagg.graph import mask_degree
from shared.secagg.masking import add_masks
from shared.secagg.messages import Masked
from shared.secagg.ring import RingVector
from shared.secagg.session import Session
from shared.secagg.unmask import MaskKeys

MODEL = bytes(range(32))
PREKEY_ROUNDS = 16
MOST_SITES = 12


def session_like(plan: StudyPlan, length: int, roster: Mapping[str, Identity]) -> Session:
    """A session with the plan's ring, threshold and colluders; of at most twelve sites.

    A larger cohort is played by its first twelve, with the threshold that they need.
    """
    names = plan.cohort.names[:MOST_SITES]
    c = min(plan.cohort.colluders, len(names) - 2)
    t = plan.cohort.threshold if names == plan.cohort.names else (len(names) + c) // 2 + 1
    return Session(
        run_id="audit",
        plan_sha256=bytes.fromhex(plan.sha256),
        roster=tuple((name, roster[name].public) for name in names),
        threshold=t,
        colluders=c,
        degree=mask_degree(len(names), t, c),
        bits=plan.secure_sum.bits,
        length=length,
        prekey_rounds=PREKEY_ROUNDS,
        prg=plan.secure_sum.prg,
    )


@dataclass(frozen=True)
class Seen:
    """What a server that only watches knows after a round, and the pair keys behind it.

    Attributes:
        uploads: Each site's masked vector.
        opened: The same without the self mask, whose key the threshold opened.
        digest: D, of the round.
        pairs: Keystream key of the mask that two sites share, by (one, other), noted while masking.
        total: The published sum.

    The newest R0 stays in `SumPlay.template`.
    """

    uploads: dict[str, RingVector]
    opened: dict[str, RingVector]
    digest: bytes
    pairs: dict[tuple[str, str], bytes]
    total: RingVector


@dataclass
class SumPlay:
    """A session that is set up and plays rounds."""

    plan: StudyPlan
    length: int
    session: Session = field(init=False)
    relay: Relay = field(init=False)
    members: dict[str, Member] = field(init=False)
    template: bytes = b""

    def __post_init__(self) -> None:
        roster = {name: Identity.generate() for name in self.plan.cohort.names[:MOST_SITES]}
        self.session = session_like(self.plan, self.length, roster)
        self.relay = Relay(self.session)
        self.members = {n: Member(self.session, roster[n], {}) for n in self.session.names}
        self._set_up()

    def _set_up(self) -> None:
        relay, members = self.relay, self.members
        asked = relay.advertised({n: m.advertise() for n, m in members.items()})
        asked = relay.encapsulated({n: m.encapsulate(asked[n]) for n, m in members.items()})
        asked = relay.dealt({n: m.prekeys(asked[n]) for n, m in members.items()})
        asked = relay.confirmed({n: m.confirm(asked[n]) for n, m in members.items()})
        for name, member in members.items():
            member.activate(asked[name])

    def play(self, round_no: int, vectors: Mapping[str, RingVector]) -> Seen:
        """One whole round, honestly played."""
        relay, members = self.relay, self.members
        r0 = relay.open_round(round_no, model_hash=MODEL)
        self.template = r0[self.session.names[0]]
        replies: dict[str, bytes] = {}
        notes = _Notes()
        for name in self.session.names:
            ticket = members[name].open_round(r0[name], model_hash=MODEL)
            with _watching(notes):
                replies[name] = members[name].masked_input(ticket, vectors[name])
            relay.add_masked(name, replies[name])
        for name in r0:
            for package in relay.recheck_packages(name):
                relay.add_recheck(name, members[name].check_chunks(package))
        for name, request in relay.close_inputs().items():
            relay.add_agreement(name, members[name].agree(request))
        relay.close_agreement()
        relay.unmask()
        result = relay.publish()
        outcomes = {name: member.accept_result(result) for name, member in members.items()}
        total = outcomes[self.session.names[0]].total
        if total is None:
            raise RuntimeError("an honest round gave no sum")
        uploads = {n: self._vector(reply) for n, reply in replies.items()}
        opened = {n: v.copy() for n, v in uploads.items()}
        for name, vector in opened.items():
            self.subtract(vector, notes.own[name], 1)
        return Seen(uploads, opened, notes.digest, notes.pairs, total)

    def _vector(self, reply: bytes) -> RingVector:
        return self.session.ring.from_wire(decode(Masked, reply).vector, self.length)

    def subtract(self, vector: RingVector, key: bytes, sign: int) -> None:
        """Take a mask, which its site added with this sign, off a vector in place."""
        plus, minus = ([key], []) if sign < 0 else ([], [key])
        add_masks(vector, plus, minus, self.session.bits, prg=self.session.prg)

    def sign(self, name: str, peer: str) -> int:
        """Whether a site adds (1) or subtracts (-1) the mask that it shares with a peer."""
        return 1 if self.session.index[name] < self.session.index[peer] else -1


@dataclass
class _Notes:
    """Mask keys of a round, as the sites had them before they were erased."""

    digest: bytes = b""
    own: dict[str, bytes] = field(default_factory=dict)
    pairs: dict[tuple[str, str], bytes] = field(default_factory=dict)


@contextmanager
def _watching(notes: _Notes) -> Iterator[None]:
    original = vars(secagg_round)["mask_keys"]

    def noted(
        session: Session, name: str, digest: bytes, self_key: bytes, pairs: Mapping[str, bytes]
    ) -> MaskKeys:
        notes.digest = digest
        notes.own[name] = transcript.self_mask_key(self_key, digest)
        for peer, key in pairs.items():
            notes.pairs[name, peer] = transcript.pair_mask_key(key, digest)
        keys: MaskKeys = original(session, name, digest, self_key, pairs)
        return keys

    vars(secagg_round)["mask_keys"] = noted
    try:
        yield
    finally:
        vars(secagg_round)["mask_keys"] = original


def zeros(play: SumPlay) -> dict[str, RingVector]:
    """The input that hides nothing by itself."""
    return {name: np.zeros(play.length, np.uint32) for name in play.session.names}
