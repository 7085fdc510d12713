"""A feature that is shuffled to noise, and trained on again, loses its importance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.attribution import Risk, shapley_values
from client.data.dataset import PatientDataset
from shared.features import feature_columns, public_baseline
from shared.released import read_model
from simulations.hospitals import Hospital
from simulations.run import PreparedRun, RunOptions, execute, prepare
from simulations.scenario import load_scenario

FEATURES = """[
  {name = "worst radius", minimum = 5, maximum = 40},
  {name = "worst texture", minimum = 10, maximum = 50},
  {name = "worst smoothness", minimum = 0.05, maximum = 0.25},
  {name = "mean symmetry", minimum = 0.10, maximum = 0.35},
]""".replace("\n", " ")
STRONGEST = 0  # worst radius


def run_of(out: Path) -> PreparedRun:
    overrides = [f"task.features={FEATURES}", "training.rounds=8", "privacy.epsilon=8"]
    options = RunOptions(out=out, insecure_reproducible=True)
    return prepare(load_scenario("breast_cancer", overrides), options)


def shuffled(data: PatientDataset, column: int) -> PatientDataset:
    inputs = data.inputs.copy()
    inputs[:, column] = np.random.default_rng(5).permutation(inputs[:, column])
    return replace(data, inputs=inputs)


def importances(run: PreparedRun) -> NDArray[np.float64]:
    """Mean absolute Shapley value of each feature over some test patients, shares of their sum."""
    execute(run, lambda report: None)
    model = read_model(run.options.out)
    task = model.plan.task
    risk = Risk(model.module(), task, 0)
    tested = np.concatenate([h.test.inputs for h in run.hospitals])[::4]
    baseline, groups = public_baseline(task), feature_columns(task)
    values = [np.abs(shapley_values(risk, row, baseline, groups)) for row in tested]
    mean: NDArray[np.float64] = np.mean(values, axis=0)
    return mean / mean.sum()


@pytest.mark.slow
def test_a_feature_shuffled_to_noise_loses_its_importance(tmp_path: Path) -> None:
    honest = run_of(tmp_path / "honest")
    noise = tuple(
        Hospital(h.name, shuffled(h.train, STRONGEST), shuffled(h.test, STRONGEST))
        for h in honest.hospitals
    )
    with_signal = importances(honest)
    without = importances(replace(run_of(tmp_path / "noise"), hospitals=noise))
    assert with_signal.argmax() == STRONGEST
    assert without[STRONGEST] < with_signal[STRONGEST] / 3
