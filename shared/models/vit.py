"""A small vision transformer: an image's patches as tokens that look at each other.

On scattering features (shared/scattering.py) it is the paper's hybrid: the tokens are the cells
that these fixed features were averaged over, so nothing of the eye has to be learnt.

Source: Dosovitskiy et al., "An Image Is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021, section 3.1; without dropout.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from shared.config import require
from shared.models.attention import Encoder, LearnedTokens
from shared.models.image import image_of, outputs_of
from shared.models.table import single
from shared.plan import StudyPlan
from shared.scattering import scattering_width

BLOCKS = 2
MOST_PATCHES = 64


class VisionTransformer(nn.Module):
    """Patches, where they lie, and a CLS token: (records, c, h, w) -> (records,) or (.., outputs).

    Args:
        patches: Cuts the image into tokens.
        count: How many there are.
        inner: Of each block, the width of its feed-forward network.
        outputs: Numbers that the task wants.
    """

    def __init__(
        self, patches: nn.Conv2d, count: int, inner: tuple[int, ...], outputs: int
    ) -> None:
        super().__init__()
        self.patches = patches
        self.places = LearnedTokens(count, patches.out_channels)
        self.encoder = Encoder(patches.out_channels, inner, outputs, gated=False)

    def forward(self, images: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return single(self.encoder(tokens + self.places(images)))


class HybridTransformer(nn.Module):
    """Cells of fixed features as tokens: (records, maps x cells) -> (records,) or (.., outputs).

    A record has length 1 over all its features; they are brought to a mean square of 1 here.

    Args:
        maps: Features of a cell.
        cells: How many there are.
        width: Numbers in a token.
        inner: Of each block, the width of its feed-forward network.
        outputs: Numbers that the task wants.
    """

    def __init__(
        self, maps: int, cells: int, width: int, inner: tuple[int, ...], outputs: int
    ) -> None:
        super().__init__()
        self._shape, self._scale = (-1, maps, cells), math.sqrt(maps * cells)
        self.tokens = nn.Linear(maps, width)
        self.places = LearnedTokens(cells, width)
        self.encoder = Encoder(width, inner, outputs, gated=False)

    def forward(self, features: Tensor) -> Tensor:
        """What the task wants of each record; see shared/tasks.py."""
        cells = (features * self._scale).view(self._shape).transpose(1, 2)
        return single(self.encoder(self.tokens(cells) + self.places(features)))


def vit(plan: StudyPlan) -> nn.Module:
    """A vision transformer; `width` is a token's, `hidden` each block's feed-forward width.

    Without `hidden` there are two blocks, of twice the width. A patch's side is the smallest that
    divides the image into at most 64 patches; on scattering features each cell is a token.
    """
    fixed, width = plan.task.image, plan.model.width
    if fixed is not None and fixed.features == "scattering":
        cells = fixed.cells**2
        maps = scattering_width(fixed.channels, 1)
        inner = plan.model.hidden or (2 * width,) * BLOCKS
        return HybridTransformer(maps, cells, width, inner, outputs_of(plan))
    image = image_of(plan, hidden=True)
    patch = patch_side(image.height, image.width)
    patches = nn.Conv2d(image.channels, width, patch, stride=patch)
    count = (image.height // patch) * (image.width // patch)
    inner = plan.model.hidden or (2 * width,) * BLOCKS
    return VisionTransformer(patches, count, inner, outputs_of(plan))


def patch_side(height: int, width: int) -> int:
    """The smallest divisor of both sides that leaves at most 64 patches.

    Raises:
        ConfigError: there is none.

    >>> patch_side(28, 28), patch_side(64, 64), patch_side(224, 224)
    (4, 8, 28)
    """
    both = math.gcd(height, width)
    fits = (p for p in range(1, both + 1) if both % p == 0)
    patch = next((p for p in fits if height * width <= MOST_PATCHES * p * p), 0)
    require(
        patch > 0,
        f"an image of {height} x {width} pixels does not divide into at most {MOST_PATCHES} equal "
        "squares; take sides with a common divisor, such as 224 x 224",
    )
    return patch
