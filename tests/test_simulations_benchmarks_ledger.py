"""The ledger's benchmark runs and writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from simulations.benchmarks import ledger


def test_it_measures_appending_composing_and_noise(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    ledger.main(["--quick", "--repetitions", "1", "--json", str(file)])
    written = json.loads(file.read_text())
    assert {"machine", "rows", "ratios"} <= set(written)
    measured = {row["what"]: row["ms"] for row in written["rows"]}
    assert set(measured) == {
        "append, durable",
        "compose 500 events",
        "torch.randn",
        "ChaCha20 normals",
        "discrete Gaussians",
    }
    assert all(ms > 0 for ms in measured.values())
