"""What every benchmark shares: repeated measurement, the machine, a table, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Row = Mapping[str, Any]
Task = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

PACKAGES = ("numpy", "cryptography", "blake3", "torch", "opacus", "flwr", "tenseal")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: --json FILE, --quick, --repetitions N."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    options.add_argument("--repetitions", type=int, default=5, help="take the best of (default 5)")
    return options


def one_thread() -> None:
    """Let torch compute in one thread, so that CPU seconds compare, and silence libraries."""
    import torch  # noqa: PLC0415  # the secure sum's benchmarks need none

    warnings.filterwarnings("ignore", category=UserWarning, module="opacus")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)


def best_of(
    tasks: Mapping[Name, Task],
    repetitions: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[Name, float]:
    """Run all tasks in turn, `repetitions` times over; the least seconds of each.

    Turns are interleaved, so that a busy minute of a shared machine hits all tasks alike.

    Args:
        clock: CPU seconds of this process and all its threads, or ``time.perf_counter``.
    """
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(repetitions):
        for name, task in tasks.items():
            start = clock()
            task()
            best[name] = min(best[name], clock() - start)
    return best


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def publish(rows: Sequence[Row], ratios: Mapping[str, float], json_path: Path | None) -> None:
    """Print the table and the ratios; write {"machine", "rows", "ratios"} if a path is given."""
    on = machine()
    print(f"{on['processor']}, {on['cores']} cores, Python {on['python']}")
    print(table(rows))
    for name, ratio in ratios.items():
        print(f"{name:44} {ratio:10.2f}")
    if json_path is not None:
        content = {"machine": on, "rows": [dict(row) for row in rows], "ratios": dict(ratios)}
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
