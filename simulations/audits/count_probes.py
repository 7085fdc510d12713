"""Released counts: their noise, what one patient moves, and that they are charged beforehand.

A site's counts of test patients, or of a statistics study, leave in the same masked vector as its
update. They are looked at as the training noise is: the same patients again and again, by several
sites, runs and processes, less what the auditor counts.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from shared.counts import EXACT_UNIT, count_kind, due_counts
from shared.models import initial_parameters
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.privacy import costs_of, count_promise_of, count_use
from shared.statistics import Records
from simulations.audits.accounting import epsilon
from simulations.audits.canaries import candidates, saturated_start
from simulations.audits.finding import artefact
from simulations.audits.measure import Check, Floats, correlation_p, smallest
from simulations.audits.noise_probes import Residuals, noise_checks
from simulations.audits.regimes import PROCESSES, QUIET, RUNS, Effort, Setting, processes
from simulations.audits.site_probe import (
    ProbedSite,
    changed,
    missing_on_charges,
    write_probed_sites,
)

PATIENTS = 12
TOLD_SLACK = 1.01
_SMOOTHING = 2.0  # shared/PRIVACY.md, "Counts": eta

ASSUMPTION = (
    "counts are those of the task made binary, or of the plan's statistics, in a ring of 32 bits"
)


@dataclass(frozen=True)
class CountRun:
    """What left in many releases of the same patients' counts.

    Attributes:
        noise: Counts less the auditor's, over the accounted noise.
        training: Noise of the update in the same releases, as it left; None without training.
        charged: (charged on disk, released) at each release of counts.
        missing: Patients who are not on a charge of the counts, at most.
        idle: Largest cell of a vector with which no counts were due; None where all had some.
    """

    noise: Residuals
    training: Floats | None
    charged: NDArray[np.int64]
    missing: int
    idle: float | None


def count_checks(
    plan: StudyPlan, setting: Setting | None, rng: np.random.Generator, effort: Effort
) -> tuple[list[Check], str]:
    """Every property of the plan's released counts; `setting` None for a study of statistics."""
    counting = _counting_plan(plan, setting, effort)
    data = _patients(counting, rng)
    start = initial_parameters(counting)
    if counting.learns:
        start = saturated_start(counting, _trained(counting, data))
    seen = _count_run(counting, data, start, effort)
    checks = [*_promise(plan), *noise_checks(seen.noise, "count-noise")]
    checks += _apart_from_training(seen) + _charged(seen.charged) + _nothing_beside(seen)
    checks += _one_patient(counting, data, start)
    checks = [replace(c, assumptions=(*c.assumptions, ASSUMPTION)) for c in checks]
    return checks, artefact(seen.noise.values)


def _told(plan: StudyPlan) -> float:
    return costs_of(plan)[count_use(plan)].noise_multiplier


def _counting_plan(plan: StudyPlan, setting: Setting | None, effort: Effort) -> StudyPlan:
    """The plan with as many releases as the audit needs, each with the noise of one of its own."""
    told, (_, delta) = _told(plan), count_promise_of(plan) or plan.privacy.budget
    releases = 4 + PROCESSES * effort.noise
    if setting is None:
        cost = epsilon(told, 1.0, releases, delta)
        return changed(
            plan,
            training={"spare_rounds": releases - 1},
            privacy={"noise_multiplier": told, "epsilon": 1.01 * cost + 0.1},
            secure_sum={"bits": 32},
        )
    base = setting.lengthened(1, setting.rate)
    cost = epsilon(told, 1.0, base.training.rounds, delta)
    own = replace(plan.evaluation, every=1, noise_multiplier=told, epsilon=1.01 * cost + 0.1)
    return replace(base, evaluation=own)


def _patients(plan: StudyPlan, rng: np.random.Generator) -> PatientDataset:
    """Patients of 1 to 3 records, in range."""
    data = candidates(plan, PATIENTS, rng)
    return replace(data, inputs=np.clip(data.inputs, -1, 1))


def _trained(plan: StudyPlan, data: PatientDataset) -> PatientDataset:
    """Whom the site trains on: others, without gradients; in statistics the same once more."""
    if not plan.learns:
        return data
    names = tuple(f"trained-{i}" for i in range(data.patient_count))
    return replace(data, labels=np.ones_like(data.labels), patient_ids=names)


def exact_counts(plan: StudyPlan, data: PatientDataset) -> Floats:
    """What a release would hold without noise, in patients, where the model is saturated.

    A saturated model's scores all lie in a class' last bin, so that no code of the product is
    needed; statistics are counted by the product's own rule, whose weights `_one_patient` checks.
    """
    if not plan.learns:
        records = Records(data.patients, data.labels, data.inputs, np.zeros(0, np.float32))
        return count_kind(plan).count(plan, records, EXACT_UNIT) / EXACT_UNIT
    found = np.zeros((2, plan.evaluation.bins))
    for rows in data.records_of:
        np.add.at(found[:, -1], data.labels[rows], 1 / len(rows))
    return found.reshape(-1)


def blocks_of(plan: StudyPlan) -> int:
    """Histograms and sums in each of which one patient weighs at most 1."""
    if plan.learns:
        return 1
    return 1 + sum(3 if f.type == "number" else 1 for f in plan.task.features)


def site_deviation(plan: StudyPlan, told: float, unit: int, blocks: int) -> float:
    """Standard deviation of one site's noise on a cell, in patients.

    Args:
        plan: Its mode says whether a site adds all of the noise or a share.
        told: The promise's noise multiplier.
        unit: Ring units that a patient weighs.
        blocks: Groups of cells in each of which a patient weighs at most 1.

    Source: shared/PRIVACY.md, "Counts".
    """
    sensitivity = unit * math.sqrt(blocks)
    local = plan.privacy.mode == "local"
    honest = 1 if local else plan.cohort.threshold - plan.cohort.colluders
    return math.sqrt(((told * sensitivity) ** 2 + _SMOOTHING**2) / honest) / unit


