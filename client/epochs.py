"""The epochs of one run at one site: the one it is in, and the one that is being set up.

A site goes on in its epoch until the next one is activated; then keys and store of the old one are
erased. It takes a model from others only on the vouchers of t sites. PROTOCOL.md, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

from client.secagg import Member, check_vouchers
from client.store import Prefixed
from shared.errors import ProtocolError
from shared.evidence import Witness
from shared.identity import Identity
from shared.messages import decode, encode
from shared.optimizers import ModelState
from shared.plan import StudyPlan
from shared.secagg.session import Session
from shared.study import EpochTerms, first_terms, session_of, state_from_bytes

TERMS, PENDING, MODEL = "terms", "pending", "pending/model"
_RECORD = "pending/record/"

Keep = Callable[[bytes], None]


class Epochs:
    """What a site's store says of its epochs; made anew after every change from outside."""

    def __init__(
        self,
        *,
        plan: StudyPlan,
        run_id: str,
        identity: Identity,
        roster: Mapping[str, bytes],
        parameters: int,
        store: MutableMapping[str, bytes],
    ) -> None:
        """Go on with what the store holds; `roster` is the site's own, pinned one."""
        self._plan, self._run_id, self._identity = plan, run_id, identity
        self._roster, self._parameters, self._store = roster, parameters, store
        self.terms = self._terms(TERMS)
        self.member = self._member(self.terms)
        self._pending = self._terms(PENDING)
        self._next = self._member(self._pending) if self._pending else None

    @property
    def session(self) -> Session:
        """Of the epoch that the site is in, or of the plan's first one before any."""
        return self._session(self.terms or first_terms(self._plan))

    @property
    def number(self) -> int:
        """Of the epoch that the site is in; 0 before any."""
        return self.terms.epoch if self.terms else 0

    def join(
        self,
        terms: EpochTerms,
        state: ModelState,
        model: bytes,
        vouchers: Mapping[str, bytes],
    ) -> tuple[bytes, bytes]:
        """Begin to set an epoch up; the one that the site is in goes on until `activate`.

        Args:
            terms: The epoch, as the server proposes it.
            state: The site's own model, all results that it was sent applied.
            model: The model that a site without one is to take; read only then.
            vouchers: Who vouches for `model`.

        Returns:
            S1, and this site's voucher for its own model if it goes on from the epoch before.

        Raises:
            ProtocolError: another epoch than the server may begin, a model that t sites do not
                vouch for, or a history that is not this site's.
        """
        session, place = self._session(terms), encode(terms)
        if self._identity.public not in session.public.values():
            raise ProtocolError(f"epoch {terms.epoch} is to be set up without this site")
        if self._store.get(TERMS) == place:
            return self.member.advertise(), b""  # says that its keys are made
        again = self._store.get(PENDING) == place
        known = [t.epoch for t in (self.terms, self._pending) if t is not None]
        if not again and known and terms.epoch <= max(known):
            raise ProtocolError(
                f"epoch {terms.epoch} is over or being set up with other sites; a new one has a "
                "higher number"
            )
        voucher = b""
        if self.member.active and not self.member.lost and self.member.transcript == terms.start:
            voucher = self.member.vouch(session, model_hash=state.digest())
        elif self.member.active or terms.start != bytes(32):
            self._check_model(session, model, vouchers)
        if not again:
            self._forget_pending()
            if voucher == b"" and terms.start != bytes(32):
                self._store[MODEL] = model
            self._store[PENDING] = place
            self._pending, self._next = terms, self._member(terms)
        assert self._next is not None  # noqa: S101  # just made, or of the same terms
        return self._next.advertise(), voucher

    def setting_up(self, epoch: int) -> Member:
        """The member of the epoch that is being set up, or is complete and asked again."""
        if self._pending is not None and self._next is not None and self._pending.epoch == epoch:
            return self._next
        if epoch == self.number:
            return self.member
        raise ProtocolError(f"epoch {epoch} is not being set up at this site")

    def note(self, epoch: int, step: int, seen: bytes) -> None:
        """Keep a step of the set-up for the evidence, until the epoch is activated."""
        if self._pending is not None and self._pending.epoch == epoch:
            self._store[f"{_RECORD}{step}"] = seen

    def activate(self, epoch: int, activation: bytes, keep: Keep) -> ModelState | None:
        """S5: from here on the new epoch alone serves; a repeated one changes nothing.

        Returns:
            The model that this site took on vouchers, or None where its own goes on.

        Raises:
            ProtocolError: the members signed something else, or the site's own history has moved
                on since the epoch was proposed.
        """
        following = self._next
        if self._pending is None or following is None or self._pending.epoch != epoch:
            self.setting_up(epoch).activate(activation)
            return None
        model = self._store.get(MODEL)
        own = self.member
        moved = own.active and own.transcript != self._pending.start
        if model is None and moved:
            raise ProtocolError(f"epoch {epoch} does not go on from where this site stands")
        if own.active and own.next_round > self._pending.first_round:
            raise ProtocolError(f"epoch {epoch} uses rounds again that this site has opened")
        following.activate(activation)
        witness = Witness(self._session(self._pending), keep)
        witness.epoch()
        for step in (2, 3, 4):
            witness.deliveries(self._store[f"{_RECORD}{step}"])
        witness.activation(activation)
        if self.terms is not None:
            self._erase(self.terms)
        self._store[TERMS] = self._store[PENDING]
        self.terms, self.member = self._pending, following
        self._pending = self._next = None
        for name in [n for n in self._store if n == PENDING or n.startswith(PENDING + "/")]:
            del self._store[name]
        return state_from_bytes(model) if model is not None else None

    def _check_model(self, session: Session, model: bytes, vouchers: Mapping[str, bytes]) -> None:
        if self.member.active and self.member.next_round > session.first_round:
            raise ProtocolError(
                f"epoch {session.epoch} begins at round {session.first_round}, which this site has "
                "passed"
            )
        if not model:
            raise ProtocolError(
                f"epoch {session.epoch} goes on from a history that is not this site's; it takes a "
                "model only on the vouchers of other sites"
            )
        check_vouchers(session, state_from_bytes(model).digest(), vouchers)

    def _forget_pending(self) -> None:
        if self._pending is not None:
            self._erase(self._pending)
        for name in [n for n in self._store if n.startswith(PENDING + "/")]:
            del self._store[name]

    def _erase(self, terms: EpochTerms) -> None:
        """The keys of an epoch that is over, as far as a store can erase."""
        place = f"secagg/{terms.epoch}/"
        for name in [n for n in self._store if n.startswith(place)]:
            del self._store[name]

    def _terms(self, place: str) -> EpochTerms | None:
        raw = self._store.get(place)
        return decode(EpochTerms, raw) if raw is not None else None

    def _session(self, terms: EpochTerms) -> Session:
        return session_of(self._plan, self._run_id, self._roster, self._parameters, terms)

    def _member(self, terms: EpochTerms | None) -> Member:
        if terms is None:  # in no epoch yet: it refuses every round
            return Member(self._session(first_terms(self._plan)), self._identity, {})
        store = Prefixed(self._store, f"secagg/{terms.epoch}/")
        return Member(self._session(terms), self._identity, store)
