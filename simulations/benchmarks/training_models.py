"""The models of simulations/benchmarks/training.py that no plan can name yet, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.models.image import SmallCnn
from shared.models.resnet import ResNet
from shared.models.table import Perceptron


@dataclass(frozen=True)
class Case:
    """One model of the table.

    Attributes:
        build: Makes the module, which returns logits (records,).
        shape: Of one record.
        target: Most times ordinary training's seconds.
        layouts: Memory layouts worth trying.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: float
    layouts: tuple[str, ...] = ("contiguous",)


class SeriesGru(nn.Module):
    """A GRU over a record's steps and a head on its last state."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(values, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One logit a record, from (records, steps, values)."""
        logits: Tensor = self.head(self.gru(x)[0][:, -1])
        return logits.squeeze(1)


class Block(nn.Module):
    """A pre-norm Transformer block, its attention written from nn.Linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (records, steps, width)."""
        records, steps, width = x.shape
        parts = self.into(self.norm1(x)).view(records, steps, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(records, steps, width))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class SeriesTransformer(nn.Module):
    """Two Transformer blocks and a head on their mean."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.entry = nn.Linear(values, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One logit a record, from (records, steps, values)."""
        logits: Tensor = self.head(self.norm(self.blocks(self.entry(x)).mean(1)))
        return logits.squeeze(1)


BOTH = ("contiguous", "channels_last")
CASES = {
    "mlp": Case(lambda: Perceptron(13, (64, 64)), (13,), 2.2),
    "cnn28": Case(lambda: SmallCnn(1, 16), (1, 28, 28), 1.6, BOTH),
    "cnn64": Case(lambda: SmallCnn(1, 16), (1, 64, 64), 1.6, BOTH),
    "resnet18": Case(lambda: ResNet("resnet18", 1, 64, small_stem=True), (1, 64, 64), 1.6, BOTH),
    "gru": Case(lambda: SeriesGru(16, 64), (64, 16), 2.2),
    "transformer": Case(lambda: SeriesTransformer(16, 64), (64, 16), 2.2),
}


def records(case: Case, count: int) -> Tensor:
    """Made-up records, the same every time."""
    return torch.randn(count, *case.shape, generator=torch.Generator().manual_seed(count))
