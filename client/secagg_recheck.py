"""A member recomputes chunks of the published sum. PROTOCOL.md, section 7."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Iterable

from client.secagg_state import LAST_SUM, PROGRESS, LastSum, Progress, Site
from shared.errors import ProtocolError
from shared.messages import decode, encode
from shared.secagg import merkle, transcript
from shared.secagg.masking import add_masks
from shared.secagg.messages import Attestation, Pieces, Recheck
from shared.secagg.unmask import MaskKeys, unmask_keys, unwrap


def check_chunks(site: Site, data: bytes) -> bytes:
    """Recompute the chunks of a relay's package (C.1 to C.4) and sign that they held."""
    package = decode(Recheck, data)
    last = site.find(LastSum, LAST_SUM)
    if last is None or package.digest != last.digest:
        raise ProtocolError(f"{site.name} was not part of the sum that it is asked to recheck")
    masks = _mask_keys(site, last, package)
    for pieces in package.chunks:
        _recompute(site, last, pieces, masks)
    numbers = tuple(pieces.number for pieces in package.chunks)
    signed = transcript.attested_digest(last.after, site.name, numbers)
    signature = site.identity.sign(transcript.RECHECK, signed)
    return encode(Attestation(site.name, last.after, numbers, signature))


def settle(site: Site, attestations: Iterable[Attestation]) -> None:
    """C.5: go on from the last published sum only when c + 1 sites recomputed each chunk."""
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    if progress.unsettled is not None:
        transcript.check_attestations(site.session, progress.unsettled, attestations)
        site.save(PROGRESS, dataclasses.replace(progress, unsettled=None))


def _mask_keys(site: Site, last: LastSum, package: Recheck) -> MaskKeys:
    """C.2, C.3: the opened keys are the ones that were committed to before the round."""
    names = tuple(entry.name for entry in last.contributions)
    gone = tuple(name for name in last.cohort if name not in names)
    if tuple(sorted(package.self_keys)) != names or tuple(sorted(package.recovered)) != gone:
        raise ProtocolError("the package does not open the masks of the very sites of the round")
    commitments = {
        name: (
            last.commitments[64 * at : 64 * at + 32],
            last.commitments[64 * at + 32 : 64 * at + 64],
        )
        for at, name in enumerate(last.members)
    }
    for name, key in package.self_keys.items():
        opened = transcript.self_commitment(last.slot, name, key)
        if not hmac.compare_digest(opened, commitments[name][0]):
            raise ProtocolError(f"the self mask published for {name} is not the one it chose")
    dropped = {}
    for name, entry in package.recovered.items():
        opened = transcript.recovery_commitment(last.slot, name, entry.key, entry.wrapped)
        if not hmac.compare_digest(opened, commitments[name][1]):
            raise ProtocolError(f"the recovery key published for {name} is not the one it chose")
        dropped[name] = unwrap(site.session, name, entry.key, entry.wrapped)
    return unmask_keys(site.session, package.digest, names, package.self_keys, dropped)


def _recompute(site: Site, last: LastSum, pieces: Pieces, masks: MaskKeys) -> None:
    """C.3, C.4: add up one chunk of every signed vector, take the masks off, compare."""
    session, ring = site.session, site.session.ring
    if len(pieces.pieces) != len(last.contributions):
        raise ProtocolError(f"chunk {pieces.number} is not given for every contributor")
    start = pieces.number * session.chunk
    total = ring.zeros(max(0, min(session.chunk, session.length - start)))
    where = {
        "index": pieces.number,
        "size": session.vector_bytes,
        "chunk_size": session.chunk_bytes,
    }
    for entry, piece in zip(last.contributions, pieces.pieces, strict=True):
        merkle.check_chunk(entry.root, piece.chunk, piece.proof, **where)
        ring.add_wire(total, piece.chunk)
    plus, minus = masks
    add_masks(total, plus, minus, session.bits, offset=start, prg=session.prg)
    try:
        merkle.check_chunk(last.total_root, ring.to_wire(total), pieces.proof, **where)
    except ProtocolError:
        raise ProtocolError(
            f"chunk {pieces.number} of the published sum is not the sum of what the sites signed; "
            f"{site.name} goes no further: the server published a false sum"
        ) from None
