"""The benchmark of a private step: it compares like with like, and prints what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simulations.benchmarks import training
from simulations.benchmarks.training_models import CASES, records


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_it_prints_every_variant_and_the_ratios(tmp_path: Path) -> None:
    training.main(["--quick", "--models", "mlp", "--json", str(tmp_path / "t.json")])
    written = json.loads((tmp_path / "t.json").read_text())
    (row,) = written["rows"]
    assert row["model"] == "mlp"
    assert all(row[name] > 0 for name in ("ordinary", "ours", "hooks", "ew", "ghost"))
    assert written["ratios"]["mlp_8_ours_to_ordinary"] == pytest.approx(
        row["ours"] / row["ordinary"]
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["mlp", "cnn28", "gru", "transformer"])
def test_ours_takes_the_very_step_of_opacus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    inputs, labels = records(case, 8), torch.tensor([0.0, 1.0] * 4)
    made: list[torch.nn.Module] = []
    real = training._module
    monkeypatch.setattr(training, "_module", lambda *a: made.append(real(*a)) or made[-1])
    start = torch.nn.utils.parameters_to_vector(real(case, "contiguous").parameters()).detach()
    training.ours(case, inputs, labels, "contiguous", 4)()
    training.opacus(case, inputs, labels, "hooks")()
    moved = [torch.nn.utils.parameters_to_vector(m.parameters()) - start for m in made]
    assert float(moved[0].norm()) > 1e-5
    if name != "gru":  # there Opacus' own module, made from nn.GRU, is the one that moved
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-8)
