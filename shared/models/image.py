"""Models for images: a small CNN and ResNet-18, both with GroupNorm.

BatchNorm mixes the records of a batch, which breaks a per-patient guarantee, and its running
means leave the site un-noised. GroupNorm sees one record at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import require
from shared.errors import ConfigError
from shared.models.table import single
from shared.plan import StudyPlan
from shared.task_plan import ImagePlan
from shared.tasks import task_kind

SMALL_IMAGE = 64  # up to this many pixels a side, ResNet keeps its first layer at full resolution


class SmallCnn(nn.Module):
    """Three convolutions, a pooled head: (records, c, *grid) -> (records,) or (records, outputs).

    Two early strides keep it cheap on a CPU. The head sees the mean and the maximum of each
    local feature over the image, so a small finding counts wherever it lies. With width 16 and
    one channel it has about 14,000 parameters: few enough to train well under DP. `volume` puts
    cubes for squares; width 8 and one channel then make about 23,000.
    """

    def __init__(
        self, channels: int, width: int, outputs: int = 1, *, volume: bool = False
    ) -> None:
        super().__init__()
        conv = nn.Conv3d if volume else nn.Conv2d
        self.conv1 = conv(channels, width, 5, stride=2, padding=2)
        self.norm1 = group_norm(width)
        self.conv2 = conv(width, 2 * width, 3, stride=2, padding=1)
        self.norm2 = group_norm(2 * width)
        self.conv3 = conv(2 * width, 2 * width, 3, padding=1)
        self.norm3 = group_norm(2 * width)
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        x = functional.relu(self.norm1(self.conv1(images)))
        x = functional.relu(self.norm2(self.conv2(x)))
        x = functional.relu(self.norm3(self.conv3(x))).flatten(2)
        return single(self.head(torch.cat([x.mean(2), x.amax(2)], dim=1)))


class PooledLinear(nn.Module):
    """Linear on a coarse picture: (records, c, *grid) -> (records,) or (records, outputs).

    The grid is averaged down to at most `side` cells an axis. Few parameters and a convex loss:
    the strongest start under a small privacy budget where what matters lies in known places.
    """

    def __init__(self, image: ImagePlan, side: int, outputs: int = 1) -> None:
        super().__init__()
        cells = tuple(min(side, size) for size in image.grid)
        pool = nn.AdaptiveAvgPool3d if image.depth else nn.AdaptiveAvgPool2d
        self.pool = pool(cells)
        self.linear = nn.Linear(image.channels * math.prod(cells), outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        return single(self.linear(self.pool(images).flatten(1)))


class Block(nn.Module):
    """ResNet's basic block: two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                group_norm(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (records, channels_out, h / stride, w / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with GroupNorm: (records, c, h, w) -> (records,) or (records, outputs).

    `width` is the first stage's channels; 64 is the published network. The small stem, one
    3 x 3 convolution without pooling, suits images up to 64 pixels.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1;
    Wu and He, "Group Normalization", ECCV 2018.
    """

    def __init__(self, channels: int, width: int, outputs: int = 1, *, small_stem: bool) -> None:
        super().__init__()
        if small_stem:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm1 = group_norm(width)
        stages: list[nn.Module] = []
        for i in range(4):
            out, before = width << i, width << max(i - 1, 0)
            stages += [Block(before, out, 1 if i == 0 else 2), Block(out, out, 1)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width << 3, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        x = self.pool(functional.relu(self.norm1(self.conv1(images))))
        return single(self.head(self.stages(x).mean((2, 3))))


def cnn(plan: StudyPlan) -> nn.Module:
    """The small CNN; `width` is its first layer's channels."""
    return SmallCnn(_image(plan).channels, plan.model.width, _outputs(plan))


def cnn3d(plan: StudyPlan) -> nn.Module:
    """The small CNN for volumes; `width` is its first layer's channels."""
    channels = _image(plan, volume=True).channels
    return SmallCnn(channels, plan.model.width, _outputs(plan), volume=True)


def pooled_linear(plan: StudyPlan) -> nn.Module:
    """Logistic regression on the picture averaged down to `width` cells an axis."""
    image = _image(plan, volume=plan.task.image is not None and plan.task.image.depth > 0)
    return PooledLinear(image, plan.model.width, _outputs(plan))


def resnet18(plan: StudyPlan) -> nn.Module:
    """ResNet-18; `width` 64 is the published size. The stem is small up to 64 pixels."""
    image = _image(plan)
    small = max(image.height, image.width) <= SMALL_IMAGE
    return ResNet18(image.channels, plan.model.width, _outputs(plan), small_stem=small)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels, where they divide evenly."""
    most = min(32, max(1, channels // 4))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


def _outputs(plan: StudyPlan) -> int:
    return task_kind(plan.task).outputs(plan.task)


def _image(plan: StudyPlan, *, volume: bool = False) -> ImagePlan:
    name, image = plan.model.name, plan.task.image
    require(not plan.model.hidden, f"model {name!r} has no hidden sizes; use width")
    if image is None:
        raise ConfigError(f"model {name!r} needs an image, and the task has a table; use mlp")
    require(
        image.features == "pixels",
        f"model {name!r} reads pixels; leave image.features out, or use logistic or mlp",
    )
    require(
        bool(image.depth) == volume,
        f"model {name!r} is for {'volumes' if volume else 'flat images'}, and the task's image "
        f"has depth {image.depth}; use {'cnn' if volume else 'cnn3d'}",
    )
    return image
