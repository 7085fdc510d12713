"""What a member keeps between two calls, and where in its store.

Every record is written and read by the typed codec. The store is all there is: a member that is
rebuilt from the same store goes on exactly where the other one stood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from shared.errors import ProtocolError
from shared.identity import Identity
from shared.messages import (
    U8,
    U32,
    Blob,
    ByName,
    Fixed,
    Flag,
    Many,
    Maybe,
    decode,
    encode,
    message,
)
from shared.secagg.keys import Random
from shared.secagg.messages import MAX_SITES, Contributions, Hash, Name, Names
from shared.secagg.session import Session

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

OPENED, MASKED, AGREED, RELEASED, DONE = 1, 2, 3, 4, 5

# Places in the store.
SESSION = "session"
PROGRESS = "progress"
EPHEMERAL = "setup/ephemeral"
PUBLICS = "setup/publics"
CHAINS = "chains"
OWN_BATCH = "batch/own"
CONFIRMED_BATCH = "batch/confirmed"
ROUND = "round"
REFILL_REPLY = "reply/refill"
ATTESTATION = "reply/attestation"
LAST_SUM = "last-sum"
MASKED_REPLY = "reply/masked"
AGREED_REPLY = "reply/agreed"
RELEASED_REPLY = "reply/released"


@message(0x0201)
@dataclass(frozen=True, slots=True)
class Progress:
    """How far this site has come; `lost` once it has seen that its state is older than its word."""

    next_round: Annotated[int, U32]
    kept_from: Annotated[int, U32]
    uncovered_from: Annotated[int, U32]
    transcript: Hash
    active: Annotated[bool, Flag()]
    lost: Annotated[bool, Flag()]
    last_result: Hash
    unsettled: Annotated[bytes | None, Maybe(Fixed(32))]


@message(0x0202)
@dataclass(frozen=True, slots=True)
class Replay:
    """The answer that was given to a request, by the request's hash."""

    request: Hash
    reply: Annotated[bytes, Blob()]


@message(0x0203)
@dataclass(frozen=True, slots=True)
class PeerKeys:
    """Between S2 and S3: what the other sites published, and this site's KEM secrets to them."""

    publics: Annotated[Mapping[str, bytes], ByName(Blob(2048), MAX_SITES)]
    deals: Annotated[tuple[bytes, ...], Many(Fixed(32), MAX_SITES)]
    secrets: Annotated[Mapping[str, bytes], ByName(Fixed(32), MAX_SITES)]
    ciphertexts: Annotated[Mapping[str, bytes], ByName(Blob(2048), MAX_SITES)]


@message(0x0204)
@dataclass(frozen=True, slots=True)
class Chains:
    """Mask chain and share chain with every other site, 32 bytes each, at one batch number."""

    setup: Hash
    next_batch: Annotated[int, U32]
    states: Annotated[Mapping[str, bytes], ByName(Fixed(64), MAX_SITES)]


@message(0x0205)
@dataclass(frozen=True, slots=True)
class OwnBatch:
    """This site's part of a batch that it dealt and did not confirm yet."""

    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    deal: Hash
    self_keys: Annotated[bytes, Blob()]
    own_shares: Annotated[bytes, Blob()]
    commitments: Annotated[bytes, Blob()]
    partner_keys: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    opening_keys: Annotated[Mapping[str, bytes], ByName(Fixed(32), MAX_SITES)]


@message(0x0206)
@dataclass(frozen=True, slots=True)
class ConfirmedBatch:
    """A batch that this site signed; shares and commitments are round by round, then by member."""

    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    members: Names
    transcript: Hash
    self_keys: Annotated[bytes, Blob()]
    partner_keys: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    shares: Annotated[bytes, Blob()]
    commitments: Annotated[bytes, Blob()]


@message(0x0207)
@dataclass(frozen=True, slots=True)
class Prekey:
    """One round's keys; fields are emptied as soon as they have served."""

    batch: Annotated[int, U32]
    transcript: Hash
    members: Names
    self_key: Annotated[bytes, Blob(32)]
    partner_keys: Annotated[Mapping[str, bytes], ByName(Fixed(32), MAX_SITES)]
    shares: Annotated[bytes, Blob()]
    commitments: Annotated[bytes, Blob()]


@message(0x0208)
@dataclass(frozen=True, slots=True)
class Current:
    """The round that this site opened last, and what it has done in it."""

    descriptor: Annotated[bytes, Blob()]
    digest: Hash
    phase: Annotated[int, U8]
    root: Hash = bytes(32)
    included: Hash = bytes(32)
    contributors: Names = ()
    last_request: Hash = bytes(32)


@message(0x0209)
@dataclass(frozen=True, slots=True)
class LastSum:
    """What it takes to recompute chunks of the last published sum, if this site is in its U3."""

    digest: Hash
    after: Hash
    total_root: Hash
    slot: Hash
    cohort: Names
    contributions: Contributions
    members: Names
    commitments: Annotated[bytes, Blob()]


@dataclass(frozen=True)
class Site:
    """One site's session, identity, store and source of randomness.

    `decoded` saves decoding the same bytes again; the store alone decides what is read.
    """

    session: Session
    identity: Identity
    name: Name
    store: MutableMapping[str, bytes]
    random: Random
    decoded: dict[str, tuple[bytes, Any]] = field(default_factory=dict, repr=False)

    def find(self, cls: type[T], place: str) -> T | None:
        """Read a record, or None."""
        raw = self.store.get(place)
        if raw is None:
            return None
        known = self.decoded.get(place)
        if known is None or known[0] != raw or type(known[1]) is not cls:
            known = self.decoded[place] = (raw, decode(cls, raw))
        return cast(T, known[1])

    def need(self, cls: type[T], place: str, way_out: str) -> T:
        """Read a record that must be there; ProtocolError says what is out of order."""
        record = self.find(cls, place)
        if record is None:
            raise ProtocolError(f"{self.name} has no {place}: {way_out}")
        return record

    def save(self, place: str, record: object) -> None:
        """Write a record."""
        self.store[place] = raw = encode(record)
        self.decoded[place] = (raw, record)

    def drop(self, *places: str) -> None:
        """Delete records, as far as a store can delete."""
        for place in places:
            self.store.pop(place, None)
            self.decoded.pop(place, None)

    def replayed(self, step: str, request: bytes) -> bytes | None:
        """The answer given before to these very bytes; other bytes for this step are refused."""
        known = self.find(Replay, f"replay/{step}")
        if known is None:
            return None
        if known.request != hashlib.sha256(request).digest():
            raise ProtocolError(
                f"{self.name} answered {step} before, to other bytes; the server may not ask twice"
            )
        return known.reply

    def answer(self, step: str, request: bytes, reply: bytes) -> bytes:
        """Remember an answer for `replayed`, and return it."""
        self.save(f"replay/{step}", Replay(hashlib.sha256(request).digest(), reply))
        return reply


def blaming(peer: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call something on what `peer` sent; a ProtocolError then names the peer."""
    try:
        return call(*args, **kwargs)
    except ProtocolError as error:
        raise ProtocolError(f"{peer}: {error}") from error


def prekey_place(round_no: int) -> str:
    """Where a round's keys are kept."""
    return f"prekey/{round_no:010d}"
