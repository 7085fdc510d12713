"""The messages of the secure sum; PROTOCOL.md, section 4, says who sends and checks which.

Lengths that depend on the session are checked by the state machines; the limits here only keep a
hostile message from costing memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from shared.messages import U8, U32, Blob, ByName, Fixed, Many, Nested, Text, message

MAX_SITES = 255
MAX_REASON_BYTES = 500

Name = Annotated[str, Text()]
Hash = Annotated[bytes, Fixed(32)]
Signature = Annotated[bytes, Fixed(64)]
Names = Annotated[tuple[str, ...], Many(Text(), MAX_SITES)]
Signatures = Annotated[Mapping[str, bytes], ByName(Fixed(64), MAX_SITES)]

S1, S2, S3, S4, S5 = 1, 2, 3, 4, 5


@message(0x0101)
@dataclass(frozen=True, slots=True)
class Dealt:
    """S1, S2 and S3, site to server: something for all, and a part for each site apart.

    S1: common = public keys. S2: part = KEM ciphertext to a site behind the sender.
    S3: common = commitments, part = `Shares`, and one part more, for the server: wrapped keys.
    """

    step: Annotated[int, U8]
    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    sender: Name
    common: Annotated[bytes, Blob()]
    parts: Annotated[tuple[bytes, ...], Many(Blob(), MAX_SITES + 1)]
    signature: Signature


@dataclass(frozen=True, slots=True)
class Delivered:
    """A `Dealt` as one recipient gets it: its own part, the hashes of all parts."""

    sender: Name
    common: Annotated[bytes, Blob()]
    part_hashes: Annotated[tuple[bytes, ...], Many(Fixed(32), MAX_SITES + 1)]
    part: Annotated[bytes, Blob()]
    signature: Signature


@message(0x0102)
@dataclass(frozen=True, slots=True)
class Deliveries:
    """The server's answer to S1, S2 or S3: every member's deal, for one recipient."""

    step: Annotated[int, U8]
    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    items: Annotated[tuple[Delivered, ...], Many(Nested(Delivered), MAX_SITES)]


@message(0x0103)
@dataclass(frozen=True, slots=True)
class Shares:
    """A site's part of S3: sealed shares, their tags, and check values if the two are partners."""

    sealed: Annotated[bytes, Blob(MAX_SITES * 64 + 16)]
    tags: Annotated[bytes, Blob(MAX_SITES * 32)]
    checks: Annotated[bytes, Blob(MAX_SITES * 16)]


@message(0x0104)
@dataclass(frozen=True, slots=True)
class Confirmed:
    """S4, site to server: a signature over the transcript of a batch."""

    batch: Annotated[int, U32]
    sender: Name
    signature: Signature


@message(0x0105)
@dataclass(frozen=True, slots=True)
class Activation:
    """S5, server to site: every member's signature over the transcript of a batch."""

    batch: Annotated[int, U32]
    signatures: Signatures


@message(0x0106)
@dataclass(frozen=True, slots=True)
class DealRequest:
    """Server to site: deal prekeys for one more batch."""

    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]


@message(0x0107)
@dataclass(frozen=True, slots=True)
class Complaint:
    """Site to server: a batch that this site will not confirm, and why."""

    batch: Annotated[int, U32]
    sender: Name
    accused: Annotated[str, Text()]
    reason: Annotated[str, Text(MAX_REASON_BYTES)]


@message(0x0108)
@dataclass(frozen=True, slots=True)
class RefillStep:
    """Steps of a refill, in order, and the answers to them; rides with R0 and R1."""

    items: Annotated[tuple[bytes, ...], Many(Blob(), 4)]


@message(0x0110)
@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a round is; the hash of its bytes, D, is bound into every mask of the round."""

    session: Hash
    batch: Hash
    round: Annotated[int, U32]
    model: Hash
    transcript: Hash
    cohort: Names


@message(0x0111)
@dataclass(frozen=True, slots=True)
class Opening:
    """R0, server to site: the descriptor; a `RefillStep` and a `Recheck`, or nothing."""

    descriptor: Annotated[bytes, Blob(MAX_SITES * 70 + 512)]
    refill: Annotated[bytes, Blob()]
    recheck: Annotated[bytes, Blob()]


@message(0x0112)
@dataclass(frozen=True, slots=True)
class Masked:
    """R1, site to server: the masked vector; a `RefillStep` and an `Attestation`, or nothing."""

    digest: Hash
    sender: Name
    root: Hash
    signature: Signature
    refill: Annotated[bytes, Blob()]
    attestation: Annotated[bytes, Blob()]
    vector: Annotated[bytes, Blob()]


@message(0x011D)
@dataclass(frozen=True, slots=True)
class Beside:
    """R1 of a site outside the cohort: its part in a refill, and no vector."""

    digest: Hash
    sender: Name
    refill: Annotated[bytes, Blob()]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One site's masked vector, by its root and the site's signature."""

    name: Name
    root: Hash
    signature: Signature


