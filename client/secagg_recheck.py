"""A member recomputes its chunks of a published sum. PROTOCOL.md, section 7."""

from __future__ import annotations

import dataclasses
import hmac

import numpy as np

from client.secagg_state import PROGRESS, Progress, RecheckDue, Site, recheck_place
from shared.errors import ProtocolError
from shared.messages import decode
from shared.secagg import merkle, transcript
from shared.secagg.masking import add_masks
from shared.secagg.messages import Pieces, Recheck
from shared.secagg.unmask import MaskKeys, unmask_keys, unwrap


def check_chunks(site: Site, data: bytes) -> None:
    """Check a relay's package against the sum that was published; C.2 to C.5."""
    package = decode(Recheck, data)
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    if package.digest not in progress.rechecks_due:
        return  # A package that came twice, or one that this site does not need.
    due = site.need(RecheckDue, recheck_place(package.digest), "the store is damaged")
    masks = _mask_keys(site, due, package)
    if tuple(pieces.number for pieces in package.chunks) != tuple(c.number for c in due.chunks):
        raise ProtocolError("the package does not hold the very chunks that this site rechecks")
    for pieces, published in zip(package.chunks, due.chunks, strict=True):
        if _recompute(site, due, pieces, masks) != published.content:
            raise ProtocolError(
                f"chunk {pieces.number} of the published sum is not the sum of what the sites "
                f"signed. {site.name} signs nothing more: the server published a false sum."
            )
    left = tuple(digest for digest in progress.rechecks_due if digest != package.digest)
    site.save(PROGRESS, dataclasses.replace(progress, rechecks_due=left))
    site.drop(recheck_place(package.digest))


def _mask_keys(site: Site, due: RecheckDue, package: Recheck) -> MaskKeys:
    """C.2, C.3: the opened keys are the ones that were committed to before the round."""
    names = tuple(entry.name for entry in due.contributions)
    gone = tuple(name for name in due.cohort if name not in names)
    if tuple(sorted(package.self_keys)) != names or tuple(sorted(package.recovered)) != gone:
        raise ProtocolError("the package does not open the masks of the very sites of the round")
    commitments = {
        name: (
            due.commitments[64 * at : 64 * at + 32],
            due.commitments[64 * at + 32 : 64 * at + 64],
        )
        for at, name in enumerate(due.members)
    }
    for name, key in package.self_keys.items():
        opened = transcript.self_commitment(due.slot, name, key)
        if not hmac.compare_digest(opened, commitments[name][0]):
            raise ProtocolError(f"the self mask published for {name} is not the one it chose")
    dropped = {}
    for name, entry in package.recovered.items():
        opened = transcript.recovery_commitment(due.slot, name, entry.key, entry.wrapped)
        if not hmac.compare_digest(opened, commitments[name][1]):
            raise ProtocolError(f"the recovery key published for {name} is not the one it chose")
        dropped[name] = unwrap(site.session, name, entry.key, entry.wrapped)
    return unmask_keys(site.session, package.digest, names, package.self_keys, dropped)


def _recompute(site: Site, due: RecheckDue, pieces: Pieces, masks: MaskKeys) -> bytes:
    """C.4, C.5: add up one chunk of every signed vector, and take the masks off."""
    session, ring = site.session, site.session.ring
    if len(pieces.pieces) != len(due.contributions):
        raise ProtocolError(f"chunk {pieces.number} is not given for every contributor")
    start = pieces.number * session.chunk
    total = np.zeros(min(session.chunk, session.length - start), np.uint32)
    for entry, piece in zip(due.contributions, pieces.pieces, strict=True):
        merkle.check_chunk(
            entry.root,
            piece.chunk,
            piece.proof,
            index=pieces.number,
            size=session.vector_bytes,
            chunk_size=session.chunk_bytes,
        )
        total += ring.from_wire(piece.chunk, len(total))
    plus, minus = masks
    add_masks(total, plus, minus, session.bits, offset=start, prg=session.prg)
    return ring.to_wire(total)
