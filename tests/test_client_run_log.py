"""What a site's own log says of a round, for its engineer alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_cases import Sites

from simulations.scenario import load_scenario


@pytest.mark.parametrize(("clip_range", "clamped"), [(1.0, False), (1e-4, True)])
def test_coordinates_beyond_the_range_of_the_secure_sum_are_counted(
    tmp_path: Path, clip_range: float, clamped: bool
) -> None:
    overrides = ["training.rounds=2", f"secure_sum.clip_range={clip_range}"]
    sites = Sites(load_scenario("breast_cancer", overrides), tmp_path)
    sites.study("a-run")
    log = (sites.folders["city"] / "runs" / "a-run" / "rounds.jsonl").read_text()
    counts = [e["clamped_coordinates"] for e in map(json.loads, log.splitlines()) if "steps" in e]
    assert len(counts) == 2
    assert all((count > 0) == clamped for count in counts)
