"""Why a model says what it says of one patient: numbers for a page that stays at the hospital."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.attribution import (
    Reals,
    Risk,
    grad_cam,
    integrated_gradients,
    risk_at,
    shapley_values,
)
from shared.answers import risk_names
from shared.config import require
from shared.errors import ConfigError
from shared.features import feature_columns, public_baseline
from shared.released import ReleasedModel, require_plain_inputs
from shared.task_plan import FeaturePlan, TaskPlan

BLACK = -1.0
"""The baseline of an image: every pixel at the plan's black."""


@dataclass(frozen=True)
class Contribution:
    """One feature's part in what the model says.

    Attributes:
        feature: The plan's.
        value: What the model saw, in the plan's unit.
        baseline: What it is compared with.
        shapley: Its Shapley value, in the unit of the answer.
        gradients: Its Integrated Gradients, likewise; None for a model that moves in jumps.
    """

    feature: FeaturePlan
    value: str
    baseline: str
    shapley: float
    gradients: float | None


@dataclass(frozen=True)
class Maps:
    """What an image's pixels do.

    Attributes:
        picture: The image as the model saw it, within [-1, 1], shape (channels, *grid).
        gradients: Integrated Gradients, summed over channels, shape (*grid,).
        heat: GradCAM, 0 or more, shape (*grid,); None where the model has no convolutions.
    """

    picture: NDArray[np.float32]
    gradients: Reals
    heat: Reals | None


@dataclass(frozen=True)
class Explanation:
    """One record, explained.

    Attributes:
        name: Of the explained answer, such as "probability of malignant".
        answers: Everything that the model says of the record, by name.
        risk: What it says under `name`.
        start: What it says of the baseline under that name.
        contributions: Of a table's features, the largest first.
        maps: Of an image.
    """

    name: str
    answers: dict[str, float]
    risk: float
    start: float
    contributions: tuple[Contribution, ...] = ()
    maps: Maps | None = None


def explain(model: ReleasedModel, inputs: NDArray[np.float32], of: str = "") -> Explanation:
    """Explain what a model says of one record.

    Args:
        model: A released model.
        inputs: Scaled by the plan, shape (*input_shape,).
        of: The class, or the time of the interval's end, that is explained. Left out: the likeliest
            class, or the end of the time grid.

    Raises:
        ConfigError: `of` is none of the task's, or the model reads features made of pictures.
    """
    task = model.plan.task
    require_plain_inputs(task, "explained")
    names, module = risk_names(task), model.module()
    said = {name: risk_at(Risk(module, task, i), inputs) for i, name in enumerate(names)}
    name = _chosen(task, said, of)
    risk = Risk(module, task, names.index(name))
    if task.image is not None:
        return _explain_image(name, said, risk, inputs)
    baseline = public_baseline(task)
    groups = feature_columns(task)
    shares = shapley_values(risk, inputs, baseline, groups)
    slopes = integrated_gradients(risk, inputs, baseline)
    parts = [
        Contribution(
            feature,
            shown(task, feature, inputs[columns]),
            shown_baseline(feature),
            float(share),
            None if slopes is None else float(slopes[columns].sum()),
        )
        for feature, columns, share in zip(task.features, groups, shares, strict=True)
    ]
    parts.sort(key=lambda part: -abs(part.shapley))
    return Explanation(name, said, said[name], risk_at(risk, baseline), tuple(parts))


def _explain_image(
    name: str, said: dict[str, float], risk: Risk, inputs: NDArray[np.float32]
) -> Explanation:
    black = np.full_like(inputs, BLACK)
    slopes = integrated_gradients(risk, inputs, black)
    if slopes is None:
        raise ConfigError("this model of images moves in jumps, so no map can be drawn of it.")
    maps = Maps(inputs, slopes.sum(axis=0), grad_cam(risk, inputs))
    return Explanation(name, said, said[name], risk_at(risk, black), maps=maps)


def _chosen(task: TaskPlan, said: dict[str, float], of: str) -> str:
    """The name of the answer that is explained."""
    if not of:
        return max(said, key=lambda n: said[n]) if task.kind == "multiclass" else list(said)[-1]
    choices = {n.removeprefix("probability of ").removeprefix("event by "): n for n in said}
    require(of in choices, f"--of is none of this model's answers: {', '.join(choices)}.")
    return choices[of]


def shown(task: TaskPlan, feature: FeaturePlan, columns: NDArray[np.float32]) -> str:
    """A feature's encoded columns as the value that the model saw, with its unit.

    Numbers are clamped to the plan's range before a model sees them; at the ends of one that has a
    unit this says so.
    """
    if feature.missing == "indicator" and columns[-1] > 0.5:
        return "missing"
    if feature.type == "category":
        return _category(task, feature, columns)
    low, high = feature.minimum or 0.0, feature.maximum or 0.0
    scaled = float(columns[0])
    text = _with_unit(low + (scaled + 1) / 2 * (high - low), feature)
    if abs(scaled) < 1 or not feature.unit:
        return text
    return f"{text} or {'more' if scaled > 0 else 'less'}"


def _category(task: TaskPlan, feature: FeaturePlan, columns: NDArray[np.float32]) -> str:
    codes = columns[:-1] if feature.missing == "indicator" else columns
    first = 1 if task.encoding == "drop-first" else 0
    if codes.max() > 0.99:
        return feature.categories[int(codes.argmax()) + first]
    return feature.categories[0] if first and codes.max() < 1e-6 else "missing"


def shown_baseline(feature: FeaturePlan) -> str:
    """What `public_baseline` stands for, in the feature's own words."""
    if feature.type == "category":
        return "all categories alike"
    return _with_unit(((feature.minimum or 0.0) + (feature.maximum or 0.0)) / 2, feature)


def _with_unit(value: float, feature: FeaturePlan) -> str:
    return f"{value:.5g} {feature.unit}".rstrip()
