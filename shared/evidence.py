"""What a run leaves behind for an auditor: every round, without any vector and any patient.

Server and sites keep the same kinds of record, made from the secure sum's own messages. All that a
record says is signed by the sites of the roster, so it matters little who kept it:

EpochOpened    the session that all keys and signatures of an epoch are bound to
DealsSeen      S1, S2 or S3 of every member: hashes, and each member's signature over them
Activation     every member's signature over the transcript of a batch (S4)
RoundEnded     a sum: descriptor, contributors, t signatures over them, the sum's root
Abort          a round without a sum
Settlement     who recomputed which chunks of a sum
SignedReceipt  what a site holds and charged at the end

A record file is a list of records and a `Seal`: the keeper's signature over the RFC 9162 root of
them. The *rounds' log* is another such tree, over one entry a round, alike at every site; each
site signs its root in its receipt, so the receipts are the log's co-signed checkpoint.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from shared import rfc9162
from shared.errors import ConfigError, ProtocolError
from shared.identity import Identity, verify
from shared.messages import (
    U8,
    U32,
    Blob,
    ByName,
    Fixed,
    Many,
    Maybe,
    Nested,
    Text,
    decode,
    encode,
    kind_of,
    message,
)
from shared.secagg import merkle, transcript
from shared.secagg.messages import (
    MAX_SITES,
    Abort,
    Activation,
    Attestation,
    Contributions,
    Deliveries,
    Descriptor,
    Hash,
    Name,
    RefillStep,
    Result,
    Settlement,
    Signature,
    Signatures,
)
from shared.secagg.session import Session
from shared.study import SignedReceipt

MAGIC = b"FWE1"
SEAL = "evidence seal"
RECORD_FILE = "record.fwe"
SUMS_FILE = "sums.fwe"
STATE_FILE = "state.fwm"
PLAN_FILE = "plan.json"
RECEIPTS_FILE = "receipts.json"
LEDGER_FILE = "ledger.jsonl"
_LENGTH = struct.Struct("<I")


@message(0x5401)
@dataclass(frozen=True, slots=True)
class EpochOpened:
    """The session of one epoch, as far as plan and roster do not tell it."""

    run_id: Annotated[str, Text()]
    plan_sha256: Hash
    roster: Annotated[dict[str, bytes], ByName(Fixed(32), MAX_SITES)]
    epoch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    start: Hash
    session: Hash


@dataclass(frozen=True, slots=True)
class DealSeen:
    """One member's signed deal without its content."""

    sender: Name
    common: Hash
    parts: Annotated[tuple[bytes, ...], Many(Fixed(32), MAX_SITES + 1)]
    signature: Signature


@message(0x5402)
@dataclass(frozen=True, slots=True)
class DealsSeen:
    """S1, S2 or S3 of a batch, all members'."""

    step: Annotated[int, U8]
    batch: Annotated[int, U32]
    first_round: Annotated[int, U32]
    deals: Annotated[tuple[DealSeen, ...], Many(Nested(DealSeen), MAX_SITES)]


@message(0x5403)
@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A `Result` with the root of its sum in the sum's place."""

    descriptor: Annotated[bytes, Blob(MAX_SITES * 70 + 512)]
    contributions: Contributions
    signatures: Signatures
    total_root: Hash


@message(0x5404)
@dataclass(frozen=True, slots=True)
class LogEntry:
    """One round in the rounds' log; every site that saw the round writes the same bytes."""

    descriptor: Annotated[bytes, Blob(MAX_SITES * 70 + 512)]
    included: Annotated[bytes | None, Maybe(Fixed(32))]
    total_root: Annotated[bytes | None, Maybe(Fixed(32))]
    transcript: Hash


@message(0x5405)
@dataclass(frozen=True, slots=True)
class Seal:
    """Who kept a record file, and what the records before this one are."""

    keeper: Annotated[str, Text()]
    size: Annotated[int, U32]
    root: Hash
    signature: Annotated[bytes | None, Maybe(Fixed(64))]


@message(0x5406)
@dataclass(frozen=True, slots=True)
class PublishedSum:
    """A published sum, as it travelled."""

    round: Annotated[int, U32]
    total: Annotated[bytes, Blob()]


Keep = Callable[[bytes], None]
RECORDS: tuple[type[Any], ...] = (
    EpochOpened,
    DealsSeen,
    Activation,
    RoundEnded,
    Abort,
    Settlement,
    SignedReceipt,
)


class Witness:
    """Turns the messages of a run, once they were checked, into records.

    The same message may come again (a reconnection): whoever keeps records drops repeated ones.
    """

    def __init__(self, session: Session, keep: Keep) -> None:
        """Records of one epoch go to `keep`."""
        self._session, self._keep = session, keep

    def epoch(self) -> None:
        """An epoch begins."""
        session = self._session
        opened = EpochOpened(
            run_id=session.run_id,
            plan_sha256=session.plan_sha256,
            roster=session.public,
            epoch=session.epoch,
            first_round=session.first_round,
            start=session.start,
            session=session.hash(),
        )
        self._keep(encode(opened))

    def deliveries(self, data: bytes) -> None:
        """A step of the set-up, S1 to S3, as any one recipient got it."""
        seen = decode(Deliveries, data)
        deals = tuple(
            DealSeen(i.sender, transcript.part_hash(i.common), i.part_hashes, i.signature)
            for i in seen.items
        )
        self._keep(encode(DealsSeen(seen.step, seen.batch, seen.first_round, deals)))

    def activation(self, data: bytes) -> None:
        """S5: every member's signature over a batch."""
        self._keep(encode(decode(Activation, data)))

    def refill(self, data: bytes) -> None:
        """The steps of a refill that came with a round."""
        for item in decode(RefillStep, data).items if data else ():
            kind = kind_of(item)
            if kind is Deliveries:
                self.deliveries(item)
            elif kind is Activation:
                self.activation(item)

    def result(self, data: bytes) -> None:
        """The end of a round, a sum or an abort."""
        self._keep(round_record(data, self._session.chunk_bytes))

    def attestations(self, entries: tuple[Attestation, ...]) -> None:
        """Who recomputed the last sum."""
        if entries:
            self._keep(encode(Settlement(tuple(sorted(entries, key=checker_place)))))

    def receipt(self, data: bytes) -> None:
        """A site's receipt at the end of the run."""
        self._keep(encode(decode(SignedReceipt, data)))


