"""Training on more images, or on a larger table, than memory holds.

    python -m simulations.benchmarks.streaming [--table] [--gigabytes 5] [--limit-gigabytes 2]
        [--records-each 20] [--folder FOLDER] [--json FILE]

Random 64 x 64 images are written as a site's prepared file (twice their size on the disk while
that is done); or a Parquet table of 60 measurements, 8 bytes each, is read, split and prepared as
`fedward-site data prepare` does it. Then the site's own trainer takes private steps until each
record has been drawn about once. The peak is the process's resident memory, mapped pages included;
above the limit the run fails. A table is written by another process, which does not count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from client.data.dataset import PatientDataset
from client.data.mapped import Spool
from client.data.mapping import TableMapping
from client.data.prepared import read_prepared, write_prepared
from client.data.split import split_by_share
from client.data.table import read_table
from client.noise import ChaChaRandom, simulation_key
from client.patients import PatientKey
from client.training import LocalTrainer
from shared.config import require
from shared.models import initial_parameters
from shared.plan import StudyPlan, from_table
from simulations.benchmarks.report import parser, publish
from simulations.benchmarks.streaming_table import COLUMNS, write_table

SIDE, AT_ONCE = 64, 1024
GB = 1 << 30
RATE = 0.02


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--table", action="store_true", help="a Parquet table, not images")
    options.add_argument("--gigabytes", type=float, help="of images (5), or of the table (1)")
    options.add_argument("--limit-gigabytes", type=float, default=2.0, help="default 2")
    options.add_argument("--records-each", type=int, default=20, help="rows a patient (20)")
    options.add_argument("--folder", help="for the data; default: the temporary folder")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    size = chosen.gigabytes or (0.125 if chosen.quick else 1.0 if chosen.table else 5.0)
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="fedward-streaming-") as folder:
        usual, tempfile.tempdir = tempfile.tempdir, folder
        try:
            row = _measured(chosen, Path(folder), size)
        finally:
            tempfile.tempdir = usual
    publish([row], {"peak_to_data": row["peak_gb"] / size}, chosen.json)
    if row["peak_gb"] > chosen.limit_gigabytes:
        sys.exit(f"the peak is {row['peak_gb']:.2f} GB, above {chosen.limit_gigabytes:g}")


def _measured(chosen: argparse.Namespace, folder: Path, size: float) -> dict[str, float]:
    if chosen.table:
        return measure_table(folder, size, chosen.records_each)
    return measure(folder, size)


def measure(folder: Path, gigabytes: float) -> dict[str, float]:
    """Write the images, train over them, and say how large the process was at its largest."""
    records = int(gigabytes * GB / (4 * SIDE * SIDE)) // AT_ONCE * AT_ONCE
    _refuse_small_disk(folder, gigabytes)
    began = time.process_time()
    path = folder / "train.safetensors"
    write_prepared(_images(records), path)
    written = time.process_time()
    image = {"channels": 1, "height": SIDE, "width": SIDE}
    plan = _plan({"label": "y", "image": image}, {"name": "cnn", "width": 4}, records)
    return {
        "images_gb": path.stat().st_size / GB,
        "records": records,
        "prepare_cpu_s": written - began,
        **_trained(plan, path),
    }


def measure_table(folder: Path, gigabytes: float, each: int) -> dict[str, float]:
    """Read, split and prepare a table as a site does, train over it, and say the same."""
    records = int(gigabytes * GB / (8 * COLUMNS)) // each * each
    _refuse_small_disk(folder, gigabytes)
    names = [f"x{i}" for i in range(COLUMNS)]
    table, path = folder / "table.parquet", folder / "train.safetensors"
    writing = multiprocessing.get_context("spawn").Process(
        target=write_table, args=(table, names, records, each)
    )
    writing.start()
    writing.join()
    require(writing.exitcode == 0, f"{table} could not be written")
    features = [{"name": name, "minimum": -8, "maximum": 8} for name in names]
    model = {"name": "mlp", "hidden": [32]}
    plan = _plan({"label": "y", "features": features}, model, records // each)
    before, began = _peak_gb(), time.process_time()
    data = read_table(table, TableMapping(patient="patient"), plan.task).data
    shares = PatientKey(bytes(32)).shares(data.patient_ids)
    train, _ = split_by_share(data, 0.2, shares)
    write_prepared(train, path)
    del data, train
    prepared = time.process_time()
    return {
        "table_gb": table.stat().st_size / GB,
        "records": records,
        "patients": records // each,
        "before_gb": before,
        "prepare_cpu_s": prepared - began,
        "prepared_peak_gb": _peak_gb(),
        **_trained(plan, path),
    }


def _refuse_small_disk(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free
    require(
        free > 2.2 * gigabytes * GB,
        f"{folder} has {free / GB:.1f} GB free; {2.2 * gigabytes:.1f} are needed. Give --folder.",
    )


def _trained(plan: StudyPlan, path: Path) -> dict[str, float]:
    """Private steps over a prepared file."""
    began = time.process_time()
    trainer = LocalTrainer(
        plan, "site-0", read_prepared(path), 1.0, "cpu", max_physical_records=256
    )
    random, model = ChaChaRandom(simulation_key(1, "site-0")), initial_parameters(plan)
    result = trainer.train_round(model, random, 1)
    return {
        "steps": result.steps,
        "records_seen": result.log.records_seen,
        "train_cpu_s": time.process_time() - began,
        "peak_gb": _peak_gb(),
    }


def _images(records: int) -> PatientDataset:
    spool, random = Spool(), torch.Generator().manual_seed(1)
    for _ in range(records // AT_ONCE):
        spool.add(torch.rand(AT_ONCE, 1, SIDE, SIDE, generator=random).numpy() * 2 - 1)
    ids = tuple(map(str, range(records)))
    return PatientDataset(spool.array(), np.arange(records) % 2, np.arange(records), ids)


def _plan(task: Mapping[str, object], model: Mapping[str, object], patients: int) -> StudyPlan:
    sites = [{"name": f"site-{i}", "expected_patients": patients} for i in range(4)]
    return from_table(
        {
            "name": "streaming",
            "task": task,
            "model": model,
            "training": {
                "rounds": 1,
                "local_steps": round(1 / RATE),
                "learning_rate": 0.5,
                "sample_rate": RATE,
            },
            "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-6, "clip_norm": 1.0},
            "cohort": {"threshold": 3, "sites": sites},
        },
        "the benchmark",
    )


def _peak_gb() -> float:
    """The largest resident memory of this process, in GB."""
    line = Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1]
    return float(line.split()[0]) * 1024 / GB


if __name__ == "__main__":
    main()
