"""Batches of prekeys on the member's side: deal, confirm, activate, and refill.

Steps S3 to S5 of PROTOCOL.md, section 5, for the first batch and for every later one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from client.secagg_deals import deal_digest_of, read_deliveries, sign_deal
from client.secagg_state import (
    CHAINS,
    CONFIRMED_BATCH,
    OWN_BATCH,
    PROGRESS,
    Chains,
    ConfirmedBatch,
    OwnBatch,
    Prekey,
    Progress,
    Replay,
    Site,
    blaming,
    prekey_place,
)
from shared.errors import ProtocolError
from shared.identity import verify
from shared.messages import decode, encode, kind_of
from shared.secagg import keys, shamir, transcript
from shared.secagg.messages import (
    MAX_REASON_BYTES,
    S3,
    Activation,
    Complaint,
    Confirmed,
    DealRequest,
    Dealt,
    Delivered,
    Deliveries,
    RefillStep,
    Shares,
)
from shared.secagg.shamir import Bytes

MAX_SKIPPED_BATCHES = 1000


class BadDealError(ProtocolError):
    """A dealer's commitments or shares are bad; `accused` is the dealer."""

    def __init__(self, accused: str, fact: str) -> None:
        """`fact` names the dealer, too."""
        super().__init__(fact)
        self.accused = accused


def deal_batch(site: Site, batch: int, first_round: int) -> bytes:
    """Deal self-mask and recovery keys for B rounds: shares to all, commitments, wrapped keys."""
    session = site.session
    rounds, partners = session.prekey_rounds, session.partners[site.name]
    mask_keys, share_keys = _step_chains(site, batch)
    partner_keys = {peer: transcript.round_keys(mask_keys[peer], rounds) for peer in partners}
    secrets = np.frombuffer(site.random(64 * rounds), np.uint8).reshape(rounds, 64)
    shares = shamir.split(secrets, session.threshold, len(session.roster), site.random)
    slots = transcript.slots(session, batch, first_round)
    commitments, wrapped = [], []
    for place, at in enumerate(slots):
        self_key, recovery_key = halves(secrets[place].tobytes())
        row = b"".join(partner_keys[peer][32 * place : 32 * place + 32] for peer in partners)
        wrapped.append(transcript.wrap_keys(recovery_key, row))
        commitments += [
            transcript.self_commitment(at, site.name, self_key),
            transcript.recovery_commitment(at, site.name, recovery_key, wrapped[-1]),
        ]
    common = b"".join(commitments)
    parts = []
    for holder, held in zip(session.names, shares, strict=True):
        sealed = checks = b""
        if holder != site.name:
            key = transcript.sealing_key(share_keys[holder], site.name, holder)
            where = transcript.sealing_context(session, batch, first_round, site.name, holder)
            sealed = keys.seal(key, held.tobytes(), nonce_context=where)
            checks = transcript.check_values(partner_keys.get(holder, b""))
        parts.append(encode(Shares(sealed, _tags(slots, site.name, holder, held), checks)))
    message = sign_deal(site, S3, (batch, first_round), common, [*parts, b"".join(wrapped)])
    own = OwnBatch(
        batch=batch,
        first_round=first_round,
        deal=deal_digest_of(site, decode(Dealt, message)),
        self_keys=secrets[:, :32].tobytes(),
        own_shares=shares[session.index[site.name]].tobytes(),
        commitments=common,
        partner_keys=partner_keys,
        opening_keys={
            peer: transcript.sealing_key(share_keys[peer], peer, site.name) for peer in share_keys
        },
    )
    site.save(OWN_BATCH, own)
    site.drop(CONFIRMED_BATCH)
    return message


