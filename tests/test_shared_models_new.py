"""The template for a new model does what it says: it is run from the document itself."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from training_cases import KINDS, make_data, make_plan

import shared.models
from client.guard import check_sensitivity
from client.noise import ChaChaRandom, simulation_key
from client.run import check_once
from client.training import LocalTrainer
from shared.models import initial_parameters
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

TEXT = (Path(shared.models.__file__).parent / "NEW.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The document's one block in a language."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(found) == 1
    assert found[0].count("\n") < 60
    return str(found[0])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> str:
    """The template's model, entered among the shipped ones."""
    module = ModuleType("template")
    source = "from __future__ import annotations\n" + block("python")
    exec(compile(source, "NEW.md", "exec"), module.__dict__)  # noqa: S102  our own document
    monkeypatch.setitem(shared.models.BUILDERS, "gated", module.gated)
    check_once.cache_clear()
    return "gated"


@pytest.mark.parametrize("kind", KINDS)
def test_the_templates_model_passes_what_every_model_must(model: str, kind: str) -> None:
    plan = make_plan(model, task={"kind": kind} | KINDS[kind], model={"width": 4})
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4
    sums = [
        LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu", engine=engine).clipped_sum(
            initial_parameters(plan), ChaChaRandom(simulation_key(1, "site-0")), 1
        ).update
        for engine in ("auto", "hooks")
    ]  # fmt: skip
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5 * float(np.abs(sums[1]).max()))


def test_the_templates_scenario_learns_under_privacy(model: str, tmp_path: Path) -> None:
    path = tmp_path / "gated.toml"
    path.write_text(block("toml"))
    options = RunOptions(out=tmp_path / "run", insecure_reproducible=True)
    results = execute(prepare(load_scenario(str(path)), options), lambda report: None)
    assert results["final"]["metrics"]["auroc"] > 0.9
    assert results["privacy"]["sites"]["a"]["epsilon"] <= 8
