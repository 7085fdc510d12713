"""Low-rank adapters: what is learnt, that engines agree on it, and that nothing else moves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained_cases import narrow_weights
from torch import Tensor, nn
from training_cases import KINDS, make_data, make_plan

from client.explanation import explain
from client.guard import check_sensitivity
from client.noise import ChaChaRandom, simulation_key
from client.prediction import outputs_of
from client.training import LocalTrainer
from shared.config import canonical_json
from shared.errors import ConfigError, SensitivityError
from shared.models import (
    build_model,
    check_model,
    initial_parameters,
    load_parameters,
    plan_spec,
    read_parameters,
    trained,
)
from shared.models.lora import Adapted, adapted
from shared.parameters import FlatVector
from shared.plan import StudyPlan, from_bytes
from shared.released import model_files, read_model
from shared.task_plan import ImagePlan
from simulations.audits.canaries import gradients


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return narrow_weights(tmp_path, monkeypatch)


def lora_plan(name: str, rank: int, **sections: Any) -> StudyPlan:
    model = {"lora": {"rank": rank}} | sections.pop("model", {})
    return make_plan(name, model=model, **sections)


def pretrained_plan(sha256: str, trainable: str = "all") -> StudyPlan:
    plan = lora_plan("resnet18", 2, image=16)
    image = ImagePlan(
        channels=1, height=16, width=16, features="resnet18",
        weights_sha256=sha256, trainable=trainable,
    )  # type: ignore[arg-type]  # fmt: skip
    return replace(plan, task=replace(plan.task, image=image))


def without_lora(plan: StudyPlan) -> StudyPlan:
    return replace(plan, model=replace(plan.model, lora=None))


def away(plan: StudyPlan) -> FlatVector:
    """Parameters with which no adapter adds zero."""
    start = initial_parameters(plan)
    moved = start + np.random.default_rng(1).normal(0, 0.05, len(start))
    return moved.astype(np.float32)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("mlp", {"features": 6, "model": {"hidden": [5, 4]}}),
    "linear over tokens": ("vit", {"image": 8, "model": {"width": 8, "hidden": [8]}}),
    "conv2d": ("cnn", {"image": 9, "model": {"width": 4}}),
    "conv3d": ("cnn3d", {"image": 8, "depth": 8, "model": {"width": 4}}),
    "residual": ("resnet18", {"image": 8, "model": {"width": 4}}),
}


@settings(max_examples=8, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    rank=st.integers(1, 4),
    records=st.integers(1, 3),
    kind=st.sampled_from(["binary", "multiclass"]),
    clip=st.sampled_from([0.01, 0.3, 30.0]),
)
def test_engines_clip_adapted_layers_alike(
    model: str, rank: int, records: int, kind: str, clip: float
) -> None:
    name, sections = MODELS[model]
    sections = {**sections, "model": {**sections["model"], "lora": {"rank": rank}}}
    plan = make_plan(name, **sections, task={"kind": kind} | KINDS[kind])
    data, start, sums = make_data(plan, patients=5, records_each=records), away(plan), []
    for engine in ("book-keeping", "hooks"):
        trainer = LocalTrainer(plan, "site-0", data, 0.0, "cpu", engine=engine, measuring=True)  # type: ignore[arg-type]
        random = ChaChaRandom(simulation_key(1, "site-0"))
        sums.append(trainer.gradient(start, np.arange(5), random, clip_norm=clip) * 10)
    size = float(np.linalg.norm(sums[1]))
    assert np.linalg.norm(sums[0] - sums[1]) <= 1e-5 * size
    if kind == "binary":  # the definition, one patient at a time
        rows = gradients(plan, start, data)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        wanted = (rows * np.minimum(1, clip / (norms + 1e-6))).sum(0)
        assert np.linalg.norm(sums[0] - wanted) <= 1e-5 * size


@pytest.mark.parametrize("trainable", ["last-stage", "all"])
def test_it_starts_at_the_files_network_and_sends_adapters_and_head_alone(
    trainable: str, weights: str
) -> None:
    plan = pretrained_plan(weights, trainable)
    assert from_bytes(plan.canonical_bytes) == plan
    data, module, whole = make_data(plan, patients=6), build_model(plan), without_lora(plan)
    base = build_model(whole)
    start = initial_parameters(whole)
    load_parameters(base, start)
    for key in ("weight", "bias"):  # the head is drawn from the same seed, after other layers
        getattr(base.head, key).data = getattr(module.head, key).data
    inputs = torch.from_numpy(data.inputs)
    with torch.no_grad():
        assert torch.equal(module(inputs), base(inputs))
    spec, learnt = plan_spec(plan), (".down.weight", ".up.weight")
    layers = 5 if trainable == "last-stage" else 20  # 4 or 16 in blocks, 1 or 3 shortcuts, the stem
    assert len(list(adapted(module))) == layers
    assert all(name.endswith(learnt) or name.startswith("head.") for name in spec.names)
    assert spec.length < len(start) / 3
    trainer = LocalTrainer(plan, "site-0", data, 1.0, "cpu")
    assert trainer.engine_name == "book-keeping"
    before = {n: p.clone() for n, p in trainer.module.named_parameters() if not p.requires_grad}
    random = ChaChaRandom(simulation_key(1, "site-0"))
    update = trainer.train_round(initial_parameters(plan), random, 1).update
    assert update.shape == (spec.length,)
    assert np.mean(update != 0) > 0.99  # noise
    for name, value in before.items():
        assert torch.equal(value, dict(trainer.module.named_parameters())[name])


def test_who_only_adds_up_needs_no_file(weights: str, tmp_path: Path) -> None:
    absent = pretrained_plan("0" * 64)
    for name, content in model_files(absent, initial_parameters(absent), {}).items():
        (tmp_path / name).write_bytes(content)
    released = read_model(tmp_path)
    assert len(released.parameters) == plan_spec(absent).length
    with pytest.raises(ConfigError, match="are not here"):
        released.module()
    with pytest.raises(ConfigError, match="are not here"):
        build_model(absent)


def test_a_released_model_holds_adapters_and_answers_with_them_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretrained_plan(narrow_weights(tmp_path, monkeypatch, blocks=1))
    data, parameters, module = make_data(plan, patients=6), away(plan), build_model(plan)
    for name, content in model_files(plan, parameters, {}).items():
        (tmp_path / name).write_bytes(content)
    released = read_model(tmp_path)
    np.testing.assert_array_equal(released.parameters, parameters)
    plain = released.module()
    # What can be done with the network itself, such as an ONNX file, can be done with this one.
    assert str(plain) == str(build_model(without_lora(plan)))
    assert all(p.requires_grad for p in plain.parameters())
    load_parameters(module, parameters)
    inputs = torch.from_numpy(data.inputs)
    with torch.no_grad():
        wanted, found = module(inputs), plain(inputs)
        start = build_model(plan)
        assert (wanted - start(inputs)).abs().max() > 0.01
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=2e-5)
    np.testing.assert_array_equal(outputs_of(released, data.inputs), found.numpy())
    if importlib.util.find_spec("captum"):
        assert explain(released, data.inputs[0]).maps is not None


def test_adapters_keep_the_clip_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pretrained_plan(narrow_weights(tmp_path, monkeypatch, blocks=1), "last-stage")
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4


class Running(nn.Module):
    """A frozen layer that remembers whom it saw, where no list of buffers shows it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = layer, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.training:
            self.seen = 0.9 * self.seen + y.detach().mean()
        return y - self.seen


