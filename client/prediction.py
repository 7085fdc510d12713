"""What a released model says of records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.mapped import release
from shared.released import ReleasedModel

MOST_RECORDS = 256


def outputs_of(model: ReleasedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs on the CPU, float32, shape (n,) or (n, outputs), for inputs scaled by the plan."""
    return _outputs(model.module(), inputs)


def outputs_in_pieces(
    model: ReleasedModel, pieces: Iterable[tuple[NDArray[np.float32], Sequence[str]]]
) -> Iterator[tuple[NDArray[np.float32], list[str]]]:
    """The same for records that come in pieces, each with whose they are.

    Records are asked about in the same batches wherever the pieces end, so the outputs are those of
    `outputs_of` to the bit.

    Args:
        model: A released model.
        pieces: Inputs, shape (n, *input_shape), and n names; one is in memory at a time.

    Yields:
        Outputs and names of as many records as are ready, in order.
    """
    module = model.module()
    held: NDArray[np.float32] | None = None
    names: list[str] = []
    for inputs, whose in pieces:
        joined = inputs if held is None else np.concatenate([held, inputs])
        names += whose
        ready = len(joined) // MOST_RECORDS * MOST_RECORDS
        if ready:
            yield _outputs(module, joined[:ready]), names[:ready]
        held, names = joined[ready:].copy(), names[ready:]
    if held is not None and len(held):
        yield _outputs(module, held), names


def _outputs(module: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        parts = []
        for part in torch.split(torch.from_numpy(inputs), MOST_RECORDS):
            parts.append(module(part))
            release(inputs)
    outputs: NDArray[np.float32] = torch.cat(parts).numpy()
    return outputs
