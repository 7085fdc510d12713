"""Every hash, signature context and derived key that both sides must compute alike.

Section 3 of PROTOCOL.md lists them; a change here is a change of the protocol's version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.errors import ProtocolError
from shared.identity import verify
from shared.secagg.encoding import (
    digest,
    digest_over_hashes,
    digester,
    encode,
    encode_items,
)
from shared.secagg.keys import hkdf
from shared.secagg.messages import Attestation, Contribution
from shared.secagg.session import Session

TAG_BYTES = 16
SELF, RECOVERY = "self", "recovery"
_share_head = encode_items(bytes(32))[:-32]  # type and length of an item of 32 bytes

# What a signature is for; `identity.sign` binds it.
DEAL = "secagg deal"
CONFIRM = "secagg set-up transcript"
MASKED = "secagg masked vector"
AGREE = "secagg contributors"
RECHECK = "secagg rechecked sum"
VOUCH = "secagg model of the next epoch"


def deal_head(session: Session, step: int, batch: int, first_round: int) -> bytes:
    """Which deal of which batch: bound into all signatures of one step."""
    return digest("deal head", session.hash(), step, batch, first_round)


def deal_digest(head: bytes, sender: str, common: bytes, part_hashes: Sequence[bytes]) -> bytes:
    """What the sender of S1, S2 or S3 signs."""
    return deal_digest_of_hashes(head, sender, part_hash(common), part_hashes)


def deal_digest_of_hashes(
    head: bytes, sender: str, common_hash: bytes, part_hashes: Sequence[bytes]
) -> bytes:
    """`deal_digest` for who has the hash of the common part alone."""
    return digest_over_hashes("deal", (head, sender, common_hash), part_hashes)


def part_hash(part: bytes) -> bytes:
    """Hash of a deal's common part, or of one recipient's part."""
    return digest("part", part)


def setup_transcript(session: Session, s1: Iterable[bytes], s2: Iterable[bytes]) -> bytes:
    """Hash over all sites' S1 and S2, in the roster's order."""
    return digest("setup", session.hash(), *s1, *s2)


def batch_transcript(
    setup: bytes, batch: int, first_round: int, members: Sequence[str], deals: Iterable[bytes]
) -> bytes:
    """Hash over a whole batch: what S4 signs, and what a descriptor names."""
    return digest("batch", setup, batch, first_round, *members, *deals)


def slot(session: Session, batch: int, round_no: int) -> bytes:
    """Which round of which batch: bound into all its commitments and tags."""
    return digest("slot", session.hash(), batch, round_no)


def slots(session: Session, batch: int, first_round: int) -> tuple[bytes, ...]:
    """The slots of a whole batch."""
    rounds = range(first_round, first_round + session.prekey_rounds)
    return tuple(slot(session, batch, round_no) for round_no in rounds)


def self_commitment(at: bytes, owner: str, key: bytes) -> bytes:
    """H(b): commits to a self-mask key before it is used; `at` is the round's `slot`."""
    return digest("self key", at, owner, key)


def recovery_commitment(at: bytes, owner: str, key: bytes, wrapped: bytes) -> bytes:
    """H(R, E): commits to a recovery key and to the partner keys that it wraps."""
    return digest("recovery key", at, owner, key, wrapped)


def share_tag(at: bytes, owner: str, holder: str, kind: str, share: bytes) -> bytes:
    """16 bytes that commit to one share; a share is uniform, so they say nothing of it."""
    return digest("share", at, owner, holder, kind, share)[:TAG_BYTES]


def share_tags(
    slots: Sequence[bytes], owner: str, holder: str, shares: Sequence[tuple[bytes, bytes]]
) -> bytes:
    """The tags of one holder's shares of one owner's keys, round by round, self mask first.

    Args:
        slots: Of the batch's rounds.
        shares: For each round the share of the self-mask key and that of the recovery key.
    """
    kinds = [encode_items(owner, holder, kind) + _share_head for kind in (SELF, RECOVERY)]
    tags = []
    for at, pair in zip(slots, shares, strict=True):
        finish = digester("share", at)
        for kind, share in zip(kinds, pair, strict=True):
            tags.append(finish(kind + share)[:TAG_BYTES])
    return b"".join(tags)


def check_values(round_keys: bytes) -> bytes:
    """`check_value` of every 32 bytes of a pair's round keys."""
    finish = digester("check")
    keys = (round_keys[at : at + 32] for at in range(0, len(round_keys), 32))
    return b"".join(finish(_share_head + key)[:TAG_BYTES] for key in keys)


def check_value(pair_round_key: bytes) -> bytes:
    """16 bytes by which both ends of a pair show that they hold the same key of a round."""
    return digest("check", pair_round_key)[:TAG_BYTES]


def wrap_keys(recovery_key: bytes, keys: bytes) -> bytes:
    """E: XOR partner keys (k x 32 bytes) with a pad of the recovery key; its own inverse."""
    pad = hkdf(recovery_key, info=encode("wrap"), length=len(keys))
    return (int.from_bytes(pad, "little") ^ int.from_bytes(keys, "little")).to_bytes(
        len(keys), "little"
    )


