"""One round on the relay's side: collects, adds as vectors come, unmasks, packs the recheck."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np

from server.secagg_recheck import Kept, Rechecks
from server.secagg_setup import Batch, check_value, commitments, shares_tag, wrapped_keys
from shared.errors import CohortError, ProtocolError
from shared.identity import verify
from shared.messages import Blob, decode, encode, message
from shared.secagg import merkle, shamir, transcript
from shared.secagg.masking import add_masks
from shared.secagg.messages import (
    Agreed,
    Attestation,
    Beside,
    Contribution,
    Descriptor,
    Included,
    Masked,
    Quorum,
    Recovered,
    Released,
    Result,
    Signatures,
)
from shared.secagg.ring import RingVector
from shared.secagg.session import Session
from shared.secagg.unmask import unmask_keys, unwrap

M = TypeVar("M", Masked, Beside, Agreed, Released)


@message(0x0304)
@dataclass(frozen=True, slots=True)
class Underway:
    """What an open round has asked the sites to sign: a site signs one set, ever.

    Attributes:
        descriptor: The round.
        included: R2 as it was sent.
        signatures: The signatures that R3 is made of; empty before R3.
    """

    descriptor: Annotated[bytes, Blob()]
    included: Annotated[bytes, Blob()]
    signatures: Signatures


class RelayRound:
    """Everything that the relay knows of one round; `phase` only goes forward."""

    def __init__(self, session: Session, batch: Batch, descriptor: bytes) -> None:
        """A round that is open for inputs."""
        self.descriptor = descriptor
        self.what = decode(Descriptor, descriptor)
        self.digest = transcript.descriptor_digest(descriptor)
        self.contributors: tuple[str, ...] = ()
        self.total: RingVector | None = None
        self._session = session
        self._batch = batch
        self._inputs_open = True
        self._sum = session.ring.zeros(session.length)
        self._wires: dict[str, bytes] = {}
        self._trees: dict[str, merkle.Tree] = {}
        self._contributions: dict[str, Contribution] = {}
        self._included = b""
        self._signatures: dict[str, bytes] = {}
        self._quorum: tuple[str, ...] = ()
        self._self_shares: dict[str, bytes] = {}
        self._recovery_shares: dict[str, bytes] = {}
        self._self_keys: dict[str, bytes] = {}
        self._recovered: dict[str, Recovered] = {}
        self._request = b""
        self._resumed: Underway | None = None

    @property
    def batch(self) -> Batch:
        """The batch of prekeys that it uses."""
        return self._batch

    @property
    def dropped(self) -> tuple[str, ...]:
        """The sites of the cohort outside U3."""
        return tuple(name for name in self.what.cohort if name not in self.contributors)

    def add_masked(self, name: str, reply: bytes) -> tuple[bytes, bytes]:
        """Add one site's R1 to the sum; returns what rode with it: refill and attestation.

        Raises:
            ProtocolError: late, not of the cohort, malformed, forged, or a second vector.
        """
        if not self._inputs_open:
            raise ProtocolError(
                f"{name}: the vector came after the round was closed; the site counts as dropped"
            )
        self._expect(name, self.what.cohort)
        answer = self._decode(name, Masked, reply)
        if len(answer.vector) != self._session.vector_bytes:
            raise ProtocolError(
                f"{name}: a vector of {len(answer.vector)} bytes came, not of "
                f"{self._session.vector_bytes}"
            )
        tree = merkle.Tree(answer.vector, self._session.chunk_bytes)
        if tree.root != answer.root:
            raise ProtocolError(f"{name}: the vector is not the one that its root names")
        signed = transcript.masked_digest(self.digest, name, answer.root)
        verify(self._session.public[name], transcript.MASKED, signed, answer.signature, who=name)
        known = self._contributions.get(name)
        if known is not None and known.root == answer.root:
            return b"", b""
        if known is not None:
            raise ProtocolError(f"{name}: sent two different vectors for one round")
        self._contributions[name] = Contribution(name, answer.root, answer.signature)
        self._wires[name] = answer.vector
        self._trees[name] = tree
        self._session.ring.add_wire(self._sum, answer.vector)
        return answer.refill, answer.attestation

    def beside(self, name: str, reply: bytes) -> bytes:
        """The refill's answer of a site outside the cohort; it has no part in the sum."""
        self._expect(name, self._session.names)
        return self._decode(name, Beside, reply).refill

    def go_on(self, earlier: Underway) -> tuple[str, ...]:
        """Ask for nothing but what was asked before a restart; returns the sites of that U3.

        Raises:
            ProtocolError: it is of another round.
        """
        if earlier.descriptor != self.descriptor:
            raise ProtocolError("what was under way is of another round than the open one")
        self._resumed = earlier
        return tuple(e.name for e in decode(Included, earlier.included).contributions)

    @property
    def goes_on(self) -> bool:
        """Whether an earlier relay asked the sites to sign this round's set."""
        return self._resumed is not None

    def underway(self) -> Underway:
        """What `go_on` needs; write it before R2, and again before R3, leave."""
        return Underway(self.descriptor, self._request, self._certificate())

    @property
    def received(self) -> tuple[str, ...]:
        """The sites whose vectors have come so far."""
        return tuple(sorted(self._contributions))

    def close_inputs(self, attestations: tuple[Attestation, ...]) -> dict[str, bytes]:
        """R2 for every site whose vector came; late ones are dropped from here on.

        Raises:
            CohortError: fewer than t came.
        """
        self._inputs_open = False
        self.contributors = self.received
        least = self._session.threshold
        if self._resumed is None and len(self.contributors) < least:
            raise CohortError(
                f"round {self.what.round}: {len(self.contributors)} of {len(self.what.cohort)} "
                f"sites sent a vector; {least} are needed"
            )
        entries = tuple(self._contributions[name] for name in self.contributors)
        self._included = transcript.included_digest(self.digest, entries)
        self._request = encode(Included(self.digest, entries, attestations))
        if self._resumed is not None:
            return self._resume_agreement(self._resumed, entries)
        return dict.fromkeys(self.contributors, self._request)

    def _resume_agreement(
        self, earlier: Underway, entries: tuple[Contribution, ...]
    ) -> dict[str, bytes]:
        """R2 as it was sent before a restart; nothing where the signatures are there already."""
        if decode(Included, earlier.included).contributions != entries:
            raise CohortError(
                f"round {self.what.round}: the server was restarted, and not every site of the "
                "set that was being signed sent its vector again"
            )
        self._request = earlier.included
        self._signatures = dict(earlier.signatures)
        return {} if self._signatures else dict.fromkeys(self.contributors, self._request)

    def add_agreement(self, name: str, reply: bytes) -> None:
        """Take one site's signature over U3, and its self-mask shares if nobody is missing.

        Raises:
            ProtocolError: malformed or forged, or a share does not match its tag.
        """
        self._expect(name, self.contributors)
        answer = self._decode(name, Agreed, reply)
        verify(
            self._session.public[name],
            transcript.AGREE,
            self._included,
            answer.signature,
            who=name,
        )
        if not self.dropped:
            self._check_shares(name, self.contributors, answer.self_shares, 0)
            self._self_shares[name] = answer.self_shares
        self._signatures[name] = answer.signature

    def close_agreement(self) -> dict[str, bytes]:
        """R3 for the sites that signed, or nothing if the shares came with the signatures.

        Raises:
            CohortError: fewer than t signed.
        """
        signed = tuple(sorted(self._signatures))
        threshold = self._session.threshold
        if len(signed) < threshold:
            raise CohortError(
                f"round {self.what.round}: {len(signed)} sites signed the contributors; "
                f"{threshold} are needed"
            )
        self._quorum = signed[:threshold]
        if not self.dropped:
            return {}
        return dict.fromkeys(signed, encode(Quorum(self.digest, self._certificate())))

    def add_release(self, name: str, reply: bytes) -> None:
        """Take one site's shares after dropouts.

        Raises:
            ProtocolError: malformed, or a share does not match its tag.
        """
        self._expect(name, tuple(self._signatures))
        answer = self._decode(name, Released, reply)
        self._check_shares(name, self.contributors, answer.self_shares, 0)
        self._check_shares(name, self.dropped, answer.recovery_shares, 1)
        self._self_shares[name] = answer.self_shares
        self._recovery_shares[name] = answer.recovery_shares

    def unmask(self, threads: int) -> RingVector:
        """Open U3's self masks and the dropped sites' pair masks, and take them off the sum.

        Raises:
            CohortError: fewer than t sites gave their shares.
            ProtocolError: a site had dealt shares or keys that do not open; it is named.
        """
        if self.total is not None:
            return self.total
        if len(self._self_shares) < self._session.threshold:
            raise CohortError(
                f"round {self.what.round}: {len(self._self_shares)} sites gave their shares; "
                f"{self._session.threshold} are needed"
            )
        self._self_keys = self._combine(self.contributors, self._self_shares)
        for name, key in self._self_keys.items():
            self._check_commitment(name, key, None)
        dropped = {}
        for name, key in self._combine(self.dropped, self._recovery_shares).items():
            wrapped = wrapped_keys(self._session, self._batch, name, self.what.round)
            self._check_commitment(name, key, wrapped)
            self._recovered[name] = Recovered(key, wrapped)
            dropped[name] = unwrap(self._session, name, key, wrapped)
            self._check_partner_keys(name, dropped[name])
        plus, minus = unmask_keys(
            self._session, self.digest, self.contributors, self._self_keys, dropped
        )
        # Unmasking twice would be wrong; the sum is not needed with masks any more.
        session = self._session
        summed, self._sum = self._sum, session.ring.zeros(0)
        add_masks(summed, plus, minus, session.bits, threads=threads, prg=session.prg)
        self.total = summed.astype(np.uint32, copy=False)
        return self.total

    def result(self) -> tuple[bytes, bytes]:
        """The Result for all sites, and the transcript after it."""
        if self.total is None:
            raise ProtocolError(f"round {self.what.round} is not unmasked yet")
        wire = self._session.ring.to_wire(self.total)
        root = merkle.root(wire, self._session.chunk_bytes)
        after = transcript.next_transcript(self.what.transcript, self.digest, self._included, root)
        entries = tuple(self._contributions[name] for name in self.contributors)
        return encode(Result(self.descriptor, entries, self._certificate(), wire)), after

    def rechecks(self, after: bytes) -> Rechecks:
        """The recheck of this round's sum, which led to transcript `after`."""
        if self.total is None:
            raise ProtocolError(f"round {self.what.round} is not unmasked yet")
        kept = Kept(
            digest=self.digest,
            after=after,
            contributions=tuple(self._contributions[name] for name in self.contributors),
            wires=self._wires,
            total=self._session.ring.to_wire(self.total),
            self_keys=self._self_keys,
            recovered=self._recovered,
        )
        return Rechecks(self._session, kept, self._trees)

    def _expect(self, name: str, expected: tuple[str, ...]) -> None:
        if name not in expected:
            raise ProtocolError(f"{name} has no part in this step of round {self.what.round}")

    def _decode(self, name: str, cls: type[M], reply: bytes) -> M:
        try:
            answer = decode(cls, reply)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from error
        if answer.sender != name:
            raise ProtocolError(f"{name}: an answer in the name of {answer.sender}")
        if answer.digest != self.digest:
            raise ProtocolError(f"{name}: the answer is to another round than {self.what.round}")
        return answer

    def _certificate(self) -> dict[str, bytes]:
        return {name: self._signatures[name] for name in self._quorum}

    def _check_shares(self, holder: str, owners: tuple[str, ...], shares: bytes, half: int) -> None:
        if len(shares) != 32 * len(owners):
            raise ProtocolError(f"{holder}: {len(shares)} bytes of shares for {len(owners)} sites")
        session, round_no = self._session, self.what.round
        at = transcript.slot(session, self._batch.number, round_no)
        kind = (transcript.SELF, transcript.RECOVERY)[half]
        for place, owner in enumerate(owners):
            share = shares[32 * place : 32 * place + 32]
            tags = shares_tag(session, self._batch, owner, holder, round_no)
            tag = transcript.share_tag(at, owner, holder, kind, share)
            if tag != tags[16 * half : 16 * half + 16]:
                raise ProtocolError(
                    f"{holder} gave a share of {owner}'s key that is not the one it was dealt"
                )

    def _combine(self, owners: tuple[str, ...], shares: Mapping[str, bytes]) -> dict[str, bytes]:
        if not owners:
            return {}
        points = {
            self._session.index[holder] + 1: np.frombuffer(row, np.uint8).reshape(len(owners), 32)
            for holder, row in shares.items()
        }
        keys = shamir.combine(points, self._session.threshold)
        return {owner: row.tobytes() for owner, row in zip(owners, keys, strict=True)}

    def _check_commitment(self, owner: str, key: bytes, wrapped: bytes | None) -> None:
        at = transcript.slot(self._session, self._batch.number, self.what.round)
        self_key, recovery_key = commitments(self._batch, owner, self.what.round)
        if wrapped is None:
            opened, committed = transcript.self_commitment(at, owner, key), self_key
        else:
            opened = transcript.recovery_commitment(at, owner, key, wrapped)
            committed = recovery_key
        if not hmac.compare_digest(opened, committed):
            raise ProtocolError(
                f"{owner} dealt shares that do not open the key it committed to; the round cannot "
                "be opened with it"
            )

    def _check_partner_keys(self, owner: str, opened: Mapping[str, bytes]) -> None:
        for peer, key in opened.items():
            if peer in self.contributors:
                known = check_value(self._session, self._batch, peer, owner, self.what.round)
                if transcript.check_value(key) != known:
                    raise ProtocolError(
                        f"{owner} wrapped a key that is not the one it shares with {peer}; the "
                        "round cannot be opened without it"
                    )