def confirm_batch(site: Site, s3: bytes, members: tuple[str, ...] | None) -> bytes:
    """Sign a batch; `members` None stands for any set of at least t sites (refill)."""
    session = site.session
    own = site.need(OwnBatch, OWN_BATCH, "a batch is dealt before it is confirmed")
    if members is None:
        members = _members_of(site, s3)
    items, digests = read_deliveries(site, s3, S3, members, own)
    rounds = session.prekey_rounds
    shares = np.empty((rounds, len(members), 64), np.uint8)
    commitments = np.empty((rounds, len(members), 64), np.uint8)
    slots = transcript.slots(session, own.batch, own.first_round)
    for place, item in enumerate(items):
        try:
            shares[:, place] = _open_shares(site, own, item, slots)
        except ProtocolError as error:
            raise BadDealError(item.sender, str(error)) from error
        commitments[:, place] = np.frombuffer(item.common, np.uint8).reshape(rounds, 64)
    setup = site.need(Chains, CHAINS, "set-up was not completed").setup
    signed = transcript.batch_transcript(setup, own.batch, own.first_round, members, digests)
    confirmed = ConfirmedBatch(
        batch=own.batch,
        first_round=own.first_round,
        members=members,
        transcript=signed,
        self_keys=own.self_keys,
        partner_keys={peer: own.partner_keys[peer] for peer in own.partner_keys if peer in members},
        shares=shares.tobytes(),
        commitments=commitments.tobytes(),
    )
    site.save(CONFIRMED_BATCH, confirmed)
    site.drop(OWN_BATCH)
    signature = site.identity.sign(transcript.CONFIRM, signed)
    return encode(Confirmed(own.batch, site.name, signature))


def activate_batch(site: Site, s4: bytes) -> None:
    """Make a confirmed batch usable, one record a round."""
    activation = decode(Activation, s4)
    batch = site.need(ConfirmedBatch, CONFIRMED_BATCH, "a batch is confirmed before it is used")
    if activation.batch != batch.batch or tuple(sorted(activation.signatures)) != batch.members:
        raise ProtocolError("the activation is not by the very members of the confirmed batch")
    for name, signature in activation.signatures.items():
        public = site.session.public[name]
        verify(public, transcript.CONFIRM, batch.transcript, signature, who=name)
    width = 64 * len(batch.members)
    for place in range(site.session.prekey_rounds):
        row = slice(width * place, width * place + width)
        cell = slice(32 * place, 32 * place + 32)
        prekey = Prekey(
            batch=batch.batch,
            transcript=batch.transcript,
            members=batch.members,
            self_key=batch.self_keys[cell],
            partner_keys={peer: row_keys[cell] for peer, row_keys in batch.partner_keys.items()},
            shares=batch.shares[row],
            commitments=batch.commitments[row],
        )
        site.save(prekey_place(batch.first_round + place), prekey)
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    if not progress.active:
        start = transcript.first_transcript(site.session, batch.transcript)
        progress = dataclasses.replace(progress, active=True, transcript=start)
    uncovered = batch.first_round + site.session.prekey_rounds
    site.save(PROGRESS, dataclasses.replace(progress, uncovered_from=uncovered))
    site.drop(CONFIRMED_BATCH)


def refill(site: Site, request: bytes) -> bytes:
    """Steps of a refill, S3 to S5 again; a failure is told to the server as a `Complaint`.

    The round that they ride with goes on: a complaint spoils the new batch alone. The same
    request again gets the same answer, since prekeys are dealt once.
    """
    if not request:
        return b""
    known = site.find(Replay, "replay/refill")
    if known is not None and known.request == hashlib.sha256(request).digest():
        return known.reply
    items = decode(RefillStep, request).items
    reply = encode(RefillStep(tuple(_refill_item(site, item) for item in items)))
    return site.answer("refill", request, reply)


def _refill_item(site: Site, item: bytes) -> bytes:
    try:
        kind = kind_of(item)
        if kind is DealRequest:
            return _deal_on_request(site, decode(DealRequest, item))
        if kind is Deliveries:
            return confirm_batch(site, item, None)
        if kind is Activation:
            activate_batch(site, item)
            return b""
        raise ProtocolError(f"{kind.__name__} is no step of a refill")
    except ProtocolError as error:
        own = site.find(OwnBatch, OWN_BATCH)
        accused = error.accused if isinstance(error, BadDealError) else ""
        reason = "".join(c for c in str(error) if c.isascii() and c.isprintable())
        return encode(
            Complaint(own.batch if own else 0, site.name, accused, reason[:MAX_REASON_BYTES])
        )


