"""Models for tables: logistic regression and a small multilayer perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from shared.config import require
from shared.features import feature_width
from shared.plan import StudyPlan


class Logistic(nn.Module):
    """Logistic regression: (records, features) -> logits (records,)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """One logit a record."""
        logits: Tensor = self.linear(inputs)
        return logits.squeeze(1)


class Perceptron(nn.Module):
    """A multilayer perceptron with tanh: (records, features) -> logits (records,).

    Bounded activations keep gradients small, so clipping costs less under DP.

    Source: Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential
    Privacy", AAAI 2021.
    """

    def __init__(self, features: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in zip((features, *hidden), hidden, strict=False):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """One logit a record."""
        logits: Tensor = self.head(self.layers(inputs))
        return logits.squeeze(1)


def logistic(plan: StudyPlan) -> nn.Module:
    """Logistic regression on the plan's features."""
    _require_table(plan)
    require(not plan.model.hidden, "model 'logistic' has no hidden layers; leave hidden out")
    return Logistic(feature_width(plan.task))


def mlp(plan: StudyPlan) -> nn.Module:
    """A perceptron with the plan's `hidden` sizes, by default one layer of 32."""
    _require_table(plan)
    return Perceptron(feature_width(plan.task), plan.model.hidden or (32,))


def _require_table(plan: StudyPlan) -> None:
    image = plan.task.image
    require(
        image is None or image.features != "pixels",
        f"model {plan.model.name!r} needs a table, and the task has an image; use cnn or resnet18, "
        "or image.features = 'scattering'",
    )
