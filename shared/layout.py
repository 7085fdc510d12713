"""What one masked vector of a study holds, and what the sum of all of them means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.counts import CountNoise, Units, count_kind, count_noise, due_counts, releases_counts
from shared.distributed import NoiseShare, divisor, noise_share
from shared.errors import ProtocolError
from shared.optimizers import ModelState, apply_update
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.secagg.ring import Quantised, Ring, RingVector


@dataclass(frozen=True)
class VectorLayout:
    """What one masked vector holds: the model update, then the evaluation counts as digits.

    Coordinates of layers that stay at each site are left out of it; an update has zeros there.
    Between the two is the sum of votes on the clip norm, where the plan adapts it.
    """

    plan: StudyPlan
    parameters: int

    @cached_property
    def ring(self) -> Ring:
        """The ring of the plan's secure sum."""
        return Ring(self.plan.secure_sum.bits, len(self.plan.cohort.sites))

    @cached_property
    def sent_places(self) -> NDArray[np.int64] | None:
        """Which coordinates of the model leave a site; None for all."""
        if not self.plan.model.personal:
            return None
        from shared.personal import sent_coordinates  # noqa: PLC0415  # torch takes seconds

        return sent_coordinates(self.plan)

    @property
    def sent(self) -> int:
        """How many coordinates of the model leave a site."""
        return self.parameters if self.sent_places is None else len(self.sent_places)

    def of_sent(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The coordinates of a whole vector that leave a site."""
        return vector if self.sent_places is None else vector[self.sent_places]

    def _whole(self, sent: FlatVector) -> FlatVector:
        if self.sent_places is None:
            return sent
        whole = np.zeros(self.parameters, dtype=np.float32)
        whole[self.sent_places] = sent
        return whole

    @property
    def counts(self) -> int:
        """Counts in the vector: the cells of one release, or none."""
        return 0 if self.count_noise is None else count_kind(self.plan).cells(self.plan)

    @cached_property
    def count_noise(self) -> CountNoise | None:
        """Unit and noise of the counts; None where none are released."""
        return count_noise(self.plan) if releases_counts(self.plan) else None

    @property
    def _exact(self) -> bool:
        return self.count_noise is not None and not self.count_noise.deviation

    @property
    def learnt(self) -> int:
        """Coordinates of what training sends: those of the model, and the votes' if there are."""
        return self.sent + self.plan.privacy.adapts

    @cached_property
    def length(self) -> int:
        """Coordinates of the whole vector."""
        lanes = self.ring.lanes(self._most) if self._exact else 1
        return self.learnt + self.counts * lanes

    @property
    def _most(self) -> int:
        return self.count_noise.clamp if self.count_noise else 1

    def pack(self, update: FlatVector, weight: float, counts: Units, key: bytes) -> Packed:
        """The vector of one site, quantised while it is masked.

        Args:
            update: float32, shape (parameters,).
            weight: The site's public weight, in (0, 1].
            counts: int64, shape (counts,), in units, noise included.
            key: 32 secret bytes for the rounding, used for this vector alone.
        """
        clip = self.plan.secure_sum.clip_range
        body = Quantised(self.of_sent(update), self.ring, clip_range=clip, key=key, weight=weight)
        return Packed(body, self._tail(counts))

    def _tail(self, counts: Units) -> RingVector:
        """Exact counts as digits, which no server can make wrap; noisy ones as they are.

        Digits of noisy counts would be summed each by itself, and so say more than the sum.
        """
        if self._exact:
            return self.ring.counts_to_lanes(counts, max_count=self._most)
        return self._reduced(counts)

    def _reduced(self, integers: Units) -> RingVector:
        return (integers & int(self.ring.modulus_mask)).astype(np.uint32)

    @cached_property
    def share(self) -> NoiseShare | None:
        """How sites of a `distributed` plan scale their sums and share the noise; else None."""
        if self.plan.privacy.mode != "distributed" or not self.plan.learns:
            return None
        return noise_share(self.plan, self.sent)

    def pack_integers(self, sums: Units, counts: Units) -> RingVector:
        """The vector of one site in mode `distributed`: noisy integers, reduced into the ring.

        Args:
            sums: int64, shape (learnt,), in ring units, noise included.
            counts: int64, shape (counts,), in units, noise included.
        """
        return np.concatenate([self._reduced(sums), self._tail(counts)])

    def clip_norm(self, state: ModelState) -> float:
        """What a patient's gradient is clipped to in a round that starts from `state`."""
        return float(state.clip_norm[0]) if len(state.clip_norm) else self.plan.privacy.promise[2]

    def vote(self, votes: int) -> NDArray[np.float64]:
        """A site's votes on the clip norm as it sends them, in units of its clipped sum.

        Returns:
            float64, shape (1,), or (0,) where the plan adapts nothing. In float32 the sum of some
            ten thousand votes is so coarse that one more moves it by too much.
        """
        privacy = self.plan.privacy
        unit = privacy.adaptive_clip.weight * (privacy.clip_norm or 0.0)
        return np.full(int(privacy.adapts), unit * votes)

    def _next_clip_norm(
        self, state: ModelState, total: RingVector, contributors: tuple[str, ...]
    ) -> FlatVector:
        if self.share is None or not self.plan.privacy.adapts:
            return state.clip_norm
        adaptive, start = self.plan.privacy.adaptive_clip, self.plan.privacy.promise[2]
        within = adaptive.within(self.votes_of(total), divisor(self.plan, contributors))
        moved = adaptive.next_norm(self.clip_norm(state), within, start)
        return np.array([moved], dtype=np.float32)

    def votes_of(self, total: RingVector) -> float:
        """The sum of votes on the clip norm in a published sum, noise included; 0.0 without any."""
        if self.share is None or not self.plan.privacy.adapts:
            return 0.0
        unit = self.plan.privacy.adaptive_clip.weight * self.plan.privacy.promise[2]
        return float(self.ring.signed(total[self.sent : self.learnt])[0]) / (
            self.share.scale * unit
        )

    def update_of(self, total: RingVector, contributors: tuple[str, ...]) -> FlatVector:
        """The update that a published sum stands for.

        In mode `local` the sites' weighted mean; in mode `distributed` one step against the
        summed gradient, divided by the public expected batch of the contributors.

        Args:
            total: uint32, shape (length,).
            contributors: The sites in the sum, whose public weights divide it.

        Returns:
            float32, shape (parameters,).
        """
        if self.share is not None:
            rate = self.plan.training.learning_rate
            unit = -rate / (self.share.scale * divisor(self.plan, contributors))
            step = self.ring.signed(total[: self.sent]) * np.float64(unit)
            return self._whole(step.astype(np.float32))
        clip = self.plan.secure_sum.clip_range
        summed = self.ring.dequantise(total[: self.sent], clip_range=clip)
        weight = sum(self.plan.cohort.weight(name) for name in sorted(contributors))
        return self._whole((summed / np.float32(weight)).astype(np.float32, copy=False))

    def advance(
        self, state: ModelState, total: RingVector, contributors: tuple[str, ...]
    ) -> ModelState:
        """The model after a published sum; every site and the server compute the same."""
        weights = {name: self.plan.cohort.weight(name) for name in self.plan.cohort.names}
        share = sum(weights[name] for name in sorted(contributors)) / sum(weights.values())
        update = self.update_of(total, contributors)
        if len(state.clip_norm):  # sums are in units of the plan's own clip norm
            update *= np.float32(self.clip_norm(state) / self.plan.privacy.promise[2])
        moved = apply_update(self.plan.optimizer, state, update, share=share)
        return replace(moved, clip_norm=self._next_clip_norm(state, total, contributors))

    def counts_of(self, total: RingVector) -> NDArray[np.float64]:
        """The summed counts of a published sum, in patients: float64, shape (counts,).

        Raises:
            ProtocolError: an exact count is larger than honest sites can make it.
        """
        tail = total[self.learnt :]
        if self.count_noise is None:
            return np.zeros(0)
        if self._exact:
            return self.ring.lanes_to_counts(tail, max_count=self._most) / self.count_noise.unit
        return self.ring.signed(tail) / np.float64(self.count_noise.unit)

    def released_counts(self, total: RingVector, finished: int) -> NDArray[np.float64]:
        """The counts of a sum that started from the model of `finished` rounds.

        Empty where the plan releases none then, or where some site sent more than it may.
        """
        if not due_counts(self.plan, finished):
            return np.zeros(0)
        try:
            return self.counts_of(total)
        except ProtocolError:
            return np.zeros(0)


class Packed:
    """A site's ring vector made chunk by chunk; a `masking.Source`."""

    def __init__(self, body: Quantised, tail: RingVector) -> None:
        self._body, self._tail = body, tail
        self.length = body.length + len(tail)

    def reader(self, start: int) -> Callable[[RingVector], None]:
        """Fill the next coordinates from `start` on."""
        inside = min(start, self._body.length)
        read_body = self._body.reader(inside) if inside < self._body.length else None
        at = start

        def read(out: RingVector) -> None:
            nonlocal at
            from_body = min(max(self._body.length - at, 0), len(out))
            if from_body and read_body is not None:
                read_body(out[:from_body])
            behind = at + from_body - self._body.length
            out[from_body:] = self._tail[behind : behind + len(out) - from_body]
            at += len(out)

        return read
