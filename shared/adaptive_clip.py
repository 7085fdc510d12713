"""A clip norm that follows the patients' gradients, by one more number in the same noised sum.

Every patient who is drawn votes: +1 if the gradient's norm is at most the round's clip norm, -1 if
it had to be clipped. The votes' sum travels as one coordinate beside the clipped sum, under the
same noise, and says how many were within; the next clip norm is a little smaller if they were more
than the plan's quantile, a little larger if they were fewer. Everyone computes it from published
sums.

Source: Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021,
algorithm 1, with patients in place of users. Its exp is replaced by (1 + x/2) / (1 - x/2), equal to
second order, since every machine rounds that alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shared.config import require


@dataclass(frozen=True)
class AdaptiveClipPlan:
    """How the clip norm moves; `quantile` 0 keeps it where it is.

    Attributes:
        quantile: Of the drawn patients' gradient norms, where the clip norm is to stand.
        rate: How far one round moves it, as a logarithm, if all were on one side.
        weight: Of a vote, as a part of the clip norm. The noise grows by sqrt(1 + weight^2), and
            the share of votes is known to noise_multiplier / (2 weight batch).
        reach: The clip norm stays within this factor of the plan's `clip_norm`, up and down.
    """

    quantile: float = 0.0
    rate: float = 0.2
    weight: float = 0.1
    reach: float = 100.0

    def __post_init__(self) -> None:
        require(0 <= self.quantile < 1, f"quantile is {self.quantile:g}; valid: 0 up to below 1")
        require(0 < self.rate <= 1, f"rate is {self.rate:g}; valid: above 0, at most 1")
        require(0 < self.weight <= 1, f"weight is {self.weight:g}; valid: above 0, at most 1")
        require(1 <= self.reach <= 1e6, f"reach is {self.reach:g}; valid: 1 to 1000000")

    @property
    def stretch(self) -> float:
        """The L2 norm of a clipped gradient with its vote, in clip norms: at most this."""
        return math.sqrt(1 + self.weight**2) if self.quantile else 1.0

    def within(self, votes: float, batch: float) -> float:
        """The share of patients whose gradient was not clipped, in [0, 1], as the noise lets it be.

        Args:
            votes: The published sum of votes.
            batch: Patients who were expected to vote, above 0. If fewer did, the share is drawn to
                a half, so only `quantile` 0.5 is then met exactly.
        """
        return min(max((votes / batch + 1) / 2, 0.0), 1.0)

    def next_norm(self, norm: float, within: float, start: float) -> float:
        """The next round's clip norm, a float32 value.

        Args:
            norm: This round's.
            within: The share of patients whose gradient was within it.
            start: The plan's `clip_norm`.
        """
        step = self.rate * (self.quantile - within)
        moved = norm * ((1 + step / 2) / (1 - step / 2))
        return float(np.float32(min(max(moved, start / self.reach), start * self.reach)))
