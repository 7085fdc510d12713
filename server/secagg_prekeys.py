"""The relay's stock of prekeys: which batch serves a round, and when to refill."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from server.secagg_refill import Refill, SavedRefill, Stage
from server.secagg_setup import Batch
from shared.errors import ProtocolError
from shared.messages import U32, Blob, ByName, Many, Maybe, Nested, decode, encode
from shared.secagg.messages import MAX_SITES, Hash, Names, RefillStep
from shared.secagg.session import Session

REFILL_MARGIN = 12
"""Rounds before the prekeys end at which a refill begins; it takes three if nobody fails."""

_ACTIVATE = "activate"


@dataclass(frozen=True, slots=True)
class SavedPrekeys:
    """The stock, for a checkpoint."""

    setup: Hash
    next_batch: Annotated[int, U32]
    batches: Annotated[tuple[Batch, ...], Many(Nested(Batch))]
    unactivated: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    refill: Annotated[SavedRefill | None, Maybe(Nested(SavedRefill))]
    left_out: Names


class Prekeys:
    """Confirmed batches, the refill under way, and activations that sites did not answer yet."""

    def __init__(self, session: Session, setup: bytes, faults: list[str]) -> None:
        """An empty stock; `faults` is the relay's log of what sites did wrong."""
        self._session = session
        self._setup = setup
        self._faults = faults
        self._batches: list[Batch] = []
        self._next_batch = 0
        self._refill: Refill | None = None
        self._unactivated: dict[str, bytes] = {}
        self._asked: dict[str, tuple[str, ...]] = {}
        self._left_out: set[str] = set()

    def add_first(self, batch: Batch) -> None:
        """The batch of the set-up; its activation goes out with S5."""
        self._batches, self._next_batch = [batch], batch.number + 1

    def covers(self, round_no: int) -> bool:
        """Whether a confirmed batch serves this round."""
        return any(self._serves(batch, round_no) for batch in self._batches)

    def batch_of(self, round_no: int) -> Batch:
        """The confirmed batch that serves this round; ProtocolError if there is none."""
        for batch in self._batches:
            if self._serves(batch, round_no):
                return batch
        raise ProtocolError(
            f"the prekeys do not cover round {round_no}; send refill_requests to the sites until "
            "they do, or begin a new epoch"
        )

    def advance(self, round_no: int, present: Collection[str]) -> None:
        """Take the refill one step on, begin one when it is time, give up a spoilt one."""
        rounds = self._session.prekey_rounds
        self._batches = [b for b in self._batches if round_no < b.first_round + rounds]
        if self._refill is not None:
            self._step(self._refill, present)
        ends = max((b.first_round + rounds for b in self._batches), default=round_no)
        if self._refill is None and ends - round_no <= min(rounds, REFILL_MARGIN):
            self._refill = Refill(self._session, self._setup, self._next_batch, ends)
            self._next_batch += 1

    def request(self, name: str) -> bytes:
        """What one site is asked now: an activation, a step of the refill, both or nothing."""
        items, asked = [], []
        if name in self._unactivated:
            items.append(self._unactivated[name])
            asked.append(_ACTIVATE)
        request = self._refill.request(name) if self._refill is not None else b""
        if self._refill is not None and request:
            items.append(request)
            asked.append(self._refill.stage.value)
        self._asked[name] = tuple(asked)
        return encode(RefillStep(tuple(items))) if items else b""

    def reply(self, name: str, reply: bytes) -> None:
        """Take one site's answers to `request`; a bad one is logged and spoils the batch."""
        asked = self._asked.pop(name, ())
        try:
            answers = decode(RefillStep, reply).items
            if len(answers) != len(asked):
                raise ProtocolError(f"{len(answers)} answers to {len(asked)} steps of a refill")
            for step, answer in zip(asked, answers, strict=True):
                if step == _ACTIVATE:
                    self._unactivated.pop(name, None)
                elif self._refill is not None and step == self._refill.stage.value:
                    self._refill.reply(name, answer)
        except ProtocolError as error:
            self._faults.append(f"refill: {name}: {error}")
            if self._refill is not None:
                self._refill.faults.add(name)

    def save(self) -> SavedPrekeys:
        """What `restore` goes on from."""
        return SavedPrekeys(
            setup=self._setup,
            next_batch=self._next_batch,
            batches=tuple(self._batches),
            unactivated=self._unactivated,
            refill=self._refill.save() if self._refill else None,
            left_out=tuple(sorted(self._left_out)),
        )

    @classmethod
    def restore(cls, session: Session, saved: SavedPrekeys, faults: list[str]) -> Prekeys:
        """Go on from a checkpoint."""
        prekeys = cls(session, saved.setup, faults)
        prekeys._next_batch = saved.next_batch
        prekeys._batches = list(saved.batches)
        prekeys._unactivated = dict(saved.unactivated)
        prekeys._left_out = set(saved.left_out)
        if saved.refill is not None:
            prekeys._refill = Refill.restore(session, saved.setup, saved.refill)
        return prekeys

    def _step(self, refill: Refill, present: Collection[str]) -> None:
        try:
            if refill.stage is Stage.DEALING:
                absent = set(refill.members) - set(present)
                refill.close_dealing(refill.faults | self._left_out | absent)
                return
            batch = refill.finish()
        except ProtocolError as error:
            self._faults.append(f"refill: batch {refill.number} is given up: {error}")
            # Whoever did not confirm, and whom it accused, stays out of the next try alone.
            self._left_out = refill.blamed if refill.stage is Stage.CONFIRMING else set()
            self._refill = None
            return
        self._batches.append(batch)
        self._unactivated |= dict.fromkeys(batch.members, batch.activation)
        self._refill, self._left_out = None, set()

    def _serves(self, batch: Batch, round_no: int) -> bool:
        return batch.first_round <= round_no < batch.first_round + self._session.prekey_rounds
