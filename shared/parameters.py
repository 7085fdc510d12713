"""Named, shape-checked tensors to and from one flat float32 vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError

FlatVector = NDArray[np.float32]


@dataclass(frozen=True)
class ParameterSpec:
    """Names and shapes of a model's parameters, in the order in which they are flattened."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def length(self) -> int:
        """Coordinates of the flat vector."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, NDArray[np.float32]]) -> FlatVector:
        """Lay the tensors one after another, float32, shape (length,).

        Raises:
            ConfigError: a tensor is missing, unknown, or has another shape.
        """
        self._check(tensors)
        parts = [np.asarray(tensors[n], dtype=np.float32).ravel() for n in self.names]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def unflatten(self, vector: FlatVector) -> dict[str, NDArray[np.float32]]:
        """Cut a flat vector into named views of it.

        Raises:
            ConfigError: the vector has another length.
        """
        if vector.shape != (self.length,):
            raise ConfigError(
                f"a parameter vector has shape {vector.shape}; the model needs ({self.length},)"
            )
        if not self.names:
            return {}
        cuts = np.cumsum(self.sizes)[:-1]
        parts = np.split(vector, cuts)
        return {
            name: part.reshape(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def _check(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))
            raise ConfigError(f"parameters missing or unknown: {', '.join(odd)}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ConfigError(
                    f"parameter {name} has shape {tensors[name].shape}; the model needs {shape}"
                )
