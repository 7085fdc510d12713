"""What a site's release must look like by the plan alone, computed apart from the product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from shared.plan import StudyPlan


@dataclass(frozen=True)
class Response:
    """How a round's released update answers to what happens inside it, by the SGD of the plan.

    Attributes:
        weights: Of each local step's gradient in -update / learning_rate.
        drift: Of the start, in the update: weight decay alone moves it so.
    """

    weights: tuple[float, ...]
    drift: float

    @property
    def gain(self) -> float:
        """Of independent noise in every step."""
        return math.sqrt(sum(w * w for w in self.weights))


@lru_cache(maxsize=64)
def response(plan: StudyPlan) -> Response:
    """Follow torch's SGD with momentum, weight decay and FedProx's pull on one number."""
    training = plan.training
    steps = training.local_steps

    def final(origin: float, pushed: int | None) -> float:
        value, speed = origin, 0.0
        for step in range(steps):
            gradient = 1.0 if step == pushed else 0.0
            gradient += training.proximal_mu * (value - origin) + training.weight_decay * value
            speed = training.momentum * speed + gradient
            value -= training.learning_rate * speed
        return value - origin

    weights = tuple(-final(0.0, step) / training.learning_rate for step in range(steps))
    return Response(weights, final(1.0, None))


def site_noise(plan: StudyPlan, noise: float, parameters: int, scale: int | None) -> float:
    """Standard deviation of the noise of one site's release of one step, over the clip norm.

    Args:
        plan: The plan; in mode `distributed` a site adds its share.
        noise: The promise's noise multiplier.
        parameters: Coordinates of the model.
        scale: Ring units per unit of gradient in mode `distributed`, else None.

    Source: shared/PRIVACY.md, "Distributed noise": the shares of `threshold - colluders` sites
    have to reach noise times the sensitivity, which rounding and float32 raise a little.
    """
    if scale is None:
        return noise
    _, _, clip = plan.privacy.promise
    honest = plan.cohort.threshold - plan.cohort.colluders
    votes = plan.privacy.adaptive_clip
    weighs = math.hypot(1, votes.weight) if votes.quantile else 1.0
    coordinates = parameters + (1 if votes.quantile else 0)
    sensitivity = clip * weighs * 1.001 + math.sqrt(coordinates) / scale
    return math.sqrt(((noise * sensitivity) ** 2 + (2.0 / scale) ** 2) / honest) / clip
