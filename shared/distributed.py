"""Sizes of the distributed noise: every site adds a share, and enough honest shares are enough.

All numbers follow from the plan and the model's length alone, never from data or from who really
dropped out, so that every site and the server compute the same. The derivation, with every
constant, is in shared/PRIVACY.md, section "Distributed noise".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from shared.config import require
from shared.errors import ConfigError
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from shared.secagg.ring import Ring

SMOOTHING = 2.0
"""eta, in ring units: a discrete Gaussian is a continuous one, then rounded with this width."""

FLOAT_SLACK = 1e-3
"""Relative room in the sensitivity for float32 arithmetic; the guard measures at most 1e-4."""

ROUNDING_SHARE = 0.01
"""Rounding may add at most this part to the sensitivity: sqrt(d) <= 0.01 C s."""

WRAP_DEVIATIONS = 12.0
"""Standard deviations of noise that the ring leaves room for beyond the clamped sums."""


@dataclass(frozen=True)
class NoiseShare:
    """What a site does to its clipped sum before masking, in a plan of mode `distributed`.

    Attributes:
        scale: Ring units per unit of gradient, a positive whole number.
        clamp: Largest magnitude of a coordinate before noise, in ring units.
        sensitivity: Most that one patient moves the rounded sum, L2, in ring units.
        deviation: tau, the parameter of one site's discrete Gaussian, in ring units.
        honest: Sites whose shares the promise counts on: threshold - colluders.
        noise_multiplier: Of the promise, for the summed honest shares.
    """

    scale: int
    clamp: int
    sensitivity: float
    deviation: float
    honest: int
    noise_multiplier: float

    @property
    def alone(self) -> float:
        """Noise multiplier of one site's own share, if every other site sides with the server."""
        return math.sqrt(self.deviation**2 - SMOOTHING**2) / self.sensitivity

    def of(self, sites: int) -> float:
        """Noise multiplier of the shares of `sites` sites; above the promise when nobody drops."""
        return math.sqrt(sites * self.deviation**2 - SMOOTHING**2) / self.sensitivity


@lru_cache(maxsize=64)
def noise_share(plan: StudyPlan, parameters: int) -> NoiseShare:
    """Size scale, clamp and noise of a `distributed` plan for a model of `parameters` numbers.

    Raises:
        ConfigError: the ring is too small for sums, noise and rounding; the message says what
            would fit.
    """
    sigma = noise_multiplier_of(plan)
    if sigma is None or plan.privacy.mode != "distributed":
        raise ConfigError(f"mode {plan.privacy.mode!r} has no distributed noise")
    _, _, clip_norm = plan.privacy.promise
    adaptive = plan.privacy.adaptive_clip
    # A patient's clipped gradient and vote together (shared/PRIVACY.md, "Adaptive clipping").
    weighs, length = clip_norm * adaptive.stretch, parameters + plan.privacy.adapts
    cohort = plan.cohort
    sites, honest = len(cohort.sites), cohort.threshold - cohort.colluders
    half = 1 << (plan.secure_sum.bits - 1)
    spread = WRAP_DEVIATIONS * math.sqrt(sites / honest)
    # sites * clamp + spread * (sigma * sensitivity + eta) must stay below half the ring.
    root = math.sqrt(length)
    room = half - 1 - spread * (sigma * root + SMOOTHING)
    largest = largest_coordinate(plan)
    per_unit = sites * largest + spread * sigma * weighs * (1 + FLOAT_SLACK)
    scale = math.floor(room / per_unit) if room > 0 else 0
    require(
        scale > 0 and root <= ROUNDING_SHARE * weighs * scale,
        f"a ring of {plan.secure_sum.bits} bits is too small for {parameters} parameters at "
        f"{sites} sites: rounding would add more than {ROUNDING_SHARE:.0%} to the sensitivity. "
        "Take secure_sum.bits = 32, or a smaller secure_sum.clip_range.",
    )
    sensitivity = weighs * scale * (1 + FLOAT_SLACK) + root
    deviation = math.sqrt(((sigma * sensitivity) ** 2 + SMOOTHING**2) / honest)
    require(
        deviation >= 2 * SMOOTHING,
        f"one site's noise of {deviation:.1f} ring units is too fine for this ring; "
        "take secure_sum.bits = 24 or 32.",
    )
    clamp = math.floor(largest * scale)
    Ring(plan.secure_sum.bits, sites)
    return NoiseShare(scale, clamp, sensitivity, deviation, honest, sigma)


def largest_coordinate(plan: StudyPlan) -> float:
    """Where a coordinate of one site's clipped sum is clamped, in gradient units.

    `secure_sum.clip_range` 1 is the sum of the largest site's expected batch if every patient
    pushed one coordinate as far as clipping allows; real sums stay far below.
    """
    _, _, clip_norm = plan.privacy.promise
    rate = plan.training.sample_rate or 1.0
    batch = rate * max(site.expected_patients for site in plan.cohort.sites)
    return plan.secure_sum.clip_range * clip_norm * max(batch, 1.0)


def divisor(plan: StudyPlan, contributors: tuple[str, ...]) -> float:
    """The public constant that a summed gradient is divided by: the sites' expected batch."""
    rate = plan.training.sample_rate or 1.0
    return rate * sum(plan.cohort.expected_patients(name) for name in sorted(contributors))
