"""FLamby's Fed-Heart-Disease through the in-process engine, beside its published results.

Same data, split, model, start, local optimiser, rounds and seeds; privacy is off, as published.
A centre's test rows are z-scored by its own training rows, "pooled" ones by all training rows:
the two are not the same inputs. The score is accuracy at probability 1/2.

Source: Ogier du Terrail et al., "FLamby", NeurIPS 2022 Datasets and Benchmarks, arXiv:2210.04620;
its repository's results_benchmark_fed_heart_disease, one file a seed.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from shared.features import fit_zscore
from shared.models import plan_spec
from shared.parameters import FlatVector
from simulations import heart
from simulations.baselines import evaluate, pool
from simulations.benchmarks.report import Row
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario

SEEDS = (42, 43, 44, 45, 46)
METHODS = {"FedAvg100": "heart_flamby_fedavg", "FedAdam100": "heart_flamby_fedadam"}
REFERENCE = "flamby_reference_results.csv"
"""All published rows: columns seed, Method, Test, Metric, as in FLamby's own files."""

MEAN, POOLED = "mean of four centres", "pooled"


def compare(folder: Path, seeds: int, *, quick: bool) -> tuple[list[Row], dict[str, float]]:
    """Ours beside the published results; the latter where the reference file lies in `folder`.

    Args:
        folder: With the four UCI files.
        seeds: How many of the five published seeds.
        quick: Two rounds only, to see that it works.

    Returns:
        One row for each method and test set, and our means over the published ones.
    """
    published = read_published(folder / REFERENCE)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for method, name in METHODS.items():
        ours = [_run(name, folder, seed, quick=quick) for seed in SEEDS[:seeds]]
        for test in ours[0]:
            row: dict[str, Any] = {"method": method, "test": test}
            row |= _beside([scores[test] for scores in ours], published.get((method, test), []))
            rows.append(row)
            if row["published"] is not None:
                key = f"{method}_{test}_ours_to_published".replace(" ", "_")
                ratios[key] = row["ours"] / row["published"]
    return rows, ratios


def read_published(path: Path) -> dict[tuple[str, str], list[float]]:
    """Published accuracies by method and test set, one for each seed; empty without the file."""
    if not path.is_file():
        print(f"{REFERENCE} is not in the data folder; the published columns stay empty")
        return {}
    tests = {f"client_test_{i}": name for i, name in enumerate(heart.HOSPITALS)}
    tests["Pooled Test"] = POOLED
    found: dict[tuple[str, str], list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["Method"], tests[row["Test"]]), []).append(float(row["Metric"]))
    for method in {method for method, _ in found}:
        centres = [found[method, name] for name in heart.HOSPITALS]
        found[method, MEAN] = [float(np.mean(seed)) for seed in zip(*centres, strict=True)]
    return found


def _beside(ours: Sequence[float], published: Sequence[float]) -> dict[str, float | str | None]:
    mean, sd = _mean_and_sd(ours)
    theirs, theirs_sd = _mean_and_sd(published)
    within = None
    if mean is not None and theirs is not None and theirs_sd is not None:
        within = "yes" if abs(mean - theirs) <= theirs_sd else "no"
    return {
        "published": theirs,
        "published_sd": theirs_sd,
        "ours": mean,
        "ours_sd": sd,
        "within_one_sd": within,
    }


def _mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def _run(name: str, folder: Path, seed: int, *, quick: bool) -> dict[str, float]:
    """Accuracy of one seed's final model on each test set."""
    overrides = [f'simulation.folder="{folder}"', f"simulation.seed={seed}"]
    overrides.append(f"model.init_seed={seed}")
    if quick:
        overrides.append("training.rounds=2")
    scenario = load_scenario(name, overrides)
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as out:
        options = RunOptions(out=Path(out) / "run", device="cpu")
        results = execute(prepare(scenario, options), lambda report: None)
        tensors = load_file(options.out / "model.safetensors")
    centres = results["final"]["per_site"]
    scores = {site: float(centres[site]["accuracy"]) for site in heart.HOSPITALS}
    scores[MEAN] = float(np.mean(list(scores.values())))
    model = plan_spec(scenario.plan).flatten(tensors)
    scores[POOLED] = pooled_accuracy(scenario, model)
    return scores


def pooled_accuracy(scenario: Scenario, model: FlatVector) -> float:
    """Accuracy on all test patients, z-scored by all training patients."""
    folder, task = Path(scenario.simulation.folder), scenario.plan.task
    train, test = [], []
    for name in heart.HOSPITALS:
        data = heart.read_hospital(folder, name, task)
        rows = heart.official_split(folder, name, data)
        train.append(data.select(rows[0]))
        test.append(data.select(rows[1]))
    scale = fit_zscore(pool(train).inputs)
    everyone = pool(test)
    everyone = replace(everyone, inputs=scale.apply(everyone.inputs))
    return float(evaluate(scenario.plan, model, everyone, "cpu")["accuracy"])
