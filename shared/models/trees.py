"""Boosted trees for tables, made for noised sums: their cuts are public, their leaves are learnt.

Which features a tree asks for, and where it cuts them, follow from the plan's ranges and seed
alone: no patient's data shapes a tree, and no split costs a patient anything. What is learnt are
the leaves' values. A round's clipped sum then holds, for every leaf, the sum of what the model
still gets wrong about the patients in it: a histogram over the leaves is all that leaves a site,
and stepping the leaves by it is a round of boosting. A record lies in one leaf of each tree, so
the norm of a patient's part is known: sqrt(trees + 1) times the slope of the loss.

Source: Maddock, Cormode, Wang, Maple, Jha, "Federated Boosted Decision Trees with Differential
Privacy", CCS 2022: totally random splits, all trees of a batch in one release; cuts as in Geurts,
Ernst, Wehenkel, "Extremely randomized trees", Machine Learning 63, 2006, one for each level of a
tree (Kohavi, Li, "Oblivious decision trees, graphs, and top-down pruning", IJCAI 1995).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.config import require
from shared.keystream import PublicStream
from shared.models.table import require_table, single
from shared.plan import StudyPlan
from shared.statistics import FeatureBlock, feature_cells
from shared.tasks import task_kind

TREES, DEPTH = 200, 2
MOST_LEAVES = 1 << 20

Cut = tuple[int, float]
"""(input column, threshold): the question "is the column's value above the threshold?"."""


class BoostedTrees(nn.Module):
    """A base value and one leaf of each tree, added up.

    Maps (records, features) to (records,), or to (records, outputs).

    Args:
        cuts: For each tree its questions, one a level; all trees of one depth.
        outputs: Numbers for each record.
    """

    STARTS_AT_ZERO = ("leaves",)

    def __init__(self, cuts: list[list[Cut]], outputs: int) -> None:
        super().__init__()
        self._trees, self._depth = len(cuts), len(cuts[0])
        flat = [cut for tree in cuts for cut in tree]
        self._columns = torch.tensor([column for column, _ in flat], device="cpu")
        self._thresholds = torch.tensor([at for _, at in flat], device="cpu", dtype=torch.float32)
        self.leaves = nn.Linear(self._trees << self._depth, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        return single(self.leaves(self.leaf_of(inputs)))

    def leaf_of(self, inputs: Tensor) -> Tensor:
        """1 for each leaf that a record is in, else 0: shape (records, trees 2^depth).

        The answer of a tree's level k is bit k of the leaf's number.
        """
        columns, thresholds = (x.to(inputs.device) for x in (self._columns, self._thresholds))
        above = (inputs[:, columns] > thresholds).to(inputs.dtype)
        above = above.view(-1, self._trees, self._depth)
        inside = torch.ones_like(above[..., :1])
        for level in range(self._depth):
            answer = above[..., level : level + 1]
            inside = torch.cat([inside * (1 - answer), inside * answer], dim=-1)
        return inside.flatten(1)


def boosted_trees(plan: StudyPlan) -> nn.Module:
    """The plan's `trees` trees of `depth` levels; by default 200 of 2."""
    require_table(plan)
    require(
        bool(plan.task.features),
        "model 'trees' cuts a table's features at their plausible ranges; an image has none",
    )
    trees, depth = plan.model.trees or TREES, plan.model.depth or DEPTH
    outputs = task_kind(plan.task).outputs(plan.task)
    require(
        trees * outputs << depth <= MOST_LEAVES,
        f"{trees} trees of depth {depth} have {trees * outputs << depth} leaf values; at most "
        f"{MOST_LEAVES}. Take fewer trees, or a smaller depth.",
    )
    return BoostedTrees(public_cuts(plan, trees, depth), outputs)


def public_cuts(plan: StudyPlan, trees: int, depth: int) -> list[list[Cut]]:
    """Draw the trees' questions from the plan's seed.

    Each level asks for a feature of its own, all equally likely, as long as there are enough: of
    a number whether it is above some point of its range, of a category whether it is a certain
    one; where the plan marks missing values, they are one more answer. Half of the points are
    uniform, half the mean of two, since a plausible range is wide and most patients are in its
    middle.
    """
    features = feature_cells(plan).parts[:-1]
    stream = PublicStream("fedward-trees/1", plan.model.init_seed)
    cuts = []
    for _ in range(trees):
        order = stream.sample(len(features), min(depth, len(features)))
        cuts.append([_cut(features[order[level % len(order)]], stream) for level in range(depth)])
    return cuts


def _cut(feature: FeatureBlock, stream: PublicStream) -> Cut:
    choices = feature.width + (feature.missing is not None)
    column = feature.column + stream.below(choices)  # the indicator of missing values comes last
    if feature.is_number and column == feature.column:
        return column, float(stream.centred(1 + stream.below(2)).mean())
    return column, 0.5
