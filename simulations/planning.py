"""What a study would mean for every site at once, before anyone signs anything.

Numbers follow from the plan alone, as they do at a site; policies are held against it as a site
would, for patients who have spent nothing yet; what they have spent, only their site knows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.guard import check_sensitivity
from client.policy import DatasetPolicy, Policy, refusals
from shared.config import parse, read_toml, require
from shared.counts import count_kind, count_noise, releases_counts
from shared.layout import VectorLayout
from shared.models import plan_spec
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import (
    PrivacyEvent,
    Use,
    costs_of,
    count_promise_of,
    count_use,
    epsilon_of,
    epsilon_of_events,
)
from shared.secagg.graph import tolerated_dropouts
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario

SCHEMA = "fedward-planned/1"
SHOWN = ("auroc", "balanced_accuracy", "recall", "f1", "brier")


def planned(
    scenario: Scenario,
    policies: Mapping[str, Path],
    *,
    device: str = "auto",
    seeds: Sequence[int] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All that can be said of a study beforehand, as plain values.

    Args:
        scenario: Its plan, and for `seeds` its simulated patients.
        policies: policy.toml of some sites, by the site's name.
        device: For guard and simulation.
        seeds: One whole simulated run each; none simulates nothing.
        say: Told what is going on.

    Raises:
        ConfigError: a policy cannot be read or is of no site; or a plan breaks its own promise.
        SensitivityError: the plan's model or loss breaks the privacy guarantee.
    """
    plan = scenario.plan
    strangers = sorted(set(policies) - set(plan.cohort.names))
    require(not strangers, f"--policy: the plan has no site {', '.join(strangers)}.")
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "scenario": scenario.name,
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        "learnt": _learnt(plan),
        "cohort": _cohort(plan),
        "privacy": _privacy(plan),
        "sites": {name: _site(plan, name, policies.get(name)) for name in plan.cohort.names},
    }
    if plan.learns and plan.privacy.mode != "none":
        say("measuring the sensitivity on made-up patients")
        report = check_sensitivity(plan, device)
        found["sensitivity"] = {"measured": report.sensitivity, "clip_norm": report.clip_norm}
    if seeds and plan.learns:
        found["simulated"] = _simulated(scenario, device, seeds, say)
    return found


def _learnt(plan: StudyPlan) -> dict[str, Any]:
    task, parameters = plan.task, plan_spec(plan).length
    layout, training = VectorLayout(plan, parameters), plan.training
    image = task.image
    shape = [image.channels, image.height, image.width] if image else None
    return {
        "kind": task.kind,
        "label": task.label,
        "positive": task.positive,
        "features": [f.name for f in task.features],
        "image": shape,
        "model": plan.model.name,
        "parameters": parameters,
        "optimizer": plan.optimizer.name,
        "rounds": training.rounds,
        "spare_rounds": training.spare_rounds,
        "local_steps": training.local_steps,
        "sample_rate": training.sample_rate,
        "round_bytes_up": layout.length * plan.secure_sum.bits // 8,
    }


def _cohort(plan: StudyPlan) -> dict[str, Any]:
    cohort = plan.cohort
    return {
        "sites": len(cohort.names),
        "threshold": cohort.threshold,
        "colluders": cohort.colluders,
        "tolerated_dropouts": tolerated_dropouts(len(cohort.names), cohort.threshold),
    }


def _privacy(plan: StudyPlan) -> dict[str, Any]:
    """The cost of each use, in full and without spare rounds; the same at every site."""
    if plan.privacy.mode == "none":
        return {"mode": "none", "uses": {}}
    own, spare = alone_multipliers(plan), plan.training.spare_rounds
    uses: dict[str, Any] = {}
    for use, event in costs_of(plan).items():
        each = plan.training.local_steps if use == "training" else 1
        delta = _delta(plan, use)

        def cost(sigma: float, steps: int, event: PrivacyEvent = event, at: float = delta) -> float:
            return epsilon_of(sigma, event.sample_rate, steps, at)

        uses[use] = {
            "noise_multiplier": event.noise_multiplier,
            "noise_multiplier_alone": own[use],
            "sample_rate": event.sample_rate,
            "steps": event.steps,
            "delta": delta,
            "epsilon": cost(event.noise_multiplier, event.steps - spare * each),
            "epsilon_worst": cost(event.noise_multiplier, event.steps),
            "epsilon_alone": cost(own[use], event.steps),
        }
    found: dict[str, Any] = {"mode": plan.privacy.mode, "clip_norm": plan.privacy.clip_norm}
    if releases_counts(plan) and count_promise_of(plan) is not None:
        noise = count_noise(plan)
        found["counts"] = {
            "cells": count_kind(plan).cells(plan),
            "spread_patients": noise.spread(len(plan.cohort.names)),
        }
    return found | {"uses": uses}


def _delta(plan: StudyPlan, use: Use) -> float:
    promise = count_promise_of(plan) if use == count_use(plan) else None
    return (promise or plan.privacy.budget)[1]


def _site(plan: StudyPlan, name: str, policy: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"expected_patients": plan.cohort.expected_patients(name)}
    if policy is None:
        return found | {"allowed": None, "refusals": []}
    limits = _limits(policy)
    reasons = refusals(plan, limits, site=name, roster=None, simulation=False)
    reasons += _beyond(plan, limits)
    return found | {"allowed": not reasons, "refusals": reasons, "dataset": limits.name}


def _limits(path: Path) -> DatasetPolicy:
    """The only dataset of a policy."""
    policy = parse(Policy, read_toml(path), str(path))
    require(
        len(policy.dataset) == 1,
        f"{path} has {len(policy.dataset)} datasets; give a file with the one that would be used.",
    )
    return policy.dataset[0]


def _beyond(plan: StudyPlan, limits: DatasetPolicy) -> list[str]:
    """Where the study alone passes the cap at the policy's own delta."""
    reasons = []
    for use, event in costs_of(plan).items():
        cost = epsilon_of_events([event], limits.max_delta)
        if cost > limits.max_epsilon:
            reasons.append(
                f"{use} costs a patient epsilon {cost:.3f} at delta {limits.max_delta:g}, "
                f"max_epsilon is {limits.max_epsilon:g}"
            )
    return reasons


def _simulated(
    scenario: Scenario, device: str, seeds: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Mean and standard deviation of the final metrics, without noise on them, over some seeds."""
    rows: list[Mapping[str, float]] = []
    for seed in seeds:
        say(f"simulating with seed {seed}")
        simulation = replace(scenario.simulation, seed=seed)
        one = replace(scenario, simulation=simulation)
        with tempfile.TemporaryDirectory(prefix="fedward-plan-") as folder:
            options = RunOptions(out=Path(folder) / "run", device=device)
            final = execute(prepare(one, options), lambda report: None)["final"]
        rows.append(final.get("exact_metrics") or final["metrics"])
    names = [n for n in SHOWN if all(n in row for row in rows)]
    mean = {n: statistics.fmean(row[n] for row in rows) for n in names}
    spread = {n: statistics.stdev([row[n] for row in rows]) for n in names} if seeds[1:] else {}
    return {"seeds": list(seeds), "mean": mean, "standard_deviation": spread}
