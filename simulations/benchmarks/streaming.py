"""Training on more images than memory holds.

    python -m simulations.benchmarks.streaming [--gigabytes 5] [--limit-gigabytes 2]
        [--folder FOLDER] [--json FILE]

Random 64 x 64 images are written as a site's prepared file (twice their size on the disk while
that is done), then the site's own trainer takes private steps over them until each has been drawn
about once. The peak is the process's resident memory, mapped pages included; above the limit the
run fails.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from client.data.dataset import PatientDataset
from client.data.mapped import Spool
from client.data.prepared import read_prepared, write_prepared
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from shared.config import require
from shared.models import initial_parameters
from shared.plan import StudyPlan, from_table
from simulations.benchmarks.report import parser, publish

SIDE, AT_ONCE = 64, 1024
GB = 1 << 30
RATE = 0.02


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--gigabytes", type=float, help="of images (default 5)")
    options.add_argument("--limit-gigabytes", type=float, default=2.0, help="default 2")
    options.add_argument("--folder", help="for the images; default: the temporary folder")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    size = chosen.gigabytes or (0.125 if chosen.quick else 5.0)
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="fedward-streaming-") as folder:
        tempfile.tempdir = folder
        row = measure(Path(folder), size)
    publish([row], {"peak_to_images": row["peak_gb"] / size}, chosen.json)
    if row["peak_gb"] > chosen.limit_gigabytes:
        sys.exit(f"the peak is {row['peak_gb']:.2f} GB, above {chosen.limit_gigabytes:g}")


def measure(folder: Path, gigabytes: float) -> dict[str, float]:
    """Write the images, train over them, and say how large the process was at its largest."""
    records = int(gigabytes * GB / (4 * SIDE * SIDE)) // AT_ONCE * AT_ONCE
    free = shutil.disk_usage(folder).free
    require(
        free > 2.2 * gigabytes * GB,
        f"{folder} has {free / GB:.1f} GB free; {2.2 * gigabytes:.1f} are needed. Give --folder.",
    )
    began = time.process_time()
    path = folder / "train.safetensors"
    write_prepared(_images(records), path)
    written = time.process_time()
    plan = _plan(records)
    data = read_prepared(path)
    trainer = LocalTrainer(plan, "site-0", data, 1.0, "cpu", max_physical_records=256)
    random, model = ChaChaRandom(simulation_key(1, "site-0")), initial_parameters(plan)
    result = trainer.train_round(model, random, 1)
    return {
        "images_gb": path.stat().st_size / GB,
        "records": records,
        "steps": result.steps,
        "records_seen": result.log.records_seen,
        "prepare_cpu_s": written - began,
        "train_cpu_s": time.process_time() - written,
        "peak_gb": _peak_gb(),
    }


def _images(records: int) -> PatientDataset:
    spool, random = Spool(), torch.Generator().manual_seed(1)
    for _ in range(records // AT_ONCE):
        spool.add(torch.rand(AT_ONCE, 1, SIDE, SIDE, generator=random).numpy() * 2 - 1)
    ids = tuple(map(str, range(records)))
    return PatientDataset(spool.array(), np.arange(records) % 2, np.arange(records), ids)


def _plan(records: int) -> StudyPlan:
    sites = [{"name": f"site-{i}", "expected_patients": records} for i in range(4)]
    return from_table(
        {
            "name": "streaming",
            "task": {"label": "y", "image": {"channels": 1, "height": SIDE, "width": SIDE}},
            "model": {"name": "cnn", "width": 4},
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
