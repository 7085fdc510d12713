"""The probes of an audit, by the name of their module; each is loaded when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from server.results import read_results
from shared import plan as plans
from shared.config import read_toml
from shared.errors import ConfigError
from shared.plan import StudyPlan
from simulations.audits.family_names import TRAINING
from simulations.audits.finding import AuditOptions, AuditTarget, Finding
from simulations.hospitals import Hospital, load_hospitals
from simulations.scenario import list_scenarios, load_scenario

Probe = Callable[[AuditTarget, AuditOptions], list[Finding]]


def probe(name: str) -> Probe:
    """The function of a family, by its module's name."""
    return cast(Probe, importlib.import_module(f"simulations.audits.{name}").run)


def attack(name: str, target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """What one family finds; "not testable" where the plan has nothing that it could attack."""
    if target.plan.learns or name not in TRAINING:
        return probe(name)(target, options)
    found = Finding(
        probe=name,
        name="training",
        claim="What leaves in training keeps its promise.",
        statistic="none",
        value=None,
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="not testable",
        explanation="This study counts and trains nothing: no update leaves, and no model. What "
        "leaves are noised counts; the family `implementation` looks at them.",
    )
    return [found]


def target_of(text: str, data: str | None = None) -> AuditTarget:
    """What a command line names: a run directory, a plan in TOML, or a scenario.

    Args:
        text: Path or scenario name.
        data: Folder of the scenario's data, where it is not built in.

    Raises:
        ConfigError: none of them.
    """
    path = Path(text)
    if (path / "evidence" / "plan.json").is_file():
        plan = plans.from_bytes((path / "evidence" / "plan.json").read_bytes())
        return AuditTarget(plan, _hospitals_of_run(path, plan))
    if path.is_file():
        table = read_toml(path)
        if "simulation" not in table:
            return AuditTarget(plans.load(path))
    overrides = [f'simulation.folder="{Path(data).expanduser().resolve()}"'] if data else []
    scenario = load_scenario(text, overrides)
    return AuditTarget(scenario.plan, load_hospitals(scenario.simulation, scenario.plan))


def _hospitals_of_run(run: Path, plan: StudyPlan) -> tuple[Hospital, ...]:
    """The simulated hospitals of a run of a bundled scenario with built-in data; else none."""
    try:
        results = read_results(run / "results.json")
        if results["scenario"] not in list_scenarios():
            return ()
        simulation = load_scenario(results["scenario"]).simulation
        if simulation.source not in ("breast-cancer", "nodules"):
            return ()
        return load_hospitals(replace(simulation, seed=results["seed"]), plan)
    except ConfigError:
        return ()
