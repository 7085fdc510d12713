"""Boosted trees: public cuts, a histogram of errors as the sum, and broken variants caught."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from training_cases import clipped_sum, make_data, make_plan

from client.cli import main
from client.export import export_onnx, largest_difference
from client.guard import check_sensitivity
from client.training import LocalTrainer
from shared.errors import ConfigError, SensitivityError
from shared.keystream import PublicStream
from shared.models import build_model, initial_parameters, load_parameters
from shared.models.trees import BoostedTrees, Cut, public_cuts
from shared.plan import StudyPlan
from shared.released import model_files, read_model
from shared.task_plan import FeaturePlan
from simulations.audits import neighbour
from simulations.audits.faults_kit import Fault, clip_rule, scaled, seeded
from simulations.audits.finding import AuditOptions, AuditTarget, violated
from simulations.audits.implementation import run as probe
from simulations.audits.site_probe import changed
from simulations.audits.verify import verify
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

BREACH = "leaving one patient out|with who else is in the batch"
DOUBLED = Fault("twice the clip norm", clip_rule(lambda all_, c: [scaled(g, 2 * c) for g in all_]))


def leaf_of(tree: list[Cut], record: NDArray[np.float32]) -> int:
    """Go down one tree, question by question; the answer of level k is bit k."""
    return sum(int(record[column] > at) << level for level, (column, at) in enumerate(tree))


def answer(
    cuts: list[list[Cut]], values: NDArray[np.float32], record: NDArray[np.float32]
) -> float:
    """The base value, and the leaf of each tree."""
    leaves = values[:-1].reshape(len(cuts), -1)
    return float(values[-1] + sum(leaves[t, leaf_of(tree, record)] for t, tree in enumerate(cuts)))


def test_a_record_gets_the_base_value_and_one_leaf_of_each_tree() -> None:
    plan = make_plan("trees", model={"trees": 7, "depth": 3, "init_seed": 5})
    model, data = build_model(plan), make_data(plan)
    values = np.random.default_rng(1).normal(size=7 * 8 + 1).astype(np.float32)
    load_parameters(model, values)
    with torch.no_grad():
        found = model(torch.from_numpy(data.inputs)).tolist()
    cuts = public_cuts(plan, 7, 3)
    assert found == pytest.approx([answer(cuts, values, r) for r in data.inputs], abs=1e-5)
    assert len(set(found)) > 10


def test_all_leaves_start_at_zero() -> None:
    assert not initial_parameters(make_plan("trees")).any()
    assert len(initial_parameters(make_plan("trees"))) == 200 * 4 + 1


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_the_sum_is_a_histogram_of_errors_over_the_leaves(kind: str) -> None:
    """What leaves a site, before noise: for every leaf, what the model got wrong in it."""
    task = {"kind": kind} | ({"minimum": 0.0, "maximum": 1.0} if kind == "regression" else {})
    plan = make_plan("trees", model={"trees": 5}, task=task, privacy={"clip_norm": 100.0})
    data = make_data(plan, records_each=[1, 2, 1, 3, 1])
    start = np.random.default_rng(1).normal(size=5 * 4 + 1).astype(np.float32)
    cuts = public_cuts(plan, 5, 2)
    wanted = np.zeros(len(start))
    for records in data.records_of:
        for row in records:
            said = answer(cuts, start, data.inputs[row])
            label = float(data.labels[row])
            error = said - (label * 2.0**-19 - 1)
            if kind == "binary":
                error = 1 / (1 + math.exp(-said)) - label
            for t, tree in enumerate(cuts):
                wanted[4 * t + leaf_of(tree, data.inputs[row])] += error / len(records)
            wanted[-1] += error / len(records)
    np.testing.assert_allclose(clipped_sum(plan, data, start), wanted, atol=1e-5)


def test_a_patients_part_has_the_known_norm() -> None:
    plan = make_plan("trees", model={"trees": 24}, privacy={"clip_norm": 100.0})
    for patient in range(4):
        one = make_data(plan).select(np.array([patient]))
        found = np.linalg.norm(clipped_sum(plan, one))
        assert found == pytest.approx(0.5 * math.sqrt(24 + 1))  # every error is 1/2 at the start


def mixed_plan() -> StudyPlan:
    """A number, a category of three, and a number whose missing values are marked."""
    plan = make_plan("trees")
    features = (
        FeaturePlan("age", minimum=0, maximum=100),
        FeaturePlan("colour", type="category", categories=("r", "g", "b")),
        FeaturePlan("dose", minimum=0, maximum=9, missing="indicator"),
    )
    return changed(plan, task={"features": features})


def test_cuts_are_public_and_cover_every_answer() -> None:
    """Columns: age 0, colour 1 to 3, dose 4, its missing values 5."""
    plan = mixed_plan()
    cuts = public_cuts(plan, 300, 2)
    assert cuts == public_cuts(plan, 300, 2)
    assert cuts != public_cuts(changed(plan, model={"init_seed": 1}), 300, 2)
    features = [[0, 1, 1, 1, 2, 2][column] for tree in cuts for column, _ in tree]
    assert all(a != b for a, b in zip(features[::2], features[1::2], strict=True))
    counts = np.bincount([column for tree in cuts for column, _ in tree], minlength=6)
    np.testing.assert_allclose(counts / 600, [1 / 3, 1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6], atol=0.05)
    at = np.array([at for tree in cuts for column, at in tree if column in (0, 4)])
    assert np.abs(at).max() < 1
    assert 0.4 < np.mean(at < 0) < 0.6
    assert np.mean(at**2) == pytest.approx((1 / 3 + 1 / 6) / 2, abs=0.05)  # half flat, half peaked
    assert {at for tree in cuts for column, at in tree if column not in (0, 4)} == {0.5}


def test_cuts_are_the_same_on_every_machine() -> None:
    assert public_cuts(mixed_plan(), 3, 2) == VECTOR
    stream = PublicStream("test", 1)
    assert [stream.below(1000) for _ in range(4)] == WORDS
    assert sorted(stream.sample(9, 9)) == list(range(9))


VECTOR = [
    [(0, -0.8589718341827393), (5, 0.5)],
    [(5, 0.5), (0, 0.07782888412475586)],
    [(5, 0.5), (3, 0.5)],
]
WORDS = [421, 449, 12, 736]


def test_what_trees_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a table"):
        build_model(make_plan("trees", image=16))
    with pytest.raises(ConfigError, match="6553600 leaf values"):
        build_model(make_plan("trees", model={"trees": 100, "depth": 16}))


class LeafMeans(BoostedTrees):
    """The histogram's usual mistake: each leaf's mean error in place of its sum."""

    def leaf_of(self, inputs: Tensor) -> Tensor:
        inside = super().leaf_of(inputs)
        share: Tensor = inside / inside.sum(0).clamp(min=1)
        return share


class TwiceTheNorm(LocalTrainer):
    """Clips to twice what the accountant was told."""

    def _sum_patients(self, batch: NDArray[np.int64]) -> int:
        assert self._clipper is not None
        clip = self._clipper.max_grad_norm
        self._clipper.max_grad_norm = 2 * clip
        seen = super()._sum_patients(batch)
        self._clipper.max_grad_norm = clip
        return seen


def test_the_guard_lets_trees_pass_and_catches_a_doubled_sensitivity() -> None:
    plan = make_plan("trees", model={"trees": 24})
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4
    with pytest.raises(SensitivityError, match="leaving one patient out moves"):
        check_sensitivity(plan, "cpu", trainer=TwiceTheNorm)
    with pytest.raises(SensitivityError, match=BREACH):
        check_sensitivity(plan, "cpu", build=lambda p: LeafMeans(public_cuts(p, 24, 2), 1))


FEATURES = [
    {"name": "mean radius", "minimum": 5, "maximum": 30},
    {"name": "mean texture", "minimum": 5, "maximum": 45},
]


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_study_of_trees_learns_verifies_and_predicts(tmp_path: Path, mode: str) -> None:
    features = json.dumps(FEATURES).replace('":', '" =')
    overrides = [f"task.features={features}", "training.rounds=6", "model.trees=50"]
    overrides += [f"privacy.mode={mode}", "training.learning_rate=0.1"]
    out = tmp_path / "run"
    options = RunOptions(out=out, insecure_reproducible=True)
    scenario = load_scenario("breast_cancer_trees", overrides)
    results = execute(prepare(scenario, options), lambda report: None)
    assert results["final"]["metrics"]["auroc"] > 0.9  # who guesses has 0.5
    assert results["privacy"]["sites"]["city"]["epsilon"] <= 8
    assert {f.name for f in verify(out).findings if f.verdict == "violated"} == {"randomness"}
    (tmp_path / "site.toml").write_text(
        'name = "city"\n[source]\nkind = "table"\npath = "ward.csv"\n[source.table]\n'
        "one_row_per_patient = true\n"
    )
    (tmp_path / "new.csv").write_text("mean radius,mean texture\n9,12\n26,35\n")
    said = tmp_path / "said.csv"
    command = ["--site", str(tmp_path), "predict", str(out), str(tmp_path / "new.csv")]
    assert main([*command, "--out", str(said)]) == 0
    model = read_model(out)
    cuts = public_cuts(model.plan, 50, 2)
    rows = list(csv.DictReader(said.read_text().splitlines()))
    for row, (radius, texture) in zip(rows, [(9, 12), (26, 35)], strict=True):
        scaled_record = np.array([(radius - 17.5) / 12.5, (texture - 25) / 20], dtype=np.float32)
        logit = answer(cuts, model.parameters, scaled_record)
        probability = float(row["probability of malignant"])
        assert probability == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    assert float(rows[0]["probability of malignant"]) < float(rows[1]["probability of malignant"])


def audited(mode: str) -> AuditTarget:
    overrides = [f"privacy.mode={mode}", "model.trees=30", "privacy.clip_norm=2.7"]
    plan = load_scenario("breast_cancer_trees", overrides).plan
    return AuditTarget(changed(plan, evaluation={"release": "none"}))


@pytest.mark.slow
def test_an_exported_forest_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    plan = make_plan("trees", model={"trees": 30})
    leaves = np.random.default_rng(2).normal(size=len(initial_parameters(plan)))
    for name, data in model_files(plan, leaves.astype(np.float32), {}).items():
        (tmp_path / name).write_bytes(data)
    model = read_model(tmp_path)
    off = largest_difference(export_onnx(model), model)
    assert off is not None
    assert off <= 1


@pytest.mark.slow
def test_audits_let_trees_pass_and_find_a_doubled_sensitivity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode = "distributed"
    target, options = audited(mode), AuditOptions(seed=1, quick=True)
    assert not violated(probe(target, options))
    # It takes noise and rate from the plan, and a linear model of its own: as well with few.
    monkeypatch.setattr(neighbour, "QUICK_RELEASES", 20)
    assert not violated(neighbour.run(target, options))
    with seeded(DOUBLED, mode):
        found = [f.name for f in probe(target, options) if f.verdict == "violated"]
    assert "guard" in found
    assert len(found) > 1  # the probes see it themselves, too
