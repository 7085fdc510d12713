"""The streaming benchmark of tables: it measures a peak, and fails above its limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.benchmarks import streaming


def test_a_table_is_prepared_and_trained_and_too_small_a_limit_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "--table",
        "--gigabytes",
        "0.002",
        "--records-each",
        "4",
        "--folder",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match=r"the peak is .* GB, above 0.01"):
        streaming.main([*arguments, "--limit-gigabytes", "0.01", "--json", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out").read_text())["rows"][0]
    assert row["records"] == 4 * row["patients"] == int(0.002 * 2**30 / (8 * 60)) // 4 * 4
    assert row["records_seen"] == pytest.approx(0.8 * row["records"], rel=0.3)
    assert 0.05 < row["before_gb"] <= row["prepared_peak_gb"] <= row["peak_gb"] < 50
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(streaming, "measure_table", lambda *_: {"peak_gb": 0.02})
    streaming.main([*arguments, "--limit-gigabytes", "0.03"])
