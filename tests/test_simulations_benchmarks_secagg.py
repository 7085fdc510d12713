"""The benchmark runs at a small size and writes what every benchmark writes."""

import json
import sys

import pytest

from simulations.benchmarks import report, secagg


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")  # when flwr is imported
def test_the_benchmark_writes_machine_rows_and_ratios(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)  # as if it were not installed
    path = tmp_path / "secagg.json"
    secagg.main(
        ["--json", str(path), "--parameters", "2000", "--sites", "4", "10", "--repetitions", "1"]
    )
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "ratios"}
    assert written["machine"]["packages"]["cryptography"]
    assert {row["system"] for row in written["rows"] if "system" in row} == {"fedward", "flower"}
    assert written["ratios"]["bytes_per_parameter_24_bits"] == 3
    assert written["ratios"]["wire_flower_to_fedward"] > 2
    assert {"client_10_degree_6_vs_flower_9", "server_4_vs_flower"} <= set(written["ratios"])
    assert all(ratio > 0 for ratio in written["ratios"].values())
    printed = capsys.readouterr().out
    assert "TenSEAL is not installed" in printed
    assert "fused_vs_keystream" in printed


@pytest.mark.parametrize(
    ("sites", "degrees"),
    [(4, [3]), (10, [9, 6]), (32, [31, 8]), (100, [99, 22, 12]), (20, [19, 6])],
)
def test_cohorts_mask_with_the_degrees_they_need(sites, degrees) -> None:
    assert secagg.degrees_for(sites) == degrees


def test_the_least_time_counts_and_turns_are_interleaved() -> None:
    ticks = iter([0.0, 5.0, 5.0, 6.0, 6.0, 8.0, 8.0, 11.0])
    turns: list[str] = []
    tasks = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    best = report.best_of(tasks, 2, clock=lambda: next(ticks))
    assert turns == ["a", "b", "a", "b"]
    assert best == {"a": 2.0, "b": 1.0}


def test_a_table_lines_up_and_leaves_unknown_cells_empty() -> None:
    lines = report.table([{"what": "client", "cpu_s": 0.5}, {"what": "x", "sites": 4}]).splitlines()
    assert lines[0].split() == ["what", "cpu_s", "sites"]
    assert lines[1].split() == ["client", "0.5000"]
    assert len({len(line) for line in lines}) == 1
