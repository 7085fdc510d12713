"""The member's side of the secure sum: one site's state machine, without any I/O."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.identity import Identity
from shared.secagg.keys import Random
from shared.secagg.masking import Source
from shared.secagg.session import Session

RingVector = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class RoundTicket:
    """Leave to take part in one round; `reply` is set when the answer was already given."""

    round: int
    digest: bytes
    cohort: tuple[str, ...]
    reply: bytes | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round ended: a sum (uint32, (d,)), or None and a reason."""

    round: int
    total: RingVector | None
    contributors: tuple[str, ...]
    transcript: bytes
    reason: str = ""


class Member:
    """One site's state, kept in `store`; the caller commits the store before bytes leave."""

    def __init__(
        self,
        session: Session,
        identity: Identity,
        store: MutableMapping[str, bytes],
        random: Random = os.urandom,
    ) -> None: ...

    # Set-up: every call takes what the relay made for this member and gives the reply.
    def advertise(self) -> bytes:  # S1
        raise NotImplementedError

    def encapsulate(self, s1: bytes) -> bytes:  # S2
        raise NotImplementedError

    def prekeys(self, s2: bytes) -> bytes:  # S3
        raise NotImplementedError

    def confirm(self, s3: bytes) -> bytes:  # S4
        raise NotImplementedError

    def activate(self, s4: bytes) -> None:  # S5
        raise NotImplementedError

    # A round.
    def open_round(self, r0: bytes, *, model_hash: bytes) -> RoundTicket:
        raise NotImplementedError

    def masked_input(self, ticket: RoundTicket, source: RingVector | Source) -> bytes:  # R1
        raise NotImplementedError

    def agree(self, r2: bytes) -> bytes:
        raise NotImplementedError

    def release(self, r3: bytes) -> bytes:
        raise NotImplementedError

    def accept_result(self, result: bytes) -> Outcome:
        """A Result or an Abort; the same bytes again give the same outcome."""
        raise NotImplementedError

    # The recheck of the published sum: needed before `agree` of the next round.
    @property
    def awaits_recheck(self) -> bool:
        raise NotImplementedError

    def check_chunks(self, package: bytes) -> None:
        raise NotImplementedError

    @property
    def transcript(self) -> bytes:
        raise NotImplementedError

    @property
    def last_round(self) -> int:
        raise NotImplementedError
