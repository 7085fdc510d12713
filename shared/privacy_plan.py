"""What a plan promises to each patient, and how: the table [privacy]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.adaptive_clip import AdaptiveClipPlan
from shared.config import later, require
from shared.errors import ConfigError

_FIXED = AdaptiveClipPlan()


@dataclass(frozen=True)
class PrivacyPlan:
    """The promise to each patient of one site: (epsilon, delta) over the whole study.

    In mode `local` every site adds all the noise itself, and nobody is trusted. In `distributed`
    a round is one step over all sites' patients, and each site adds a share of the noise, sized
    so that the shares of `threshold - colluders` sites are enough (shared/PRIVACY.md).
    `noise_multiplier` is normally left out: each site calibrates it to the promise. Given, it
    must keep the promise. Mode `none` exists in the simulator only; every site refuses it.
    `adaptive_clip` lets the clip norm of mode `distributed` follow the gradients.
    """

    mode: Literal["local", "distributed", "none"]
    epsilon: float | None = None
    delta: float | None = None
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    unit: Literal["patient"] = "patient"
    adaptive_clip: AdaptiveClipPlan = later(_FIXED)  # noqa: RUF009  # it is frozen

    def __post_init__(self) -> None:
        if self.mode == "none":
            return
        for name in ("epsilon", "delta"):
            require(getattr(self, name) is not None, f"mode {self.mode!r} needs {name}")
        epsilon, delta = self.budget
        require(epsilon > 0, f"epsilon is {epsilon:g}; it must be above 0")
        require(0 < delta <= 1e-2, f"delta is {delta:g}; valid: above 0, at most 0.01")
        clip = self.clip_norm
        require(clip is None or clip > 0, f"clip_norm is {clip or 0:g}; it must be above 0")
        require(
            self.mode == "distributed" or not self.adaptive_clip.quantile,
            "adaptive_clip needs mode 'distributed': in mode 'local' each hospital's own votes "
            "would need noise of their own",
        )
        if self.noise_multiplier is not None:
            require(self.noise_multiplier > 0, "noise_multiplier must be above 0")

    @property
    def budget(self) -> tuple[float, float]:
        """(epsilon, delta) of the whole study; ConfigError where privacy is off."""
        if self.epsilon is None or self.delta is None:
            raise ConfigError(f"mode {self.mode!r} promises no epsilon and delta")
        return self.epsilon, self.delta

    @property
    def promise(self) -> tuple[float, float, float]:
        """(epsilon, delta, clip_norm); ConfigError where privacy is off."""
        if self.epsilon is None or self.delta is None or self.clip_norm is None:
            raise ConfigError(f"mode {self.mode!r} promises no epsilon, delta and clip_norm")
        return self.epsilon, self.delta, self.clip_norm

    @property
    def adapts(self) -> bool:
        """Whether the clip norm follows the patients' votes; never where privacy is off."""
        return self.mode == "distributed" and self.adaptive_clip.quantile > 0

    @property
    def largest_clip_norm(self) -> float | None:
        """The largest norm that a patient's gradient may ever be clipped to; None without one."""
        if self.clip_norm is None or not self.adapts:
            return self.clip_norm
        return self.clip_norm * self.adaptive_clip.reach
