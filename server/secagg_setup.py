"""Set-up S1 to S5, and refills, on the relay's side: routes and compares; holds no key.

What the relay checks here only names a liar early. No site relies on it: every site checks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from shared.errors import ProtocolError
from shared.evidence import DealSeen, DealsSeen
from shared.identity import verify
from shared.messages import U32, Blob, ByName, decode, encode, message
from shared.secagg import keys, transcript
from shared.secagg.messages import (
    MAX_SITES,
    S1,
    S2,
    S3,
    Confirmed,
    Dealt,
    Delivered,
    Deliveries,
    Hash,
    Names,
    Shares,
)
from shared.secagg.session import Session


@dataclass(frozen=True)
class Deal:
    """One site's checked deal, ready to be routed."""

    message: Dealt
    digest: bytes
    part_hashes: tuple[bytes, ...]


@message(0x0301)
@dataclass(frozen=True, slots=True)
class Batch:
    """One batch that all its members confirmed, as the relay needs it to finish rounds.

    Per dealer and round by round: commitments (64 bytes), wrapped keys (32 a partner), for each
    holder of a share its two tags (32 bytes), for each partner its check value (16 bytes).
    `seen` is the deals as evidence, a `DealsSeen`.
    """

    number: Annotated[int, U32]
    first_round: Annotated[int, U32]
    members: Names
    transcript: Hash
    activation: Annotated[bytes, Blob()]
    seen: Annotated[bytes, Blob()]
    commitments: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    wrapped: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    tags: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    checks: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]


def shares_tag(session: Session, batch: Batch, owner: str, holder: str, round_no: int) -> bytes:
    """The tags of the two shares that `holder` has of `owner`: 16 bytes each, self mask first."""
    at = session.prekey_rounds * session.index[holder] + round_no - batch.first_round
    return batch.tags[owner][32 * at : 32 * at + 32]


def commitments(batch: Batch, owner: str, round_no: int) -> tuple[bytes, bytes]:
    """H(b) and H(R, E) of one site and round."""
    at = 64 * (round_no - batch.first_round)
    return batch.commitments[owner][at : at + 32], batch.commitments[owner][at + 32 : at + 64]


def wrapped_keys(session: Session, batch: Batch, owner: str, round_no: int) -> bytes:
    """E of one site and round."""
    width = 32 * len(session.partners[owner])
    at = width * (round_no - batch.first_round)
    return batch.wrapped[owner][at : at + width]


def check_value(session: Session, batch: Batch, author: str, peer: str, round_no: int) -> bytes:
    """What `author` published for the key that it shares with `peer` in one round."""
    place = session.partners[author].index(peer)
    at = session.prekey_rounds * place + round_no - batch.first_round
    return batch.checks[author][16 * at : 16 * at + 16]


def activated(
    session: Session, deals: Mapping[str, Deal], signed: bytes, activation: bytes
) -> Batch:
    """Keep of a confirmed batch what rounds need; sealed shares are dropped."""
    first = next(iter(deals.values())).message
    tags, checks = {}, {}
    for name, deal in deals.items():
        parts = dict(zip(session.names, deal.message.parts[:-1], strict=True))
        shares = {peer: decode(Shares, part) for peer, part in parts.items()}
        tags[name] = b"".join(shares[peer].tags for peer in session.names)
        checks[name] = b"".join(shares[peer].checks for peer in session.partners[name])
    return Batch(
        number=first.batch,
        first_round=first.first_round,
        members=tuple(sorted(deals)),
        transcript=signed,
        activation=activation,
        seen=deals_seen(deals),
        commitments={name: deal.message.common for name, deal in deals.items()},
        wrapped={name: deal.message.parts[-1] for name, deal in deals.items()},
        tags=tags,
        checks=checks,
    )


def deals_seen(deals: Mapping[str, Deal]) -> bytes:
    """The deals of one step as an auditor gets them."""
    first = next(iter(deals.values())).message
    seen = tuple(_deal_seen(deals[name]) for name in sorted(deals))
    return encode(DealsSeen(first.step, first.batch, first.first_round, seen))


