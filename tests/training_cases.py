"""Small plans and made-up patients for the tests of training, models and the guard."""

from __future__ import annotations

from typing import Any

import numpy as np

from client.data.dataset import PatientDataset
from shared.models import input_shape
from shared.plan import StudyPlan, from_table


def make_plan(
    name: str = "logistic", *, features: int = 5, image: int | None = None, **sections: Any
) -> StudyPlan:
    """A four-site study of model `name`; sections override keys: training={"local_steps": 3}."""
    task: dict[str, Any] = {"label": "y"}
    if image is None:
        task["features"] = [
            {"name": f"f{i}", "minimum": -1.0, "maximum": 1.0} for i in range(features)
        ]
    else:
        task["image"] = {"channels": 1, "height": image, "width": image}
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


def make_data(
    plan: StudyPlan, patients: int = 20, records_each: int | list[int] = 1, seed: int = 0
) -> PatientDataset:
    """Patients with uniform inputs in [-1, 1] and random labels."""
    rng = np.random.default_rng(seed)
    counts = [records_each] * patients if isinstance(records_each, int) else records_each
    owners = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    inputs = rng.uniform(-1, 1, (len(owners), *input_shape(plan))).astype(np.float32)
    labels = rng.integers(0, 2, len(owners)).astype(np.int64)
    return PatientDataset(inputs, labels, owners, tuple(f"p{i}" for i in range(len(counts))))
