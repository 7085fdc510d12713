"""Boosted trees against a perceptron, pooled gradient boosting, and a guess.

    python -m simulations.benchmarks.trees [--scenario heart ...] [--data FOLDER] [--seeds 3]
        [--json FILE]

Every study runs whole through the in-process engine. A seed changes the model's start (of trees:
their cuts); at `breast_cancer` and `diabetes` also who is at which hospital and who is tested.
Draws and noise are new in every study. Figures are mean and sample standard deviation over seeds
on all hospitals' test patients.
`pooled boosting` is scikit-learn's HistGradientBoosting, as it comes, on all training patients at
one place and without privacy; `guess` says the training patients' mean of everyone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from client.data.dataset import PatientDataset
from shared.counts import EXACT_UNIT, count_kind, exact_metrics
from shared.evaluation_plan import EvaluationPlan
from shared.plan import StudyPlan
from shared.statistics import Records
from shared.tasks import values_of
from simulations.baselines import pool
from simulations.benchmarks.report import Row, one_thread, parser, publish
from simulations.benchmarks.utility import mean_and_sd
from simulations.hospitals import load_hospitals
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario

MODES = ("local", "distributed", "none")
BINS = 256
METRICS = {"heart": "auroc", "breast_cancer": "auroc", "diabetes": "r2"}

PERCEPTRON: Mapping[tuple[str, str], Sequence[str]] = {
    ("heart", "local"): ("training.rounds=25", "training.learning_rate=1.0"),
    ("heart", "distributed"): ("training.learning_rate=2.0",),
    ("breast_cancer", "local"): ("training.learning_rate=2.0", "privacy.clip_norm=0.5"),
    ("breast_cancer", "distributed"): ("training.learning_rate=1.0", "privacy.clip_norm=0.5"),
    ("diabetes", "local"): ("training.learning_rate=0.3",),
    ("diabetes", "distributed"): (),
}
"""Settings of the perceptron where its best ones are not the scenario's own."""

Scores = dict[str, dict[str, float]]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--scenario", nargs="*", default=list(METRICS), choices=list(METRICS))
    options.add_argument("--data", metavar="FOLDER", help="where the data files of heart lie")
    options.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    chosen = options.parse_args(arguments)
    one_thread()
    seeds = range(1, 2 if chosen.quick else chosen.seeds + 1)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for name in chosen.scenario:
        found = [_scores(name, seed, chosen.data, quick=chosen.quick) for seed in seeds]
        table = {m: _row(name, m, [one[m] for one in found]) for m in found[0]}
        rows += table.values()
        metric = METRICS[name]
        for mode in MODES[:2]:
            ours, other = (table[f"{m}, {mode}"][metric] for m in ("trees", "perceptron"))
            ratios[f"{name}_{metric}_{mode}_trees_to_perceptron"] = float(ours) / float(other)
    publish(rows, ratios, chosen.json)


def _row(name: str, method: str, scores: Sequence[Mapping[str, float]]) -> Row:
    row: dict[str, object] = {"scenario": name, "method": method}
    for metric in (METRICS[name], "mse" if name == "diabetes" else "accuracy"):
        row |= mean_and_sd(metric, [one[metric] for one in scores])
    return row | {"seconds": max(one.get("seconds", 0.0) for one in scores)}


def _scores(name: str, seed: int, data: str | None, *, quick: bool) -> Scores:
    """One seed's metrics of every method."""
    scores: Scores = {}
    for mode in MODES:
        for method in ("trees", "perceptron"):
            scenario = _scenario(name, method, mode, seed, data)
            scores[f"{method}, {mode}"] = one = _study(scenario, quick=quick)
            print(
                name, seed, method, mode, f"{one[METRICS[name]]:.4f}", file=sys.stderr, flush=True
            )
    scores |= dict(_references(scenario, seed))
    return scores


def _scenario(name: str, method: str, mode: str, seed: int, data: str | None) -> Scenario:
    values = [f"simulation.seed={seed}", f"model.init_seed={seed}", "evaluation.every=0"]
    values += [f"privacy.mode={mode}", "privacy.epsilon=8.0"]
    if data and name == "heart":
        values.append(f'simulation.folder="{Path(data).expanduser().resolve()}"')
    if method == "trees":
        return load_scenario(f"{name}_trees", values)
    kind = "local" if mode == "none" else mode
    return load_scenario(name, [*values, "model.name=mlp", *PERCEPTRON[name, kind]])


def _study(scenario: Scenario, *, quick: bool) -> dict[str, float]:
    began = time.perf_counter()
    if quick:
        plan = scenario.plan
        values = ["training.rounds=2", f"privacy.mode={plan.privacy.mode}"]
        scenario = load_scenario(scenario.name, values)
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        options = RunOptions(out=Path(folder) / "run", device="cpu")
        results = execute(prepare(scenario, options), lambda report: None)
    return dict(results["final"]["metrics"]) | {"seconds": time.perf_counter() - began}


def _references(scenario: Scenario, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Pooled gradient boosting, and a guess."""
    plan, hospitals = scenario.plan, load_hospitals(scenario.simulation, scenario.plan)
    train, test = (pool([getattr(h, part) for h in hospitals]) for part in ("train", "test"))
    if plan.task.kind == "regression":
        learner = HistGradientBoostingRegressor(random_state=seed)
        values = values_of(train.labels.astype(np.float64))
        said = learner.fit(train.inputs, values).predict(test.inputs)
        guess = np.full(len(said), values.mean())
    else:
        classifier = HistGradientBoostingClassifier(random_state=seed)
        said = classifier.fit(train.inputs, train.labels).decision_function(test.inputs)
        share = float(train.labels.mean())
        guess = np.full(len(said), np.log(share / (1 - share)))
    yield "pooled boosting", _metrics(plan, test, said)
    yield "guess", _metrics(plan, test, guess)


def _metrics(plan: StudyPlan, test: PatientDataset, outputs: np.ndarray) -> dict[str, float]:
    exact = StudyPlan(
        plan.name, plan.task, plan.privacy, plan.cohort, plan.model, plan.training,
        evaluation=EvaluationPlan(release="exact", bins=BINS),
    )  # fmt: skip
    records = Records(test.patients, test.labels, test.inputs, outputs.astype(np.float32))
    return exact_metrics(exact, count_kind(exact).count(exact, records, EXACT_UNIT) / EXACT_UNIT)


if __name__ == "__main__":
    main()
