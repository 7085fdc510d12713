"""Seeded faults: the product's own code path, broken on purpose, one way at a time.

    python -m simulations.audits.faults [--unseen | --second | --third | --counts]
        [--epsilon 8] [--mode local distributed statistics]
    python -m simulations.audits.faults --clean N

Each fault is patched into the running process and taken out again. `implementation` is run on the
broken product and should find it; with --clean, it is run on the product as it is and should find
nothing. RESULTS.md in this folder has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.plan import StudyPlan
from simulations.audits.faults_counts import COUNTED
from simulations.audits.faults_kit import LISTED, Fault, seeded
from simulations.audits.faults_second import SECOND
from simulations.audits.faults_third import THIRD
from simulations.audits.faults_unseen import UNSEEN
from simulations.audits.finding import AuditOptions, AuditTarget
from simulations.audits.implementation import run
from simulations.audits.site_probe import changed
from simulations.run import fit_threads
from simulations.scenario import load_scenario

FAULTS = LISTED + UNSEEN + SECOND + THIRD + COUNTED


def small_plan(mode: str, epsilon: float, *, counts: bool = False) -> StudyPlan:
    """The study that the faults are seeded into: the default one, in a privacy mode.

    Args:
        mode: local, distributed, or "statistics" for the bundled study that counts alone.
        epsilon: Of training; of the counts where nothing is trained.
        counts: Release noised counts of the test patients, too, for epsilon 2.
    """
    if mode == "statistics":
        return load_scenario("statistics", [f"privacy.epsilon={epsilon}"]).plan
    scenario = load_scenario(
        "breast_cancer", [f"privacy.mode={mode}", f"privacy.epsilon={epsilon}"]
    )
    evaluation = (
        {"release": "noised", "epsilon": 2.0, "bins": 16} if counts else {"release": "none"}
    )
    return changed(scenario.plan, evaluation=evaluation)


@dataclass(frozen=True)
class Trial:
    """What one audit of a seeded fault found, and the CPU seconds it took."""

    fault: str
    mode: str
    epsilon: float
    seed: int
    found: tuple[str, ...]
    cpu_s: float


def attempt(fault: Fault | None, mode: str, epsilon: float, seed: int, quick: bool) -> Trial:
    """Audit the product with a fault, or as it is."""
    plan = small_plan(mode, epsilon, counts=fault is None or fault in COUNTED)
    target = AuditTarget(fault.plan(plan) if fault and fault.plan else plan)
    fit_threads(target.plan)
    began = time.process_time()
    with seeded(fault, mode) if fault else contextlib.nullcontext():
        findings = run(target, AuditOptions(seed=seed, quick=quick))
    found = tuple(f.name for f in findings if f.verdict == "violated")
    name = fault.name if fault else "none"
    return Trial(name, mode, epsilon, seed, found, time.process_time() - began)


def main(arguments: list[str] | None = None) -> int:
    """Run and print; the exit code is 0 whatever was found."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--epsilon", type=float, nargs="*", default=[1.0, 8.0])
    options.add_argument("--mode", nargs="*", default=["local", "distributed"])
    options.add_argument("--unseen", action="store_true", help="those invented after the freeze")
    options.add_argument("--second", action="store_true", help="those of the second set")
    options.add_argument("--third", action="store_true", help="those of the third set")
    options.add_argument("--counts", action="store_true", help="those of released counts")
    options.add_argument("--only", nargs="*", default=[], help="faults whose names hold this")
    options.add_argument("--clean", type=int, default=0, metavar="N", help="runs without a fault")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--json", type=Path, metavar="FILE")
    chosen = options.parse_args(arguments)
    faults = [
        f
        for f in (
            UNSEEN if chosen.unseen else SECOND if chosen.second else THIRD if chosen.third
            else COUNTED if chosen.counts else FAULTS if chosen.only else LISTED
        )
        if not chosen.only or any(o in f.name for o in chosen.only)
    ]  # fmt: skip
    cases: list[tuple[Fault | None, str, float]] = [
        (fault, mode, epsilon)
        for fault in faults if not chosen.clean
        for mode in chosen.mode if mode in fault.modes
        for epsilon in chosen.epsilon
    ]  # fmt: skip
    cases += [
        (None, chosen.mode[i % len(chosen.mode)], chosen.epsilon[i // 2 % len(chosen.epsilon)])
        for i in range(chosen.clean)
    ]
    trials = []
    for number, case in enumerate(cases):
        trial = attempt(*case, seed=chosen.seed + number, quick=chosen.quick)
        trials.append(trial)
        print(_line(trial), flush=True)
        if chosen.json:
            rows = [asdict(trial) for trial in trials]
            chosen.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{sum(bool(t.found) for t in trials)} of {len(trials)} with a violated claim")
    return 0


def _line(trial: Trial) -> str:
    shown = ", ".join(trial.found[:4]) + (" ..." if len(trial.found) > 4 else "")
    verdict = shown or "nothing"
    return (
        f"{trial.fault:36s} {trial.mode:12s} epsilon {trial.epsilon:g}  seed {trial.seed:<4d} "
        f"{trial.cpu_s:5.1f} s  {verdict}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
