"""What a model's outputs mean, in the task's own words.

Written with torch, so that a gradient passes through it (client/attribution.py) and an exported
model can hold it (client/export.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shared.task_plan import TaskPlan


def answer_names(task: TaskPlan) -> tuple[str, ...]:
    """A name for each column of `answers_of`."""
    if task.kind == "multiclass":
        return tuple(f"probability of {name}" for name in task.classes)
    if task.kind == "regression":
        return (task.label,)
    if task.kind == "survival":
        return tuple(f"without event at {time:g}" for time in task.intervals)
    return (f"probability of {task.positive}",)


def answers_of(task: TaskPlan, outputs: Tensor) -> Tensor:
    """A model's outputs as probabilities or values.

    Args:
        task: The plan's task.
        outputs: Shape (n,) or (n, outputs).

    Returns:
        Shape (n, columns), as `answer_names`. binary: the probability of the positive label.
        multiclass: of each class. regression: the value in the label's unit. survival: the
        probability to be without the event at the end of each interval.
    """
    if task.kind == "multiclass":
        return torch.softmax(outputs, dim=1)
    if task.kind == "survival":
        columns = outputs.reshape(outputs.shape[0], -1)  # one interval has one output
        return torch.exp(-torch.cumsum(functional.softplus(columns), dim=1))
    single = outputs.reshape(-1, 1)
    if task.kind == "regression":
        low, high = task.minimum or 0.0, task.maximum or 0.0
        return low + (single + 1) / 2 * (high - low)
    return torch.sigmoid(single)


def risk_names(task: TaskPlan) -> tuple[str, ...]:
    """A name for each column of `risks_of`."""
    if task.kind == "survival":
        return tuple(f"event by {time:g}" for time in task.intervals)
    return answer_names(task)


def risks_of(task: TaskPlan, outputs: Tensor) -> Tensor:
    """What an explanation is of: the answers, and for survival the risk of the event instead."""
    answers = answers_of(task, outputs)
    return 1 - answers if task.kind == "survival" else answers
