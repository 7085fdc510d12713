"""Small plans and made-up patients for the tests of training, models and the guard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.models import build_model, initial_parameters, input_shape, load_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan, from_table
from shared.tasks import task_kind

KEY = bytes(range(32))
DIVISOR = 0.5 * 20  # sample_rate times expected_patients of make_plan


def make_plan(
    name: str = "logistic",
    *,
    features: int = 5,
    image: int | None = None,
    depth: int = 0,
    **sections: Any,
) -> StudyPlan:
    """A four-site study of model `name`; sections override keys: training={"local_steps": 3}."""
    task: dict[str, Any] = {"label": "y"} | sections.pop("task", {})
    if image is None:
        task["features"] = [
            {"name": f"f{i}", "minimum": -1.0, "maximum": 1.0} for i in range(features)
        ]
    else:
        task["image"] = {"channels": 1, "height": image, "width": image, "depth": depth}
    private = sections.get("privacy", {}).get("mode", "local") != "none"
    training: dict[str, Any] = {"rounds": 10, "local_steps": 1, "learning_rate": 0.5}
    privacy: dict[str, Any] = {"mode": "local"}
    if private:
        training["sample_rate"] = 0.5
        privacy |= {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
    table: dict[str, Any] = {
        "name": "trial",
        "task": task,
        "model": {"name": name} | sections.pop("model", {}),
        "training": training | sections.pop("training", {}),
        "privacy": privacy | sections.pop("privacy", {}),
        "cohort": {
            "threshold": 4,
            "sites": [{"name": f"site-{i}", "expected_patients": 20} for i in range(4)],
        },
    }
    return from_table(table | sections, "test")


KINDS: dict[str, dict[str, Any]] = {
    "binary": {},
    "multiclass": {"classes": ["none", "mild", "severe"]},
    "regression": {"minimum": 0.0, "maximum": 50.0},
    "survival": {"time": "days", "intervals": [30.0, 90.0, 365.0, 1000.0]},
}
_MODEL_KINDS = {"linear": "regression", "cox": "survival"}


def model_plan(name: str, kind: str = "", **sections: Any) -> StudyPlan:
    """A plan for any shipped model, with inputs it takes and the kind of task it is for."""
    flat, volume = ("cnn", "resnet18", "resnet50", "pooled-linear", "vit"), ("cnn3d",)
    kind = kind or _MODEL_KINDS.get(name, "binary")
    image = 12 if name in (*flat, *volume) else None
    depth = 8 if name in volume else 0
    task = {"kind": kind} | KINDS[kind]
    return make_plan(name, image=image, depth=depth, task=task, **sections)


def make_data(
    plan: StudyPlan, patients: int = 20, records_each: int | list[int] = 1, seed: int = 0
) -> PatientDataset:
    """Patients with uniform inputs in [-1, 1] and random labels of the task."""
    rng = np.random.default_rng(seed)
    counts = [records_each] * patients if isinstance(records_each, int) else records_each
    owners = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    inputs = rng.uniform(-1, 1, (len(owners), *input_shape(plan))).astype(np.float32)
    codes = task_kind(plan.task).codes(plan.task)
    labels = rng.integers(0, codes, len(owners)).astype(np.int64)
    return PatientDataset(inputs, labels, owners, tuple(f"p{i}" for i in range(len(counts))))


def clipped_sum(
    plan: StudyPlan, data: PatientDataset, start: FlatVector | None = None, most: int | None = None
) -> FlatVector:
    """The sum before noise over all patients, as the trainer computes it."""
    trainer = LocalTrainer(
        plan, "site-0", data, 0.0, "cpu", max_physical_records=most, measuring=True
    )
    everyone = np.arange(data.patient_count)
    start = initial_parameters(plan) if start is None else start
    divisor = np.float32((plan.training.sample_rate or 1) * 20)
    return trainer.gradient(start, everyone, ChaChaRandom(KEY)) * divisor


def patient_gradients(plan: StudyPlan, data: PatientDataset, start: FlatVector) -> list[FlatVector]:
    """Each patient's gradient by one ordinary backward pass: the definition."""
    model = build_model(plan)
    load_parameters(model, start)
    gradients = []
    for rows in data.records_of:
        model.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(
            model(torch.from_numpy(data.inputs[rows])),
            torch.from_numpy(data.labels[rows].astype(np.float32)),
            reduction="none",
        )
        torch.autograd.backward(losses.mean())
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).numpy().copy())
    return gradients
