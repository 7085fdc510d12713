"""Which engine sums a site's clipped per-patient gradients, behind one interface.

`book-keeping` (client/bookkeeping.py) is the default wherever it has an exact rule for every
layer; `hooks` is Opacus' own way (client/clipping.py), slower and larger, and takes over where it
has not. The two give the same sums up to float32 rounding.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from client.bookkeeping import BookKeeping, UnsupportedLayerError
from client.clipping import HookedGradients, PatientClipper
from shared.errors import ConfigError

EngineName = Literal["auto", "book-keeping", "hooks"]

_LOG = logging.getLogger("fedward.client")


class Engine(Protocol):
    """From a physical batch to its part of the step's sum, which the clipper holds."""

    name: str

    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's logits, remembering what `add` needs."""

    def add(self, loss: Tensor, owners: Tensor, patients: int) -> Tensor:
        """Add the batch's clipped per-patient gradients to the clipper's sum.

        Args:
            loss: The sum of the records' losses, from the last forward pass.
            owners: Which patient (0 to patients - 1) each record belongs to, sorted.
            patients: How many there are.

        Returns:
            The patients' norms before clipping, shape (patients,).

        Raises:
            SensitivityError: a record's gradient cannot be told from another's.
        """

    def forget(self) -> None:
        """Drop what an interrupted step left."""


class BookKeepingEngine:
    """The book-keeping engine, adding to an Opacus optimiser's sums."""

    name = "book-keeping"

    def __init__(self, module: nn.Module, clipper: PatientClipper, example: Tensor) -> None:
        self._engine, self._clipper = BookKeeping(module, example), clipper

    def __call__(self, inputs: Tensor) -> Tensor:
        """See `Engine`."""
        return self._engine(inputs)

    def add(self, loss: Tensor, owners: Tensor, patients: int) -> Tensor:
        """See `Engine`."""
        clip_norm = float(self._clipper.max_grad_norm)
        return self._engine.add(loss, owners, patients, clip_norm, self._clipper.sums)

    def forget(self) -> None:
        """See `Engine`."""
        self._engine.forget()


def choose_engine(
    name: EngineName, module: nn.Module, clipper: PatientClipper, shape: tuple[int, ...]
) -> Engine:
    """The engine of this name; `auto` is book-keeping where it is exact, and else Opacus' hooks.

    The choice depends on the model alone, never on a clock, so that a study repeats to the bit.

    Args:
        module: The model, on its device.
        clipper: Holds the step's sum.
        shape: Of one record.

    Raises:
        ConfigError: book-keeping was asked for by name and has no rule for a layer.
    """
    device = next(module.parameters()).device
    if name != "hooks":
        waves = torch.sin(torch.arange(2 * max(1, torch.Size(shape).numel()), device=device) * 1.7)
        try:
            return BookKeepingEngine(module, clipper, waves.view(2, *shape))
        except UnsupportedLayerError as reason:
            if name == "book-keeping":
                raise ConfigError(
                    f"the book-keeping engine cannot train this model: {reason}. Use engine auto."
                ) from None
            _say_once(f"per-patient gradients by Opacus' hooks, which are slower: {reason}")
    return HookedGradients(module, clipper, torch.zeros(1, *shape, device=device))


@functools.lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    _LOG.warning(text)
