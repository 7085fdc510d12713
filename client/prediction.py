"""What a released model says of records."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from shared.released import ReleasedModel

MOST_RECORDS = 256


def outputs_of(model: ReleasedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs on the CPU, float32, shape (n,) or (n, outputs), for inputs scaled by the plan."""
    module = model.module()
    with torch.inference_mode():
        parts = [module(part) for part in torch.split(torch.from_numpy(inputs), MOST_RECORDS)]
    outputs: NDArray[np.float32] = torch.cat(parts).numpy()
    return outputs
