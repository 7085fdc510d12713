"""The end of a round on the member's side: a sum or an abort. PROTOCOL.md, section 6, E."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from client.secagg_state import (
    AGREED,
    AGREED_REPLY,
    DONE,
    LAST_SUM,
    PROGRESS,
    RELEASED,
    RELEASED_REPLY,
    ROUND,
    Current,
    LastSum,
    Prekey,
    Progress,
    Site,
    prekey_place,
)
from shared.errors import ProtocolError
from shared.identity import verify
from shared.messages import decode, kind_of
from shared.secagg import merkle, transcript
from shared.secagg.messages import (
    Abort,
    Descriptor,
    Result,
)
from shared.secagg.ring import RingVector

_OUT_OF_ORDER = "the server's messages are out of order"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round ended: a sum (uint32, shape (d,)), or None and a reason."""

    round: int
    total: RingVector | None
    contributors: tuple[str, ...]
    transcript: bytes
    reason: str = ""


def accept_result(site: Site, data: bytes) -> Outcome:
    """A Result or an Abort: check it against this site's own history, go on to the next."""
    kind = kind_of(data)
    if kind is Abort:
        abort = decode(Abort, data)
        return _end(site, data, abort.descriptor, None, abort.reason)
    result = decode(Result, data)
    return _end(site, data, result.descriptor, result, "")


def _end(site: Site, data: bytes, raw: bytes, result: Result | None, reason: str) -> Outcome:
    descriptor, digest = decode(Descriptor, raw), transcript.descriptor_digest(raw)
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    names = tuple(entry.name for entry in result.contributions) if result else ()
    total = None
    if result:
        total = site.session.ring.from_wire(result.total, site.session.length)
    if progress.last_result == sha256(data):
        return Outcome(descriptor.round, total, names, progress.transcript, reason)
    current = site.find(Current, ROUND)
    if current is not None and (current.digest != digest or current.phase == DONE):
        current = None
    _check_end(site, descriptor, progress, current)
    unsettled = progress.unsettled
    if result:
        included = _check_result(site, descriptor, digest, result, current)
        root = merkle.root(result.total, site.session.chunk_bytes)
        after = transcript.next_transcript(descriptor.transcript, digest, included, root)
        unsettled = after
        site.drop(LAST_SUM)
        if site.name in names:
            _keep_for_recheck(site, descriptor, result, (digest, after, root))
    else:
        after = transcript.aborted_transcript(descriptor.transcript, digest)
    if current is not None:
        site.save(ROUND, dataclasses.replace(current, phase=DONE))
    progress = dataclasses.replace(
        progress,
        transcript=after,
        last_result=sha256(data),
        unsettled=unsettled,
    )
    erase_rounds(site, progress, before=descriptor.round + 1, used=descriptor.round)
    site.drop(AGREED_REPLY, RELEASED_REPLY)
    return Outcome(descriptor.round, total, names, after, reason)


def _check_end(
    site: Site, descriptor: Descriptor, progress: Progress, current: Current | None
) -> None:
    """E.1: the result continues this site's own history, and its round is open or ahead."""
    round_no = descriptor.round
    if not progress.active or descriptor.session != site.session.hash():
        raise ProtocolError(f"the result of round {round_no} is of another session")
    if descriptor.transcript != progress.transcript:
        raise ProtocolError(f"the result of round {round_no} has another history than {site.name}")
    if current is None and round_no < progress.next_round:
        raise ProtocolError(f"round {round_no} is over, or is not the one that {site.name} opened")


def _check_result(
    site: Site, descriptor: Descriptor, digest: bytes, result: Result, current: Current | None
) -> bytes:
    """E.2 to E.4; returns the digest over U3."""
    names = transcript.check_contributions(site.session, descriptor.cohort, result.contributions)
    included = transcript.included_digest(digest, result.contributions)
    if current is not None and current.phase in (AGREED, RELEASED) and current.included != included:
        raise ProtocolError(
            f"round {descriptor.round} was published over another set than {site.name} signed"
        )
    check_quorum(site, names, included, result.signatures)
    for entry in result.contributions:
        if entry.name == site.name and (current is None or current.root != entry.root):
            signed = transcript.masked_digest(digest, site.name, entry.root)
            verify(site.identity.public, transcript.MASKED, signed, entry.signature, who=site.name)
            _declare_lost(site, descriptor.round)
    return included


def _declare_lost(site: Site, round_no: int) -> None:
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    site.save(PROGRESS, dataclasses.replace(progress, lost=True))
    raise ProtocolError(
        f"{site.name} signed a contribution to round {round_no} that its state does not know: the "
        "state was lost or an older copy was restored. The site may join only with a new epoch."
    )


def _keep_for_recheck(
    site: Site, descriptor: Descriptor, result: Result, hashes: tuple[bytes, bytes, bytes]
) -> None:
    """Keep what it takes to recompute any chunk of the sum; replaces what was kept before.

    One sum at a time is enough: t signatures over the next U3 say that this one was rechecked.
    """
    digest, after, root = hashes
    prekey = site.need(Prekey, prekey_place(descriptor.round), _OUT_OF_ORDER)
    last = LastSum(
        digest=digest,
        after=after,
        total_root=root,
        slot=transcript.slot(site.session, prekey.batch, descriptor.round),
        cohort=descriptor.cohort,
        contributions=result.contributions,
        members=prekey.members,
        commitments=prekey.commitments,
    )
    site.save(LAST_SUM, last)


def check_quorum(
    site: Site, contributors: tuple[str, ...], included: bytes, signatures: Mapping[str, bytes]
) -> None:
    """R3.1: at least t sites of U3 signed the very same U3."""
    if not set(signatures) <= set(contributors):
        raise ProtocolError("a signature over the contributors is not by one of them")
    if len(signatures) < site.session.threshold:
        raise ProtocolError(
            f"{len(signatures)} signatures over the contributors; {site.session.threshold} needed"
        )
    for name, signature in signatures.items():
        verify(site.session.public[name], transcript.AGREE, included, signature, who=name)


def erase_rounds(site: Site, progress: Progress, *, before: int, used: int) -> None:
    """Erase the keys of all rounds before one, and refuse rounds up to `used` from now on."""
    before = min(before, progress.uncovered_from)
    for round_no in range(progress.kept_from, before):
        site.drop(prekey_place(round_no))
    progress = dataclasses.replace(
        progress,
        kept_from=max(progress.kept_from, before),
        next_round=max(progress.next_round, used + 1),
    )
    site.save(PROGRESS, progress)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
