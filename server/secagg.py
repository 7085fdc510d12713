"""The relay's side of the secure sum: routes, adds, unmasks; holds no key.

    relay = Relay(session)
    s1 = relay.advertised({name: member.advertise(), ...})   # all sites' replies in, requests out
    s2 = relay.encapsulated({name: member.encapsulate(s1[name]), ...})
    s3 = relay.dealt({name: member.prekeys(s2[name]), ...})
    s4 = relay.confirmed({name: member.confirm(s3[name]), ...})  # then member.activate(s4[name])

    r0 = relay.open_round(1, model_hash=...)     # one request for each site of the cohort
    relay.add_masked(name, reply)                # as they come
    r2 = relay.close_inputs()                    # CohortError: relay.abort("...")
    relay.add_agreement(name, reply)
    r3 = relay.close_agreement()                 # {} when nobody dropped out
    relay.add_release(name, reply)
    total = relay.unmask()
    result = relay.publish()                     # to all sites, absent ones included, in order

The recheck of the published sum rides with the next round's R0 and R1. After the last round, and
where `spare_checkers` was set too low for the dropouts, it is sent apart:

    for name in names:
        for package in relay.recheck_packages(name):
            relay.add_recheck(name, member.check_chunks(package))
    settlement = relay.settlement()              # after the last round: member.settle(settlement)

A reply that is refused raises an error that names the site; the round goes on without it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from server.lazy import Lazy
from server.secagg_prekeys import Prekeys, SavedPrekeys
from server.secagg_recheck import Kept, Openings, Rechecks
from server.secagg_refill import Refill, Stage
from server.secagg_round import RelayRound, Underway
from server.secagg_setup import Deal, check_deal, deliveries
from shared.errors import CohortError, ConfigError, ProtocolError
from shared.messages import U32, Blob, Many, Maybe, Nested, decode, encode, message
from shared.secagg import transcript
from shared.secagg.messages import (
    MAX_REASON_BYTES,
    S1,
    S2,
    Abort,
    Attestation,
    Descriptor,
    Hash,
    Settlement,
)
from shared.secagg.ring import RingVector
from shared.secagg.session import Session

_NO_ROUND = "no round is open"


@message(0x0302)
@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a relay needs to go on after a restart; it holds no secret that sites did not open."""

    session: Hash
    transcript: Hash
    next_round: Annotated[int, U32]
    prekeys: Annotated[SavedPrekeys, Nested(SavedPrekeys)]
    open_descriptor: Annotated[bytes, Blob()]
    kept: Annotated[Kept | None, Maybe(Nested(Kept))]
    attestations: Annotated[tuple[Attestation, ...], Many(Nested(Attestation))]


