"""What each hospital gains or loses by fine-tuning, a head of its own, and SCAFFOLD.

    python -m simulations.benchmarks.personal [--scenario heart] [--data FOLDER] [--seeds 3]
        [--methods ...] [--set KEY=VALUE ...] [--json FILE]

Each hospital tests on its own test patients the model that it would use: the common one, or its
own. `tuned` spends half of epsilon on the study and half on fine-tuning at each hospital, so that
all rows cost the same (composition of the two is below the sum). The drift rows take ten local
steps a round; the rows of norms take the scenario's own model, which must have some. Figures are
means over seeds of the mean over hospitals, with the sample standard
deviation over seeds, and the mean of every hospital. Draws and noise are new in every study.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from client.finetune import Tuning, tuning_plan
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.privacy import noise_multiplier_of
from shared.released import read_model
from simulations.baselines import evaluate
from simulations.benchmarks.report import Row, one_thread, parser, publish
from simulations.benchmarks.utility import mean_and_sd
from simulations.run import PreparedRun, RunOptions, execute, prepare
from simulations.scenario import load_scenario

EPSILON = 8.0
_MLP = ("model.name=mlp", "training.rounds=25", "training.learning_rate=1.0")
_DISTRIBUTED = ("privacy.mode=distributed",)
_DRIFT = ("training.rounds=10", "training.local_steps=10")
METHODS: Mapping[str, Sequence[str]] = {
    "common": _MLP,
    "own head": (*_MLP, 'model.personal=["head"]'),
    "own first layer": (*_MLP, 'model.personal=["layers"]'),
    "tuned": (*_MLP, f"privacy.epsilon={EPSILON / 2}"),
    "drift, fedavg": (*_MLP, *_DRIFT),
    "drift, scaffold": (*_MLP, *_DRIFT, "optimizer.name=scaffold"),
    "drift, fedavg, no privacy": (*_MLP, *_DRIFT, "privacy.mode=none"),
    "drift, scaffold, no privacy": (
        *_MLP, *_DRIFT, "optimizer.name=scaffold", "privacy.mode=none",
    ),
    "distributed, common": (*_MLP[:1], *_DISTRIBUTED),
    "distributed, own head": (*_MLP[:1], *_DISTRIBUTED, 'model.personal=["head"]'),
    "norms, common": (),
    "norms, own": ('model.personal=["norms"]',),
    "norms, common, no privacy": ("privacy.mode=none",),
    "norms, own, no privacy": ('model.personal=["norms"]', "privacy.mode=none"),
}  # fmt: skip
COMPARED = (
    ("own head", "common"), ("own first layer", "common"), ("tuned", "common"),
    ("drift, scaffold", "drift, fedavg"),
    ("drift, scaffold, no privacy", "drift, fedavg, no privacy"),
    ("distributed, own head", "distributed, common"), ("norms, own", "norms, common"),
    ("norms, own, no privacy", "norms, common, no privacy"),
)  # fmt: skip
TUNING = Tuning(epsilon=EPSILON / 2, steps=20, learning_rate=0.5)
"""For `tuned`; with rate and clip norm of the study. Not searched for."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--scenario", default="heart", help="default: heart")
    options.add_argument("--data", metavar="FOLDER", help="where the scenario's data files lie")
    options.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    names = [name for name in METHODS if not name.startswith("norms")]
    options.add_argument("--methods", nargs="*", default=names, choices=list(METHODS))
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="in all rows")
    chosen = options.parse_args(arguments)
    one_thread()
    seeds = range(1, 2 if chosen.quick else chosen.seeds + 1)
    rows: list[Row] = []
    for method in chosen.methods:
        overrides = [*METHODS[method], *chosen.set] + (
            ["training.rounds=2"] if chosen.quick else []
        )
        if chosen.data:
            overrides.append(f'simulation.folder="{Path(chosen.data).expanduser().resolve()}"')
        found = [_per_site(chosen.scenario, method, overrides, seed) for seed in seeds]
        rows.append(_row(method, found))
        print(rows[-1], file=sys.stderr, flush=True)
    publish(rows, _gains(rows), chosen.json)


def _row(method: str, found: Sequence[Mapping[str, Mapping[str, float]]]) -> Row:
    row: dict[str, object] = {"method": method}
    for metric in ("auroc", "accuracy"):
        means = [float(np.mean([m[metric] for m in one.values() if metric in m])) for one in found]
        row |= mean_and_sd(metric, means)
    for name in found[0]:
        row[name] = float(np.mean([one[name]["accuracy"] for one in found]))
    return row


def _gains(rows: Sequence[Row]) -> dict[str, float]:
    accuracy = {str(row["method"]): float(row["accuracy"]) for row in rows}
    return {
        f"accuracy of {method} to {other}": accuracy[method] / accuracy[other]
        for method, other in COMPARED
        if method in accuracy and other in accuracy
    }


def _per_site(
    scenario: str, method: str, overrides: Sequence[str], seed: int
) -> Mapping[str, Mapping[str, float]]:
    """Metrics of every hospital's own test patients, under the model that it would use."""
    values = [f"simulation.seed={seed}", f"model.init_seed={seed}", "evaluation.every=0"]
    values += [f"privacy.epsilon={EPSILON}", *overrides]
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        out = Path(folder) / "run"
        run = prepare(load_scenario(scenario, values), RunOptions(out=out, device="cpu"))
        results = execute(run, lambda report: None)
        if method == "tuned":
            return _tuned(run, out)
    table: Mapping[str, Mapping[str, float]] = results["final"]["per_site"]
    return table


def _tuned(run: PreparedRun, out: Path) -> Mapping[str, Mapping[str, float]]:
    """Each hospital trains the released model on, as client/finetune.py does."""
    model, table = read_model(out), {}
    plan = tuning_plan(model.plan, TUNING)
    sigma = noise_multiplier_of(plan)
    for hospital in run.hospitals:
        trainer = LocalTrainer(plan, hospital.name, hospital.train, sigma, "cpu")
        done = trainer.train_round(model.parameters, ChaChaRandom.from_system(), 1)
        own = model.parameters + done.update
        table[hospital.name] = evaluate(run.plan, own, hospital.test, "cpu")
    return table


if __name__ == "__main__":
    main()
