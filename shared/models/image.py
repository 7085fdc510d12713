"""Models for images: a small CNN with GroupNorm, and a line through coarse pixels.

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


class SmallCnn(nn.Module):
    """Three convolutions, a pooled head: (records, c, *grid) -> (records,) or (records, outputs).

    Two early strides keep it cheap on a CPU. The head sees the mean and the maximum of each
    local feature over the image, so a small finding counts wherever it lies. With width 16 and
    one channel it has about 14,000 parameters: few enough to train well under DP. `volume` puts
    cubes for squares; width 8 and one channel then make about 23,000.

    With `local_contrast` the first layer sees each pixel less the mean around it. What all images
    share, lungs in a body, otherwise makes up nearly all of every patient's gradient, and a
    clipped gradient has room for little else (simulations/benchmarks/RESULTS.md).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        outputs: int = 1,
        *,
        volume: bool = False,
        local_contrast: int = 0,
    ) -> None:
        super().__init__()
        self.local_contrast = local_contrast
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
        if self.local_contrast:
            images = images - local_means(images, self.local_contrast)
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


def cnn(plan: StudyPlan) -> nn.Module:
    """The small CNN; `width` is its first layer's channels."""
    model, channels = plan.model, image_of(plan).channels
    outputs, square = outputs_of(plan), plan.model.local_contrast
    return SmallCnn(channels, model.width, outputs, local_contrast=square)


def cnn3d(plan: StudyPlan) -> nn.Module:
    """The small CNN for volumes; `width` is its first layer's channels."""
    channels = image_of(plan, volume=True).channels
    return SmallCnn(channels, plan.model.width, outputs_of(plan), volume=True)


def pooled_linear(plan: StudyPlan) -> nn.Module:
    """Logistic regression on the picture averaged down to `width` cells an axis."""
    image = image_of(plan, volume=plan.task.image is not None and plan.task.image.depth > 0)
    return PooledLinear(image, plan.model.width, outputs_of(plan))


def local_means(images: Tensor, square: int) -> Tensor:
    """The mean of the square around each pixel, as much of it as lies in the image.

    Source: subtractive normalisation, Jarrett et al., "What is the best multi-stage architecture
    for object recognition?", ICCV 2009; here with a box, whose two axes are averaged in turn.

    Args:
        images: Shape (records, channels, height, width).
        square: Pixels on its side, odd.
    """
    half = square // 2
    rows = functional.avg_pool2d(images, (square, 1), 1, (half, 0), count_include_pad=False)
    return functional.avg_pool2d(rows, (1, square), 1, (0, half), count_include_pad=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels, where they divide evenly."""
    most = min(32, max(1, channels // 4))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


def outputs_of(plan: StudyPlan) -> int:
    """How many numbers the plan's task wants of each record."""
    return task_kind(plan.task).outputs(plan.task)


def image_of(plan: StudyPlan, *, volume: bool = False, hidden: bool = False) -> ImagePlan:
    """The image that a model of pixels reads.

    Args:
        plan: The study.
        volume: Whether the model is for volumes.
        hidden: Whether it has hidden sizes.

    Raises:
        ConfigError: the task has no such image, or the plan gives hidden sizes to a model without.
    """
    name, image = plan.model.name, plan.task.image
    require(hidden or not plan.model.hidden, f"model {name!r} has no hidden sizes; use width")
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