class Drifting(Running):
    """The same in a frozen parameter."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.training:
            with torch.no_grad():
                self.inner.bias += 1e-3 * y.mean()
        return y


class Centred(Running):
    """A frozen layer that mixes the records of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y - y.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("around", "error", "message"),
    [
        (lambda layer: nn.Sequential(layer, nn.BatchNorm1d(5)), ConfigError, "BatchNorm1d.*frozen"),
        (Running, SensitivityError, "a patient's part|moves the sum"),
        (Drifting, SensitivityError, "frozen .*bias changes"),
        (Centred, SensitivityError, "a patient's part|moves the sum"),
    ],
)
def test_a_frozen_part_that_patients_shape_is_refused(
    around: Callable[[nn.Module], nn.Module], error: type[Exception], message: str
) -> None:
    plan = lora_plan("mlp", 2, features=6, model={"hidden": [5, 4]})

    def build(plan: StudyPlan) -> nn.Module:
        module = build_model(plan)
        _, first = next(adapted(module))
        first.layer = around(first.layer).requires_grad_(False)  # type: ignore[assignment]
        return module

    with pytest.raises(error, match=message):
        check_sensitivity(plan, "cpu", build=build)


def test_frozen_weights_are_accepted_where_declared_and_nowhere_else() -> None:
    part = Adapted(nn.Linear(4, 3), 2)
    check_model(nn.Sequential(part))
    assert set(trained(part)) == {"down.weight", "up.weight"}
    assert read_parameters(part).shape == (2 * 4 + 3 * 2,)
    part.down.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"0\.down\.weight is frozen"):
        check_model(nn.Sequential(part))


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("cnn", {"image": 9, "model": {"width": 4, "lora": {"rank": 0}}}, "rank is 0; 1 up to"),
        (
            "cnn",
            {"image": 9, "model": {"width": 4, "lora": {"rank": 5}}},
            "rank is 5, and layer conv1 of 'cnn' has at most 4; valid: 1 to 4",
        ),
        ("logistic", {"model": {"lora": {"rank": 1}}}, "no layer under its head.*leave model.lora"),
        ("mlp", {"model": {"init": "torch", "lora": {"rank": 1}}}, "lora needs init 'uniform'"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(
    name: str, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_spec(make_plan(name, **sections))


def test_a_plan_without_adapters_keeps_its_hash() -> None:
    assert b"lora" not in canonical_json(make_plan("cnn", image=9))
    assert b'"lora":{"rank":2}' in canonical_json(lora_plan("cnn", 2, image=9))