def checker_place(entry: Attestation) -> tuple[str, tuple[int, ...]]:
    """How attestations are ordered in a record, so that it has one form."""
    return entry.sender, entry.chunks


def round_record(data: bytes, chunk_bytes: int) -> bytes:
    """A `Result` or `Abort` as it is kept: the sum is replaced by its root."""
    if kind_of(data) is Abort:
        return encode(decode(Abort, data))
    result = decode(Result, data)
    root = merkle.root(result.total, chunk_bytes)
    return encode(RoundEnded(result.descriptor, result.contributions, result.signatures, root))


def log_entry(record: bytes) -> LogEntry | None:
    """A record's entry in the rounds' log; None for what is not the end of a round."""
    kind = kind_of(record)
    if kind is Abort:
        raw = decode(Abort, record).descriptor
        before, digest = decode(Descriptor, raw).transcript, transcript.descriptor_digest(raw)
        return LogEntry(raw, None, None, transcript.aborted_transcript(before, digest))
    if kind is not RoundEnded:
        return None
    ended = decode(RoundEnded, record)
    before = decode(Descriptor, ended.descriptor).transcript
    digest = transcript.descriptor_digest(ended.descriptor)
    included = transcript.included_digest(digest, ended.contributions)
    after = transcript.next_transcript(before, digest, included, ended.total_root)
    return LogEntry(ended.descriptor, included, ended.total_root, after)


def log_leaves(records: Iterable[bytes]) -> list[bytes]:
    """Leaf hashes of the rounds' log, in the order of the records."""
    entries = (log_entry(record) for record in records)
    return [rfc9162.leaf_hash(encode(entry)) for entry in entries if entry is not None]


def write_record_file(
    path: Path, records: Sequence[bytes], *, keeper: str, identity: Identity | None
) -> None:
    """Write records and their seal.

    Args:
        path: Written over; the folder must exist.
        records: In the order of the run.
        keeper: The site's name, or "server".
        identity: Signs the seal; None where the keeper has no key (a simulated server): the
            sites' own signatures inside the records hold all the same.
    """
    root = rfc9162.root_of([rfc9162.leaf_hash(record) for record in records])
    blank = Seal(keeper, len(records), root, None)
    signature = identity.sign(SEAL, encode(blank)) if identity else None
    write_frames(path, [*records, encode(Seal(keeper, len(records), root, signature))])


@dataclass(frozen=True)
class RecordFile:
    """A record file whose seal fits its records; who signed it is for the reader to check."""

    keeper: str
    records: tuple[bytes, ...]
    seal: Seal

    def check_signature(self, public: bytes) -> None:
        """Raise ProtocolError unless the keeper, under this key, signed the seal."""
        blank = Seal(self.seal.keeper, self.seal.size, self.seal.root, None)
        if self.seal.signature is None:
            raise ProtocolError(f"the record file of {self.keeper} is not signed")
        verify(public, SEAL, encode(blank), self.seal.signature, who=self.keeper)


def read_record_file(path: Path) -> RecordFile:
    """Read what `write_record_file` wrote.

    Raises:
        ConfigError: the file cannot be read.
        ProtocolError: not such a file, cut short, or a record does not fit the seal.
    """
    frames = list(read_frames(path))
    if not frames:
        raise ProtocolError(f"{path.name} holds no record and no seal")
    seal, records = decode(Seal, frames[-1]), tuple(frames[:-1])
    for number, record in enumerate(records):
        if kind_of(record) not in RECORDS:
            raise ProtocolError(f"{path.name}: record {number} is of a kind that does not belong")
        decode(kind_of(record), record)
    root = rfc9162.root_of([rfc9162.leaf_hash(record) for record in records])
    if (seal.size, seal.root) != (len(records), root):
        raise ProtocolError(
            f"{path.name}: the {len(records)} records are not the {seal.size} that were sealed: "
            "one was changed, removed, added or moved"
        )
    return RecordFile(seal.keeper, records, seal)


def write_frames(path: Path, frames: Iterable[bytes]) -> None:
    """Write byte strings one after the other, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(MAGIC)
        for frame in frames:
            file.write(_LENGTH.pack(len(frame)))
            file.write(frame)
    temporary.replace(path)


def read_frames(path: Path) -> Iterator[bytes]:
    """Byte strings that `write_frames` wrote; ConfigError, or ProtocolError where cut short."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ProtocolError(f"{path.name} does not start as a file of evidence does")
            while head := file.read(_LENGTH.size):
                size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
                frame = file.read(size) if 0 <= size < 2**31 else b""
                if len(frame) != size:
                    raise ProtocolError(f"{path.name} is cut short")
                yield frame
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
