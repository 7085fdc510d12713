"""A site's part of a distributed step: its clipped sum as integers, with its share of the noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.discrete import discrete_gaussian
from client.noise import ChaChaRandom
from shared.distributed import NoiseShare

_PIECE = 1 << 14  # coordinates at a time stay in a core's cache


def noisy_integers(
    clipped_sum: NDArray[np.float32] | NDArray[np.float64], share: NoiseShare, random: ChaChaRandom
) -> NDArray[np.int64]:
    """Scale, round, clamp, and add the site's share of the noise, in this order.

    Nothing but the reduction into the ring follows the noise, so what is released has it whole.

    Args:
        clipped_sum: float32 or float64, shape (d,): the site's sum of clipped per-patient
            gradients. A coordinate that is not finite counts as zero; a failure must not show.
        share: From `noise_share`.
        random: The site's stream.

    Returns:
        int64, shape (d,), in ring units.
    """
    total = discrete_gaussian(random, share.deviation, len(clipped_sum))
    for start in range(0, len(total), _PIECE):
        piece = clipped_sum[start : start + _PIECE].astype(np.float64)
        np.nan_to_num(piece, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        piece *= share.scale
        np.clip(np.rint(piece, out=piece), -share.clamp, share.clamp, out=piece)
        total[start : start + _PIECE] += piece.astype(np.int64)
    return total
