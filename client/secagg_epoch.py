"""From one epoch to the next: what a site vouches for, and what a late joiner believes.

PROTOCOL.md, section 8. A new epoch has new keys and a new store; model and transcript go on.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from client.secagg_state import PROGRESS, Progress, Site
from shared.errors import CohortError, ProtocolError
from shared.identity import verify
from shared.messages import decode, encode
from shared.secagg import transcript
from shared.secagg.messages import Voucher
from shared.secagg.session import Session


def vouch(site: Site, following: Session, model_hash: bytes) -> bytes:
    """Sign that `following` goes on from this site's own history with this very model."""
    progress = site.need(Progress, PROGRESS, "the store is damaged")
    session = site.session
    if not progress.active or progress.unsettled is not None:
        raise ProtocolError(
            f"{site.name} vouches for no model yet: the last published sum is not rechecked"
        )
    same_run = (following.run_id, following.plan_sha256) == (session.run_id, session.plan_sha256)
    if not same_run or following.epoch <= session.epoch:
        raise ProtocolError("the next epoch must be of the same run and plan, with a later number")
    if following.start != progress.transcript or following.first_round < progress.next_round:
        raise ProtocolError(f"the next epoch does not go on from where {site.name} stands")
    signed = transcript.voucher_digest(following, model_hash)
    return encode(Voucher(site.name, model_hash, site.identity.sign(transcript.VOUCH, signed)))


def check_vouchers(session: Session, model_hash: bytes, vouchers: Mapping[str, bytes]) -> None:
    """Believe the model that an epoch starts with, on the word of t sites of its roster.

    Args:
        session: The epoch that this site is to join; its roster is this site's own, pinned one.
        model_hash: 32 bytes, computed over the model and optimiser state that was received.
        vouchers: What the sites signed, by name.

    Raises:
        CohortError: fewer than t vouchers.
        ProtocolError: a voucher is forged, of another epoch, or for another model.
    """
    for name, data in vouchers.items():
        voucher = decode(Voucher, data)
        if voucher.sender != name or name not in session.public:
            raise ProtocolError(f"a voucher of {voucher.sender} was given as one of {name}")
        if not hmac.compare_digest(voucher.model, model_hash):
            raise ProtocolError(f"{name} vouches for another model than the one received")
        signed = transcript.voucher_digest(session, model_hash)
        verify(session.public[name], transcript.VOUCH, signed, voucher.signature, who=name)
    if len(vouchers) < session.threshold:
        raise CohortError(
            f"{len(vouchers)} sites vouch for the model; this session asks {session.threshold}"
        )
