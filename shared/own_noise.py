"""Noise multipliers of a site's own noise, if every other site sides with the server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from shared.counts import count_noise
from shared.distributed import noise_share
from shared.personal import sent_length
from shared.plan import StudyPlan
from shared.privacy import Use, costs_of


@lru_cache(maxsize=64)
def alone_multipliers(plan: StudyPlan) -> Mapping[Use, float]:
    """The own multiplier for each use that costs something.

    The same as the promise's in mode `local`, where each site adds all the noise itself; less in
    mode `distributed`, where it adds a share.
    """
    own: dict[Use, float] = {}
    for use, event in costs_of(plan).items():
        if plan.privacy.mode == "local":
            own[use] = event.noise_multiplier
        elif use == "training":
            own[use] = noise_share(plan, sent_length(plan)).alone
        else:
            own[use] = count_noise(plan).alone
    return own
