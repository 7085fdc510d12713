"""Per-patient gradients that are held, in blocks of many values: their norms and weighted sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORM_PIECE = 1 << 16  # float32 norms of more values at once come out too small
SMALL_VALUES = 1 << 11  # a parameter with more values is a block of its own

Sums = Mapping[nn.Parameter, Tensor]
"""Of every parameter, the step's sum of gradients so far."""


@dataclass(eq=False)
class Block:
    """Per-patient gradients of some parameters side by side.

    Attributes:
        rows: Shape (patients, values).
        parts: Of each parameter how many values it has, and the way back to its shape.
    """

    rows: Tensor
    parts: Sequence[tuple[nn.Parameter, int, Callable[[Tensor], Tensor]]]

    def add_weighted(self, factors: Tensor, sums: Sums) -> None:
        """Add the sum over patients of factor times gradient, for every parameter."""
        found = torch.split(factors @ self.rows, [size for _, size, _ in self.parts])
        for (p, _, back), part in zip(self.parts, found, strict=True):
            sums[p].add_(back(part))


def blocks_of(gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> list[Block]:
    """Gradients (patients, *parameter.shape), the small ones together.

    A small model has many small parameters, and each operation on one costs more than its values.
    """
    blocks, small, parts = [], [], []
    for p, values in gradients:
        rows, back = _flattened(values)
        part = (p, rows.shape[1], back)
        if rows.shape[1] > SMALL_VALUES:
            blocks.append(Block(rows, [part]))
        else:
            small.append(rows)
            parts.append(part)
    return [*blocks, Block(torch.cat(small, 1), parts)] if small else blocks


def squares_of(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Squared norms of the rows of (patients, values), in parts that add up to each row's."""
    pieces = [piece for rows in blocks for piece in torch.split(rows, NORM_PIECE, dim=1)]
    return [torch.linalg.vector_norm(p, dim=1).square_() for p in pieces]


def _flattened(gradients: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(patients, ...) as (patients, d) in the order of memory, and the way back for one row."""
    shape = gradients.shape[1:]
    if gradients.is_contiguous():
        return gradients.flatten(1), lambda row: row.view(shape)
    strides = gradients.stride()
    order = sorted(range(1, gradients.dim()), key=lambda i: -strides[i])
    ordered = gradients.permute(0, *order)
    back = [order.index(i) for i in range(1, gradients.dim())]
    shape = ordered.shape[1:]
    return ordered.flatten(1), lambda row: row.view(shape).permute(back)
