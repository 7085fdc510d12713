"""A released model as one ONNX file: the plan's preprocessing in front, its answers behind.

The file needs neither Fedward nor PyTorch. Input and output are described in its metadata, as JSON
under the key "fedward".

Source: ONNX, "Open Neural Network Exchange Intermediate Representation", version 10 and later.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.answers import answer_names, answers_of
from shared.config import require
from shared.errors import ConfigError
from shared.features import MISSING_CATEGORY
from shared.files import read_bytes
from shared.released import ReleasedModel
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

SCHEMA = "fedward-onnx/1"
TOLERANCE = 1e-5
"""Largest difference between the file and PyTorch: absolute, and relative for large values."""

_CHECKED = 16  # invented records that a file is compared on
_OPSET = 18


class Portable(nn.Module):
    """Raw records to answers; see `describe` for what goes in and comes out."""

    def __init__(self, model: ReleasedModel) -> None:
        super().__init__()
        self.task = model.plan.task
        self.module = model.module()
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


def export_onnx(model: ReleasedModel) -> bytes:
    """The model as the bytes of an ONNX file.

    Raises:
        ConfigError: a package is not installed, PyTorch cannot write the model, or the plan's
            preprocessing cannot be part of a file: features made of pictures, or scaling by each
            hospital's own data.
    """
    _require_exportable(model)
    import onnx  # noqa: PLC0415  # optional

    module = Portable(model).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages not needed here
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                module,
                (torch.from_numpy(invented(model.plan.task, 3)),),
                file,
                input_names=["records"],
                output_names=["answers"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ConfigError(
                f"PyTorch cannot write the model {model.plan.model.name!r} as ONNX "
                f"({type(error).__name__}). Use it with fedward-site predict."
            ) from None
        graph = onnx.load_model_from_string(read_bytes(file, "exported model"))
    onnx.helper.set_model_props(graph, {"fedward": json.dumps(describe(model), ensure_ascii=False)})
    graph.doc_string = model.plan.description
    onnx.checker.check_model(graph)
    data: bytes = graph.SerializeToString()
    return data


def _require_exportable(model: ReleasedModel) -> None:
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"an export needs the packages {' and '.join(absent)}, which are not installed. "
            "Install them: pip install 'fedward[onnx]'."
        )
    task = model.plan.task
    require(
        task.image is None or task.image.features == "pixels",
        "this model reads fixed features that were made of the picture outside it, so no file can "
        "hold the whole way. Models that read pixels (cnn, resnet18) can be exported.",
    )
    require(
        task.scaling == "public-range",
        "this model was scaled by each hospital's own data, which must not be in a file. "
        "Models with scaling = 'public-range' can be exported.",
    )


def describe(model: ReleasedModel) -> dict[str, Any]:
    """What goes into the file and what comes out, for whoever uses it."""
    task = model.plan.task
    if task.image is not None:
        grid = " x ".join(map(str, (*task.image.grid, task.image.channels)))
        said: dict[str, Any] = {
            "records": f"float32, n x {grid}: the last axis is the channel, values in the scan's "
            f"own unit; {task.image.black:g} is black and {task.image.white:g} is white",
        }
    else:
        said = {
            "records": "float32, n x features in this order: a number in its unit, a category by "
            "its place in the list from 0; NaN where a value is missing",
            "features": [asdict(feature) for feature in task.features],
        }
    return {
        "schema": SCHEMA,
        "study": model.plan.name,
        "plan_sha256": model.plan.sha256,
        "model_sha256": model.sha256,
        **said,
        "answers": list(answer_names(task)),
        "not_a_number": "the record lacks a value that the study refuses to miss, or has one that "
        "it does not know",
        "caution": "supports a decision and makes none",
    }


def invented(task: TaskPlan, count: int) -> NDArray[np.float32]:
    """Raw records that are nobody's, some values missing or out of range where that may be."""
    random = np.random.default_rng(count)
    if task.image is not None:
        image = task.image
        reach = (image.white - image.black) / 10
        shape = (count, *image.grid, image.channels)
        pixels = random.uniform(image.black - reach, image.white + reach, shape)
        return pixels.astype(np.float32)
    columns = [_invented(feature, count, random) for feature in task.features]
    return np.stack(columns, axis=1).astype(np.float32)


def _invented(feature: FeaturePlan, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    if feature.type == "category":
        values = random.integers(0, len(feature.categories), count).astype(np.float64)
    else:
        low, high = feature.minimum or 0.0, feature.maximum or 0.0
        values = random.uniform(low - (high - low) / 10, high + (high - low) / 10, count)
    if feature.missing != "refuse":
        values[random.random(count) < 0.3] = np.nan
    return values


def largest_difference(data: bytes, model: ReleasedModel) -> float | None:
    """How far the file is from PyTorch on invented records, in units of `TOLERANCE` allowed.

    Returns:
        At most 1 where all is well; None where onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    raw = invented(model.plan.task, _CHECKED)
    with torch.inference_mode():
        wanted = Portable(model).eval()(torch.from_numpy(raw)).numpy()
    return off_by(ask(data, raw), wanted)


def ask(data: bytes, raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an ONNX file says of raw records, by onnxruntime on the CPU."""
    import onnxruntime  # noqa: PLC0415  # optional

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    answers: NDArray[np.float32] = session.run(None, {"records": raw})[0]
    return answers


def off_by(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference in units of what is allowed; infinite where one is no number."""
    if not np.array_equal(np.isnan(found), np.isnan(wanted)):
        return float("inf")
    allowed = TOLERANCE * np.maximum(1.0, np.abs(wanted))
    return float(np.nanmax(np.abs(found - wanted) / allowed, initial=0.0))
