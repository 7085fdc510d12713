"""sweep.json: all runs of a sweep, their means, and paired differences with standard errors."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.plan import StudyPlan
from simulations.sweep import Cell, Record, Sweep

SWEEP_SCHEMA = "fedward-sweep/1"
METHODS = ("study", "pooled_dp", "pooled", "local")
COMPARISONS = (
    # (of: mode, method), (less: mode, method)
    (("distributed", "study"), ("distributed", "pooled_dp")),
    (("distributed", "study"), ("local", "study")),
    (("local", "study"), ("local", "pooled_dp")),
)


def sweep_table(
    sweep: Sweep, records: Mapping[Cell, Record], made: datetime.datetime
) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        sweep: From `prepare_sweep`.
        records: Of at least one finished run; more may be missing.
        made: The time, UTC.

    Returns:
        Tables `runs` (one row a run), `summary` (mode, epsilon, method: mean and sample standard
        deviation of each metric over seeds) and `differences` (paired by seed, with standard
        errors); `settings` by mode; and what the figures are about.
    """
    options, cells = sweep.options, [c for c in sweep.scenarios if c in records]
    first = next(iter(sweep.scenarios.values()))
    record = records[cells[0]]
    cohort = first.plan.cohort
    return {
        "schema": SWEEP_SCHEMA,
        "version": importlib.metadata.version("fedward"),
        "made": f"{made:%Y-%m-%dT%H:%M:%SZ}",
        "scenario": first.name,
        "title": first.simulation.title,
        "unit": first.plan.privacy.unit,
        "synthetic": record["synthetic"],
        "data": record["data"],
        "split": first.simulation.split,
        "overrides": list(options.overrides),
        "modes": list(options.modes),
        "epsilons": list(options.epsilons),
        "seeds": list(options.seeds),
        "insecure_reproducible": options.insecure_reproducible,
        "runs_planned": len(sweep.scenarios),
        "delta": first.plan.privacy.delta,
        "cohort": {
            "sites": list(cohort.names),
            "threshold": cohort.threshold,
            "colluders": cohort.colluders,
        },
        "model": {"name": first.plan.model.name, "parameters": record["parameters"]},
        "train_patients": record["train_patients"],
        "test_patients": record["test_patients"],
        "test_positives": record["test_positives"],
        "settings": {mode: _settings(_plan(sweep, mode)) for mode in options.modes},
        "summary": _summary(sweep, records),
        "differences": _differences(sweep, records),
        "runs": [_row(records[cell]) for cell in cells],
    }


def _plan(sweep: Sweep, mode: str) -> StudyPlan:
    return next(s.plan for cell, s in sweep.scenarios.items() if cell.mode == mode)


def _settings(plan: StudyPlan) -> dict[str, Any]:
    training, ring = plan.training, plan.secure_sum
    return {
        "rounds": training.rounds,
        "local_steps": training.local_steps,
        "sample_rate": training.sample_rate,
        "learning_rate": training.learning_rate,
        "clip_norm": plan.privacy.clip_norm,
        "optimizer": plan.optimizer.name,
        "ring_bits": ring.bits,
        "clip_range": ring.clip_range,
    }


def _row(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("schema", "key", "data", "synthetic")}


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and sample standard deviation where there are two values or more."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Mean of first - second, and its standard error where there are two pairs or more."""
    gaps = np.subtract(first, second)
    error = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else None
    return {"mean": float(np.mean(gaps)), "standard_error": error, "pairs": len(gaps)}


def _summary(sweep: Sweep, records: Mapping[Cell, Record]) -> list[dict[str, Any]]:
    rows = []
    for mode in sweep.options.modes:
        for epsilon in sweep.options.epsilons:
            runs = _runs(sweep, records, mode, epsilon)
            for method in METHODS if runs else ():
                tables = [run["metrics"][method] for run in runs.values()]
                metrics = {
                    name: mean_and_sd([t[name] for t in tables])
                    for name in tables[0]
                    if all(name in t for t in tables)
                }
                row = {"mode": mode, "epsilon": epsilon, "method": method, "seeds": len(runs)}
                rows.append(row | {"metrics": metrics})
    return rows


def _differences(sweep: Sweep, records: Mapping[Cell, Record]) -> list[dict[str, Any]]:
    rows = []
    for (mode, method), (other_mode, other) in COMPARISONS:
        for epsilon in sweep.options.epsilons:
            ours = _runs(sweep, records, mode, epsilon)
            theirs = _runs(sweep, records, other_mode, epsilon)
            seeds = [seed for seed in ours if seed in theirs]
            if not seeds:
                continue
            pairs = [(ours[s]["metrics"][method], theirs[s]["metrics"][other]) for s in seeds]
            metrics = {
                name: paired_difference([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
                for name in pairs[0][0]
                if all(name in a and name in b for a, b in pairs)
            }
            of = {"mode": mode, "method": method}
            less = {"mode": other_mode, "method": other}
            rows.append({"epsilon": epsilon, "of": of, "less": less, "metrics": metrics})
    return rows


def _runs(
    sweep: Sweep, records: Mapping[Cell, Record], mode: str, epsilon: float
) -> dict[int, Record]:
    """The finished runs of one mode and epsilon, by seed."""
    return {
        cell.seed: records[cell]
        for cell in sweep.scenarios
        if (cell.mode, cell.epsilon) == (mode, epsilon) and cell in records
    }
