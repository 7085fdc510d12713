"""Local training: what a step's gradient is, and that nothing else can slip into it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from training_cases import make_data, make_plan

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.models import build_model, initial_parameters, load_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan

KEY = bytes(range(32))


def loop_sum(plan: StudyPlan, data: PatientDataset, start: FlatVector, clip: float) -> FlatVector:
    """The clipped sum by one ordinary backward pass per patient: the definition."""
    model = build_model(plan)
    load_parameters(model, start)
    total = np.zeros(len(start), dtype=np.float64)
    for rows in data.records_of:
        model.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(
            model(torch.from_numpy(data.inputs[rows])),
            torch.from_numpy(data.labels[rows].astype(np.float32)),
            reduction="none",
        )
        torch.autograd.backward(losses.mean())
        grad = nn.utils.parameters_to_vector([p.grad for p in model.parameters()]).numpy()
        total += grad * min(1.0, clip / np.linalg.norm(grad))
    return total.astype(np.float32)


@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize(
    ("model", "image"), [("logistic", None), ("mlp", None), ("cnn", 16), ("resnet18", 16)]
)
def test_the_sum_is_the_per_patient_definition(model: str, image: int | None, clip: float) -> None:
    plan = make_plan(model, image=image, model={"width": 8}, privacy={"clip_norm": clip})
    data = make_data(plan, records_each=[1, 3, 2, 1, 5])
    trainer = LocalTrainer(plan, "site-0", data, 0.0, "cpu", measuring=True)
    start = initial_parameters(plan)
    got = trainer.gradient(start, np.arange(5), ChaChaRandom(KEY)) * trainer.public_divisor(
        "site-0"
    )
    want = loop_sum(plan, data, start, clip)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.linalg.norm(want))
