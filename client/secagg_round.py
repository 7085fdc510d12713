"""One round, R0 to R3, on the member's side. PROTOCOL.md, section 6."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from client.secagg_batches import refill
from client.secagg_end import check_quorum, erase_rounds, sha256
from client.secagg_recheck import check_chunks, settle
from client.secagg_state import (
    AGREED,
    AGREED_REPLY,
    ATTESTATION,
    MASKED,
    MASKED_REPLY,
    OPENED,
    PROGRESS,
    REFILL_REPLY,
    RELEASED,
    RELEASED_REPLY,
    ROUND,
    Current,
    Prekey,
    Progress,
    Site,
    prekey_place,
)
from shared.errors import CohortError, ProtocolError
from shared.identity import verify
from shared.messages import decode, encode
from shared.secagg import merkle, transcript
from shared.secagg.masking import Source, add_masks
from shared.secagg.messages import (
    Agreed,
    Beside,
    Contribution,
    Descriptor,
    Included,
    Masked,
    Opening,
    Quorum,
    Released,
)
from shared.secagg.ring import RingVector
from shared.secagg.unmask import mask_keys

_OUT_OF_ORDER = "the server's messages are out of order"


@dataclass(frozen=True, slots=True)
class RoundTicket:
    """Leave to take part in one round; `reply` is set when the answer was already given.

    A ticket with a reply is not to be trained for: send the reply again as it is.
    """

    round: int
    digest: bytes
    cohort: tuple[str, ...]
    reply: bytes | None


def open_round(site: Site, r0: bytes, model_hash: bytes) -> RoundTicket:
    """R0: refuse another run, round, history, model or cohort than this site knows.

    A site outside the cohort gives no more than its part in a refill; it promises nothing.
    """
    opening = decode(Opening, r0)
    descriptor = decode(Descriptor, opening.descriptor)
    digest = transcript.descriptor_digest(opening.descriptor)
    current = site.find(Current, ROUND)
    if current is not None and current.digest == digest:
        reply = site.store.get(MASKED_REPLY) if current.phase >= MASKED else None
        return RoundTicket(descriptor.round, digest, descriptor.cohort, reply)
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    if progress.active and site.name not in descriptor.cohort and opening.refill:
        beside = encode(Beside(digest, site.name, refill(site, opening.refill)))
        return RoundTicket(descriptor.round, digest, descriptor.cohort, beside)
    _check_descriptor(site, descriptor, progress, model_hash)
    answer = refill(site, opening.refill)
    attestation = check_chunks(site, opening.recheck) if opening.recheck else b""
    prekey = site.find(Prekey, prekey_place(descriptor.round))
    if prekey is None or prekey.transcript != descriptor.batch:
        raise ProtocolError(
            f"round {descriptor.round}: {site.name} has no prekeys of the batch that the round "
            "names. The relay must refill before it opens the round."
        )
    _check_cohort(site, descriptor, prekey)
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    erase_rounds(site, progress, before=descriptor.round, used=descriptor.round)
    site.save(ROUND, Current(opening.descriptor, digest, OPENED))
    site.store[REFILL_REPLY] = answer
    site.store[ATTESTATION] = attestation
    return RoundTicket(descriptor.round, digest, descriptor.cohort, None)


def masked_input(
    site: Site, ticket: RoundTicket, source: RingVector | Source, threads: int
) -> bytes:
    """R1: mask, sign; own keys of this round are erased, the answer is kept for a reconnection."""
    current = _current(site, ticket.digest, OPENED)
    descriptor = decode(Descriptor, current.descriptor)
    session, place = site.session, prekey_place(descriptor.round)
    prekey = site.need(Prekey, place, _OUT_OF_ORDER)
    pairs = {peer: key for peer, key in prekey.partner_keys.items() if peer in descriptor.cohort}
    plus, minus = mask_keys(session, site.name, current.digest, prekey.self_key, pairs)
    vector = np.empty(session.length, np.uint32)
    fused: Source | None = None
    if isinstance(source, np.ndarray):
        if source.shape != vector.shape or source.dtype != np.uint32:
            raise ProtocolError(f"a vector is uint32 ({session.length},), not {source.shape}")
        vector[:] = source
    else:
        fused = source
    add_masks(vector, plus, minus, session.bits, source=fused, threads=threads, prg=session.prg)
    wire = session.ring.to_wire(vector)
    root = merkle.root(wire, session.chunk_bytes)
    signed = transcript.masked_digest(current.digest, site.name, root)
    signature = site.identity.sign(transcript.MASKED, signed)
    reply = encode(
        Masked(
            digest=current.digest,
            sender=site.name,
            root=root,
            signature=signature,
            refill=site.store.get(REFILL_REPLY, b""),
            attestation=site.store.get(ATTESTATION, b""),
            vector=wire,
        )
    )
    site.store[MASKED_REPLY] = reply
    site.save(place, dataclasses.replace(prekey, self_key=b"", partner_keys={}))
    site.save(ROUND, dataclasses.replace(current, phase=MASKED, root=root))
    site.drop(REFILL_REPLY, ATTESTATION)
    return reply


def agree(site: Site, r2: bytes) -> bytes:
    """R2: check U3 and every signature in it, sign it once; open self masks if all are in."""
    included = decode(Included, r2)
    current = site.need(Current, ROUND, _OUT_OF_ORDER)
    if _is_repeat(current, AGREED, r2):
        return site.store[AGREED_REPLY]
    current = _current(site, included.digest, MASKED)
    descriptor = decode(Descriptor, current.descriptor)
    session = site.session
    names = transcript.check_contributions(session, descriptor.cohort, included.contributions)
    if site.name not in names:
        raise ProtocolError(f"{site.name} is asked to agree to a set without it")
    for entry in included.contributions:
        _check_contribution(site, current, entry)
    settle(site, included.attestations)
    signed = transcript.included_digest(current.digest, included.contributions)
    signature = site.identity.sign(transcript.AGREE, signed)
    shares = b""
    if names == descriptor.cohort:
        prekey = site.need(Prekey, prekey_place(descriptor.round), _OUT_OF_ORDER)
        shares = _shares(prekey, names, 0)
        site.save(prekey_place(descriptor.round), dataclasses.replace(prekey, shares=b""))
    reply = encode(Agreed(current.digest, site.name, signature, shares))
    site.store[AGREED_REPLY] = reply
    agreed = dataclasses.replace(
        current, phase=AGREED, included=signed, contributors=names, last_request=sha256(r2)
    )
    site.save(ROUND, agreed)
    return reply


def release(site: Site, r3: bytes) -> bytes:
    """R3, after dropouts only: t signatures over the set that this site signed open its shares."""
    quorum = decode(Quorum, r3)
    current = site.need(Current, ROUND, _OUT_OF_ORDER)
    if _is_repeat(current, RELEASED, r3):
        return site.store[RELEASED_REPLY]
    current = _current(site, quorum.digest, AGREED)
    descriptor = decode(Descriptor, current.descriptor)
    dropped = tuple(name for name in descriptor.cohort if name not in current.contributors)
    if not dropped:
        raise ProtocolError(f"round {descriptor.round}: nobody dropped out, nothing is released")
    check_quorum(site, current.contributors, current.included, quorum.signatures)
    place = prekey_place(descriptor.round)
    prekey = site.need(Prekey, place, _OUT_OF_ORDER)
    reply = encode(
        Released(
            digest=current.digest,
            sender=site.name,
            self_shares=_shares(prekey, current.contributors, 0),
            recovery_shares=_shares(prekey, dropped, 32),
        )
    )
    site.save(place, dataclasses.replace(prekey, shares=b""))
    site.store[RELEASED_REPLY] = reply
    site.save(ROUND, dataclasses.replace(current, phase=RELEASED, last_request=sha256(r3)))
    return reply


def _check_descriptor(
    site: Site, descriptor: Descriptor, progress: Progress, model_hash: bytes
) -> None:
    """R0.1 to R0.4."""
    round_no = descriptor.round
    if not progress.active:
        raise ProtocolError(f"round {round_no} was opened before the set-up was complete")
    if descriptor.session != site.session.hash():
        raise ProtocolError(f"round {round_no} is of another session: another run, plan or roster")
    if round_no < progress.next_round:
        raise ProtocolError(f"round {round_no} is used up; {progress.next_round} is the next")
    if descriptor.transcript != progress.transcript:
        raise ProtocolError(
            f"round {round_no} has another history than {site.name} has. If results are missing "
            "here, the server must send them first; if not, sites were told different things."
        )
    if descriptor.model != model_hash:
        raise ProtocolError(
            f"round {round_no} is for another model than the one that {site.name} computed from "
            "the published sums"
        )


def _check_cohort(site: Site, descriptor: Descriptor, prekey: Prekey) -> None:
    """R0.5."""
    cohort = descriptor.cohort
    if list(cohort) != sorted(set(cohort)) or not set(cohort) <= set(prekey.members):
        raise ProtocolError(f"round {descriptor.round}: the cohort holds sites without prekeys")
    if site.name not in cohort:
        raise ProtocolError(f"round {descriptor.round}: {site.name} is not in the cohort")
    if len(cohort) < site.session.threshold:
        raise CohortError(
            f"round {descriptor.round}: a cohort of {len(cohort)} is too small; this session "
            f"takes {site.session.threshold} or more"
        )


def _check_contribution(site: Site, current: Current, entry: Contribution) -> None:
    """R2.3: every H(y) is signed by its site for this D; this site's own is the one it sent."""
    if entry.name == site.name and entry.root != current.root:
        raise ProtocolError(f"the contribution listed for {site.name} is not the one it made")
    if entry.name != site.name:
        signed = transcript.masked_digest(current.digest, entry.name, entry.root)
        public = site.session.public[entry.name]
        verify(public, transcript.MASKED, signed, entry.signature, who=entry.name)


def _shares(prekey: Prekey, names: tuple[str, ...], half: int) -> bytes:
    if not prekey.shares:
        raise ProtocolError("the shares of this round were given out or erased")
    places = {name: 64 * place + half for place, name in enumerate(prekey.members)}
    return b"".join(prekey.shares[places[name] : places[name] + 32] for name in names)


def _current(site: Site, digest: bytes, phase: int) -> Current:
    current = site.need(Current, ROUND, _OUT_OF_ORDER)
    if current.digest != digest:
        raise ProtocolError(f"{site.name} has another round open than the one it is asked about")
    if current.phase != phase:
        steps = ("", "opened", "sent its vector", "signed the contributors", "released", "ended")
        raise ProtocolError(
            f"{site.name} has already {steps[current.phase]} in this round; a step is taken once"
            if current.phase > phase
            else f"{site.name} has only {steps[current.phase]} in this round: {_OUT_OF_ORDER}"
        )
    return current


def _is_repeat(current: Current, phase: int, request: bytes) -> bool:
    return current.phase == phase and current.last_request == sha256(request)
