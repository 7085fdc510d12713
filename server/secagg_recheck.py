"""The relay's part in the recheck of a published sum: packages out, attestations in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from shared.errors import ProtocolError
from shared.identity import verify
from shared.messages import Blob, ByName, Fixed, Nested, decode, encode, message
from shared.secagg import merkle, transcript
from shared.secagg.messages import (
    MAX_SITES,
    Attestation,
    Contributions,
    Hash,
    Opening,
    Piece,
    Pieces,
    Recheck,
    Recovered,
)
from shared.secagg.session import Session


@message(0x0303)
@dataclass(frozen=True, slots=True)
class Kept:
    """A published round: its masked vectors and opened keys, until they have been rechecked."""

    digest: Hash
    after: Hash
    contributions: Contributions
    wires: Annotated[Mapping[str, bytes], ByName(Blob(), MAX_SITES)]
    total: Annotated[bytes, Blob()]
    self_keys: Annotated[Mapping[str, bytes], ByName(Fixed(32), MAX_SITES)]
    recovered: Annotated[Mapping[str, Recovered], ByName(Nested(Recovered), MAX_SITES)]


class Rechecks:
    """Who recomputes which chunks of one published sum, and who has."""

    def __init__(
        self, session: Session, kept: Kept, trees: Mapping[str, merkle.Tree] | None = None
    ) -> None:
        """Hash the vectors once for all packages, unless `trees` has their hashes."""
        self.kept = kept
        self._session = session
        self._names = tuple(entry.name for entry in kept.contributions)
        size = session.chunk_bytes
        self._trees = trees or {name: merkle.Tree(wire, size) for name, wire in kept.wires.items()}
        self._total_tree = merkle.Tree(kept.total, size)
        self._held: list[set[str]] = [
            set() for _ in range(merkle.chunk_count(session.vector_bytes, size))
        ]
        self._attestations: list[Attestation] = []

    def restore(self, attestations: tuple[Attestation, ...]) -> None:
        """Count again what had come before a restart."""
        for entry in attestations:
            self.add(entry.sender, encode(entry))

    def assign(self, present: Collection[str], spare: int) -> dict[str, tuple[int, ...]]:
        """Which present site is to recompute which chunks, so that c + 1 + `spare` do each."""
        work: dict[str, list[int]] = {}
        for chunk, held in enumerate(self._held):
            order = transcript.checker_order(self._session, self.kept.digest, self._names, chunk)
            free = [name for name in order if name in present and name not in held]
            missing = self._session.colluders + 1 - len(held)
            for name in free[: missing + spare] if missing > 0 else ():
                work.setdefault(name, []).append(chunk)
        return {name: tuple(chunks) for name, chunks in work.items()}

    def package(self, chunks: tuple[int, ...]) -> bytes:
        """What a site needs to recompute these chunks: them of every vector, and opened keys."""
        kept, size = self.kept, self._session.chunk_bytes
        packed = []
        for number in chunks:
            span = slice(number * size, (number + 1) * size)
            pieces = (  # views: a package of 30 MB is held once, where it is joined
                Piece(memoryview(kept.wires[name])[span], self._trees[name].proof(number))
                for name in self._names
            )
            packed.append(Pieces(number, self._total_tree.proof(number), tuple(pieces)))
        return encode(Recheck(kept.digest, kept.self_keys, kept.recovered, tuple(packed)))

    def add(self, name: str, data: bytes) -> None:
        """Take one site's attestation.

        Raises:
            ProtocolError: forged, or of another sum; the site is named.
        """
        entry = decode(Attestation, data)
        if entry.sender != name or entry.transcript != self.kept.after:
            raise ProtocolError(f"{name}: its recheck is of another sum")
        signed = transcript.attested_digest(entry.transcript, name, entry.chunks)
        verify(self._session.public[name], transcript.RECHECK, signed, entry.signature, who=name)
        useful = False
        for chunk in entry.chunks:
            if chunk >= len(self._held):
                raise ProtocolError(f"{name}: chunk {chunk} does not exist")
            useful = useful or len(self._held[chunk]) <= self._session.colluders
            self._held[chunk].add(name)
        if useful:
            self._attestations.append(entry)

    @property
    def attestations(self) -> tuple[Attestation, ...]:
        """What has come so far, without what adds nothing."""
        return tuple(self._attestations)

    @property
    def complete(self) -> bool:
        """Whether c + 1 sites recomputed every chunk."""
        return all(len(held) > self._session.colluders for held in self._held)


class Openings(Mapping[str, bytes]):
    """R0 by site; the large part, a recheck package, is made when it is asked for."""

    def __init__(
        self,
        descriptor: bytes,
        refills: Mapping[str, bytes],
        rechecks: Rechecks | None,
        work: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Requests for the sites of `refills`; `work` says who rechecks which chunks."""
        self._descriptor, self._refills = descriptor, refills
        self._rechecks, self._work = rechecks, work

    def __getitem__(self, name: str) -> bytes:
        package = b""
        if self._rechecks is not None and name in self._work:
            package = self._rechecks.package(self._work[name])
        return encode(Opening(self._descriptor, self._refills[name], package))

    def __iter__(self) -> Iterator[str]:
        return iter(self._refills)

    def __len__(self) -> int:
        return len(self._refills)
