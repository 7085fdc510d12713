"""A pretrained ResNet's weights, and fixed features of an image by it, for a head on top of it.

The weights are a file in torchvision's layout, which the plan pins by sha256 and the site's own
people put in place; nothing is downloaded. The network is frozen, its BatchNorm with it: every
record's features come from that record and public constants alone, so they cost no privacy, and
they are computed once, when the data are prepared. What trains on is in shared/models/resnet.py.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 (torchvision
puts a bottleneck's stride into its 3 x 3 convolution). For the use, Tramèr and Boneh,
"Differentially Private Learning Needs Better Features (or Much More Data)", ICLR 2021.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError
from shared.features import PRETRAINED_WIDTHS

FOLDER = "FEDWARD_WEIGHTS"
"""Environment variable: the folder that holds SHA256.safetensors."""

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
_PIECE = 32
EPS = 1e-5

Weights = Mapping[str, Tensor]


def pretrained(
    pixels: NDArray[np.float32], name: str, sha256: str, *, maps: bool = False
) -> NDArray[np.float32]:
    """Features of images, each record's from that record alone.

    Args:
        pixels: float32 in [-1, 1], shape (records, 1 or 3, height, width); one channel is seen
            as grey.
        name: resnet18 or resnet50.
        sha256: Of the weights' file, 64 hex digits.
        maps: The third stage's maps, for a last stage that is trained, in place of features.

    Returns:
        float32, shape (records, PRETRAINED_WIDTHS[name]), each row of length 1; or maps of shape
        (records, *map_shape(name, height, width)).

    Raises:
        ConfigError: the file is not there, is another one, or does not hold this network.
    """
    weights = weights_of(name, sha256)
    parts = [
        _features(torch.from_numpy(pixels[i : i + _PIECE]), name, weights, maps=maps).numpy()
        for i in range(0, len(pixels), _PIECE)
    ]
    shape = map_shape(name, *pixels.shape[2:]) if maps else (PRETRAINED_WIDTHS[name],)
    return np.concatenate([np.zeros((0, *shape), dtype=np.float32), *parts])


def map_shape(name: str, height: int, width: int) -> tuple[int, int, int]:
    """Channels, height and width of the third stage's maps of an image."""
    return PRETRAINED_WIDTHS[name] // 2, -(-height // 16), -(-width // 16)


def imagenet(images: Tensor) -> Tensor:
    """Images in [-1, 1] of 1 or 3 channels as the network was trained on: three, standardised."""
    shape = (1, 3, 1, 1)
    mean, spread = images.new_tensor(_MEAN).view(shape), images.new_tensor(_SPREAD).view(shape)
    return ((images.expand(-1, 3, -1, -1) + 1) / 2 - mean) / spread


def weight_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the network reads, in torchvision's layout."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (stem_width(), 3, 7, 7)}
    shapes |= _norm("bn1", stem_width())
    bottleneck = expansion(name) == 4
    for block, width_in, width, out, _ in _layout(name):
        if bottleneck:
            sizes = [(width, width_in, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
        else:
            sizes = [(width, width_in, 3, 3), (out, width, 3, 3)]
        for i, size in enumerate(sizes, start=1):
            shapes |= {f"{block}.conv{i}.weight": size} | _norm(f"{block}.bn{i}", size[0])
        if _has_shortcut(block, width_in, out):
            shapes[f"{block}.downsample.0.weight"] = (out, width_in, 1, 1)
            shapes |= _norm(f"{block}.downsample.1", out)
    return shapes


def _features(images: Tensor, name: str, weights: Weights, *, maps: bool) -> Tensor:
    with torch.inference_mode():
        x = imagenet(images)
        x = functional.relu(_conv(x, weights, "conv1", "bn1", stride=2, padding=3))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for block, width_in, _, out, stride in _layout(name):
            if maps and block == "layer4.0":
                return x
            kept = x
            if _has_shortcut(block, width_in, out):
                kept = _conv(
                    x, weights, f"{block}.downsample.0", f"{block}.downsample.1", stride=stride
                )
            x = functional.relu(kept + _block(x, weights, block, name, stride))
        return functional.normalize(x.mean((2, 3)), dim=1)


def _block(x: Tensor, weights: Weights, block: str, name: str, stride: int) -> Tensor:
    """A block's convolutions, without the shortcut and the last ReLU."""
    basic = expansion(name) == 1
    steps = [(stride, 1), (1, 1)] if basic else [(1, 0), (stride, 1), (1, 0)]
    for i, (step, padding) in enumerate(steps, start=1):
        x = functional.relu(x) if i > 1 else x
        x = _conv(x, weights, f"{block}.conv{i}", f"{block}.bn{i}", stride=step, padding=padding)
    return x


def _conv(
    x: Tensor, weights: Weights, conv: str, norm: str, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """A convolution and the frozen BatchNorm behind it."""
    x = functional.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=padding)
    mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
    scale, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
    return functional.batch_norm(x, mean, variance, scale, shift, training=False, eps=EPS)


def _layout(name: str) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, channels in, inner channels, channels out, stride) of every block."""
    width_in = stem_width()
    for stage, blocks in enumerate(BLOCKS[name]):
        width = stem_width() << stage
        for i in range(blocks):
            out = width * expansion(name)
            yield f"layer{stage + 1}.{i}", width_in, width, out, 2 if stage and not i else 1
            width_in = out


def _has_shortcut(block: str, width_in: int, out: int) -> bool:
    return block.endswith(".0") and (width_in != out or not block.startswith("layer1"))


def expansion(name: str) -> int:
    """How much wider a block's output is than its inner layers."""
    return PRETRAINED_WIDTHS[name] // PRETRAINED_WIDTHS["resnet18"]


def stem_width() -> int:
    """Channels of the first convolution, and inner ones of the first stage: 64, as published."""
    return PRETRAINED_WIDTHS["resnet18"] // 8


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (width,) for leaf in leaves}


@lru_cache(maxsize=2)
def weights_of(name: str, sha256: str) -> Weights:
    """The tensors of the plan's file; ConfigError as for `pretrained`."""
    folder = os.environ.get(FOLDER, "")
    path = Path(folder) / f"{sha256}.safetensors"
    try:
        content = path.read_bytes() if folder else b""
    except OSError:
        content = b""
    if not content:
        raise ConfigError(
            f"the plan's pretrained weights are not here: put the {name} file with sha256 {sha256} "
            f"as {path.name} into a folder, and name that folder in {FOLDER}."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ConfigError(f"{path}: its sha256 is {found}, not the plan's. Fetch the right file.")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from None
    return _checked(tensors, name, path)


def _checked(tensors: dict[str, Tensor], name: str, path: Path) -> Weights:
    """The tensors that the network reads; all must be there, and none too many."""
    wanted = weight_shapes(name)
    for tensor, shape in wanted.items():
        found = tuple(tensors[tensor].shape) if tensor in tensors else None
        if found != shape:
            raise ConfigError(
                f"{path}: {tensor} has shape {found}; a {name} in torchvision's layout has {shape}"
            )
    unknown = [
        t for t in tensors
        if t not in wanted and not t.startswith("fc.") and not t.endswith(".num_batches_tracked")
    ]  # fmt: skip
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]} belongs to no {name} in torchvision's layout")
    return {tensor: tensors[tensor].float() for tensor in wanted}
