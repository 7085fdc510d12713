"""A released model: model.safetensors beside model.json, and what its outputs mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from shared import plan as plans
from shared.config import require
from shared.errors import ConfigError
from shared.models import build_model, parameter_spec
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.task_plan import TaskPlan

SCHEMA = "fedward-model/1"
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class ReleasedModel:
    """A model that can be used without the study that it came from."""

    plan: StudyPlan
    parameters: FlatVector


def read_model(folder: Path) -> ReleasedModel:
    """Read model.safetensors and model.json of a run directory, or of a folder with both.

    Raises:
        ConfigError: a file is missing or damaged, or the tensors are not the plan's model's.
    """
    file = folder / "model.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} holds no readable model.json and model.safetensors "
            f"({type(error).__name__}). Give the folder of a finished run."
        ) from None
    require(
        isinstance(about, dict) and about.get("schema") == SCHEMA,
        f"{file} is not of schema {SCHEMA}; take the version of Fedward that wrote it.",
    )
    plan = plans.from_table(about.get("plan") or {}, f"{file}: plan")
    require(
        plan.sha256 == about.get("plan_sha256"),
        f"{file}: the plan is not the one that its plan_sha256 names; the file was changed.",
    )
    return ReleasedModel(plan, parameter_spec(build_model(plan)).flatten(tensors))


def answers(task: TaskPlan, outputs: NDArray[np.float32]) -> dict[str, Reals]:
    """A model's outputs in the task's own words, one column each.

    Args:
        task: The plan's task.
        outputs: float32, shape (n,) or (n, outputs).

    Returns:
        binary: the probability of the positive label. multiclass: of each class. regression: the
        value in the label's unit. survival: the probability to be without the event at the end of
        each interval.
    """
    exact = outputs.astype(np.float64)
    if task.kind == "multiclass":
        likely = np.exp(exact - np.logaddexp.reduce(exact, axis=1)[:, None])
        return {f"probability of {c}": likely[:, i] for i, c in enumerate(task.classes)}
    if task.kind == "regression":
        low, high = task.minimum or 0.0, task.maximum or 0.0
        return {task.label: low + (exact + 1) / 2 * (high - low)}
    if task.kind == "survival":
        columns = exact.reshape(len(exact), -1)  # one interval has one output
        free = np.exp(-np.cumsum(np.logaddexp(0.0, columns), axis=1))
        return {f"without event at {t:g}": free[:, i] for i, t in enumerate(task.intervals)}
    return {f"probability of {task.positive}": np.exp(-np.logaddexp(0.0, -exact))}
