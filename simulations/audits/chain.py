"""A run's rounds, replayed from the records alone: every hash, every signature, every threshold.

Nothing is believed that is not signed under a key of the roster; which keys those are, the reader
has to know from elsewhere (fingerprints). The formulas are the protocol's own
(shared/secagg/transcript.py): an auditor who distrusts them finds them in PROTOCOL.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared import rfc9162
from shared.errors import AuditError, ProtocolError
from shared.evidence import (
    DealsSeen,
    EpochOpened,
    LogEntry,
    RoundEnded,
    checker_place,
    log_entry,
)
from shared.identity import verify
from shared.messages import decode, encode, kind_of
from shared.plan import StudyPlan
from shared.secagg import transcript
from shared.secagg.messages import S1, S2, S3, Abort, Activation, Descriptor, Settlement
from shared.secagg.session import Session
from shared.study import EpochTerms, Receipt, SignedReceipt, session_of
from simulations.audits.checks import demand


@dataclass(frozen=True)
class Batch:
    """A batch of prekeys that all its members confirmed."""

    first_round: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class Round:
    """One round as it was signed.

    Attributes:
        number: Of the secure sum; aborted rounds count.
        descriptor: What all masks of the round are bound to.
        digest: D, its hash.
        contributors: U3; empty where the round was aborted.
        reason: Why it was aborted, or "".
        total_root: Root of the published sum; empty where there is none.
        entry: In the rounds' log.
        session: Of its epoch.
    """

    number: int
    descriptor: Descriptor
    digest: bytes
    contributors: tuple[str, ...]
    reason: str
    total_root: bytes
    entry: LogEntry
    session: Session

    @property
    def cohort(self) -> tuple[str, ...]:
        """The sites that were asked."""
        return self.descriptor.cohort


@dataclass
class History:
    """What the records of one keeper say, checked."""

    keeper: str
    plan: StudyPlan
    parameters: int
    sessions: list[Session] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    receipts: dict[str, SignedReceipt] = field(default_factory=dict)
    settled: set[bytes] = field(default_factory=set)
    foreign_batches: int = 0
    _deals: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)
    _members: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    _batches: dict[bytes, Batch] = field(default_factory=dict)
    _setup: bytes = b""
    transcript: bytes = b""

    @property
    def session(self) -> Session:
        """Of the epoch that the records are in."""
        if not self.sessions:
            raise AuditError(f"{self.keeper}: a record comes before its epoch was opened")
        return self.sessions[-1]

    @property
    def roster(self) -> dict[str, bytes]:
        """Public key of every site, as the last epoch pinned them."""
        return self.session.public

    @property
    def leaves(self) -> list[bytes]:
        """Leaf hashes of the rounds' log."""
        return [rfc9162.leaf_hash(encode(r.entry)) for r in self.rounds]

    def read(self, number: int, record: bytes) -> None:
        """Take one record on.

        Raises:
            AuditError: it does not hold; record and round are named.
        """
        kind = kind_of(record)
        try:
            if kind is EpochOpened:
                self._epoch(decode(EpochOpened, record))
            elif kind is DealsSeen:
                self._deal(decode(DealsSeen, record))
            elif kind is Activation:
                self._activate(decode(Activation, record))
            elif kind in (RoundEnded, Abort):
                self._round(record)
            elif kind is Settlement:
                self._settle(decode(Settlement, record))
            else:
                self._receipt(decode(SignedReceipt, record))
        except (ProtocolError, AuditError) as error:
            where = f"{self.keeper}, record {number} ({kind.__name__})"
            raise AuditError(f"{where}: {error}") from None

    def _epoch(self, opened: EpochOpened) -> None:
        demand(opened.plan_sha256.hex() == self.plan.sha256, "it is of another plan")
        members = tuple(sorted(opened.roster))
        terms = EpochTerms(opened.epoch, members, opened.first_round, opened.start)
        session = session_of(self.plan, opened.run_id, opened.roster, self.parameters, terms)
        demand(session.hash() == opened.session, "plan and roster give another session")
        if self.sessions:
            demand(opened.run_id == self.session.run_id, "it is of another run")
            demand(opened.epoch > self.session.epoch, "epochs do not rise")
            demand(opened.start == self.transcript, "the epoch does not go on from the one before")
            demand(opened.first_round > self._last_round, "the epoch uses round numbers again")
        elif opened.epoch == 0:
            demand(opened.start == bytes(32), "a run begins with an empty history")
        self.sessions.append(session)
        self._deals, self._members, self._batches, self._setup = {}, {}, {}, b""

    @property
    def _last_round(self) -> int:
        return self.rounds[-1].number if self.rounds else 0

    def _deal(self, seen: DealsSeen) -> None:
        session = self.session
        members = tuple(deal.sender for deal in seen.deals)
        demand(list(members) == sorted(set(members)), "its members are not sorted")
        demand(set(members) <= set(session.names), "a member is not in the roster")
        if seen.step in (S1, S2):
            demand(members == session.names, "set-up needs every site")
        demand(seen.step in (S1, S2, S3), f"step {seen.step} does not exist")
        head = transcript.deal_head(session, seen.step, seen.batch, seen.first_round)
        digests = []
        for deal in seen.deals:
            digest = transcript.deal_digest_of_hashes(head, deal.sender, deal.common, deal.parts)
            verify(session.public[deal.sender], transcript.DEAL, digest, deal.signature,
                   who=deal.sender)  # fmt: skip
            digests.append(digest)
        self._deals[seen.step, seen.batch] = digests
        if seen.step == S3:
            self._members[seen.batch] = (seen.first_round, members)
        if seen.step == S2:
            self._setup = transcript.setup_transcript(session, self._deals[S1, 0], digests)

    def _activate(self, activation: Activation) -> None:
        session, number = self.session, activation.batch
        demand(number in self._members, f"batch {number} was confirmed, but not dealt")
        first, members = self._members[number]
        demand(tuple(sorted(activation.signatures)) == members, "not every member confirmed")
        demand(len(members) >= session.threshold, "the batch has fewer members than the threshold")
        signed = transcript.batch_transcript(
            self._setup, number, first, members, self._deals[S3, number]
        )
        for name, signature in activation.signatures.items():
            verify(session.public[name], transcript.CONFIRM, signed, signature, who=name)
        if not self._batches:
            demand(number == 0, "the set-up's own batch is missing")
            self.transcript = transcript.first_transcript(session, signed)
        self._batches[signed] = Batch(first, members)

    def _round(self, record: bytes) -> None:
        entry = log_entry(record)
        assert entry is not None  # noqa: S101  # of these two kinds
        what = decode(Descriptor, entry.descriptor)
        try:
            self._check_descriptor(what)
            ended = decode(RoundEnded, record) if kind_of(record) is RoundEnded else None
            names = self._check_ended(what, entry, ended) if ended else ()
        except (ProtocolError, AuditError) as error:
            raise AuditError(f"round {what.round}: {error}") from None
        self.rounds.append(
            Round(
                number=what.round,
                descriptor=what,
                digest=transcript.descriptor_digest(entry.descriptor),
                contributors=names,
                reason="" if ended else decode(Abort, record).reason,
                total_root=ended.total_root if ended else b"",
                entry=entry,
                session=self.session,
            )
        )
        self.transcript = entry.transcript

    def _check_descriptor(self, what: Descriptor) -> None:
        session = self.session
        demand(what.session == session.hash(), "it is of another session")
        demand(what.round > self._last_round, f"it comes after round {self._last_round}")
        demand(what.round >= session.first_round, "it is older than its epoch")
        demand(what.transcript == self.transcript, "it does not go on from the round before")
        cohort = what.cohort
        demand(list(cohort) == sorted(set(cohort)), "the cohort is not sorted")
        demand(set(cohort) <= set(session.names), "the cohort holds a stranger")
        demand(len(cohort) >= session.threshold, "the cohort is smaller than the threshold")
        batch = self._batches.get(what.batch)
        if batch is None:
            demand(self.keeper not in cohort, "its prekeys were never confirmed")
            demand(self.keeper in session.names, "its prekeys were never confirmed")
            self.foreign_batches += 1
            return
        demand(set(cohort) <= set(batch.members), "the cohort holds sites without prekeys")
        covered = range(batch.first_round, batch.first_round + session.prekey_rounds)
        demand(what.round in covered, "its prekeys are of other rounds")

    def _check_ended(self, what: Descriptor, entry: LogEntry, ended: RoundEnded) -> tuple[str, ...]:
        session, digest = self.session, transcript.descriptor_digest(ended.descriptor)
        names = transcript.check_contributions(session, what.cohort, ended.contributions)
        for one in ended.contributions:
            signed = transcript.masked_digest(digest, one.name, one.root)
            verify(session.public[one.name], transcript.MASKED, signed, one.signature, who=one.name)
        signers = set(ended.signatures)
        demand(signers <= set(names), "somebody signed the contributors who is not one of them")
        demand(
            len(signers) >= session.threshold,
            f"{len(signers)} sites signed the contributors; {session.threshold} must",
        )
        for name, signature in ended.signatures.items():
            verify(session.public[name], transcript.AGREE, entry.included or b"", signature,
                   who=name)  # fmt: skip
        return names

    def _settle(self, settlement: Settlement) -> None:
        entries = settlement.attestations
        after = entries[0].transcript if entries else b""
        demand(list(entries) == sorted(entries, key=checker_place), "its entries are not sorted")
        last = self.sums[-1] if self.sums else None
        demand(
            last is not None and last.entry.transcript == after,
            "it vouches for another sum than the last one before it",
        )
        session = last.session if last else self.session
        transcript.check_attestations(session, after, settlement.attestations)
        self.settled.add(after)

    def _receipt(self, signed: SignedReceipt) -> None:
        receipt = decode(Receipt, signed.receipt)
        demand(receipt.site in self.roster, f"{receipt.site} is not in the roster")
        verify(self.roster[receipt.site], "receipt", signed.receipt, signed.signature,
               who=receipt.site)  # fmt: skip
        demand(receipt.site not in self.receipts, f"a second receipt of {receipt.site}")
        self.receipts[receipt.site] = signed

    @property
    def sums(self) -> list[Round]:
        """The rounds that ended with a sum."""
        return [r for r in self.rounds if r.total_root]

    @property
    def last_sum_settled(self) -> bool:
        """Whether c + 1 sites are seen to have recomputed the last sum.

        Every earlier one is covered by the next: t sites sign a set only after the recheck.
        """
        return bool(self.sums) and self.sums[-1].entry.transcript in self.settled


