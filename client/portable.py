"""A released model as one module from raw records to answers, in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.answers import answers_of
from shared.features import MISSING_CATEGORY
from shared.released import ReleasedModel
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan


class Portable(nn.Module):
    """Raw records to answers; see `client.export.describe` for what goes in and comes out."""

    def __init__(self, model: ReleasedModel) -> None:
        super().__init__()
        self.task = model.plan.task
        self.module = _averaged_by_matrices(model.module())
        image = self.task.image
        self.prepare = Encoding(self.task) if image is None else Scaling(image)

    def forward(self, raw: Tensor) -> Tensor:
        """Answers, shape (n, columns); NaN for a record that the plan does not admit."""
        inputs, usable = self.prepare(raw)
        answers = answers_of(self.task, self.module(inputs))
        return torch.where(usable[:, None], answers, torch.full_like(answers, torch.nan))


class Scaling(nn.Module):
    """`features.scale_pixels` on raw pixels (n, *grid, channels), and which records are usable."""

    def __init__(self, image: ImagePlan) -> None:
        super().__init__()
        self._black, self._factor = image.black, 2.0 / (image.white - image.black)

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, channels, *grid), and (n,)."""
        unit = (raw - self._black) * self._factor - 1.0
        usable = torch.isfinite(raw).flatten(1).all(dim=1)
        return torch.clamp(torch.movedim(unit, -1, 1), -1.0, 1.0), usable


class Encoding(nn.Module):
    """`features.encode` on raw features (n, features), and which records it would not refuse.

    Every encoded column looks at one feature: as a number, as one of its categories, or at whether
    it is missing.
    """

    middle: Tensor
    reach: Tensor
    code: Tensor
    absent: Tensor
    number: Tensor
    flag: Tensor
    source: Tensor
    counts: Tensor
    refuses: Tensor

    def __init__(self, task: TaskPlan) -> None:
        super().__init__()
        columns = [c for i, f in enumerate(task.features) for c in _columns(i, f, task.encoding)]
        tables: dict[str, list[Any]] = {
            name: [getattr(column, name) for column in columns]
            for name in ("middle", "reach", "code", "absent", "number", "flag", "source")
        }
        tables["counts"] = [float(len(feature.categories)) for feature in task.features]
        tables["refuses"] = [feature.missing == "refuse" for feature in task.features]
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, width), and (n,)."""
        category = self.counts > 0
        missing = torch.isnan(raw) | (category & (raw == MISSING_CATEGORY))
        among = (raw >= 0) & (raw < self.counts) & (raw == torch.floor(raw))
        known = (category & among) | (~category & torch.isfinite(raw))
        usable = ((known & ~missing) | (missing & ~self.refuses)).all(dim=1)
        value, gone = raw[:, self.source], missing[:, self.source]
        filled = torch.where(gone, self.middle, value)
        scaled = torch.clamp((filled - self.middle) / self.reach, -1.0, 1.0)
        chosen = torch.where(gone, self.absent, (value == self.code).to(raw.dtype))
        other = torch.where(self.flag, gone.to(raw.dtype), chosen)
        return torch.where(self.number, scaled, other), usable


@dataclass(frozen=True)
class _Column:
    """One encoded column.

    Attributes:
        source: The feature's place among the plan's.
        number: Whether it is the scaled number.
        flag: Whether it says that the feature is missing.
        middle: Of a number's range.
        reach: From there to its ends.
        code: Of a category that is compared with.
        absent: What the column holds where a category is missing.
    """

    source: int
    number: bool = False
    flag: bool = False
    middle: float = 0.0
    reach: float = 1.0
    code: float = -2.0
    absent: float = 0.0


def _columns(source: int, feature: FeaturePlan, encoding: str) -> Iterator[_Column]:
    """The columns of one feature, in the order of `features.column_names`."""
    if feature.type == "number":
        low, high = feature.minimum or 0.0, feature.maximum or 0.0
        yield _Column(source, number=True, middle=(low + high) / 2, reach=(high - low) / 2)
    else:
        absent = 1.0 / len(feature.categories) if feature.missing == "midpoint" else 0.0
        first = 1 if encoding == "drop-first" else 0
        for code in range(first, len(feature.categories)):
            yield _Column(source, code=float(code), absent=absent)
    if feature.missing == "indicator":
        yield _Column(source, flag=True)


class CellMeans(nn.Module):
    """`nn.AdaptiveAvgPool2d` or `3d` as one matrix an axis, since ONNX has no adaptive pooling.

    Cell i of m over n values is the mean of those from floor(i n / m) to ceil((i + 1) n / m).

    Source: PyTorch, ATen/native/AdaptivePooling.h.
    """

    def __init__(self, cells: Any) -> None:  # what the layer was given: a number each axis
        super().__init__()
        self._cells = tuple(int(count) for count in cells)

    def forward(self, images: Tensor) -> Tensor:
        """(records, channels, *grid) to (records, channels, *cells)."""
        for axis, cells in enumerate(self._cells, start=2):
            means = torch.from_numpy(mean_matrix(images.shape[axis], cells))
            images = torch.movedim(torch.movedim(images, axis, -1) @ means, -1, axis)
        return images


def mean_matrix(values: int, cells: int) -> NDArray[np.float32]:
    """What brings `values` numbers to the means of `cells` cells, shape (values, cells)."""
    matrix = np.zeros((values, cells), dtype=np.float32)
    for cell in range(cells):
        start, end = cell * values // cells, -((cell + 1) * values // -cells)
        matrix[start:end, cell] = 1 / (end - start)
    return matrix


def _averaged_by_matrices(module: nn.Module) -> nn.Module:
    """The module with `CellMeans` for its adaptive pooling, in place."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
            setattr(module, name, CellMeans(part.output_size))
        else:
            _averaged_by_matrices(part)
    return module
