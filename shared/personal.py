"""Layers that stay at each site: which coordinates of a model leave it.

Source: FedBN, Li et al., ICLR 2021 (norms stay); FedPer, Arivazhagan et al., 2019 (heads stay).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared.config import require
from shared.plan import StudyPlan

NORMS = "norms"
Places = NDArray[np.int64]


@lru_cache(maxsize=64)
def sent_coordinates(plan: StudyPlan) -> Places:
    """Coordinates of the flat parameter vector that leave a site, in order, int64.

    Raises:
        ConfigError: a name in `model.personal` is no layer's, or no coordinate would leave.
    """
    from torch import nn  # noqa: PLC0415  # torch takes seconds

    from shared.models import model_outline, trained  # noqa: PLC0415

    module = model_outline(plan)
    learnt = trained(module)
    norms = {
        f"{name}.{leaf}"
        for name, part in module.named_modules()
        if isinstance(part, nn.GroupNorm | nn.LayerNorm)
        for leaf, _ in part.named_parameters(recurse=False)
    }
    kept, sizes, found = [], [], set[str]()
    for name, parameter in learnt.items():
        of = [p for p in plan.model.personal if _is_of(name, p, norms)]
        found.update(of)
        kept.append(bool(of))
        sizes.append(parameter.numel())
    missing = sorted(set(plan.model.personal) - found)
    layers = sorted({name.rpartition(".")[0] for name in learnt})
    require(
        not missing,
        f"model.personal names {', '.join(missing)}, and model {plan.model.name!r} has no such "
        f"layer. It has {', '.join(layers)}; {NORMS!r} are all its norms.",
    )
    require(not all(kept), "model.personal names every layer, so nothing would be learnt together")
    return np.flatnonzero(~np.repeat(kept, sizes))


def sent_length(plan: StudyPlan) -> int:
    """How many coordinates of the plan's model leave a site; see `sent_coordinates`."""
    return len(sent_coordinates(plan))


def _is_of(name: str, layer: str, norms: set[str]) -> bool:
    return name in norms if layer == NORMS else name == layer or name.startswith(f"{layer}.")
