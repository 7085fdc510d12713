"""ResNet-18 and ResNet-50: with GroupNorm from scratch, or going on from a pretrained file.

From scratch every norm is a GroupNorm. A file in torchvision's layout has BatchNorm, whose running
statistics are constants of the file: each is folded into the convolution before it, so that the
study starts at exactly the network of the file, and trains convolutions and nothing else.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 (torchvision
puts a bottleneck's stride into its 3 x 3 convolution); Wu and He, "Group Normalization", ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.config import require
from shared.features import PRETRAINED_WIDTHS
from shared.models.image import group_norm, image_of, outputs_of
from shared.models.table import single
from shared.plan import StudyPlan
from shared.pretrained import BLOCKS, EPS, Weights, expansion, imagenet, stem_width, weights_of
from shared.task_plan import ImagePlan

SMALL_IMAGE = 64  # up to this many pixels a side, the first layer stays at full resolution


class Block(nn.Module):
    """A residual block beside a shortcut: two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1.

    `expansion` 1 is ResNet-18's block and 4 ResNet-50's, whose output is four times as wide as its
    inner layers. `folded` has biases in place of norms.
    """

    def __init__(
        self, width_in: int, width: int, stride: int, *, expansion: int = 1, folded: bool = False
    ) -> None:
        super().__init__()
        out = width * expansion
        sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        if expansion > 1:
            sizes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self._count = len(sizes)
        for i, (before, after, kernel, step) in enumerate(sizes, start=1):
            conv = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=folded)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", nn.Identity() if folded else group_norm(after))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            conv = nn.Conv2d(width_in, out, 1, stride, bias=folded)
            self.shortcut = nn.Sequential(conv, nn.Identity() if folded else group_norm(out))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (records, width * expansion, h / stride, w / stride)."""
        y = x
        for i in range(1, self._count + 1):
            y = functional.relu(y) if i > 1 else y
            y = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet with GroupNorm: (records, c, h, w) -> (records,) or (records, outputs).

    The small stem, one 3 x 3 convolution without pooling, suits images up to 64 pixels.

    Args:
        name: resnet18 or resnet50.
        channels: Of the image.
        width: The first stage's inner channels; 64 is the published network.
        outputs: Numbers that the task wants.
        small_stem: See above.
    """

    def __init__(
        self, name: str, channels: int, width: int, outputs: int = 1, *, small_stem: bool
    ) -> None:
        super().__init__()
        if small_stem:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm1 = group_norm(width)
        stages = [block for stage in range(4) for block in _stage(name, stage, width)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear((width << 3) * expansion(name), outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        x = self.pool(functional.relu(self.norm1(self.conv1(images))))
        return single(self.head(self.stages(x).mean((2, 3))))


class FineTuned(nn.Module):
    """A pretrained ResNet that trains on, from the pixels or from its last stage.

    Maps (records, 1 or 3, h, w), or the third stage's maps, to (records,) or (records, outputs).
    What the head reads has length 1, as the features of a frozen network have.

    Args:
        name: resnet18 or resnet50.
        outputs: Numbers that the task wants.
        whole: Whether all of it is trained; otherwise the last stage alone.
    """

    def __init__(self, name: str, outputs: int, *, whole: bool) -> None:
        super().__init__()
        self._whole = whole
        if whole:
            self.conv1 = nn.Conv2d(3, stem_width(), 7, stride=2, padding=3)
        for stage in range(0 if whole else 3, 4):
            blocks = _stage(name, stage, stem_width(), folded=True)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.head = nn.Linear(PRETRAINED_WIDTHS[name], outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        x = inputs
        if self._whole:
            x = functional.relu(self.conv1(imagenet(x)))
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(1 if self._whole else 4, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return single(self.head(functional.normalize(x.mean((2, 3)), dim=1)))


def resnet(plan: StudyPlan) -> nn.Module:
    """The plan's ResNet; `width` 64 is the published size. The stem is small up to 64 pixels.

    Where the plan's image has `trainable` "last-stage" or "all", it is the pretrained one, and its
    width the file's.
    """
    name, image = plan.model.name, plan.task.image
    if image is not None and image.trainable != "head":
        require(
            image.features == name,
            f"the plan fine-tunes a {image.features}, and its model is {name!r}; name the same",
        )
        require(not plan.model.hidden, f"model {name!r} has no hidden sizes")
        return FineTuned(name, outputs_of(plan), whole=image.trainable == "all")
    image = image_of(plan)
    small = max(image.height, image.width) <= SMALL_IMAGE
    return ResNet(name, image.channels, plan.model.width, outputs_of(plan), small_stem=small)


def load_pretrained(module: nn.Module, image: ImagePlan) -> None:
    """Put a file's weights into a `FineTuned`, in place; its head is not the file's.

    Raises:
        ConfigError: see `shared.pretrained.pretrained`.
    """
    weights = weights_of(image.features, image.weights_sha256)
    with torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                weight, bias = folded(weights, *_names_in_file(name))
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))


def folded(
    weights: Weights, conv: str, norm: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of a convolution with its BatchNorm in it.

    Float64 with +, -, *, / and sqrt alone, which all machines round alike.
    """
    mean, variance, scale, shift = (
        weights[f"{norm}.{leaf}"].numpy().astype(np.float64)
        for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    factor = scale / np.sqrt(variance + EPS)
    weight = weights[f"{conv}.weight"].numpy().astype(np.float64) * factor[:, None, None, None]
    return weight.astype(np.float32), (shift - mean * factor).astype(np.float32)


def _names_in_file(name: str) -> tuple[str, str]:
    """A convolution's name in torchvision's layout, and its norm's."""
    if name.endswith(".shortcut.0"):
        inside = name.replace("shortcut", "downsample")
        return inside, inside[:-1] + "1"
    return name, name.replace("conv", "bn")


def _stage(name: str, stage: int, width: int, *, folded: bool = False) -> Iterator[Block]:
    wider = expansion(name)
    out, before = width << stage, (width << (stage - 1)) * wider if stage else width
    for i in range(BLOCKS[name][stage]):
        stride = 2 if stage and not i else 1
        yield Block(before, out, stride, expansion=wider, folded=folded)
        before = out * wider
