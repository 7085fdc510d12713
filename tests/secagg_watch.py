"""What no fault of a secure sum may ever bring about, asserted on what sites send and accept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from secagg_driver import World, plain_sum

from client.secagg import Outcome
from shared.messages import decode
from shared.secagg.messages import Agreed, Descriptor, Included, Opening, Released, Result
from shared.secagg.ring import RingVector
from shared.secagg.transcript import descriptor_digest


class UnsafeError(AssertionError):
    """What no fault may ever bring about."""


@dataclass
class Watch:
    """Remembers what sites gave away and accepted, and raises `UnsafeError`."""

    vectors: dict[tuple[bytes, str], RingVector] = field(default_factory=dict)
    rounds: dict[bytes, int] = field(default_factory=dict)
    signed: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    self_shares: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    recovery_shares: dict[tuple[str, int], set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )
    false_sums: dict[str, str] = field(default_factory=dict)

    def opened(self, r0: bytes) -> None:
        """A site took this R0."""
        raw = decode(Opening, r0).descriptor
        self.rounds[descriptor_digest(raw)] = decode(Descriptor, raw).round

    def agreed(self, world: World, name: str, r2: bytes, reply: bytes) -> None:
        """A site signed a set."""
        if name in self.false_sums:
            raise UnsafeError(f"{name} went on from a false sum: {self.false_sums[name]}")
        message, contributions = decode(Agreed, reply), decode(Included, r2).contributions
        names = [entry.name for entry in contributions]
        key = (name, self.rounds[message.digest])
        self.signed[key].add(message.signature)
        if len(self.signed[key]) > 1:
            raise UnsafeError(f"{name} signed two sets in one round")
        if len(names) < world.session.threshold:
            raise UnsafeError(f"{name} signed a set of {len(names)}")
        if message.self_shares:
            self._gave(world, key, names, [])

    def released(self, world: World, name: str, reply: bytes, contributors: Iterable[str]) -> None:
        """A site gave its shares after a dropout."""
        message = decode(Released, reply)
        included = list(contributors)
        gone = [other for other in world.session.names if other not in included]
        if len(message.recovery_shares) != 32 * len(gone):
            raise UnsafeError(f"{name} gave recovery shares of sites that are in the sum")
        self._gave(world, (name, self.rounds[message.digest]), included, gone)

    def _gave(self, world: World, key: tuple[str, int], b: list[str], r: list[str]) -> None:
        self.self_shares[key] |= set(b)
        self.recovery_shares[key] |= set(r)
        both = self.self_shares[key] & self.recovery_shares[key]
        if both:
            raise UnsafeError(f"{key[0]} gave shares of both keys of {sorted(both)}")
        for owner in world.session.names:
            holders = [
                sum(owner in given for (_, n), given in kept.items() if n == key[1])
                for kept in (self.self_shares, self.recovery_shares)
            ]
            least = world.session.threshold - world.session.colluders
            if min(holders) >= least:
                raise UnsafeError(f"both keys of {owner} can be opened")

    def ended(self, world: World, name: str, result: bytes, outcome: Outcome) -> None:
        """A site took the end of a round; a false sum must not lead it any further."""
        if outcome.total is None:
            return
        digest = descriptor_digest(decode(Result, result).descriptor)
        vectors = {site: self.vectors.get((digest, site)) for site in outcome.contributors}
        known = {site: vector for site, vector in vectors.items() if vector is not None}
        true = plain_sum(world.session, known, known)
        if len(known) < len(vectors) or not np.array_equal(true, outcome.total):
            self.false_sums[name] = f"round {outcome.round}"

    def settled(self, name: str) -> None:
        """A site takes the last sum for good."""
        if name in self.false_sums:
            raise UnsafeError(f"{name} settled a false sum: {self.false_sums[name]}")
