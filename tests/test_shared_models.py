"""Models: one logit a record, one starting point on every machine, faulty parts refused by name."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_cases import make_plan

import shared.models
from shared.errors import ConfigError
from shared.models import (
    build_model,
    check_model,
    initial_parameters,
    input_shape,
    load_parameters,
    parameter_spec,
    read_parameters,
)
from shared.models.image import group_norm, local_means
from shared.models.resnet import ResNet
from shared.models.vit import patch_side
from shared.plan import StudyPlan
from shared.task_plan import FeaturePlan, TaskPlan

PLANS = {
    "logistic": make_plan(),
    "mlp": make_plan("mlp", model={"hidden": [7, 3]}),
    "cnn": make_plan("cnn", image=24, model={"width": 6}),
    "cnn3d": make_plan("cnn3d", image=12, depth=8, model={"width": 4}),
    "pooled-linear": make_plan("pooled-linear", image=12, model={"width": 5}),
    "pooled-linear-3d": make_plan("pooled-linear", image=12, depth=8, model={"width": 5}),
    "resnet18": make_plan("resnet18", image=24, model={"width": 8}),
    "resnet18-large": make_plan("resnet18", image=72, model={"width": 4}),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def inputs_of(plan: StudyPlan, records: int) -> torch.Tensor:
    return torch.rand((records, *input_shape(plan)), generator=torch.Generator().manual_seed(1))


@plans
def test_a_logit_a_record_that_depends_on_that_record_alone(plan: StudyPlan) -> None:
    model, inputs = build_model(plan), inputs_of(plan, 5)
    with torch.no_grad():
        together = model(inputs)
        assert together.shape == (5,)
        alone = torch.cat([model(inputs[i : i + 1]) for i in range(5)])
        changed = inputs.clone()
        changed[0] = -50.0
        torch.testing.assert_close(model(changed)[1:], together[1:])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert len(set(together.tolist())) == 5


@plans
def test_parameters_go_round_through_the_flat_vector(plan: StudyPlan) -> None:
    model = build_model(plan)
    spec = parameter_spec(model)
    vector = np.arange(spec.length, dtype=np.float32)
    load_parameters(model, vector)
    assert np.array_equal(read_parameters(model), vector)
    named = {n: p.detach().numpy() for n, p in model.named_parameters()}
    assert np.array_equal(spec.flatten(named), vector)
    assert all(np.array_equal(a, named[n]) for n, a in spec.unflatten(vector).items())


def test_a_loaded_vector_is_copied() -> None:
    model = build_model(PLANS["logistic"])
    vector = initial_parameters(PLANS["logistic"])
    vector.setflags(write=False)
    load_parameters(model, vector)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert np.array_equal(vector, initial_parameters(PLANS["logistic"]))


@pytest.mark.parametrize(
    "vector", [np.zeros(5, np.float32), np.zeros(7, np.float32), np.zeros(6, np.float64)]
)
def test_a_vector_that_does_not_fit_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"float32 of shape \(6,\)"):
        load_parameters(build_model(PLANS["logistic"]), vector)


@plans
def test_the_start_is_uniform_within_the_fan_in(plan: StudyPlan) -> None:
    model = build_model(plan)
    for part in model.modules():
        if isinstance(part, nn.GroupNorm):
            assert torch.equal(part.weight, torch.ones_like(part.weight))
            assert torch.equal(part.bias, torch.zeros_like(part.bias))
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
            bound = 1 / math.sqrt(part.weight[0].numel())
            values = torch.cat([p.detach().flatten() for p in part.parameters()])
            assert values.abs().max() <= bound
            if len(values) > 200:
                assert values.abs().max() > 0.9 * bound
                assert abs(values.var().item() - bound**2 / 3) < 0.1 * bound**2


# Of the bytes of float32, little-endian. Every machine must get these, or sites start apart.
STARTS = {
    "logistic": "7e0e8789886474d4",
    "mlp": "ed489aa9f7bbae0e",
    "cnn3d": "6372b39b38721640",
    "resnet18": "30a4b11a81deed21",
}


@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_the_same_on_every_machine(name: str) -> None:
    vector = initial_parameters(PLANS[name])
    assert hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()[:16] == STARTS[name]


def test_the_start_depends_on_the_plan_seed_and_on_no_torch_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial_parameters(make_plan("mlp"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(initial_parameters(make_plan("mlp")), first)
    other = initial_parameters(make_plan("mlp", model={"init_seed": 1}))
    assert not np.array_equal(other, first)


def test_resnet18_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ResNet("resnet18", 3, 64, small_stem=False)
    # He et al. 2016, with 1,000 classes: 11,689,512, of which the head is 513,000; here 513.
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 513_000 + 513


def test_resnet50_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ResNet("resnet50", 3, 64, small_stem=False)
    # He et al. 2016, with 1,000 classes: 25,557,032, of which the head is 2,049,000; here 2,049.
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 2_049_000 + 2_049


def test_a_missing_value_has_a_learned_token() -> None:
    plan = make_plan("ft-transformer", model={"width": 8})
    feature = FeaturePlan("x", minimum=-1.0, maximum=1.0, missing="indicator")
    plan = replace(plan, task=replace(plan.task, features=(feature,)))
    model, missing = build_model(plan), torch.tensor([[0.0, 1.0]])
    middle = torch.tensor([[0.0, 0.0]])
    assert not torch.allclose(model(missing), model(middle))
    model(missing).sum().backward()
    token = model.get_submodule("tokens.0").weight.grad
    assert token is not None
    assert float(token[:, 0].abs().max()) == 0  # the value is 0: its vector is not in it
    assert float(token[:, 1].abs().max()) > 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan("ft-transformer", image=24), "reads a table's features"),
        (make_plan("ft-transformer", model={"width": 7}), "an even one of 8 or more"),
        (make_plan("vit", image=24, model={"width": 6}), "an even one of 8 or more"),
        (make_plan("vit"), "needs an image"),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused(plan: StudyPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(plan)


def test_an_image_that_does_not_divide_into_patches_is_refused() -> None:
    assert patch_side(28, 28) == 4
    with pytest.raises(ConfigError, match="at most 64 equal"):
        patch_side(97, 89)


@given(st.integers(1, 600))
def test_group_norm_divides_any_width(channels: int) -> None:
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups <= max(1, min(32, channels // 4))


def test_input_width_counts_encoded_columns() -> None:
    number = FeaturePlan("a", minimum=0.0, maximum=1.0, missing="indicator")
    category = FeaturePlan("b", type="category", categories=("x", "y", "z"))
    for encoding, width in (("one-hot", 5), ("drop-first", 4)):
        task = TaskPlan("label", features=(number, category), encoding=encoding)  # type: ignore[arg-type]
        assert shared.models.feature_width(task) == width


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan("alexnet"), "unknown model 'alexnet'.*cnn, cnn3d, cox"),
        (make_plan("cnn"), "needs an image"),
        (make_plan("resnet18"), "needs an image"),
        (make_plan("mlp", image=16), "needs a table"),
        (make_plan("logistic", image=16), "needs a table"),
        (make_plan("logistic", model={"hidden": [3]}), "no hidden layers"),
        (make_plan("cnn", image=16, model={"hidden": [3]}), "use width"),
    ],
)
def test_a_model_that_does_not_fit_the_task_is_refused(plan: StudyPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(plan)


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight


def frozen(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1 is a BatchNorm1d.*Use GroupNorm"),
        (nn.Sequential(nn.Linear(2, 2), frozen(nn.BatchNorm1d(2))), "BatchNorm1d.*frozen"),
        (nn.BatchNorm2d(2, track_running_stats=False), "mixes the records"),
        (nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (nn.InstanceNorm1d(2, affine=True, track_running_stats=True), "InstanceNorm1d"),
        (WithBuffer(), "buffer, seen"),
        (Tied(), "second.weight and first.weight are tied"),
        (frozen(nn.Linear(2, 1)), "weight is frozen"),
        (nn.Linear(2, 1).double(), "float64"),
    ],
)
def test_faulty_parts_are_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(module)
    with pytest.raises(ConfigError, match=message):
        parameter_spec(module)


def test_a_registered_model_is_checked_and_needs_known_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(shared.models.BUILDERS, "bad", lambda _: nn.BatchNorm1d(5))
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        build_model(make_plan("bad"))
    monkeypatch.setitem(shared.models.BUILDERS, "odd", lambda _: nn.PReLU())
    with pytest.raises(ConfigError, match=r"\.weight is a parameter of a PReLU"):
        build_model(make_plan("odd"))


def test_torchs_own_start_depends_on_the_plan_seed_alone_and_spares_the_global_state() -> None:
    plan = make_plan("mlp", model={"init": "torch", "init_seed": 3})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial_parameters(plan)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(initial_parameters(plan), first)
    assert not np.array_equal(initial_parameters(make_plan("mlp")), first)


@pytest.mark.parametrize(("name", "depth", "way"), [("cnn", 8, "cnn3d"), ("cnn3d", 0, "cnn")])
def test_flat_models_take_no_volumes_and_the_other_way_round(
    name: str, depth: int, way: str
) -> None:
    with pytest.raises(ConfigError, match=f"use {way}$"):
        build_model(make_plan(name, image=12, depth=depth))


def test_local_means_are_those_of_the_square_that_lies_in_the_image() -> None:
    image = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    means = local_means(image, 5)
    for y, x in ((0, 0), (3, 4), (6, 1), (2, 8)):
        part = image[..., max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        assert torch.allclose(means[..., y, x], part.mean(dim=(2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("square", "sees"), [(0, True), (9, False)])
def test_with_local_contrast_the_cnn_does_not_see_how_bright_an_image_is(
    square: int, sees: bool
) -> None:
    """And it is the same network else: the same parameters at the same start."""
    plan = make_plan("cnn", image=16, model={"width": 4, "local_contrast": square})
    assert parameter_spec(build_model(plan)) == parameter_spec(
        build_model(make_plan("cnn", image=16, model={"width": 4}))
    )
    module, image = build_model(plan).double(), torch.rand(3, 1, 16, 16).double()
    moved = (module(image + 0.3) - module(image)).abs().max()
    assert moved > 1e-3 if sees else moved < 1e-9


@pytest.mark.parametrize(
    ("name", "square", "message"),
    [("cnn", 4, "odd number from 3"), ("cnn", 1, "odd"), ("cnn", -3, "odd"), ("cnn", 257, "255"),
     ("resnet18", 9, "is for model 'cnn', and this is 'resnet18'")],
)  # fmt: skip
def test_a_square_that_no_network_takes_is_refused(name: str, square: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(name, image=16, model={"local_contrast": square})


def test_a_plan_from_before_local_contrast_keeps_its_hash() -> None:
    assert b"local_contrast" not in make_plan("cnn", image=16).canonical_bytes
    assert (
        b'"local_contrast":9'
        in make_plan("cnn", image=16, model={"local_contrast": 9}).canonical_bytes
    )