class Relay:
    """The coordinator's part in one epoch."""

    def __init__(self, session: Session, *, spare_checkers: int | None = None) -> None:
        """Begin an epoch; `restore` goes on with one.

        Args:
            spare_checkers: Sites beyond c + 1 that recompute each chunk of a published sum, so
                that dropouts cost no extra exchange. Default N - t, all dropouts that a round
                survives; each costs every site one more vector of download a round.
        """
        if spare_checkers is None:
            spare_checkers = len(session.roster) - session.threshold
        self.session = session
        self.transcript = session.start
        self.next_round = session.first_round
        self.faults: list[str] = []
        self._s1: dict[str, Deal] = {}
        self._first: Refill | None = None
        self._prekeys = Prekeys(session, bytes(32), self.faults)
        self._round: RelayRound | None = None
        self._rechecks: Rechecks | None = None
        self._spare_checkers = spare_checkers

    # Set-up.

    def advertised(self, replies: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """S1 of every site in, each site's request for S2 out.

        Raises:
            ProtocolError: a site is missing or its message is bad; it is named.
        """
        self._s1 = self._deals(replies, S1)
        return Lazy(self.session.names, partial(deliveries, self.session, self._s1))

    def encapsulated(self, replies: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """S2 of every site in, each site's request for S3 out."""
        s2 = self._deals(replies, S2)
        names = self.session.names
        setup = transcript.setup_transcript(
            self.session, (self._s1[n].digest for n in names), (s2[n].digest for n in names)
        )
        self._prekeys = Prekeys(self.session, setup, self.faults)
        self._first = Refill(self.session, setup, 0, self.session.first_round)
        return Lazy(names, partial(deliveries, self.session, s2))

    def dealt(self, replies: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """S3 of every site in, each site's request for S4 out."""
        return self._first_batch(replies, Stage.DEALING)

    def confirmed(self, replies: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """S4 of every site in, each site's S5 out; rounds may begin once a site has its S5."""
        return self._first_batch(replies, Stage.CONFIRMING)

    # Rounds.

    def open_round(
        self, round_no: int, *, model_hash: bytes, cohort: tuple[str, ...] | None = None
    ) -> Mapping[str, bytes]:
        """R0 for each site of the cohort (default: all sites).

        Sites without prekeys for this round are left out of it; while a refill is under way they
        get a request all the same, and answer with prekeys for the next batch.

        A request is put together when it is taken out of the mapping: with large vectors, send
        one after the other, since each holds a recheck package of c + 1 vectors or more.

        Raises:
            ConfigError: the round number is used up.
            CohortError: fewer than t sites of the cohort have prekeys.
            ProtocolError: the last round is still open, or the prekeys do not cover this one.
        """
        if self._round is not None:
            raise ProtocolError(f"round {self._round.what.round} is open; publish or abort it")
        if round_no < self.next_round:
            raise ConfigError(f"round {round_no} is used up; {self.next_round} is the next")
        present = cohort or self.session.names
        self._prekeys.advance(round_no, present)
        batch = self._prekeys.batch_of(round_no)
        chosen = tuple(name for name in batch.members if name in present)
        if len(chosen) < self.session.threshold:
            raise CohortError(
                f"round {round_no}: {len(chosen)} sites of the cohort have prekeys; "
                f"{self.session.threshold} are needed"
            )
        descriptor = Descriptor(
            session=self.session.hash(),
            batch=batch.transcript,
            round=round_no,
            model=model_hash,
            transcript=self.transcript,
            cohort=chosen,
        )
        self._round = RelayRound(self.session, batch, encode(descriptor))
        self.next_round = round_no + 1
        steps = {name: self._prekeys.request(name) for name in present}
        steps = {name: step for name, step in steps.items() if step or name in chosen}
        work = self._rechecks.assign(chosen, self._spare_checkers) if self._rechecks else {}
        return Openings(self._round.descriptor, steps, self._rechecks, work)

    def add_masked(self, name: str, reply: bytes) -> None:
        """Add one site's R1; ProtocolError names the site when it is late, forged or malformed."""
        if name not in self._open().what.cohort:
            self.add_refill(name, self._open().beside(name, reply))
            return
        refill, attestation = self._open().add_masked(name, reply)
        if refill:
            self.add_refill(name, refill)
        if attestation:
            self.add_recheck(name, attestation)

    def close_inputs(self) -> dict[str, bytes]:
        """R2 for each site of U3.

        Raises:
            CohortError: too few vectors came, or too few sites rechecked the sum before; then
                `recheck_packages` first, or abort.
        """
        opened, rechecks = self._open(), self._rechecks
        if rechecks is not None and not rechecks.complete and not opened.goes_on:
            raise CohortError(
                "too few sites rechecked the last published sum for the others to go on; send "
                "recheck_packages to the sites whose vectors came"
            )
        return opened.close_inputs(rechecks.attestations if rechecks else ())

    def add_agreement(self, name: str, reply: bytes) -> None:
        """Take one site's answer to R2; ProtocolError names the site."""
        self._open().add_agreement(name, reply)

    def close_agreement(self) -> dict[str, bytes]:
        """R3 for each site that signed, {} when nobody dropped out; CohortError."""
        return self._open().close_agreement()

    def add_release(self, name: str, reply: bytes) -> None:
        """Take one site's answer to R3; ProtocolError names the site."""
        self._open().add_release(name, reply)

    def unmask(self, *, threads: int = 1) -> RingVector:
        """The sum over U3, uint32 (d,); CohortError, or ProtocolError that names a liar."""
        return self._open().unmask(threads)

    def publish(self) -> bytes:
        """The Result for all sites; ends the round."""
        ended = self._open()
        result, self.transcript = ended.result()
        self._rechecks = ended.rechecks(self.transcript)
        self._round = None
        return result

    def abort(self, reason: str) -> bytes:
        """The Abort for all sites; ends the round."""
        ended = self._open()
        self.transcript = transcript.aborted_transcript(self.transcript, ended.digest)
        self._round = None
        readable = "".join(c for c in reason if c.isascii() and c.isprintable())
        return encode(Abort(ended.descriptor, readable[:MAX_REASON_BYTES]))

    @property
    def unchecked(self) -> bool:
        """Whether too few sites have recomputed the last published sum so far."""
        return self._rechecks is not None and not self._rechecks.complete

    def recheck_packages(self, name: str, among: Collection[str] = ()) -> tuple[bytes, ...]:
        """What one site is to recompute apart from a round's R0; empty when nothing is missing.

        In a round: the sites whose vectors came, once they all came. After the last: the sites of
        `among`, or all.
        """
        rechecks = self._rechecks
        if rechecks is None or not self.unchecked:
            return ()
        present = self._round.received if self._round else among or self.session.names
        if self._round is not None and not present:
            return ()
        chunks = rechecks.assign(present, 0).get(name)
        return (rechecks.package(chunks),) if chunks else ()

    def add_recheck(self, name: str, reply: bytes) -> bool:
        """Take a site's attestation; a bad one is noted among the faults and counts for nothing.

        Returns:
            Whether it was a good one.
        """
        try:
            if self._rechecks is None:
                raise ProtocolError(f"{name}: no sum waits for a recheck")
            self._rechecks.add(name, reply)
        except ProtocolError as error:
            self.faults.append(f"recheck: {error}")
            return False
        return True

    def settlement(self) -> bytes:
        """After the last round, for `Member.settle`: who rechecked the last sum.

        Raises:
            CohortError: too few did so far.
        """
        if self._rechecks is None or not self._rechecks.complete:
            raise CohortError("too few sites rechecked the last published sum")
        return encode(Settlement(self._rechecks.attestations))

    @property
    def cohort(self) -> tuple[str, ...]:
        """The sites of the open round."""
        return self._open().what.cohort

    @property
    def contributors(self) -> tuple[str, ...]:
        """U3 of the open round, once inputs are closed."""
        return self._open().contributors

    @property
    def batch_records(self) -> tuple[bytes, bytes]:
        """The deals and the activation of the batch that the open round uses, for the evidence."""
        batch = self._open().batch
        return batch.seen, batch.activation

    @property
    def attestations(self) -> tuple[Attestation, ...]:
        """Who recomputed the last published sum so far."""
        return self._rechecks.attestations if self._rechecks else ()

    # Refills; they ride with rounds, and can be sent apart when the prekeys have run out.

    def covers(self, round_no: int) -> bool:
        """Whether confirmed prekeys reach this round."""
        return self._prekeys.covers(round_no)

    def refill_requests(self, cohort: tuple[str, ...] | None = None) -> dict[str, bytes]:
        """One step of a refill outside a round, for `Member.refill`; {} when none is due."""
        present = cohort or self.session.names
        self._prekeys.advance(self.next_round, present)
        steps = {name: self._prekeys.request(name) for name in present}
        return {name: step for name, step in steps.items() if step}

    def add_refill(self, name: str, reply: bytes) -> None:
        """Take a site's answers to a refill's steps; a bad one spoils the batch, not the round."""
        self._prekeys.reply(name, reply)

    # Checkpoints.

    def go_on(self, underway: bytes) -> tuple[str, ...]:
        """Right after `open_round`: take the round up where a relay that was killed left it.

        Args:
            underway: Its last `underway`.

        Returns:
            The sites to ask for their vectors once more; the others count as dropped.

        Raises:
            ProtocolError: it is of another round, or damaged.
        """
        return self._open().go_on(decode(Underway, underway))

    def underway(self) -> bytes:
        """For `go_on`; store it after `close_inputs` and after `close_agreement`, **before** their
        bytes leave: a site that signed one set signs no other.
        """
        return encode(self._open().underway())

    @property
    def vectors(self) -> tuple[bytes, ...]:
        """The masked vectors behind the last sum, for a checkpoint that keeps them apart."""
        kept = self._rechecks.kept if self._rechecks else None
        return tuple(kept.wires[e.name] for e in kept.contributions) if kept else ()

    def snapshot(self, *, vectors: bool = True) -> bytes:
        """Everything, for a checkpoint, without the masked vectors where these are kept apart.

        Taken between two rounds it is enough to repeat the next one: `open_round` then makes the
        very same requests, and sites answer those from their stores. Taken after `open_round`, the
        open round can only be aborted after `restore`.
        """
        kept = self._rechecks.kept if self._rechecks else None
        if kept is not None and not vectors:
            kept = replace(kept, wires={})
        return encode(
            Snapshot(
                session=self.session.hash(),
                transcript=self.transcript,
                next_round=self.next_round,
                prekeys=self._prekeys.save(),
                open_descriptor=self._round.descriptor if self._round else b"",
                kept=kept,
                attestations=self._rechecks.attestations if self._rechecks else (),
            )
        )

    @classmethod
    def restore(cls, session: Session, data: bytes, vectors: Sequence[bytes] = ()) -> Relay:
        """Go on from a `snapshot`; `vectors` where it was taken without.

        Raises:
            ConfigError: it is of another session.
            ProtocolError: it is damaged.
        """
        saved = decode(Snapshot, data)
        if saved.session != session.hash():
            raise ConfigError("the checkpoint is of another session")
        relay = cls(session)
        relay.transcript, relay.next_round = saved.transcript, saved.next_round
        relay._prekeys = Prekeys.restore(session, saved.prekeys, relay.faults)
        if saved.kept is not None:
            relay._rechecks = Rechecks(session, _whole(saved.kept, vectors))
            relay._rechecks.restore(saved.attestations)
        if saved.open_descriptor:
            batch = relay._prekeys.batch_of(decode(Descriptor, saved.open_descriptor).round)
            relay._round = RelayRound(session, batch, saved.open_descriptor)
        return relay

    def _deals(self, replies: Mapping[str, bytes], step: int) -> dict[str, Deal]:
        missing = set(self.session.names) - set(replies)
        if missing:
            raise ProtocolError(
                f"S{step} is missing from {sorted(missing)}; set-up needs all sites"
            )
        place = (step, 0, self.session.first_round)
        return {n: check_deal(self.session, n, replies[n], place) for n in self.session.names}

    def _first_batch(self, replies: Mapping[str, bytes], stage: Stage) -> Mapping[str, bytes]:
        refill = self._first
        if refill is None or refill.stage is not stage:
            raise ProtocolError("the steps of the set-up are out of order")
        missing = set(self.session.names) - set(replies)
        if missing:
            raise ProtocolError(f"set-up needs all sites; missing: {sorted(missing)}")
        for name in self.session.names:
            refill.reply(name, replies[name])
        if stage is Stage.DEALING:
            refill.close_dealing()
            return Lazy(self.session.names, refill.request)
        batch = refill.finish()
        self._prekeys.add_first(batch)
        self._first = None
        self.transcript = transcript.first_transcript(self.session, batch.transcript)
        return dict.fromkeys(self.session.names, batch.activation)

    def _open(self) -> RelayRound:
        if self._round is None:
            raise ProtocolError(_NO_ROUND)
        return self._round


def _whole(kept: Kept, vectors: Sequence[bytes]) -> Kept:
    names = [entry.name for entry in kept.contributions]
    if vectors and len(vectors) != len(names):
        raise ProtocolError(f"{len(vectors)} masked vectors are kept of {len(names)}")
    wires = dict(zip(names, vectors, strict=True)) if vectors else kept.wires
    if set(wires) != set(names):
        raise ProtocolError("the masked vectors behind the last sum are missing")
    return replace(kept, wires=wires)
