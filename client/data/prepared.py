"""Records that are already arrays, in a safetensors file: no code, no pickle, exact shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from client.data.dataset import PatientDataset
from client.data.mapped import IN_MEMORY, Records, map_records, pieces_of, release
from shared.config import require
from shared.errors import ConfigError

_KINDS = {"<f4": "F32", "<i8": "I64", "|u1": "U8"}


def write_prepared(data: PatientDataset, path: Path) -> None:
    """Write a dataset, patient ids included; for the site's own disk only.

    The records go from one file to the other without being in memory at once. The identifiers are
    JSON in an array of bytes: a safetensors header may have 100 MB, two million long ones.
    """
    arrays: dict[str, NDArray[Any]] = {
        "inputs": data.inputs,
        "labels": data.labels,
        "patients": data.patients,
        "patient_ids": np.frombuffer(json.dumps(data.patient_ids).encode(), dtype=np.uint8),
    }
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        kind = _KINDS[array.dtype.str]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for piece in pieces_of(len(array), array.shape[1:]):
                file.write(np.ascontiguousarray(array[piece]).data)
                release(array)


def read_prepared(path: Path) -> PatientDataset:
    """Read a dataset written by `write_prepared`.

    Raises:
        ConfigError: the file is missing, damaged, or lacks an array.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            ids = json.loads(file.get_tensor("patient_ids").tobytes())
            shape = tuple(file.get_slice("inputs").get_shape())
            kept = file.get_slice("inputs").get_dtype() == "F32"
            labels, patients = file.get_tensor("labels"), file.get_tensor("patients")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not a prepared dataset ({type(error).__name__}). Prepare it: "
            "fedward-site data prepare PLAN."
        ) from None
    require(kept, f"{path}: inputs are not float32. Prepare it again.")
    return PatientDataset(
        _records(path, shape),
        np.asarray(labels, dtype=np.int64),
        np.asarray(patients, dtype=np.int64),
        tuple(str(i) for i in ids),
    )


def _records(path: Path, shape: tuple[int, ...]) -> Records:
    """The records of a file whose layout was checked; many stay in it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))["inputs"]["data_offsets"]
    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    mapped = map_records(path, 8 + length + begin, shape)
    return mapped if mapped.nbytes > IN_MEMORY else np.array(mapped)
