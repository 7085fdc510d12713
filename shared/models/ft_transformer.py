"""FT-Transformer: a table's features as tokens that look at each other.

Source: Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021, section
3.3, but for dropout, which is left out, and the first norm, which is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.config import require
from shared.features import feature_columns
from shared.models.attention import Encoder
from shared.models.table import single
from shared.plan import StudyPlan
from shared.tasks import task_kind

BLOCKS = 2


class FtTransformer(nn.Module):
    """One token a feature, and a CLS token: (records, columns) -> (records,) or (.., outputs).

    A number's token is its value times a vector plus another; a category's is its own vector plus
    one of the feature. A missing value has value 0, or no category, and with `missing =
    "indicator"` in the plan adds a learned vector of its own.

    Args:
        columns: Where each feature lies in the encoded record.
        width: Numbers in a token.
        inner: Of each block, the width of its feed-forward network.
        outputs: Numbers that the task wants.
    """

    def __init__(
        self, columns: tuple[slice, ...], width: int, inner: tuple[int, ...], outputs: int
    ) -> None:
        super().__init__()
        self._columns = columns
        self.tokens = nn.ModuleList(nn.Linear(c.stop - c.start, width) for c in columns)
        self.encoder = Encoder(width, inner, outputs, gated=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        parts = zip(self.tokens, self._columns, strict=True)
        tokens = torch.stack([token(inputs[:, columns]) for token, columns in parts], dim=1)
        return single(self.encoder(tokens))


def ft_transformer(plan: StudyPlan) -> nn.Module:
    """FT-Transformer; `width` is a token's, `hidden` each block's feed-forward width.

    Without `hidden` there are two blocks, of 4/3 of the width as in the paper.
    """
    require(
        bool(plan.task.features),
        f"model {plan.model.name!r} reads a table's features, and the task has an image; use vit",
    )
    width = plan.model.width
    inner = plan.model.hidden or (max(1, round(4 * width / 3)),) * BLOCKS
    outputs = task_kind(plan.task).outputs(plan.task)
    return FtTransformer(feature_columns(plan.task), width, inner, outputs)
