"""Models for tables: (generalised) linear models and a small multilayer perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.config import require
from shared.features import feature_width
from shared.plan import StudyPlan
from shared.tasks import task_kind

LOG_HAZARDS = (-20.0, 4.0)  # below, a hazard of 0; above, certain death within the interval


class Linear(nn.Module):
    """Linear in the features: (records, features) -> (records,) or (records, outputs)."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        return single(self.linear(inputs))


class GroupedCox(nn.Module):
    """Proportional hazards on the plan's time grid: (records, features) -> logits of hazards.

    One score a record, and one baseline hazard an interval; the hazard of interval k is
    1 - exp(-exp(b_k + score)), which is Cox's model where times are known by interval.

    Source: Prentice, Gloeckler, "Regression analysis of grouped survival data", Biometrics 34,
    1978.
    """

    def __init__(self, features: int, intervals: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1, bias=False)
        self.baseline = nn.Linear(1, intervals, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the hazards, shape (records, intervals)."""
        score: Tensor = self.score(inputs)
        log_hazard = score + self.baseline(torch.ones_like(score)) - 3.0
        hazard: Tensor = log_hazard.clamp(*LOG_HAZARDS).exp()
        return hazard + torch.log(-torch.expm1(-hazard))


def single(outputs: Tensor) -> Tensor:
    """Shape (records,) where each record has one output."""
    return outputs.squeeze(1) if outputs.shape[1] == 1 else outputs


class Perceptron(nn.Module):
    """A multilayer perceptron with tanh: (records, features) -> (records,) or (records, outputs).

    Bounded activations keep gradients small, so clipping costs less under DP.

    Source: Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential
    Privacy", AAAI 2021.
    """

    def __init__(self, features: int, hidden: tuple[int, ...], outputs: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in zip((features, *hidden), hidden, strict=False):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        return single(self.head(self.layers(inputs)))


def logistic(plan: StudyPlan) -> nn.Module:
    """Logistic regression on the plan's features; multinomial where there are more classes."""
    return _linear(plan, ("binary", "multiclass"))


def linear(plan: StudyPlan) -> nn.Module:
    """Least squares on the plan's features."""
    return _linear(plan, ("regression",))


def cox(plan: StudyPlan) -> nn.Module:
    """Proportional hazards on the plan's features and time grid."""
    require_table(plan, ("survival",))
    require(not plan.model.hidden, "model 'cox' has no hidden layers; take mlp")
    return GroupedCox(feature_width(plan.task), task_kind(plan.task).outputs(plan.task))


def mlp(plan: StudyPlan) -> nn.Module:
    """A perceptron with the plan's `hidden` sizes, by default one layer of 32.

    On a survival task it is the discrete-time hazard network of Gensheimer and Narasimhan 2019.
    """
    require_table(plan)
    outputs = task_kind(plan.task).outputs(plan.task)
    return Perceptron(feature_width(plan.task), plan.model.hidden or (32,), outputs)


def _linear(plan: StudyPlan, kinds: tuple[str, ...]) -> nn.Module:
    require_table(plan, kinds)
    require(not plan.model.hidden, f"model {plan.model.name!r} has no hidden layers; take mlp")
    return Linear(feature_width(plan.task), task_kind(plan.task).outputs(plan.task))


def require_table(plan: StudyPlan, kinds: tuple[str, ...] = ()) -> None:
    """Refuse pixels, and kinds of task that a model is not for; ConfigError."""
    name, image = plan.model.name, plan.task.image
    require(
        image is None or image.tabular,
        f"model {name!r} needs a table, and the task has an image; use cnn or resnet18, "
        "or image.features = 'scattering' or a pretrained network's",
    )
    require(
        not kinds or plan.task.kind in kinds,
        f"model {name!r} is for {' and '.join(kinds)}, and the task is {plan.task.kind!r}",
    )
