"""Plan's features to model inputs, by public knowledge alone.

Numbers are scaled by the plan's plausible range to [-1, 1] and clamped there; categories become
indicator columns; pixels are scaled by the plan's white. None of it looks at another record, so
none of it costs privacy. The per-site z-score does look, and is valid with privacy mode `none`
alone (a plan refuses it elsewhere).

Columns of the encoded matrix: feature by feature in the plan's order, each feature's value
columns first, then its missing-indicator where the plan has `missing = "indicator"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.scattering import scattering, scattering_width
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

Columns = Mapping[str, NDArray[np.float64] | NDArray[np.int64]]
"""One array per feature: float64 with NaN where missing for a number; int64 index into the
plan's categories, -1 where missing, for a category."""

MISSING_CATEGORY = -1

PRETRAINED_WIDTHS = {"resnet18": 512, "resnet50": 2048}
"""Features of an image by a pretrained network, see shared/pretrained.py."""


@dataclass(frozen=True)
class ZScore:
    """Mean and standard deviation of each encoded column, both float64, shape (width,)."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def apply(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(inputs - mean) / std, float32; a column that was constant when fitted becomes 0."""
        spread = np.where(self.std > 0, self.std, 1.0)
        scaled = np.where(self.std > 0, (inputs - self.mean) / spread, 0.0)
        return scaled.astype(np.float32)


def feature_width(task: TaskPlan) -> int:
    """How many input columns the task's features become.

    Raises:
        ConfigError: the task's input is an image's pixels.
    """
    if task.image is not None and task.image.features == "scattering":
        return scattering_width(task.image.channels, task.image.cells)
    if task.image is not None and task.image.tabular:
        return PRETRAINED_WIDTHS[task.image.features]
    return len(column_names(task))


def column_names(task: TaskPlan) -> tuple[str, ...]:
    """A name for each encoded column: "age", "cp=4", "age is missing".

    Raises:
        ConfigError: the task's input is an image.
    """
    if not task.features:
        raise ConfigError("the plan's input is an image; only a table's features have columns")
    return tuple(name for f in task.features for name in _names_of(f, task.encoding))


def feature_columns(task: TaskPlan) -> tuple[slice, ...]:
    """Where each of the task's features lies among the columns of the encoded matrix."""
    ends = list(accumulate(len(tuple(_names_of(f, task.encoding))) for f in task.features))
    return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


def public_baseline(task: TaskPlan) -> NDArray[np.float32]:
    """A record that says nothing: each number amid its plausible range, categories all alike.

    It is made of the plan alone, so comparing with it costs no privacy.

    Returns:
        float32, shape (feature_width(task),).
    """
    columns = [value for f in task.features for value in _baseline_of(f, task.encoding)]
    return np.array(columns, dtype=np.float32)


def encode(task: TaskPlan, columns: Columns, where: str = "the data") -> NDArray[np.float32]:
    """Turn checked columns into the model's input matrix.

    With scaling "site-zscore" numbers keep their own unit and are not clamped: the caller fits
    `fit_zscore` on the site's training rows.

    Args:
        task: The plan's task with features.
        columns: One array per feature, all of one length; see `Columns`.
        where: How to name the data in messages, such as a file name.

    Returns:
        float32, shape (records, feature_width(task)); under "public-range" within [-1, 1].

    Raises:
        ConfigError: a column is absent, or holds a missing value that the plan refuses; the
            message names the column and the first such row, never a value.
    """
    width = feature_width(task)
    absent = [f.name for f in task.features if f.name not in columns]
    if absent:
        raise ConfigError(f"{where}: columns {', '.join(map(repr, absent))} are absent. Add them.")
    raw = task.scaling == "site-zscore"
    blocks = [
        block
        for f in task.features
        for block in _encode_feature(f, columns[f.name], task.encoding, raw, where)
    ]
    return np.stack(blocks, axis=1).astype(np.float32).reshape(-1, width)


def clamped_counts(task: TaskPlan, columns: Columns) -> dict[str, int]:
    """How many values of each number lie outside its plausible range; private, stays local.

    Features without such values are left out.
    """
    counts = {
        f.name: int(np.count_nonzero((columns[f.name] < low) | (columns[f.name] > high)))
        for f in task.features
        if f.type == "number"
        for low, high in [_range(f)]
    }
    return {name: count for name, count in counts.items() if count}


def fit_zscore(inputs: NDArray[np.float32]) -> ZScore:
    """Column means and sample standard deviations (divisor n - 1) of a site's training rows.

    Depends on patients' data: for studies without privacy only.
    """
    exact = inputs.astype(np.float64)
    ddof = 1 if len(exact) > 1 else 0
    return ZScore(exact.mean(axis=0), exact.std(axis=0, ddof=ddof))