def replay(records: Sequence[bytes], keeper: str, plan: StudyPlan, parameters: int) -> History:
    """Read a keeper's records in order.

    Args:
        records: As in its record file.
        keeper: A site's name, or "server".
        plan: Whose hash everything must be bound to.
        parameters: Coordinates of the plan's model.

    Raises:
        AuditError: the first record that does not hold, with the reason.
    """
    history = History(keeper, plan, parameters)
    for number, record in enumerate(records):
        history.read(number, record)
    demand(bool(history.rounds), f"{keeper}: the record holds no round")
    return history


def check_same_rounds(mine: History, other: History) -> int:
    """Compare two keepers' rounds; returns how many both hold.

    A site that joined in a later epoch holds the last rounds only.

    Raises:
        AuditError: they were told different things; the first such round is named.
    """
    theirs = {r.number: r for r in other.rounds}
    common = [r for r in mine.rounds if r.number in theirs]
    for one in common:
        demand(
            one.entry == theirs[one.number].entry,
            f"{mine.keeper} and {other.keeper} hold different rounds from round {one.number} on: "
            "one of them was shown another history",
        )
    for keeper, rounds in ((mine, other.rounds), (other, mine.rounds)):
        joined = keeper.sessions[0].first_round if keeper.sessions[0].epoch else 0
        held = {r.number for r in keeper.rounds}
        missing = [r.number for r in rounds if r.number >= joined and r.number not in held]
        demand(
            not missing,
            f"the record of {keeper.keeper} lacks {len(missing)} round(s) that others hold, from "
            f"round {missing[0] if missing else 0} on: it was cut",
        )
    return len(common)
