"""Records that are already arrays, in a safetensors file: no code, no pickle, exact shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from client.data.dataset import PatientDataset
from shared.errors import ConfigError


def write_prepared(data: PatientDataset, path: Path) -> None:
    """Write a dataset, patient ids included; for the site's own disk only."""
    arrays: dict[str, np.ndarray] = {
        "inputs": np.ascontiguousarray(data.inputs),
        "labels": data.labels,
        "patients": data.patients,
    }
    save_file(arrays, path, metadata={"patient_ids": json.dumps(data.patient_ids)})


def read_prepared(path: Path) -> PatientDataset:
    """Read a dataset written by `write_prepared`.

    Raises:
        ConfigError: the file is missing, damaged, or lacks an array.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            ids = json.loads((file.metadata() or {})["patient_ids"])
            inputs = file.get_tensor("inputs")
            labels, patients = file.get_tensor("labels"), file.get_tensor("patients")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not a prepared dataset ({type(error).__name__}). Prepare it: "
            "fedward-site data prepare PLAN."
        ) from None
    return PatientDataset(
        np.asarray(inputs, dtype=np.float32),
        np.asarray(labels, dtype=np.int64),
        np.asarray(patients, dtype=np.int64),
        tuple(str(i) for i in ids),
    )
