"""The benchmark of mode distributed runs at a small size, and its opponents do what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from simulations.benchmarks import distributed


@pytest.mark.slow
def test_every_part_has_its_rows_and_ratios(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    distributed.main(["--quick", "--json", str(path)])
    written = json.loads(path.read_text())
    rows = {row["what"]: row for row in written["rows"]}
    assert {"discrete Gaussian", "whole study", "CNN, distributed", "CNN, plain twin"} <= set(rows)
    assert rows["whole study"]["rounds"] == 5
    assert rows["CNN, distributed"]["ring_bits"] == 32
    ratios = written["ratios"]
    assert ratios["discrete_to_one_at_a_time"] > 10
    ratio = rows["CNN, distributed"]["cpu_s"] / rows["CNN, plain twin"]["cpu_s"]
    assert ratios["distributed_to_plain_8_images"] == pytest.approx(ratio)
    assert ratios["target_to_1000_rounds"] == pytest.approx(60 / ratios["cpu_s_of_1000_rounds"])


@pytest.mark.parametrize("deviation", [1, 3])
def test_the_plain_sampler_draws_a_discrete_gaussian(deviation: int) -> None:
    source = random.Random(1)
    draws = np.array([distributed.plain_draw(source, deviation) for _ in range(12_000)])
    span = np.arange(-3 * deviation, 3 * deviation + 1)
    weights = np.exp(-(np.arange(-60, 61) ** 2) / (2 * deviation**2))
    chances = np.exp(-(span**2) / (2 * deviation**2)) / weights.sum()
    seen = np.array([(draws == x).sum() for x in span])
    expected = np.append(chances, 1 - chances.sum()) * len(draws)
    observed = np.append(seen, len(draws) - seen.sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    # Rounding a continuous Gaussian would give another distribution where it is this coarse.
    if deviation == 1:
        rounded = np.rint(np.random.default_rng(1).normal(size=12_000))
        other = np.append([(rounded == x).sum() for x in span], (abs(rounded) > 3).sum())
        assert stats.chisquare(other, expected).pvalue < 1e-4


def test_the_twin_steps_by_the_sum_of_the_sites_clipped_sums() -> None:
    plan = distributed.cnn_plan(4, 6, 1)
    hospitals = [distributed._hospital(s.name, i, 6) for i, s in enumerate(plan.cohort.sites)]
    twin = distributed.PlainStudy(plan, {h.name: h.train for h in hospitals})
    start = twin.state.parameters
    sums = [
        LocalTrainer(plan, h.name, h.train, 1.0, "cpu")
        .clipped_sum(start, ChaChaRandom(simulation_key(1, h.name)), 1)
        .update
        for h in hospitals
    ]
    twin.run_round()
    step = -0.1 * sum(sums) / (4 * 6)
    np.testing.assert_allclose(twin.state.parameters - start, step, atol=1e-6)
    assert np.abs(step).max() > 1e-4