def _deal_on_request(site: Site, request: DealRequest) -> bytes:
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    if request.first_round < max(progress.uncovered_from, progress.next_round):
        raise ProtocolError(f"round {request.first_round} is covered by prekeys or over")
    if request.first_round + site.session.prekey_rounds >= 2**32:
        raise ProtocolError(f"round {request.first_round} is beyond what a round number holds")
    return deal_batch(site, request.batch, request.first_round)


def _members_of(site: Site, s3: bytes) -> tuple[str, ...]:
    members = tuple(item.sender for item in decode(Deliveries, s3).items)
    known = set(members) <= set(site.session.names) and site.name in members
    if list(members) != sorted(set(members)) or not known:
        raise ProtocolError("the members of a batch must be sites of the roster, this one included")
    if len(members) < site.session.threshold:
        raise ProtocolError(f"{len(members)} members of a batch are fewer than the threshold")
    return members


def _step_chains(site: Site, batch: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """This batch's key of every mask chain and share chain; earlier batches' keys are lost."""
    chains = site.need(Chains, CHAINS, "set-up was not completed")
    skipped = batch - chains.next_batch
    if not 0 <= skipped <= MAX_SKIPPED_BATCHES:
        raise ProtocolError(f"batch {batch} is used up or too far ahead of {chains.next_batch}")
    mask_keys, share_keys, states = {}, {}, {}
    for peer, state in chains.states.items():
        drawn = []
        for half in halves(state):
            ratchet = keys.Ratchet(half)
            for _ in range(skipped):
                ratchet.next_key()
            drawn.append((ratchet.next_key(), ratchet.state))
        (mask_keys[peer], mask_state), (share_keys[peer], share_state) = drawn
        states[peer] = mask_state + share_state
    site.save(CHAINS, Chains(chains.setup, batch + 1, states))
    return mask_keys, share_keys


def _open_shares(site: Site, own: OwnBatch, item: Delivered, slots: Sequence[bytes]) -> Bytes:
    """S4.2 to S4.4: unseal one dealer's shares, check them against tags and check values."""
    session, dealer = site.session, item.sender
    if len(item.common) != 64 * session.prekey_rounds:
        raise ProtocolError(f"{dealer}: commitments have {len(item.common)} bytes")
    part = blaming(dealer, decode, Shares, item.part)
    if dealer == site.name:
        raw = own.own_shares
    else:
        where = transcript.sealing_context(session, own.batch, own.first_round, dealer, site.name)
        raw = blaming(dealer, _unseal, own.opening_keys[dealer], part.sealed, where)
    if len(raw) != 64 * session.prekey_rounds:
        raise ProtocolError(f"{dealer}: shares have {len(raw)} bytes")
    shares = np.frombuffer(raw, np.uint8).reshape(session.prekey_rounds, 64)
    if part.tags != _tags(slots, dealer, site.name, shares):
        raise ProtocolError(f"{dealer} dealt {site.name} a share that does not match its tag")
    expected = transcript.check_values(own.partner_keys.get(dealer, b""))
    if dealer != site.name and part.checks != expected:
        raise ProtocolError(f"{dealer} and {site.name} do not hold the same mask keys")
    return shares


def _tags(slots: Sequence[bytes], dealer: str, holder: str, shares: Bytes) -> bytes:
    rows = [halves(row.tobytes()) for row in shares]
    return transcript.share_tags(slots, dealer, holder, rows)


def _unseal(key: bytes, sealed: bytes, where: bytes) -> bytes:
    return keys.unseal(key, sealed, nonce_context=where)


def halves(both: bytes) -> tuple[bytes, bytes]:
    return both[: len(both) // 2], both[len(both) // 2 :]
