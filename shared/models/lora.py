"""Low-rank adapters (LoRA): a network whose own weights stay, and small changes of them that train.

Beside each frozen layer y = W x stand two small layers of the same kind, and together they compute
W x + up(down(x)). `down` starts at random and `up` at zero, so the network starts as it was. Only
adapters, norms and the head have gradients, are clipped, noised and sent. All of them are ordinary
layers, so both gradient engines treat them as they do any other.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1,
with a scale of 1; for convolutions, `down` has the layer's kernel and `up` is 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import require

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Adaptable = nn.Linear | Convolution

HEAD = "head"
"""A layer of this name reads the network's answer off. It is trained whole."""


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition: inputs and outputs are the layer's.

    Args:
        layer: A linear map or a convolution without groups.
        rank: 1 to `most_rank(layer)`.
    """

    FROZEN = ("layer",)
    STARTS_AT_ZERO = ("up",)

    def __init__(self, layer: Adaptable, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        kind: Any = type(layer)
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = kind(layer.in_features, rank, bias=False)
            self.up: nn.Module = kind(rank, layer.out_features, bias=False)
        else:
            self.down = kind(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding,
                layer.dilation, bias=False, padding_mode=layer.padding_mode,
            )  # fmt: skip
            self.up = kind(rank, layer.out_channels, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs."""
        outputs: Tensor = self.layer(inputs) + self.up(self.down(inputs))
        return outputs

    def merged(self) -> Adaptable:
        """The layer with the addition in its weight, no longer frozen; the adapter is spent."""
        with torch.no_grad():
            up, down = (next(part.parameters()).flatten(1) for part in (self.up, self.down))
            self.layer.weight += (up @ down).view_as(self.layer.weight)
        return self.layer.requires_grad_(True)


def adapt(module: nn.Module, rank: int, model: str) -> None:
    """Freeze a network's layers and put an adapter beside each, in place.

    Its head, norms, and layers that are no more than a vector stay as they are.

    Args:
        module: With layers of its own names; one of them is its head.
        rank: Of every adapter.
        model: The model's name, for messages.

    Raises:
        ConfigError: nothing to adapt, or the rank is above a layer's.
    """
    found = [
        (name, layer) for name, layer in module.named_modules()
        if isinstance(layer, Adaptable) and most_rank(layer) > 1 and _last(name) != HEAD
    ]  # fmt: skip
    headed = any(_last(name) == HEAD for name, _ in module.named_modules())
    require(
        bool(found) and headed,
        f"model {model!r} has no layer under its head to adapt; leave model.lora out, or take a "
        "network: a pretrained resnet18 or resnet50 with image.trainable 'last-stage' or 'all'",
    )
    name, least = min(found, key=lambda pair: most_rank(pair[1]))
    require(
        rank <= most_rank(least),
        f"model.lora: rank is {rank}, and layer {name} of {model!r} has at most "
        f"{most_rank(least)}; valid: 1 to {most_rank(least)}, and a small part of that pays",
    )
    adapters = {layer: Adapted(layer, rank) for _, layer in found}
    _replace(module, adapters.get)  # type: ignore[arg-type]  # whatever else is there has none


def merge(module: nn.Module) -> None:
    """Put every adapter into its layer's weight, in place: the network without adapters."""
    _replace(module, lambda part: part.merged() if isinstance(part, Adapted) else None)


def adapted(module: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The adapted layers by name; a layer's name is the one that it had before."""
    for name, part in module.named_modules():
        if isinstance(part, Adapted):
            yield name, part


def most_rank(layer: Adaptable) -> int:
    """The largest rank that a layer's weight, as a matrix of outputs by inputs, can have."""
    return min(layer.weight.shape[0], math.prod(layer.weight.shape[1:]))


def _replace(module: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> None:
    for name, child in list(module.named_children()):
        new = other(child)
        if new is None:
            _replace(child, other)
        else:
            module.register_module(name, new)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