@message(0x011B)
@dataclass(frozen=True, slots=True)
class Attestation:
    """A site's word that it recomputed these chunks of the sum that led to this transcript."""

    sender: Name
    transcript: Hash
    chunks: Annotated[tuple[int, ...], Many(U32, 1 << 24)]
    signature: Signature


Attestations = Annotated[tuple[Attestation, ...], Many(Nested(Attestation), 4 * MAX_SITES)]
Contributions = Annotated[tuple[Contribution, ...], Many(Nested(Contribution), MAX_SITES)]


@message(0x0113)
@dataclass(frozen=True, slots=True)
class Included:
    """R2, server to site: U3, whose sum is to be opened, and who rechecked the sum before."""

    digest: Hash
    contributions: Contributions
    attestations: Attestations


@message(0x0114)
@dataclass(frozen=True, slots=True)
class Agreed:
    """R2, site to server: its signature over U3, and its self-mask shares if U3 is the cohort."""

    digest: Hash
    sender: Name
    signature: Signature
    self_shares: Annotated[bytes, Blob(MAX_SITES * 32)]


@message(0x0115)
@dataclass(frozen=True, slots=True)
class Quorum:
    """R3, server to site: at least t signatures over the U3 that the site signed, too."""

    digest: Hash
    signatures: Signatures


@message(0x0116)
@dataclass(frozen=True, slots=True)
class Released:
    """R3, site to server: self-mask shares of U3, recovery shares of the rest of the cohort."""

    digest: Hash
    sender: Name
    self_shares: Annotated[bytes, Blob(MAX_SITES * 32)]
    recovery_shares: Annotated[bytes, Blob(MAX_SITES * 32)]


@message(0x0117)
@dataclass(frozen=True, slots=True)
class Result:
    """Server to all: the sum over U3, with t signatures over U3."""

    descriptor: Annotated[bytes, Blob(MAX_SITES * 70 + 512)]
    contributions: Contributions
    signatures: Signatures
    total: Annotated[bytes, Blob()]


@message(0x0118)
@dataclass(frozen=True, slots=True)
class Abort:
    """Server to all: the round ended without a sum."""

    descriptor: Annotated[bytes, Blob(MAX_SITES * 70 + 512)]
    reason: Annotated[str, Text(MAX_REASON_BYTES)]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A dropped-out site's recovery key of one round and the partner keys that it wraps."""

    key: Hash
    wrapped: Annotated[bytes, Blob(MAX_SITES * 32)]


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk of one masked vector with its path to the signed root."""

    chunk: Annotated[bytes | memoryview, Blob()]
    proof: Annotated[tuple[bytes, ...], Many(Fixed(32), 64)]


@dataclass(frozen=True, slots=True)
class Pieces:
    """One chunk of every vector of U3, and the path from the chunk of their sum to its root."""

    number: Annotated[int, U32]
    proof: Annotated[tuple[bytes, ...], Many(Fixed(32), 64)]
    pieces: Annotated[tuple[Piece, ...], Many(Nested(Piece), MAX_SITES)]


@message(0x0119)
@dataclass(frozen=True, slots=True)
class Recheck:
    """Server to site: what it takes to compute some chunks of the published sum again."""

    digest: Hash
    self_keys: Annotated[Mapping[str, bytes], ByName(Fixed(32), MAX_SITES)]
    recovered: Annotated[Mapping[str, Recovered], ByName(Nested(Recovered), MAX_SITES)]
    chunks: Annotated[tuple[Pieces, ...], Many(Nested(Pieces), 1 << 24)]


@message(0x011C)
@dataclass(frozen=True, slots=True)
class Settlement:
    """Server to site, after the last round: who rechecked the last sum."""

    attestations: Attestations


@message(0x011A)
@dataclass(frozen=True, slots=True)
class Voucher:
    """A site's word for the model with which the next epoch starts."""

    sender: Name
    model: Hash
    signature: Signature
