"""The scale benchmark runs at a small size, checks the sums, and sees memory that is held."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import shared.identity
from simulations.benchmarks import scale


def test_the_benchmark_writes_rows_and_ratios(tmp_path: Path, capsys) -> None:
    path = tmp_path / "scale.json"
    scale.main(["--quick", "--json", str(path)])
    written = json.loads(path.read_text())
    rounds = [row for row in written["rows"] if "peak_in" in row]
    assert [row["what"] for row in rounds] == ["round 1", "round 2", "recheck of round 2"]
    assert all(row["relay_peak_mb"] > row["held_mb"] for row in rounds)
    cohorts = [row for row in written["rows"] if row["what"] == "cpu"]
    assert [(row["sites"], row["k"]) for row in cohorts] == [(5, 4), (10, 4)]
    assert all(row["site masks ms"] > 0 and row["site prekeys ms"] > 0 for row in cohorts)
    assert "256 sites are refused" in capsys.readouterr().out


def test_a_wrong_sum_stops_the_benchmark(tmp_path: Path) -> None:
    with scale.playing(5, 1, 10, str(tmp_path / "stores")) as trial:
        trial.set_up()
        unmask = trial.relay.unmask

        def false_sum() -> scale.RingVector:
            return unmask() ^ np.uint32(1)

        trial.relay.unmask = false_sum  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="not the plain one"):
            trial.run_round(1, ("site-000",))


def test_no_party_profits_from_what_another_has_checked(tmp_path: Path, monkeypatch) -> None:
    """In one process, sites and relay would otherwise share the memory of checked signatures."""
    checks: list[bytes] = []
    check = shared.identity._public_key

    def counted(public: bytes) -> object:
        checks.append(public)
        return check(public)

    monkeypatch.setattr(shared.identity, "_public_key", counted)
    common = shared.identity._holds
    with scale.playing(5, 1, 10, str(tmp_path / "stores")) as trial:
        trial.set_up()
        checks.clear()
        trial.run_round(1, ("site-000",))
    assert shared.identity._holds is common
    # R1: the relay checks 4, and each of 4 sites the 3 others'. R2: the relay checks 4 more. R3:
    # each site checks 4. The result: only the site that was gone has not seen these 4 before.
    assert len(checks) == 4 + 4 * 3 + 4 + 4 * 4 + 4


def test_memory_that_a_step_holds_or_only_passes_through_is_seen() -> None:
    tracemalloc.start()
    peaks = scale.Peaks(tracemalloc.get_traced_memory()[0])
    kept: list[bytes] = []
    peaks.ask("keeps", lambda: kept.append(bytes(3_000_000)))
    peaks.ask("passes", lambda: len(bytes(5_000_000)))
    peaks.ask("nothing", lambda: None)
    tracemalloc.stop()
    assert 3e6 <= peaks.bytes_in["keeps"] < 3.1e6
    assert 8e6 <= peaks.bytes_in["passes"] < 8.1e6
    assert 3e6 <= peaks.bytes_in["nothing"] < 3.1e6
    assert peaks.highest == "passes"


def test_large_values_of_a_store_lie_on_disk(tmp_path: Path) -> None:
    store = scale.Spill(tmp_path / "store")
    store["small"], store["reply/large"] = b"s", bytes(scale.SPILL_BYTES)
    assert [path.stat().st_size for path in (tmp_path / "store").iterdir()] == [scale.SPILL_BYTES]
    assert store["reply/large"] == bytes(scale.SPILL_BYTES)
    del store["small"]
    assert list(store) == ["reply/large"]
    assert len(store) == 1