def _count_run(
    plan: StudyPlan, data: PatientDataset, start: FlatVector, effort: Effort
) -> CountRun:
    rows, labels, updates = list[Floats](), list[tuple[int, int, int, int]](), list[Floats]()
    charged = list[tuple[int, int]]()
    exact, deviation = exact_counts(plan, data), 1.0
    missing, idle = 0, None
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, _trained(plan, data), tested=data, runs=RUNS)
        taken = 0
        for probe, site, run, process in processes(folders, plan, start, None):
            taken = 0 if not process else taken
            noise = probe.run.layout.count_noise
            unit = noise.unit if noise else 1
            deviation = site_deviation(plan, _told(plan), unit, blocks_of(plan))
            for time in range(effort.noise):
                due = due_counts(plan, probe.finished)
                seen = probe.release()
                if not due:  # the starting point is not counted
                    idle = max(idle or 0.0, float(np.abs(seen.counts).max(initial=0.0)))
                    continue
                taken += 1
                rows.append(seen.counts)
                labels.append((site, run, process, time))
                charged.append((seen.counted, taken))
                updates.append(seen.sums.astype(np.float64))
            missing = max(missing, missing_on_charges(probe, data, count_use(plan)))
    table = np.array(labels)
    values = (np.stack(rows) - exact) / deviation
    sequence, one = table[:, 0] * RUNS + table[:, 1], np.zeros(len(exact), dtype=np.int64)
    residuals = Residuals(values, sequence, one, ("counts",), table)
    training = np.stack(updates) if plan.learns else None
    return CountRun(residuals, training, np.array(charged), missing, idle)


def _promise(plan: StudyPlan) -> list[Check]:
    """What the counts' noise costs by the auditor's own accounting."""
    promised, delta = count_promise_of(plan) or plan.privacy.budget
    rounds = plan.training.rounds
    due = sum(due_counts(plan, r) for r in range(rounds + 1)) if plan.learns else 1
    cost = epsilon(_told(plan), 1.0, due + plan.training.spare_rounds, delta)
    return [
        Check(
            "count-epsilon",
            "the noise of the counts keeps the promised epsilon over all their releases",
            "epsilon by the auditor's own accountant (PLD)",
            1.0 if cost <= promised * TOLD_SLACK else 0.0,
            cost, promised,
        )
    ]  # fmt: skip


def _apart_from_training(seen: CountRun) -> list[Check]:
    if seen.training is None:
        return []
    update = seen.training[:, np.linspace(0, seen.training.shape[1] - 1, 256).astype(int)]
    update = update[:, np.ptp(update, axis=0) > 0]
    norms = [np.maximum(np.linalg.norm(v, axis=0), 1e-300) for v in (update, seen.noise.values)]
    cosine = (update / norms[0]).T @ (seen.noise.values / norms[1])
    return [
        Check(
            "count-noise-independent-of-training",
            "the noise of counts tells nothing of the noise of the update that they travel with",
            "largest correlation of a cell's noise with a coordinate's",
            smallest(correlation_p(cosine, len(update)).reshape(-1)),
            float(np.abs(cosine).max()), 0.0,
        )
    ]  # fmt: skip


def _charged(charged: NDArray[np.int64]) -> list[Check]:
    short = int(np.max(charged[:, 1] - charged[:, 0]))
    return [
        Check(
            "counts-charged-before-release",
            "every release of counts is charged on disk before it is handed over",
            "most releases beyond those charged",
            1.0 if short <= 0 else 0.0, float(short), 0.0,
        )
    ]  # fmt: skip


def _nothing_beside(seen: CountRun) -> list[Check]:
    checks = [
        Check(
            "everybody-counted-charged",
            "every patient who is counted is on each charge for counts",
            "patients who are missing on a charge, at most",
            1.0 if not seen.missing else 0.0, float(seen.missing), 0.0,
        )
    ]  # fmt: skip
    if seen.idle is not None:
        checks.append(
            Check(
                "idle-cells-empty",
                "the cells of counts hold nothing where no counts are due",
                "largest number in an idle cell, in patients",
                1.0 if not seen.idle else 0.0, seen.idle, 0.0,
            )
        )  # fmt: skip
    return checks


def _one_patient(plan: StudyPlan, data: PatientDataset, start: FlatVector) -> list[Check]:
    """With the noise turned down, leave patients out one at a time."""
    moved = []
    everyone, limit = _quiet_counts(plan, data, start), math.sqrt(blocks_of(plan))
    for absent in range(3):  # of 1, 2 and 3 records
        rest = data.select(np.array([p for p in range(data.patient_count) if p != absent]))
        moved.append(float(np.linalg.norm(everyone - _quiet_counts(plan, rest, start))) / limit)
    counted = min(moved)
    return [
        Check(
            "count-sensitivity",
            "one patient, with however many records, moves a release of counts by at most what "
            "the accountant was told",
            "largest move when a patient is left out, over the accounted one",
            1.0 if max(moved) <= 1.01 and counted > 0.05 else 0.0, max(moved), 1.0,
            note="" if counted > 0.05 else "A patient was not counted at all.",
        )
    ]  # fmt: skip


def _quiet_counts(plan: StudyPlan, data: PatientDataset, start: FlatVector) -> Floats:
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, _trained(plan, data), tested=data)
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-counts", start, QUIET)
        while not due_counts(plan, probe.finished):
            probe.release()
        found = probe.release().counts
        probe.close()
    return found