def image_inputs(image: ImagePlan, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
    """The model's inputs of images: scaled pixels, or the fixed features made of them.

    Args and errors as for `scale_pixels`.

    Returns:
        float32, shape (records, channels, height, width) or (records, feature_width(task)).
    """
    return features_of_scaled(image, scale_pixels(image, pixels))


def features_of_scaled(image: ImagePlan, scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """The second half of `image_inputs`, for readers that scale images themselves."""
    if image.pixels:
        return scaled
    if image.features == "scattering":
        return scattering(scaled, image.cells)
    from shared.pretrained import pretrained  # noqa: PLC0415  # torch takes seconds to import

    maps = image.trainable == "last-stage"
    return pretrained(scaled, image.features, image.weights_sha256, maps=maps)


def scale_pixels(image: ImagePlan, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
    """Scale pixels from [black, white] to [-1, 1], clamped.

    Args:
        image: The plan's image or volume.
        pixels: Any number type, shape (records, *image.grid) where channels is 1, else
            (records, *image.grid, channels).

    Returns:
        float32, shape (records, channels, *image.grid).

    Raises:
        ConfigError: the pixels have another shape.
    """
    if image.channels == 1 and pixels.shape[1:] == image.grid:
        pixels = pixels[..., None]
    if pixels.shape[1:] != (*image.grid, image.channels):
        size = " x ".join(map(str, image.grid))
        raise ConfigError(
            f"images have shape {pixels.shape[1:]}; the plan needs {size} with {image.channels} "
            "channel(s). Resize the images, or change the plan"
        )
    factor = np.float32(2.0 / (image.white - image.black))
    scaled = (pixels.astype(np.float32) - np.float32(image.black)) * factor - np.float32(1.0)
    return np.ascontiguousarray(np.moveaxis(np.clip(scaled, -1.0, 1.0), -1, 1))


def _names_of(feature: FeaturePlan, encoding: str) -> Iterator[str]:
    if feature.type == "number":
        yield feature.name
    else:
        first = 1 if encoding == "drop-first" else 0
        yield from (f"{feature.name}={c}" for c in feature.categories[first:])
    if feature.missing == "indicator":
        yield f"{feature.name} is missing"


def _baseline_of(feature: FeaturePlan, encoding: str) -> Iterator[float]:
    if feature.type == "number":
        yield 0.0
    else:
        count = len(feature.categories)
        yield from [1.0 / count] * (count - (encoding == "drop-first"))
    if feature.missing == "indicator":
        yield 0.0


def _encode_feature(
    feature: FeaturePlan,
    values: NDArray[np.float64] | NDArray[np.int64],
    encoding: str,
    raw: bool,
    where: str,
) -> Iterator[NDArray[np.float64]]:
    number = feature.type == "number"
    missing = np.isnan(values) if number else values == MISSING_CATEGORY
    if feature.missing == "refuse" and missing.any():
        raise missing_refused(feature, int(missing.sum()), int(np.argmax(missing)) + 1, where)
    if number:
        yield _scale_number(feature, values.astype(np.float64), missing, raw)
    else:
        first = 1 if encoding == "drop-first" else 0
        absent = 1.0 / len(feature.categories) if feature.missing == "midpoint" else 0.0
        for code in range(first, len(feature.categories)):
            yield np.where(missing, absent, (values == code).astype(np.float64))
    if feature.missing == "indicator":
        yield missing.astype(np.float64)


def missing_refused(feature: FeaturePlan, count: int, first: int, where: str) -> ConfigError:
    """What is raised where the plan refuses missing values; the first is in data row `first`."""
    return ConfigError(
        f"{where}: column {feature.name!r} has {count} missing value(s), the first in data row "
        f"{first}, and the plan refuses them. Complete or leave out those rows, or agree on "
        'missing = "midpoint" or "indicator" in the plan.'
    )


def _scale_number(
    feature: FeaturePlan, values: NDArray[np.float64], missing: NDArray[np.bool_], raw: bool
) -> NDArray[np.float64]:
    low, high = _range(feature)
    middle = (low + high) / 2
    filled = np.where(missing, middle, values)
    if raw:
        return filled
    return np.clip((filled - middle) / ((high - low) / 2), -1.0, 1.0)


def _range(feature: FeaturePlan) -> tuple[float, float]:
    if feature.minimum is None or feature.maximum is None:
        raise ConfigError(f"feature {feature.name!r} has no plausible range")
    return feature.minimum, feature.maximum
