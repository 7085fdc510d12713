"""Deals, the signed messages of S1 to S3: how a site makes its own and reads the others'."""

from __future__ import annotations

from collections.abc import Sequence

from client.secagg_state import (
    OwnBatch,
    Replay,
    Site,
)
from shared.errors import ProtocolError
from shared.identity import verify
from shared.messages import decode, encode
from shared.secagg import transcript
from shared.secagg.messages import (
    S1,
    S2,
    S3,
    Dealt,
    Delivered,
    Deliveries,
)

Place = tuple[int, int]  # batch, first round


def sign_deal(site: Site, step: int, place: Place, common: bytes, parts: Sequence[bytes]) -> bytes:
    batch, first_round = place
    head = transcript.deal_head(site.session, step, batch, first_round)
    hashes = [transcript.part_hash(part) for part in parts]
    signed = transcript.deal_digest(head, site.name, common, hashes)
    signature = site.identity.sign(transcript.DEAL, signed)
    return encode(Dealt(step, batch, first_round, site.name, common, tuple(parts), signature))


def deal_digest_of(site: Site, deal: Dealt) -> bytes:
    head = transcript.deal_head(site.session, deal.step, deal.batch, deal.first_round)
    hashes = [transcript.part_hash(part) for part in deal.parts]
    return transcript.deal_digest(head, deal.sender, deal.common, hashes)


def read_deliveries(
    site: Site,
    data: bytes,
    step: int,
    members: tuple[str, ...],
    own: OwnBatch | None = None,
) -> tuple[tuple[Delivered, ...], tuple[bytes, ...]]:
    """Check form and signatures of everyone's deal; returns the deals and their digests."""
    session = site.session
    batch, first_round = (own.batch, own.first_round) if own else (0, session.first_round)
    deliveries = decode(Deliveries, data)
    if (deliveries.step, deliveries.batch, deliveries.first_round) != (step, batch, first_round):
        raise ProtocolError(f"deliveries of S{step} for batch {batch} were expected, others came")
    if tuple(item.sender for item in deliveries.items) != members:
        raise ProtocolError("the roster was changed: the deals are not by the very sites it names")
    head = transcript.deal_head(session, step, batch, first_round)
    count = {S1: 0, S2: len(session.roster), S3: len(session.roster) + 1}[step]
    digests = []
    for item in deliveries.items:
        hashes = item.part_hashes
        if len(hashes) != count:
            raise ProtocolError(f"{item.sender}: {len(hashes)} parts were dealt, not {count}")
        if count and transcript.part_hash(item.part) != hashes[session.index[site.name]]:
            raise ProtocolError(f"{item.sender}: the part for {site.name} was altered")
        digest = transcript.deal_digest(head, item.sender, item.common, hashes)
        verify(
            session.public[item.sender], transcript.DEAL, digest, item.signature, who=item.sender
        )
        if item.sender == site.name and digest != _own_deal(site, step, own):
            raise ProtocolError(f"the deal returned as {site.name}'s own is not the one it made")
        digests.append(digest)
    return deliveries.items, tuple(digests)


def _own_deal(site: Site, step: int, own: OwnBatch | None) -> bytes:
    if own is not None:
        return own.deal
    known = site.need(Replay, f"replay/S{step}", f"it has not dealt S{step} yet")
    return deal_digest_of(site, decode(Dealt, known.reply))
