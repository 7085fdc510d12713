"""Models by name, and their parameters as one flat vector that all sites agree on.

One file per family. To add a model, write a builder `plan -> module` whose module maps a batch of
inputs to what the task wants of each record (shared/tasks.py), record by record, and enter it in
`BUILDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as BatchStatisticsNorm

from shared.errors import ConfigError
from shared.features import feature_width
from shared.keystream import PublicStream
from shared.models import ft_transformer, image, lora, resnet, table, trees, vit
from shared.parameters import FlatVector, ParameterSpec
from shared.plan import StudyPlan
from shared.pretrained import map_shape

BUILDERS: dict[str, Callable[[StudyPlan], nn.Module]] = {
    "logistic": table.logistic,
    "linear": table.linear,
    "cox": table.cox,
    "mlp": table.mlp,
    "trees": trees.boosted_trees,
    "ft-transformer": ft_transformer.ft_transformer,
    "cnn": image.cnn,
    "cnn3d": image.cnn3d,
    "pooled-linear": image.pooled_linear,
    "resnet18": resnet.resnet,
    "resnet50": resnet.resnet,
    "vit": vit.vit,
    "none": lambda plan: nn.Identity(),
}


def build_model(plan: StudyPlan) -> nn.Module:
    """Build the plan's model, float32 on the CPU, at its public starting point.

    A pretrained file is asked for where its weights are frozen: without them nothing can be
    computed. Otherwise `initial_parameters` has them.

    Returns:
        A module from inputs (records, *input_shape) to outputs (records,), or (records, outputs)
        where the task has more than one.

    Raises:
        ConfigError: unknown model, a model that does not fit the task, or one `parameter_spec`
            refuses; or the weights that are frozen are not here.
    """
    module = model_outline(plan)
    if plan.model.lora is not None:
        start = _frozen_start(plan)
        for name, part in lora.adapted(module):
            for leaf, value in list(part.layer.named_parameters()):
                values = torch.from_numpy(start[f"{name}.{leaf}"].copy()).view(value.shape)
                setattr(part.layer, leaf, nn.Parameter(values, requires_grad=False))
    return module


def model_outline(plan: StudyPlan) -> nn.Module:
    """The plan's model at its start, but with frozen weights that have shapes and no values.

    It needs no pretrained file, and computes nothing where there are such weights: torch refuses.

    Raises:
        ConfigError: as for `build_model`, but for the file.
    """
    builder = BUILDERS.get(plan.model.name)
    if builder is None:
        raise ConfigError(
            f"unknown model {plan.model.name!r}. Valid names: {', '.join(sorted(BUILDERS))}."
        )
    if plan.model.init == "torch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.model.init_seed)
            module = builder(plan)
        check_model(module)
        return module
    with torch.device("meta"):  # neither time nor torch's global random state for values unused
        module = builder(plan)
        if plan.model.lora is not None:
            lora.adapt(module, plan.model.lora.rank, plan.model.name)
    check_model(module)
    for part in module.modules():
        for leaf, value in list(part.named_parameters(recurse=False)):
            if value.requires_grad:
                setattr(part, leaf, nn.Parameter(torch.empty(value.shape)))
    load_parameters(module, starting_point(module, plan.model.init_seed))
    return module


@lru_cache(maxsize=2)  # every site of a simulation asks for the same
def _frozen_start(plan: StudyPlan) -> dict[str, FlatVector]:
    """Where the plan's model starts without adapters, by parameter."""
    whole = replace(plan, model=replace(plan.model, lora=None))
    return plan_spec(whole).unflatten(initial_parameters(whole))


def input_shape(plan: StudyPlan) -> tuple[int, ...]:
    """The shape of one record: (features,), or (channels, [depth,] height, width)."""
    image = plan.task.image
    if image is None or image.tabular:
        return (feature_width(plan.task),)
    if image.pixels:
        return (image.channels, *image.grid)
    return map_shape(image.features, image.height, image.width)


