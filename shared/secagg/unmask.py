"""Take the masks off a sum, or off one chunk of it: the relay does it, checkers repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.errors import ProtocolError
from shared.secagg import transcript
from shared.secagg.session import Session

MaskKeys = tuple[list[bytes], list[bytes]]


def mask_keys(
    session: Session, name: str, round_digest: bytes, self_key: bytes, pairs: Mapping[str, bytes]
) -> MaskKeys:
    """Keystream keys that one site adds and subtracts (R1); the earlier site of a pair adds."""
    plus = [transcript.self_mask_key(self_key, round_digest)]
    minus: list[bytes] = []
    for peer, key in pairs.items():
        side = plus if session.index[name] < session.index[peer] else minus
        side.append(transcript.pair_mask_key(key, round_digest))
    return plus, minus


def unmask_keys(
    session: Session,
    round_digest: bytes,
    contributors: Sequence[str],
    self_keys: Mapping[str, bytes],
    dropped: Mapping[str, Mapping[str, bytes]],
) -> MaskKeys:
    """Keystream keys to add to the sum over U3 and to subtract from it.

    Args:
        contributors: U3.
        self_keys: The opened b of every site of U3.
        dropped: For each site of the cohort outside U3, its key of this round with each partner.
    """
    plus: list[bytes] = []
    minus = [transcript.self_mask_key(self_keys[name], round_digest) for name in contributors]
    included = set(contributors)
    for gone, pairs in dropped.items():
        for peer, key in pairs.items():
            if peer in included:
                added = session.index[peer] < session.index[gone]
                (minus if added else plus).append(transcript.pair_mask_key(key, round_digest))
    return plus, minus


def unwrap(session: Session, name: str, recovery_key: bytes, wrapped: bytes) -> dict[str, bytes]:
    """A dropped-out site's keys of one round by partner, from its recovery key and E."""
    partners = session.partners[name]
    if len(wrapped) != 32 * len(partners):
        raise ProtocolError(f"{name}: {len(wrapped)} bytes of wrapped keys")
    opened = transcript.wrap_keys(recovery_key, wrapped)
    return {peer: opened[32 * at : 32 * at + 32] for at, peer in enumerate(partners)}