def _deal_seen(deal: Deal) -> DealSeen:
    sent = deal.message
    common = transcript.part_hash(sent.common)
    return DealSeen(sent.sender, common, deal.part_hashes, sent.signature)


def check_deal(session: Session, name: str, data: bytes, place: tuple[int, int, int]) -> Deal:
    """Decode and check one site's S1, S2 or S3; `place` is step, batch and first round.

    Raises:
        ProtocolError: naming the site.
    """
    try:
        deal = decode(Dealt, data)
    except ProtocolError as error:
        raise ProtocolError(f"{name}: {error}") from error
    step, batch, first_round = place
    if (deal.step, deal.batch, deal.first_round, deal.sender) != (*place, name):
        raise ProtocolError(f"{name}: S{step} of batch {batch} was expected, another deal came")
    _check_sizes(session, deal)
    hashes = tuple(transcript.part_hash(part) for part in deal.parts)
    head = transcript.deal_head(session, step, batch, first_round)
    digest = transcript.deal_digest(head, name, deal.common, hashes)
    verify(session.public[name], transcript.DEAL, digest, deal.signature, who=name)
    return Deal(deal, digest, hashes)


def deliveries(session: Session, deals: Mapping[str, Deal], recipient: str) -> bytes:
    """What one site gets of everyone's deals."""
    at = session.index[recipient]
    items = []
    for name in sorted(deals):
        deal = deals[name]
        sent = deal.message
        part = sent.parts[at] if sent.parts else b""
        items.append(Delivered(name, sent.common, deal.part_hashes, part, sent.signature))
    first = next(iter(deals.values())).message
    return encode(Deliveries(first.step, first.batch, first.first_round, tuple(items)))


def check_pairs(session: Session, deals: Mapping[str, Deal]) -> None:
    """Both ends of every pair must show the same check values (S4.4, seen early)."""
    for name in deals:
        for peer in session.partners[name]:
            if name < peer and peer in deals:
                mine = decode(Shares, deals[name].message.parts[session.index[peer]]).checks
                theirs = decode(Shares, deals[peer].message.parts[session.index[name]]).checks
                if mine != theirs:
                    raise ProtocolError(f"{name} and {peer} do not hold the same mask keys")


def check_confirmation(
    session: Session, name: str, data: bytes, batch: int, signed: bytes
) -> bytes:
    """Check one S4 and return its signature."""
    confirmed = decode(Confirmed, data)
    if (confirmed.batch, confirmed.sender) != (batch, name):
        raise ProtocolError(f"{name}: a confirmation of batch {batch} was expected")
    verify(session.public[name], transcript.CONFIRM, signed, confirmed.signature, who=name)
    return confirmed.signature


def _check_sizes(session: Session, deal: Dealt) -> None:
    name, n, rounds = deal.sender, len(session.roster), session.prekey_rounds
    count = {S1: 0, S2: n, S3: n + 1}[deal.step]
    common = {S1: keys.PUBLIC_BYTES, S2: 0, S3: 64 * rounds}[deal.step]
    if len(deal.parts) != count or len(deal.common) != common:
        raise ProtocolError(f"{name}: S{deal.step} has parts or keys of wrong number or size")
    if deal.step == S2:
        for peer, part in zip(session.names, deal.parts, strict=True):
            due = keys.KEM_CIPHERTEXT_BYTES if peer > name else 0
            if len(part) != due:
                raise ProtocolError(f"{name}: the KEM ciphertext to {peer} has {len(part)} bytes")
    if deal.step == S3:
        if len(deal.parts[-1]) != 32 * rounds * len(session.partners[name]):
            raise ProtocolError(f"{name}: the wrapped keys have {len(deal.parts[-1])} bytes")
        for peer, part in zip(session.names, deal.parts[:-1], strict=True):
            shares = decode(Shares, part)
            sealed = 64 * rounds + 16 if peer != name else 0
            checks = 16 * rounds if peer in session.partners[name] else 0
            sizes = (len(shares.sealed), len(shares.tags), len(shares.checks))
            if sizes != (sealed, 32 * rounds, checks):
                raise ProtocolError(f"{name}: the shares for {peer} have wrong sizes")
