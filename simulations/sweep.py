"""A sweep: every privacy mode at every epsilon under several seeds, with baselines beside each.

Each run is a whole study through the in-process engine, as `fedward-sim run --baselines` does
it. A finished run stays as one small JSON file in DIR/runs, so that an interrupted sweep goes on
where it stopped; what a run depends on is hashed into its file's name, and a file of other
settings or other data is never mistaken for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from server.results import write_text
from server.rounds import RoundReport
from shared.config import canonical_json, require
from shared.distributed import noise_share
from shared.personal import sent_length
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from simulations.hospitals import Hospital, load_hospitals
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario

RUN_SCHEMA = "fedward-sweep-run/1"
MODES = ("local", "distributed")
EPSILONS = (1.0, 2.0, 4.0, 8.0)
BASELINES = ("pooled_dp", "pooled", "local")

Record = Mapping[str, Any]
"""What a finished run leaves; see `_record`."""


@dataclass(frozen=True)
class SweepOptions:
    """What the operator chose on the command line.

    Attributes:
        scenario: A bundled scenario's name, or the path of a TOML file.
        out: The sweep's folder; one that holds finished runs is gone on with.
        overrides: As for `load_scenario`. They hold for all modes, but for those that start with
            a mode's name, such as "local.training.rounds=40".
        modes: Privacy modes to compare.
        epsilons: Promises to compare, each above 0.
        seeds: Each changes the start and, if random, the split; draws and noise are always new.
        device: auto, cpu or cuda.
        insecure_reproducible: Let draws and noise follow from the seed, see RunOptions.
    """

    scenario: str
    out: Path
    overrides: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    epsilons: tuple[float, ...] = EPSILONS
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    device: str = "auto"
    insecure_reproducible: bool = False

    def __post_init__(self) -> None:
        for name in ("modes", "epsilons", "seeds"):
            values = getattr(self, name)
            require(bool(values), f"--{name} is empty; give at least one.")
            twice = sorted({str(v) for v in values if values.count(v) > 1})
            require(not twice, f"--{name} has {', '.join(twice)} twice. Give each once.")
        odd = sorted(set(self.modes) - set(MODES))
        require(not odd, f"--modes has {', '.join(odd)}; valid: {', '.join(MODES)}.")
        for epsilon in self.epsilons:
            require(
                math.isfinite(epsilon) and epsilon > 0,
                f"--epsilons has {epsilon:g}; an epsilon is a number above 0.",
            )
        for line in self.overrides:
            key = _for_mode(line)[1].partition("=")[0].strip().removeprefix("plan.")
            key = key.replace("-", "_")
            require(
                key not in _SWEPT,
                f"--set {line!r}: a sweep sets {key} itself; choose with {_SWEPT.get(key)}.",
            )


def _for_mode(override: str) -> tuple[str | None, str]:
    """The mode that an override is for, None if for all, and the override without it."""
    first, dot, rest = override.strip().partition(".")
    return (first, rest) if dot and first in MODES else (None, override)


_SWEPT = {
    "privacy.mode": "--modes",
    "privacy.epsilon": "--epsilons",
    "privacy.noise_multiplier": "--epsilons",
    "simulation.seed": "--seeds and --first-seed",
    "model.init_seed": "--seeds and --first-seed",
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    mode: str
    epsilon: float
    seed: int


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def begin(self, cells: Sequence[Cell], kept: Mapping[Cell, Record]) -> None:
        """All runs of the sweep are known, and which of them are finished already."""

    def round(self, cell: Cell, done: int, rounds: int) -> None:
        """A run has finished `done` of its rounds."""

    def finished(self, cell: Cell, record: Record) -> None:
        """A run is finished and kept."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run: every plan was read and fits, and so do the data.

    Attributes:
        options: What was asked for.
        scenarios: The scenario of each run, in the order in which they are run.
        data_sha256: Of all patients' records.
    """

    options: SweepOptions
    scenarios: Mapping[Cell, Scenario]
    data_sha256: str

    def path(self, cell: Cell) -> Path:
        """Where a finished run is kept."""
        name = f"{cell.mode}-{cell.epsilon:g}-{cell.seed}-{self.key(cell)[:12]}.json"
        return self.options.out / "runs" / name

    def key(self, cell: Cell) -> str:
        """Hash of everything that a run's outcome depends on: hex, 64 characters."""
        scenario = self.scenarios[cell]
        unprotected = scenario.open_plan
        simulation = replace(scenario.simulation, folder="", title="-")
        parts = {
            "version": importlib.metadata.version("fedward"),
            "plan": scenario.plan.sha256,
            "open_plan": None if unprotected is None else unprotected.sha256,
            "simulation": asdict(simulation),
            "data": self.data_sha256,
            "insecure_reproducible": self.options.insecure_reproducible,
        }
        return hashlib.sha256(canonical_json(parts)).hexdigest()

    def kept(self) -> dict[Cell, Record]:
        """The runs that are finished, from their files; a damaged file counts as none."""
        found: dict[Cell, Record] = {}
        for cell in self.scenarios:
            try:
                record = json.loads(self.path(cell).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("key") == self.key(cell):
                found[cell] = record
        return found


def prepare_sweep(options: SweepOptions) -> Sweep:
    """Read the scenario for every run, and check it before anything is run.

    Raises:
        ConfigError: bad data, plan or override, in whichever mode or epsilon.
    """
    cells = [
        Cell(mode, epsilon, seed)
        for seed in options.seeds
        for epsilon in options.epsilons
        for mode in options.modes
    ]
    scenarios = {cell: _scenario(options, cell) for cell in cells}
    sweep = Sweep(options, scenarios, _data_sha256(options))
    kept = sweep.kept()
    for plan in {
        (cell.mode, cell.epsilon): scenarios[cell].plan for cell in cells if cell not in kept
    }.values():
        _check(plan)
    return sweep


def run_sweep(sweep: Sweep, watcher: Watcher) -> dict[Cell, Record]:
    """Run what is missing; each finished run is kept at once.

    Returns:
        Every run's record, those of an earlier call included.
    """
    done = sweep.kept()
    watcher.begin(list(sweep.scenarios), done)
    for cell, scenario in sweep.scenarios.items():
        if cell not in done:
            record = _run(sweep, cell, scenario, watcher)
            path = sweep.path(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", path)
            done[cell] = record
            watcher.finished(cell, record)
    return done


def _scenario(options: SweepOptions, cell: Cell) -> Scenario:
    own = (
        f"privacy.mode={cell.mode}",
        f"privacy.epsilon={cell.epsilon!r}",
        f"simulation.seed={cell.seed}",
        f"model.init_seed={cell.seed}",
    )
    scenario = load_scenario(options.scenario, [*_overrides(options, cell.mode), *own])
    # What was set for one private mode alone says nothing about training without privacy.
    for_all = load_scenario(options.scenario, [*_overrides(options, None), *own])
    scenario = replace(scenario, open_plan=for_all.open_plan)
    require(
        scenario.plan.evaluation.release == "exact",
        f"scenario {scenario.name!r} releases no test metrics, and a sweep compares them. "
        "Add --set evaluation.release=exact.",
    )
    return scenario


def _overrides(options: SweepOptions, mode: str | None) -> list[str]:
    """What holds for all modes, then what is for this mode alone."""
    found = [_for_mode(line) for line in options.overrides]
    return [line for to, line in found if to is None] + [
        line for to, line in found if to and to == mode
    ]


def _check(plan: StudyPlan) -> None:
    """The noise can be calibrated, and in mode distributed the ring has room for it."""
    noise_multiplier_of(plan)
    if plan.privacy.mode == "distributed":
        noise_share(plan, sent_length(plan))


def _data_sha256(options: SweepOptions) -> str:
    """One hash over all records, whatever seeds and modes are swept."""
    scenario = load_scenario(options.scenario, _overrides(options, None))
    digest = hashlib.sha256()
    for hospital in load_hospitals(scenario.simulation, scenario.plan):
        for part in (hospital.train, hospital.test):
            for array in (part.inputs, part.labels, part.patients):
                digest.update(str(array.shape).encode())
                digest.update(array.tobytes())
    return digest.hexdigest()


def _run(sweep: Sweep, cell: Cell, scenario: Scenario, watcher: Watcher) -> Record:
    rounds = scenario.plan.training.rounds
    with tempfile.TemporaryDirectory(prefix="fedward-sweep-") as folder:
        options = RunOptions(
            Path(folder) / "run",
            device=sweep.options.device,
            baselines=True,
            insecure_reproducible=sweep.options.insecure_reproducible,
        )
        prepared = prepare(scenario, options)
        results = execute(prepared, _observer(cell, rounds, watcher))
    return _record(sweep.key(cell), cell, prepared.hospitals, results)


def _observer(cell: Cell, rounds: int, watcher: Watcher) -> Callable[[RoundReport], None]:
    return lambda report: watcher.round(cell, min(report.model_round + 1, rounds), rounds)


def _record(
    key: str, cell: Cell, hospitals: Sequence[Hospital], results: Mapping[str, Any]
) -> Record:
    sites = results["privacy"]["sites"].values()
    alone = [site["epsilon_alone"] for site in sites if site.get("epsilon_alone") is not None]
    metrics = {"study": results["final"]["metrics"]}
    metrics |= {name: results["baselines"][name]["metrics"] for name in BASELINES}
    return {
        "schema": RUN_SCHEMA,
        "key": key,
        "mode": cell.mode,
        "epsilon": cell.epsilon,
        "seed": cell.seed,
        "plan_sha256": results["plan_sha256"],
        "wall_s": results["wall_s"],
        "epsilon_spent": max(site["epsilon"] for site in sites),
        "epsilon_alone": max(alone, default=None),
        "noise_multiplier": max(site["noise_multiplier"] for site in sites),
        "train_patients": sum(h.train.patient_count for h in hospitals),
        "test_patients": sum(h.test.patient_count for h in hospitals),
        "test_positives": sum(int(h.test.labels.sum()) for h in hospitals),
        "parameters": results["model"]["parameters"],
        "data": results["data"],
        "synthetic": results["synthetic"],
        "metrics": metrics,
    }
