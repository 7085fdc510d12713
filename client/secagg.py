"""The member's side of the secure sum: one site's state machine, without any I/O.

A caller wraps each call in one durable transaction of the store, which commits **before** the
returned bytes leave the site. A member that is rebuilt from the same store goes on exactly: it
gives the same bytes to the same request, and refuses what it must. PROTOCOL.md has the steps.

    member = Member(session, identity, store)
    S1 advertise   S2 encapsulate   S3 prekeys   S4 confirm   S5 activate
    ticket = member.open_round(r0, model_hash=...)          # R0
    reply = ticket.reply or member.masked_input(ticket, vector)   # R1
    member.agree(r2); member.release(r3)                    # R2, and R3 after dropouts
    member.accept_result(result)
    member.check_chunks(package); member.settle(settlement)       # after the last round
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import MutableMapping, Sequence

from client import (
    secagg_batches,
    secagg_end,
    secagg_epoch,
    secagg_recheck,
    secagg_round,
    secagg_setup,
)
from client.secagg_end import Outcome
from client.secagg_epoch import check_vouchers
from client.secagg_round import RoundTicket
from client.secagg_state import PROGRESS, SESSION, Progress, Site
from shared.errors import ConfigError, ProtocolError
from shared.identity import Identity
from shared.messages import decode
from shared.secagg.keys import Random
from shared.secagg.masking import Source
from shared.secagg.messages import Settlement
from shared.secagg.ring import RingVector
from shared.secagg.session import Session

__all__ = ["Member", "Outcome", "RoundTicket", "check_vouchers"]


class Member:
    """One site's part in one epoch; all of its state is in the store."""

    def __init__(
        self,
        session: Session,
        identity: Identity,
        store: MutableMapping[str, bytes],
        random: Random = os.urandom,
    ) -> None:
        """Begin an epoch on an empty store, or go on with the one that the store is of.

        Raises:
            ConfigError: the identity is not in the roster, or the store is of another session.
        """
        names = [name for name, public in session.roster if public == identity.public]
        if not names:
            raise ConfigError("this site's identity is not in the roster of the session")
        self._site = Site(session, identity, names[0], store, random)
        if store.setdefault(SESSION, session.hash()) != session.hash():
            raise ConfigError("the store is of another session; each epoch has a store of its own")
        if PROGRESS not in store:
            first = session.first_round
            start = Progress(first, first, first, session.start, False, False, bytes(32), None)
            self._site.save(PROGRESS, start)

    def advertise(self) -> bytes:
        """S1: this site's ephemeral public keys, signed."""
        return secagg_setup.advertise(self._checked())

    def encapsulate(self, s1: bytes) -> bytes:
        """S2: KEM ciphertexts, after everyone's keys were checked."""
        return secagg_setup.encapsulate(self._checked(), s1)

    def prekeys(self, s2: bytes) -> bytes:
        """S3: prekeys of the first batch; the ephemeral keys are erased."""
        return secagg_setup.prekeys(self._checked(), s2)

    def confirm(self, s3: bytes) -> bytes:
        """S4: a signature over the set-up transcript, after all shares were checked."""
        return secagg_setup.confirm(self._checked(), s3)

    def activate(self, s4: bytes) -> None:
        """S5: everyone signed the same transcript; rounds may begin."""
        secagg_setup.activate(self._checked(), s4)

    def refill(self, request: bytes) -> bytes:
        """One step of a refill outside a round; within rounds it rides with R0 and R1."""
        return secagg_batches.refill(self._checked(), request)

    def open_round(self, r0: bytes, *, model_hash: bytes) -> RoundTicket:
        """R0: a ticket for this round, or one with the cached reply if it was answered before.

        Args:
            r0: What the relay made for this site.
            model_hash: 32 bytes over the model and the optimiser's state that this site itself
                computed from the published sums.

        Raises:
            ProtocolError: a used or older round, another model, history, run or cohort.
            CohortError: the cohort is too small.
        """
        return secagg_round.open_round(self._checked(), r0, model_hash)

    def masked_input(
        self, ticket: RoundTicket, source: RingVector | Source, *, threads: int = 1
    ) -> bytes:
        """R1: the masked vector, signed.

        Args:
            ticket: From `open_round`; it serves once.
            source: uint32, shape (d,), below 2^bits, or a source that quantises as it is masked.
            threads: 1 or 2, for large vectors.
        """
        return secagg_round.masked_input(self._checked(), ticket, source, threads)

    def agree(self, r2: bytes) -> bytes:
        """R2: this site's one signature over U3; with its self-mask shares if nobody is missing.

        Raises:
            ProtocolError: U3 is too small, is not of this round, holds a contribution that its
                site did not sign, or is another one than was signed before; or a recheck is due.
        """
        return secagg_round.agree(self._checked(), r2)

    def release(self, r3: bytes) -> bytes:
        """R3: self-mask shares of U3 and recovery shares of the rest, on t signatures.

        Raises:
            ProtocolError: fewer than t sites signed the very set that this site signed, or the
                shares were given out.
        """
        return secagg_round.release(self._checked(), r3)

    def accept_result(self, result: bytes) -> Outcome:
        """End a round, also one that this site missed; the same bytes give the same outcome.

        Raises:
            ProtocolError: another history or set than this site knows, fewer than t signatures,
                or this site's own signature that its state does not know (restored from an older
                copy): then it refuses everything until a new epoch.
        """
        return secagg_end.accept_result(self._checked(), result)

    def check_chunks(self, package: bytes) -> bytes:
        """Recompute chunks of the last published sum, and sign that they held.

        Packages ordinarily ride with R0 and their answers with R1; this is for the ones that are
        sent apart: after a checker dropped out, and after the last round.

        Raises:
            ProtocolError: the published sum is false, or the package is.
        """
        return secagg_recheck.check_chunks(self._checked(), package)

    def settle(self, settlement: bytes) -> None:
        """After the last round: check that c + 1 sites recomputed each chunk of the last sum.

        Raises:
            ProtocolError: they did not; the model of the last round is not to be used.
        """
        attestations = decode(Settlement, settlement).attestations
        secagg_recheck.settle(self._checked(), attestations)

    def vouch(self, following: Session, *, model_hash: bytes) -> bytes:
        """Sign that the next epoch goes on from here with this model; see `check_vouchers`.

        Raises:
            ProtocolError: it does not, or the last published sum is not settled.
        """
        return secagg_epoch.vouch(self._checked(), following, model_hash)

    @property
    def name(self) -> str:
        """This site's name in the roster."""
        return self._site.name

    @property
    def settled(self) -> bool:
        """Whether the last published sum is known to be the sum of what the sites signed."""
        return self._progress().unsettled is None

    @property
    def transcript(self) -> bytes:
        """T, the chain over all rounds so far; 32 bytes."""
        return self._progress().transcript

    def taken(self, results: Sequence[bytes]) -> int:
        """How many of these results are behind this site, which ended its last round with one."""
        if len(results) < 2:
            return 0  # `accept_result` itself knows the last one again
        last = self._progress().last_result
        hashes = [hashlib.sha256(result).digest() for result in results]
        return hashes.index(last) + 1 if last in hashes else 0

    @property
    def active(self) -> bool:
        """Whether the set-up is complete."""
        return self._progress().active

    @property
    def lost(self) -> bool:
        """Whether the state is known to be older than this site's own signatures."""
        return self._progress().lost

    @property
    def next_round(self) -> int:
        """The lowest round number that this site may still open."""
        return self._progress().next_round

    def _progress(self) -> Progress:
        return self._site.need(Progress, PROGRESS, "the store is damaged")

    def _checked(self) -> Site:
        if self._progress().lost:
            raise ProtocolError(
                f"{self.name}: its state is older than its own signatures; it may join only with "
                "a new epoch"
            )
        return self._site
