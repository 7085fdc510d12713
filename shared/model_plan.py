"""The plan's model: which one, where it starts, and how much of it the study learns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shared.config import later, require

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class LoraPlan:
    """Low-rank adapters beside frozen layers (shared/models/lora.py).

    An adapter of rank r on a layer of m inputs and n outputs learns r (m + n) numbers in place of
    m n. Norms and the head are learnt whole. The frozen weights are those that the model starts at:
    a pretrained file's, which the plan pins, or the ones that `init_seed` gives. They never leave a
    site and are no part of the released file.
    """

    rank: int

    def __post_init__(self) -> None:
        require(
            self.rank >= 1,
            f"rank is {self.rank}; 1 up to the smallest layer's, or leave lora out to train "
            "the layers themselves",
        )


@dataclass(frozen=True)
class ModelPlan:
    """Which model, and its public starting point, a function of `init_seed`.

    `init` "uniform" is equal to the bit on every machine. "torch" is PyTorch's own, as published
    benchmarks start from; it depends on torch's version, and sites that disagree refuse to run.
    `local_contrast` lets the small CNN of flat images see contrast alone: from every pixel the mean
    of the square of so many pixels around it is taken, an odd number; 0 leaves the image as it is.
    `trees` trees of `depth` levels each; 0 is the model's own default.
    `personal` names layers that each site learns for itself: they never leave it. "norms" are all
    norms of the model (FedBN), a head's name is a local head.
    With `lora` the network stays at its starting point, and low-rank additions to it are learnt.
    """

    name: str
    init_seed: int = 0
    init: Literal["uniform", "torch"] = "uniform"
    hidden: tuple[int, ...] = ()
    width: int = 16
    trees: int = later(0)
    depth: int = later(0)
    personal: tuple[str, ...] = later(())
    local_contrast: int = later(0)
    lora: LoraPlan | None = later(None)  # noqa: RUF009  # None is as good a default as any

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name {self.name!r} is not a model's name")
        require(0 <= self.init_seed < 2**63, "init_seed must be between 0 and 2^63 - 1")
        require(all(1 <= h <= 65536 for h in self.hidden), "hidden sizes must be 1 to 65536")
        require(1 <= self.width <= 4096, f"width is {self.width}; valid: 1 to 4096")
        square = self.local_contrast
        require(
            square == 0 or (3 <= square <= 255 and square % 2 == 1),
            f"local_contrast is {square}; valid: 0, or an odd number from 3 to 255",
        )
        require(
            square == 0 or self.name == "cnn",
            f"local_contrast is for model 'cnn', and this is {self.name!r}; leave it out",
        )
        require(0 <= self.trees <= 10_000, f"trees is {self.trees}; valid: 0 to 10000")
        require(0 <= self.depth <= 16, f"depth is {self.depth}; valid: 0 to 16")
        require(
            all(self.personal) and len(set(self.personal)) == len(self.personal),
            "personal must be names of layers, each once",
        )
        require(
            self.lora is None or self.init == "uniform",
            "lora needs init 'uniform': every site computes the frozen weights for itself",
        )
