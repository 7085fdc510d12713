"""What a plan says of counts: about test patients beside training, or in a study of its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from shared.config import later, require
from shared.errors import ConfigError
from shared.task_plan import TaskPlan


@dataclass(frozen=True)
class GroupPlan:
    """Patients told apart by a feature: its categories, or a number below, between and above
    `edges`, in the feature's unit."""

    feature: str
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(
            all(a < b for a, b in itertools.pairwise(self.edges)),
            f"groups of {self.feature!r}: edges must rise",
        )

    def check(self, task: TaskPlan) -> None:
        """Raise ConfigError unless the task has such groups."""
        feature = next((f for f in task.features if f.name == self.feature), None)
        if feature is None or task.kind != "binary":
            raise ConfigError(
                f"evaluation: groups of {self.feature!r} need a binary task with that feature"
            )
        number = feature.type == "number"
        require(
            bool(self.edges) == number,
            f"evaluation: groups of {self.feature!r} "
            + ("need edges, in its unit" if number else "have no edges: it is a category"),
        )
        low, high = feature.minimum or 0.0, feature.maximum or 0.0
        require(
            all(low < edge < high for edge in self.edges),
            f"evaluation: groups of {self.feature!r}: edges must lie within its plausible range",
        )
        require(
            feature.missing != "midpoint",
            f"evaluation: groups of {self.feature!r}: missing = 'midpoint' would count missing "
            "values as measured ones; use 'indicator' or 'refuse'",
        )


@dataclass(frozen=True)
class EvaluationPlan:
    """Which counts about test patients travel inside the sum, and what they may cost them.

    `noised` histograms of scores carry noise for (epsilon, delta) over all their releases; the
    test patients pay it. delta is the study's where it is left out. `noise_multiplier` is normally
    left out, too, and calibrated. `exact` histograms are for simulations only, and are refused by
    every real site. The model is evaluated after every `every` rounds and at the end; 0 is the end
    alone. `bins` is per class; few bins carry little noise, many resolve the curve.

    `groups` adds right and wrong answers by group, such as sex or age, and `importance_clip` above
    0 the mean importance of each feature, a patient's vector of them clipped to that norm, such as
    0.5. Both are for tables, and each adds a block to every release (shared/more_counts.py).
    """

    release: Literal["none", "noised", "exact"] = "none"
    every: int = 1
    bins: int = 256
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    groups: tuple[GroupPlan, ...] = later(())
    importance_clip: float = later(0.0)

    def __post_init__(self) -> None:
        require(self.every >= 0, f"every is {self.every}; 0 (at the end alone) or more")
        require(8 <= self.bins <= 4096, f"bins is {self.bins}; valid: 8 to 4096")
        require(self.bins % 2 == 0, f"bins is {self.bins}; it must be even: half lie below 1/2")
        noised = self.release == "noised"
        require(not noised or self.epsilon is not None, "release 'noised' needs epsilon")
        for name in ("epsilon", "delta", "noise_multiplier"):
            value = getattr(self, name)
            require(
                noised or value is None, f"{name} is for release 'noised'; here nothing has noise"
            )
            require(value is None or value > 0, f"{name} must be above 0")
        require(self.delta is None or self.delta <= 1e-2, "delta must be at most 0.01")
        require(
            self.release != "none" or not (self.groups or self.importance_clip),
            "groups and importance_clip are for release 'noised'; nothing is released here",
        )
        require(
            0 <= self.importance_clip <= 10,
            f"importance_clip is {self.importance_clip:g}; valid: 0 (none) to 10",
        )

    def is_due(self, finished: int, rounds: int) -> bool:
        """Whether the model after `finished` of `rounds` rounds is evaluated.

        The starting point is not worth a patient's budget; without noise it is shown, too.
        """
        if self.release == "none":
            return False
        if finished >= rounds:
            return True
        first = finished == 0 and self.release == "noised"
        return self.every > 0 and finished % self.every == 0 and not first

    def releases(self, rounds: int) -> int:
        """How many models of a study are evaluated."""
        return sum(self.is_due(finished, rounds) for finished in range(rounds + 1))


@dataclass(frozen=True)
class StatisticsPlan:
    """What a study of kind "statistics" counts of each number: a histogram over its range."""

    bins: int = 10

    def __post_init__(self) -> None:
        require(2 <= self.bins <= 1000, f"bins is {self.bins}; valid: 2 to 1000")
