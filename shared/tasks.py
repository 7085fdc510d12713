"""Kinds of task: what a label is, what a model says of a record, and what a mistake costs.

Every label is one whole number, its code, so that files, splits and counts know one form alone:

binary       0 or 1
multiclass   the class's place among the plan's `classes`
regression   steps of 2^-20 of the plan's public range, 0 to 2^20
survival     2 j + e: follow-up ends in interval j of the plan's grid, with the event (e = 1) or
             without; j = number of intervals where it goes on past the last

To add a kind, write its row here, its counts in shared/counts.py, its labels in
client/data/labels.py, and its name in `TaskPlan.kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.task_plan import TaskPlan

if TYPE_CHECKING:
    from torch import Tensor  # which takes seconds, and most commands need no loss

RecordLosses = Callable[["Tensor", "Tensor"], "Tensor"]
"""(outputs (n,) or (n, outputs), codes as float (n,)) -> one loss a record, shape (n,)."""

VALUE_STEPS = 1 << 20
Reals = TypeVar("Reals", "Tensor", NDArray[np.float64])


@dataclass(frozen=True)
class TaskKind:
    """How one kind of task is learnt.

    Attributes:
        outputs: Numbers that a model gives for each record.
        codes: Labels are whole numbers from 0 up to below this.
        losses: Each record's own loss.
    """

    outputs: Callable[[TaskPlan], int]
    codes: Callable[[TaskPlan], int]
    losses: Callable[[TaskPlan, Tensor, Tensor], Tensor]


def task_kind(task: TaskPlan) -> TaskKind:
    """How the plan's kind of task is learnt; ConfigError where nothing is learnt."""
    kind = TASKS.get(task.kind)
    if kind is None:
        raise ConfigError(
            f"task kind {task.kind!r} trains no model; kinds that do: {', '.join(TASKS)}"
        )
    return kind


def record_losses(task: TaskPlan) -> RecordLosses:
    """The loss of the plan's task."""
    return partial(task_kind(task).losses, task)


def values_of(codes: Reals) -> Reals:
    """The label values that regression codes stand for, in [-1, 1]; tensor or array of reals."""
    return codes * (2.0 / VALUE_STEPS) - 1.0


def binary_losses(logits: Tensor, codes: Tensor) -> Tensor:
    """Each record's own cross entropy, shape (records,)."""
    from torch.nn import functional  # noqa: PLC0415  # torch takes seconds

    return functional.binary_cross_entropy_with_logits(logits, codes, reduction="none")


def _binary(task: TaskPlan, logits: Tensor, codes: Tensor) -> Tensor:
    return binary_losses(logits, codes)


def _multiclass(task: TaskPlan, logits: Tensor, codes: Tensor) -> Tensor:
    """Cross entropy."""
    from torch.nn import functional  # noqa: PLC0415

    return functional.cross_entropy(logits, codes.long(), reduction="none")


def _regression(task: TaskPlan, outputs: Tensor, codes: Tensor) -> Tensor:
    """Half the squared error, in units of half the plan's range."""
    return 0.5 * (outputs - values_of(codes)) ** 2


def _survival(task: TaskPlan, logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood of discrete-time hazards, logits of shape (n, intervals).

    A record lives through the intervals before the one in which its follow-up ends, and in that
    one has the event or leaves unseen.

    Source: Gensheimer, Narasimhan, "A scalable discrete-time survival model for neural
    networks", PeerJ 7:e6257, 2019, equation 3.
    """
    import torch  # noqa: PLC0415
    from torch.nn import functional  # noqa: PLC0415

    whole = codes.long()
    end, event = whole // 2, whole % 2
    intervals = torch.arange(logits.shape[1], device=logits.device)
    survived = (intervals < end[:, None]).to(logits.dtype)
    died = ((intervals == end[:, None]) & (event[:, None] == 1)).to(logits.dtype)
    return (survived * functional.softplus(logits) + died * functional.softplus(-logits)).sum(1)


TASKS: dict[str, TaskKind] = {
    "binary": TaskKind(outputs=lambda task: 1, codes=lambda task: 2, losses=_binary),
    "multiclass": TaskKind(
        outputs=lambda task: len(task.classes),
        codes=lambda task: len(task.classes),
        losses=_multiclass,
    ),
    "regression": TaskKind(
        outputs=lambda task: 1, codes=lambda task: VALUE_STEPS + 1, losses=_regression
    ),
    "survival": TaskKind(
        outputs=lambda task: len(task.intervals),
        codes=lambda task: 2 * len(task.intervals) + 1,
        losses=_survival,
    ),
}
