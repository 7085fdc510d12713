"""Bring the sites to one more batch of prekeys: S3, S4, S5, each riding with one round.

A batch that a site does not confirm in its turn, or complains about, is given up; the next one
has a new number, and so new keys, and leaves out sites that were accused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from server.secagg_setup import (
    Batch,
    Deal,
    activated,
    check_confirmation,
    check_deal,
    check_pairs,
    deliveries,
)
from shared.errors import ProtocolError
from shared.messages import U32, Blob, ByName, Flag, decode, encode, kind_of
from shared.secagg import transcript
from shared.secagg.messages import (
    MAX_SITES,
    S3,
    Activation,
    Complaint,
    DealRequest,
    Names,
    Signatures,
)
from shared.secagg.session import Session


class Stage(Enum):
    """What the sites are asked for."""

    DEALING = "deal"
    CONFIRMING = "confirm"


@dataclass(frozen=True, slots=True)
class SavedRefill:
    """A refill that is under way, for a checkpoint."""

    number: Annotated[int, U32]
    first_round: Annotated[int, U32]
    confirming: Annotated[bool, Flag()]
    deals: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    signatures: Signatures
    faults: Names
    accused: Names


class Refill:
    """One batch on its way; made for every batch, also for the first one."""

    def __init__(self, session: Session, setup: bytes, number: int, first_round: int) -> None:
        """A batch of this number, for B rounds from `first_round` on."""
        self.number = number
        self.first_round = first_round
        self.stage = Stage.DEALING
        self.faults: set[str] = set()
        self._accused: set[str] = set()
        self._session = session
        self._setup = setup
        self._deals: dict[str, Deal] = {}
        self._signatures: dict[str, bytes] = {}
        self._transcript = b""

    @property
    def members(self) -> tuple[str, ...]:
        """The sites that dealt."""
        return tuple(sorted(self._deals))

    @property
    def waiting(self) -> tuple[str, ...]:
        """Members that did not confirm yet."""
        return tuple(name for name in self.members if name not in self._signatures)

    @property
    def blamed(self) -> set[str]:
        """Members that did not confirm, and dealers that they accuse."""
        return set(self.waiting) | self._accused

    def request(self, name: str) -> bytes:
        """What to send to one site at this stage; nothing if it has done its part."""
        if self.stage is Stage.DEALING:
            return encode(DealRequest(self.number, self.first_round))
        return deliveries(self._session, self._deals, name) if name in self.waiting else b""

    def reply(self, name: str, data: bytes) -> None:
        """Take one site's deal or confirmation.

        Raises:
            ProtocolError: naming the site; the batch is then given up by whoever leads it.
        """
        if self.stage is Stage.DEALING:
            place = (S3, self.number, self.first_round)
            self._deals[name] = check_deal(self._session, name, data, place)
        elif name in self._deals:
            if kind_of(data) is Complaint:
                complaint = decode(Complaint, data)
                self._accused |= {complaint.accused} & set(self.members)
                raise ProtocolError(f"does not confirm batch {self.number}: {complaint.reason}")
            signature = check_confirmation(self._session, name, data, self.number, self._transcript)
            self._signatures[name] = signature

    def close_dealing(self, leave_out: Collection[str] = ()) -> None:
        """Fix the members, and go on to the confirmations.

        Raises:
            ProtocolError: too few dealt, or two partners do not hold the same keys.
        """
        for name in leave_out:
            self._deals.pop(name, None)
        if len(self._deals) < self._session.threshold:
            raise ProtocolError(f"only {len(self._deals)} sites dealt prekeys")
        check_pairs(self._session, self._deals)
        digests: Iterable[bytes] = (self._deals[name].digest for name in self.members)
        self._transcript = transcript.batch_transcript(
            self._setup, self.number, self.first_round, self.members, digests
        )
        self.stage = Stage.CONFIRMING

    def save(self) -> SavedRefill:
        """What `restore` goes on from."""
        return SavedRefill(
            number=self.number,
            first_round=self.first_round,
            confirming=self.stage is Stage.CONFIRMING,
            deals={name: encode(deal.message) for name, deal in self._deals.items()},
            signatures=dict(self._signatures),
            faults=tuple(sorted(self.faults)),
            accused=tuple(sorted(self._accused)),
        )

    @classmethod
    def restore(cls, session: Session, setup: bytes, saved: SavedRefill) -> Refill:
        """Go on from a checkpoint; everything in it is checked again."""
        refill = cls(session, setup, saved.number, saved.first_round)
        for name, deal in saved.deals.items():
            refill.reply(name, deal)
        if saved.confirming:
            refill.close_dealing()
            refill._signatures = dict(saved.signatures)
        refill.faults, refill._accused = set(saved.faults), set(saved.accused)
        return refill

    def finish(self) -> Batch:
        """The confirmed batch, with the activation message for its members."""
        if self.waiting:
            raise ProtocolError(f"batch {self.number} is not confirmed by {self.waiting}")
        activation = encode(Activation(self.number, dict(self._signatures)))
        return activated(self._session, self._deals, self._transcript, activation)