def check_model(module: nn.Module) -> None:
    """Refuse a module whose parts cannot be trained under a per-patient guarantee.

    A part may declare in FROZEN which of its children are frozen; nothing else may be.

    Raises:
        ConfigError: batch statistics, buffers, tied or undeclared frozen parameters, or values
            that are not float32; the message names the part and the way out.
    """
    for name, part in module.named_modules():
        if isinstance(part, BatchStatisticsNorm):
            raise ConfigError(
                f"{name or 'the model'} is a {type(part).__name__}, which mixes the records of a "
                "batch (frozen, too) and keeps statistics of them. Use GroupNorm."
            )
    for name, _ in module.named_buffers():
        raise ConfigError(
            f"the model has a buffer, {name}: state outside the parameters is neither clipped "
            "nor noised. Make it a constant or a parameter; replace a norm by GroupNorm."
        )
    seen, frozen = dict[int, str](), tuple(f"{name}." for name in _declared(module, "FROZEN"))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            raise ConfigError(f"{name} and {seen[id(parameter)]} are tied; give each its own.")
        seen[id(parameter)] = name
        if not parameter.requires_grad and not name.startswith(frozen):
            raise ConfigError(f"{name} is frozen; leave it out of the model or train it.")
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{name} is {parameter.dtype}; every parameter must be float32.")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a study learns, by name, in the order in which they are flattened."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def plan_spec(plan: StudyPlan) -> ParameterSpec:
    """Names and shapes of what the plan's model learns; ConfigError as for `model_outline`."""
    return parameter_spec(model_outline(plan))


def parameter_spec(module: nn.Module) -> ParameterSpec:
    """Names and shapes of what is learnt, in the order in which it is flattened.

    Raises:
        ConfigError: see `check_model`.
    """
    check_model(module)
    named = trained(module)
    return ParameterSpec(tuple(named), tuple(tuple(p.shape) for p in named.values()))


def initial_parameters(plan: StudyPlan) -> FlatVector:
    """The public starting point, float32 (length,); see `ModelPlan`.

    Raises:
        ConfigError: the plan trains the weights of a pretrained file that is not here.
    """
    module, image = model_outline(plan), plan.task.image
    if image is not None and image.trainable != "head" and plan.model.lora is None:
        resnet.load_pretrained(module, image)
    return read_parameters(module)


def starting_point(module: nn.Module, seed: int) -> FlatVector:
    """Starting values of what is learnt: uniform in +-1/sqrt(fan in); norms weigh 1 with bias 0.

    Layers that their part names in STARTS_AT_ZERO do that.

    The values come from a ChaCha20 keystream of the seed by exact float64 operations, so they
    do not depend on torch's generator, its version, or the machine.

    Raises:
        ConfigError: a parameter belongs to a layer with no rule here.
    """
    stream = PublicStream("fedward-initial-parameters/1", seed)
    at_zero = _declared(module, "STARTS_AT_ZERO")
    parts: list[FlatVector] = []
    for name, layer in module.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            size = parameter.numel()
            if not parameter.requires_grad:
                continue
            if name in at_zero:
                parts.append(np.zeros(size, dtype=np.float32))
            elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                parts.append(np.full(size, float(leaf == "weight"), dtype=np.float32))
            elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
                parts.append((stream.centred(size) * bound).astype(np.float32))
            else:
                raise ConfigError(
                    f"{name}.{leaf} is a parameter of a {type(layer).__name__}, which has no "
                    "starting value; build the model from Linear, Conv, GroupNorm, LayerNorm."
                )
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _declared(module: nn.Module, what: str) -> set[str]:
    """Names of the children that parts of the module list under this attribute."""
    return {
        f"{name}.{child}".lstrip(".")
        for name, part in module.named_modules()
        for child in getattr(part, what, ())
    }


def read_parameters(module: nn.Module) -> FlatVector:
    """Copy what a module learns into one flat vector, float32 (length,)."""
    with torch.no_grad():
        parts = [p.detach().reshape(-1) for p in trained(module).values()]
        flat = torch.cat(parts) if parts else torch.zeros(0)
    values: FlatVector = flat.cpu().numpy()
    return values


def load_parameters(module: nn.Module, vector: FlatVector) -> None:
    """Write a flat vector into what a module learns, in place.

    Raises:
        ConfigError: the vector's length is not the model's, or it is not float32.
    """
    parameters = list(trained(module).values())
    length = sum(p.numel() for p in parameters)
    if vector.shape != (length,) or vector.dtype != np.float32:
        raise ConfigError(
            f"a parameter vector is {vector.dtype} of shape {vector.shape}; "
            f"the model needs float32 of shape ({length},)"
        )
    flat = torch.from_numpy(np.array(vector))  # a copy: torch warns of read-only memory
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.copy_(flat[start:end].view_as(parameter))
            start = end
