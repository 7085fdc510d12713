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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.portable import Portable
from shared.answers import answer_names
from shared.errors import ConfigError
from shared.files import read_bytes
from shared.released import ReleasedModel, require_plain_inputs
from shared.task_plan import FeaturePlan, TaskPlan

SCHEMA = "fedward-onnx/1"
TOLERANCE = 1e-5
"""Largest difference between the file and PyTorch: absolute, and relative for large values."""

_CHECKED = 16  # invented records that a file is compared on
_OPSET = 18


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
    require_plain_inputs(model.plan.task, "exported")


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
