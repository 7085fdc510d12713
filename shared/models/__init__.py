"""Models by name, and their parameters as one flat vector that all sites agree on.

One file per family. To add a model, write a builder `plan -> module` whose module maps a batch of
inputs to what the task wants of each record (shared/tasks.py), record by record, and enter it in
`BUILDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as BatchStatisticsNorm

from shared.errors import ConfigError
from shared.features import feature_width
from shared.keystream import PublicStream
from shared.models import ft_transformer, image, resnet, table, trees, vit
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

    A pretrained file is not asked for here: `initial_parameters` has its weights.

    Returns:
        A module from inputs (records, *input_shape) to outputs (records,), or (records, outputs)
        where the task has more than one.

    Raises:
        ConfigError: unknown model, a model that does not fit the task, or one `parameter_spec`
            refuses.
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
    check_model(module)
    module = module.to_empty(device="cpu")
    load_parameters(module, starting_point(module, plan.model.init_seed))
    return module


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

    Raises:
        ConfigError: batch statistics, buffers, tied or frozen parameters, or values that are
            not float32; the message names the part and the way out.
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
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            raise ConfigError(f"{name} and {seen[id(parameter)]} are tied; give each its own.")
        seen[id(parameter)] = name
        if not parameter.requires_grad:
            raise ConfigError(f"{name} is frozen; leave it out of the model or train it.")
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{name} is {parameter.dtype}; every parameter must be float32.")


def parameter_spec(module: nn.Module) -> ParameterSpec:
    """Names and shapes of the parameters, in the order in which they are flattened.

    Raises:
        ConfigError: see `check_model`.
    """
    check_model(module)
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    return ParameterSpec(tuple(n for n, _ in named), tuple(s for _, s in named))


def initial_parameters(plan: StudyPlan) -> FlatVector:
    """The public starting point, float32 (length,); see `ModelPlan`.

    Raises:
        ConfigError: the plan goes on from a pretrained file that is not here.
    """
    module, image = build_model(plan), plan.task.image
    if image is not None and image.trainable != "head":
        resnet.load_pretrained(module, image)
    return read_parameters(module)


def starting_point(module: nn.Module, seed: int) -> FlatVector:
    """Starting values for a module: uniform in +-1/sqrt(fan in); norms weigh 1 with bias 0.

    Layers that the module names in STARTS_AT_ZERO do that.

    The values come from a ChaCha20 keystream of the seed by exact float64 operations, so they
    do not depend on torch's generator, its version, or the machine.

    Raises:
        ConfigError: a parameter belongs to a layer with no rule here.
    """
    stream = PublicStream("fedward-initial-parameters/1", seed)
    at_zero: tuple[str, ...] = getattr(module, "STARTS_AT_ZERO", ())
    parts: list[FlatVector] = []
    for name, layer in module.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            size = parameter.numel()
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


def read_parameters(module: nn.Module) -> FlatVector:
    """Copy a module's parameters into one flat vector, float32 (length,)."""
    with torch.no_grad():
        parts = [p.detach().reshape(-1) for p in module.parameters()]
        flat = torch.cat(parts) if parts else torch.zeros(0)
    values: FlatVector = flat.cpu().numpy()
    return values


def load_parameters(module: nn.Module, vector: FlatVector) -> None:
    """Write a flat vector into a module's parameters, in place.

    Raises:
        ConfigError: the vector's length is not the model's, or it is not float32.
    """
    parameters = list(module.parameters())
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
