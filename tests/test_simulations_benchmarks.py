"""Every benchmark runs at a small size, and what it measures is what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared.messages
from client import secagg_state
from client.noise import simulation_key
from client.secagg_state import Progress
from shared.errors import ProtocolError
from simulations.benchmarks import engine, flamby, personal, trees, utility
from simulations.benchmarks import round as round_benchmark
from simulations.benchmarks.stopwatch import Stopwatch, measured

MAINS = [engine.main, round_benchmark.main, utility.main, trees.main, personal.main]


def run(main: Callable[[list[str]], None], folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "out.json"
    main([*arguments, "--json", str(path)])
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "ratios"}
    assert written["machine"]["cores"] >= 1
    assert all(isinstance(ratio, float) for ratio in written["ratios"].values())
    return written


@pytest.mark.parametrize("main", MAINS)
def test_help_names_the_options(main, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--json" in printed
    assert "--quick" in printed


def test_engine_gives_every_part_of_a_round_its_time(tmp_path) -> None:
    written = run(engine.main, tmp_path, "--quick")
    parts = {row["what"].strip(): row for row in written["rows"]}
    assert set(engine.PARTS) <= set(parts)
    idle = [part for part in engine.PARTS if parts[part]["ms_per_round"] <= 0]
    assert not idle  # a part whose functions moved would come out empty
    counted = sum(parts[part]["ms_per_round"] for part in engine.OVERHEAD)
    assert written["ratios"]["overhead_ms_per_round"] == pytest.approx(counted)
    assert parts["one round, watched"]["ms_per_round"] > counted
    assert parts["training"]["calls_per_round"] == 4
    assert written["ratios"]["target_to_1000_rounds"] > 0


def test_round_compares_equal_training_and_both_wires(tmp_path) -> None:
    written = run(round_benchmark.main, tmp_path, "--quick", "--local-steps", "1")
    secure, clear = written["rows"]
    assert (secure["what"], clear["what"]) == ("secure", "clear")
    assert clear["mb_up"] == pytest.approx(4 * 4 * clear["parameters"] / 1e6)
    assert secure["mb_up"] > 4 * 3 * secure["parameters"] / 1e6
    ratio = secure["cpu_s"] / clear["cpu_s"]
    assert written["ratios"]["secure_to_clear_1_steps"] == pytest.approx(ratio)


def test_round_refuses_a_twin_that_trains_differently(monkeypatch) -> None:
    # The twin alone takes its keys from here; with other noise it is another study.
    monkeypatch.setattr(
        round_benchmark, "simulation_key", lambda seed, name: simulation_key(seed + 1, name)
    )
    with pytest.raises(AssertionError, match="different models"):
        round_benchmark.compare(round_benchmark.benchmark_plan(4, 1, 1))


def test_utility_has_a_row_for_the_study_and_each_baseline(tmp_path) -> None:
    written = run(utility.main, tmp_path, "--quick", "--seeds", "2", "--epsilons", "8")
    found = [(row["mode"], row["method"]) for row in written["rows"]]
    methods = ["study", "local", "pooled", "pooled_dp"]
    assert found == [(mode, method) for mode in utility.MODES for method in methods]
    study, *_, pooled = written["rows"][:4]
    assert study["auroc"] > 0.5
    assert study["auroc_sd"] > 0
    ratio = written["ratios"]["auroc_local_to_pooled_dp_at_8"]
    assert ratio == pytest.approx(study["auroc"] / pooled["auroc"])


def test_flamby_reads_published_results_and_tells_when_ours_differ(tmp_path) -> None:
    lines = ["seed,Method,Test,Metric,optimizer_class"]
    for seed, shift in ((42, 0.0), (43, 0.1)):
        lines += [f"{seed},FedAvg100,client_test_{i},{0.1 * i + shift}," for i in range(4)]
        lines.append(f"{seed},FedAvg100,Pooled Test,{0.5 + shift},")
    path = tmp_path / flamby.REFERENCE
    path.write_text("\n".join(lines))
    published = flamby.read_published(path)
    assert published["FedAvg100", "pooled"] == [0.5, 0.6]
    assert published["FedAvg100", flamby.MEAN] == pytest.approx([0.15, 0.25])
    near, far = (flamby._beside([ours], [0.5, 0.6]) for ours in (0.61, 0.63))
    assert (near["within_one_sd"], far["within_one_sd"]) == ("yes", "no")
    assert near["published_sd"] == pytest.approx(np.std([0.5, 0.6], ddof=1))


def test_flamby_runs_on_the_hospitals_files(heart_folder, tmp_path) -> None:
    arguments = ("--flamby", "--quick", "--seeds", "1", "--data", str(heart_folder))
    rows = run(utility.main, tmp_path, *arguments)["rows"]
    tests = {row["test"] for row in rows if row["method"] == "FedAvg100"}
    assert tests == {"cleveland", "hungarian", "switzerland", "va", flamby.MEAN, "pooled"}
    assert all(0 <= row["ours"] <= 1 for row in rows)


def test_a_second_is_counted_once_by_the_innermost_part() -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch = Stopwatch(lambda: now)
    inner = watch.wrap("inner", lambda: spend(2.0))

    def work() -> None:
        spend(1.0)
        inner()
        spend(4.0)
        inner()

    watch.wrap("outer", work)()
    spend(100.0)
    assert watch.read() == {"outer": 5.0, "inner": 4.0}
    assert watch.calls == {"outer": 1, "inner": 2}


def test_functions_are_wrapped_where_they_were_imported_to_and_put_back() -> None:
    original = shared.messages.decode
    watch = Stopwatch()
    with measured({"codec": [(shared.messages, "decode")]}, watch):
        assert secagg_state.decode is shared.messages.decode is not original
        with pytest.raises(ProtocolError):
            secagg_state.decode(Progress, b"")
    assert watch.calls == {"codec": 1}
    assert secagg_state.decode is shared.messages.decode is original
