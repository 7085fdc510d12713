"""What transformers are made of: learned tokens, attention, and blocks of both kinds of network.

Everything is Linear and LayerNorm, with the records as every layer's first dimension, so that the
fast engine knows each record's gradient (client/layers.py). There is no dropout: under DP-SGD the
noise regularises enough, and a record's answer depends on nothing but the record.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import require

MOST_HEADS = 8
LEAST_HEAD = 8  # numbers a head looks at


class LearnedTokens(nn.Module):
    """Vectors that are the same for every record: (records,) -> (records, tokens, width).

    A bare parameter belongs to no layer and would have no per-record gradient; a linear map of a
    constant does. They start uniform within +-1/sqrt(width).
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Linear(1, tokens * width, bias=False)
        self._shape = (-1, tokens, width)
        self._start = width**-0.5

    def forward(self, inputs: Tensor) -> Tensor:
        """The tokens for each record of `inputs`, which is looked at for its length alone."""
        constant = inputs.new_full((inputs.shape[0], 1), self._start)
        vectors: Tensor = self.vectors(constant)
        return vectors.view(self._shape)


class Attention(nn.Module):
    """Multi-head self-attention: (records, tokens, width) -> the same.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (records, tokens, width)."""
        records, count, width = tokens.shape
        split = self.inward(tokens).view(records, count, 3, self._heads, width // self._heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        outward: Tensor = self.outward(seen.transpose(1, 2).reshape(records, count, width))
        return outward


class Block(nn.Module):
    """A pre-norm block: attention, then a feed-forward network, each beside a shortcut.

    `gated` is ReGLU of Shazeer, "GLU Variants Improve Transformer", 2020, as FT-Transformer has
    it; otherwise GELU, as vision transformers have it.
    """

    def __init__(self, width: int, heads: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        self._gated = gated
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * inner if gated else inner)
        self.narrow = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (records, tokens, width)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        inner = self.wide(self.norm2(tokens))
        if self._gated:
            values, gates = inner.chunk(2, dim=-1)
            inner = values * functional.relu(gates)
        else:
            inner = functional.gelu(inner)
        narrow: Tensor = self.narrow(inner)
        return tokens + narrow


class Encoder(nn.Module):
    """Blocks over tokens and a CLS token, which is read at the end by a linear head.

    Maps (records, tokens, width) to (records, outputs).

    Args:
        width: Numbers in a token.
        inner: Of each block, the width of its feed-forward network.
        outputs: Numbers that the head gives.
        gated: See `Block`.
    """

    def __init__(self, width: int, inner: tuple[int, ...], outputs: int, *, gated: bool) -> None:
        super().__init__()
        heads = heads_of(width)
        self.cls = LearnedTokens(1, width)
        self.blocks = nn.Sequential(*(Block(width, heads, size, gated=gated) for size in inner))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (records, outputs)."""
        tokens = self.blocks(torch.cat([self.cls(tokens), tokens], dim=1))
        answers: Tensor = self.head(self.norm(tokens[:, 0]))
        return answers


def heads_of(width: int) -> int:
    """As many heads as divide the width, at most 8, each of 8 numbers or more.

    Raises:
        ConfigError: the width is below 8, or odd.
    """
    require(
        width >= LEAST_HEAD and width % 2 == 0,
        f"width is {width}; a transformer needs an even one of {LEAST_HEAD} or more",
    )
    most = min(MOST_HEADS, width // LEAST_HEAD)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)