def round_keys(batch_key: bytes, rounds: int) -> bytes:
    """A pair's mask keys for the rounds of one batch: rounds x 32 bytes, rounds <= 255."""
    return hkdf(batch_key, info=encode("round keys"), length=32 * rounds)


def sealing_key(batch_key: bytes, dealer: str, holder: str) -> bytes:
    """The key that seals one dealer's shares of one batch for one holder."""
    return hkdf(batch_key, info=encode("seal", dealer, holder))


def sealing_context(
    session: Session, batch: int, first_round: int, dealer: str, holder: str
) -> bytes:
    """What a sealed message is and for whom."""
    return encode("shares", session.hash(), batch, first_round, dealer, holder)


def self_mask_key(key: bytes, round_digest: bytes) -> bytes:
    """Keystream key of a self mask: HKDF(b, "self", D)."""
    return hkdf(key, info=encode("self", round_digest))


def pair_mask_key(key: bytes, round_digest: bytes) -> bytes:
    """Keystream key of a pair's mask: HKDF(k_ij,round, "mask", D)."""
    return hkdf(key, info=encode("mask", round_digest))


def descriptor_digest(descriptor: bytes) -> bytes:
    """D, the hash of a descriptor's bytes."""
    return digest("round", descriptor)


def masked_digest(round_digest: bytes, sender: str, root: bytes) -> bytes:
    """What the sender of R1 signs."""
    return digest("masked", round_digest, sender, root)


def included_digest(round_digest: bytes, contributions: Sequence[Contribution]) -> bytes:
    """What R2 signs: D, U3 and every H(y)."""
    parts = [part for entry in contributions for part in (entry.name, entry.root)]
    return digest("included", round_digest, *parts)


def next_transcript(
    transcript: bytes, round_digest: bytes, included: bytes, total_root: bytes
) -> bytes:
    """T after a sum."""
    return digest("transcript", transcript, round_digest, included, total_root)


def aborted_transcript(transcript: bytes, round_digest: bytes) -> bytes:
    """T after an abort."""
    return digest("transcript", transcript, round_digest, "abort")


def first_transcript(session: Session, batch: bytes) -> bytes:
    """T of an epoch's first round; `batch` is the transcript of batch 0."""
    return digest("epoch", session.hash(), session.start, batch)


def voucher_digest(session: Session, model: bytes) -> bytes:
    """What a site signs about the model that `session`, the next epoch, starts with."""
    return digest("voucher", session.hash(), session.start, model)


def attested_digest(after: bytes, sender: str, chunks: Sequence[int]) -> bytes:
    """What a site signs once it has recomputed chunks of the sum that led to transcript `after`."""
    return digest("rechecked", after, sender, *chunks)


def checker_order(
    session: Session, round_digest: bytes, names: Sequence[str], chunk: int
) -> list[str]:
    """In which order the sites of U3 are asked to recompute one chunk; the first c + 1 do.

    The sorted names, turned to a place that D and the chunk pick, so that the work is even.
    """
    start = int.from_bytes(digest("checkers", round_digest), "little")
    turn = (start + chunk * (session.colluders + 1)) % len(names)
    return [*names[turn:], *names[:turn]]


def check_contributions(
    session: Session, cohort: Sequence[str], contributions: Sequence[Contribution]
) -> tuple[str, ...]:
    """The names of U3, if it is sorted, part of the cohort and large enough (R2.1, R2.2).

    Raises:
        ProtocolError: it is not.
    """
    names = tuple(entry.name for entry in contributions)
    if list(names) != sorted(set(names)):
        raise ProtocolError("the set of contributors is not sorted, or names a site twice")
    strangers = set(names) - set(cohort)
    if strangers:
        raise ProtocolError(f"contributors outside the round's cohort: {sorted(strangers)}")
    if len(names) < session.threshold:
        raise ProtocolError(
            f"{len(names)} contributors are too few; this session opens a sum over at least "
            f"{session.threshold}"
        )
    return names


def check_attestations(session: Session, after: bytes, attestations: Iterable[Attestation]) -> None:
    """Every chunk of the sum that led to `after` was recomputed by c + 1 sites (C.5).

    Raises:
        ProtocolError: one is forged, or a chunk has too few.
    """
    count = -(-session.length // session.chunk)
    seen: list[set[str]] = [set() for _ in range(count)]
    for entry in attestations:
        if entry.transcript != after or entry.sender not in session.public:
            raise ProtocolError(f"{entry.sender}: its recheck is of another sum")
        signed = attested_digest(after, entry.sender, entry.chunks)
        public = session.public[entry.sender]
        verify(public, RECHECK, signed, entry.signature, who=entry.sender)
        for chunk in entry.chunks:
            if chunk >= count:
                raise ProtocolError(f"{entry.sender}: chunk {chunk} does not exist")
            seen[chunk].add(entry.sender)
    needed = session.colluders + 1
    short = sum(len(senders) < needed for senders in seen)
    if short:
        raise ProtocolError(
            f"{short} of {count} chunks of the last published sum were not recomputed by {needed} "
            "sites; until they are, no site signs another set"
        )
