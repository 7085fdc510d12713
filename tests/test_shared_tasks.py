"""Kinds of task: their losses against plain arithmetic, and every model on every kind it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_cases import KINDS, make_data, model_plan

from client.guard import check_sensitivity
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from shared.errors import ConfigError
from shared.models import build_model, initial_parameters, input_shape
from shared.task_plan import FeaturePlan, TaskPlan
from shared.tasks import VALUE_STEPS, record_losses, task_kind

AGE = (FeaturePlan("age", minimum=0, maximum=120),)


def plain_survival(logits: list[float], code: int) -> float:
    """Minus the log of the probability of what was seen, factor by factor."""
    end, event = divmod(code, 2)
    probability = 1.0
    for k, logit in enumerate(logits):
        hazard = 1 / (1 + math.exp(-logit))
        if k < end:
            probability *= 1 - hazard
        elif k == end and event:
            probability *= hazard
    return -math.log(probability)


def test_survival_loss_is_the_likelihood_of_what_was_seen() -> None:
    task = TaskPlan("e", kind="survival", time="t", intervals=(1, 2, 4), features=AGE)
    logits = torch.randn((7, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = torch.arange(7, dtype=torch.float64)  # 0 and 1 in the first interval ... 6 past all
    losses = record_losses(task)(logits, codes)
    expected = [plain_survival(row, code) for code, row in enumerate(logits.tolist())]
    assert losses.tolist() == pytest.approx(expected)
    assert expected[0] == 0.0  # who leaves within the first interval says nothing
    assert task_kind(task).codes(task) == 7


def test_the_probabilities_of_all_that_can_be_seen_add_up_to_one() -> None:
    task = TaskPlan("e", kind="survival", time="t", intervals=(1, 2, 4), features=AGE)
    seen = torch.tensor([1.0, 3.0, 5.0, 6.0])  # the event in each interval, or none
    losses = record_losses(task)(torch.tensor([[0.3, -1.0, 2.0]] * 4), seen)
    assert float(torch.exp(-losses).sum()) == pytest.approx(1)


def test_regression_is_in_half_ranges() -> None:
    task = TaskPlan("y", kind="regression", minimum=0, maximum=10, features=AGE)
    codes = torch.tensor([0.0, VALUE_STEPS / 2, VALUE_STEPS])
    assert record_losses(task)(torch.zeros(3), codes).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "multiclass"}, "needs classes"),
        ({"kind": "multiclass", "classes": ("a", "b")}, "at least three"),
        ({"kind": "multiclass", "classes": ("a", "b", "a")}, "at least three different"),
        ({"classes": ("a", "b", "c")}, "'binary' has no classes"),
        ({"kind": "regression", "minimum": 0.0}, "needs maximum"),
        ({"kind": "regression", "minimum": 3.0, "maximum": 1.0}, "not below its maximum"),
        ({"kind": "survival", "time": "t"}, "needs intervals"),
        ({"kind": "survival", "time": "t", "intervals": (2.0, 1.0)}, "must rise"),
        ({"kind": "survival", "time": "t", "intervals": (0.0, 1.0)}, "from above 0"),
        ({"kind": "survival", "time": "age", "intervals": (1.0,)}, "named twice"),
    ],
)
def test_a_task_that_lacks_something_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskPlan("y", features=AGE, **values)  # type: ignore[arg-type]


FITS = [
    *(("mlp", kind) for kind in KINDS),
    *(("trees", kind) for kind in KINDS),
    *(("cnn", kind) for kind in KINDS),
    ("logistic", "multiclass"), ("pooled-linear", "survival"), ("cnn3d", "multiclass"),
    *((name, kind) for name in ("ft-transformer", "vit") for kind in KINDS),
    ("resnet18", "regression"), ("cox", "survival"), ("linear", "regression"),
]  # fmt: skip

WIDTHS = {"ft-transformer": 8, "vit": 8}


@pytest.mark.parametrize(("name", "kind"), FITS)
def test_every_record_is_answered_by_itself(name: str, kind: str) -> None:
    plan = model_plan(name, kind, model={"width": WIDTHS.get(name, 4)})
    model, outputs = build_model(plan), task_kind(plan.task).outputs(plan.task)
    inputs = torch.rand((5, *input_shape(plan)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model(inputs)
        alone = torch.cat([model(inputs[i : i + 1]) for i in range(5)])
    assert together.shape == ((5,) if outputs == 1 else (5, outputs))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlp", "multiclass"), ("mlp", "regression"), ("mlp", "survival"), ("cnn", "multiclass"),
     ("cox", "survival"), ("logistic", "multiclass"), ("trees", "multiclass"),
     ("trees", "regression"), ("trees", "survival"),
     ("ft-transformer", "binary"), ("vit", "multiclass")],
)  # fmt: skip
def test_one_patient_moves_the_sum_by_at_most_the_clip_norm(name: str, kind: str) -> None:
    plan = model_plan(name, kind, model={"width": WIDTHS.get(name, 4)})
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4


@pytest.mark.parametrize(("name", "kind"), FITS)
def test_both_engines_sum_the_same_clipped_gradients(name: str, kind: str) -> None:
    plan = model_plan(name, kind, model={"width": WIDTHS.get(name, 4)}, privacy={"clip_norm": 0.3})
    data = make_data(plan, patients=12)
    sums = [
        LocalTrainer(plan, "site-0", data, 1.0, "cpu", engine=engine).clipped_sum(
            initial_parameters(plan), ChaChaRandom(simulation_key(1, "site-0")), 1
        ).update
        for engine in ("auto", "hooks")
    ]  # fmt: skip
    scale = float(np.abs(sums[1]).max())
    assert scale > 0
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "kind"), [("linear", "binary"), ("cox", "regression"), ("logistic", "survival")]
)
def test_a_model_of_another_kind_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"and the task is '{kind}'"):
        build_model(model_plan(name, kind))
