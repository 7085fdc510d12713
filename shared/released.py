"""A released model: model.safetensors beside model.json, and what its outputs mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from shared import plan as plans
from shared.answers import answer_names, answers_of
from shared.config import require
from shared.errors import ConfigError
from shared.models import build_model, load_parameters, plan_spec
from shared.models.lora import merge
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.task_plan import TaskPlan
from shared.version import fedward_version

SCHEMA = "fedward-model/1"
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class ReleasedModel:
    """A model that can be used without the study that it came from.

    Attributes:
        plan: Of that study.
        parameters: Of the model.
        sha256: Hex digest of model.safetensors.
    """

    plan: StudyPlan
    parameters: FlatVector
    sha256: str

    @property
    def key(self) -> str:
        """Names the model by plan and parameters alone, 32 hex digits, whatever file holds it."""
        return model_key(self.plan, self.parameters)

    def module(self) -> nn.Module:
        """The model itself, on the CPU, ready to be asked; adapters are in its weights.

        Raises:
            ConfigError: it adapts a pretrained file's weights, and that file is not here.
        """
        module = build_model(self.plan)
        load_parameters(module, self.parameters)
        merge(module)
        return module.eval()


def require_plain_inputs(task: TaskPlan, done: str) -> None:
    """Refuse a model whose inputs are not each record's own values, scaled by the plan alone.

    Args:
        task: Of the model's plan.
        done: What such a model cannot be: "explained", "exported".

    Raises:
        ConfigError: it reads features made of the picture by something that is no part of it, or
            what each hospital's own data scaled.
    """
    require(
        task.image is None or task.image.pixels,
        f"this model cannot be {done}: it reads fixed features that were made of the picture "
        "outside it. A model that reads pixels can: cnn, resnet18, vit, or a pretrained network "
        "with image.trainable = 'all'.",
    )
    require(
        task.scaling == "public-range",
        f"this model cannot be {done}: it was scaled by each hospital's own data, which is no part "
        "of it. A model with scaling = 'public-range' can.",
    )


def read_model(folder: Path) -> ReleasedModel:
    """Read model.safetensors and model.json of a run directory, or of a folder with both.

    Raises:
        ConfigError: a file is missing or damaged, or the tensors are not the plan's model's.
    """
    file = folder / "model.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        data = (folder / "model.safetensors").read_bytes()
        tensors = load(data)
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
    parameters = plan_spec(plan).flatten(tensors)
    return ReleasedModel(plan, parameters, hashlib.sha256(data).hexdigest())


def model_key(plan: StudyPlan, parameters: FlatVector) -> str:
    """See `ReleasedModel.key`."""
    values = np.ascontiguousarray(parameters, dtype="<f4").tobytes()
    return hashlib.sha256(bytes.fromhex(plan.sha256) + values).hexdigest()[:32]


def model_files(
    plan: StudyPlan, parameters: FlatVector, facts: Mapping[str, object]
) -> dict[str, bytes]:
    """What `read_model` reads: the bytes of model.safetensors and model.json, by file name.

    Args:
        plan: Of the model.
        parameters: float32, shape (d,).
        facts: What else model.json says of it.
    """
    tensors = plan_spec(plan).unflatten(parameters)
    about: dict[str, object] = {"schema": SCHEMA, "version": fedward_version()}
    about |= {"plan_sha256": plan.sha256, **facts, "plan": json.loads(plan.canonical_bytes)}
    return {
        "model.safetensors": save({n: np.ascontiguousarray(t) for n, t in tensors.items()}),
        "model.json": (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def answers(task: TaskPlan, outputs: NDArray[np.float32]) -> dict[str, Reals]:
    """A model's outputs in the task's own words, one column each.

    Args:
        task: The plan's task.
        outputs: float32, shape (n,) or (n, outputs).

    Returns:
        float64, shape (n,), under the names of `answer_names`; see `answers_of`.
    """
    exact = torch.from_numpy(outputs.astype(np.float64))
    columns: Reals = answers_of(task, exact).numpy()
    return {name: columns[:, i] for i, name in enumerate(answer_names(task))}
