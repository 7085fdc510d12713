"""What the hospitals would reach otherwise: each alone, pooled, and pooled under DP-SGD.

Same model, start, splits, local learning rate and number of steps as the study; without privacy
those of the scenario's [none], where it has any. Pooling is what federation is there to avoid; it
shows what privacy and distance cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from shared.counts import EXACT_UNIT, Units, count_kind, exact_metrics
from shared.evaluation_plan import EvaluationPlan
from shared.models import initial_parameters
from shared.optimizers import apply_update, initial_state
from shared.parameters import FlatVector
from shared.plan import OptimizerPlan, SitePlan, StudyPlan
from shared.privacy import epsilon_of, noise_multiplier_of
from shared.privacy_plan import PrivacyPlan
from shared.statistics import Records
from simulations.hospitals import Hospital
from simulations.sites import noise_seed

EXACT_BINS = 256


def pool(parts: Sequence[PatientDataset]) -> PatientDataset:
    """All patients in one dataset; a patient of two hospitals counts as two."""
    offsets = np.cumsum([0] + [p.patient_count for p in parts])
    return PatientDataset(
        np.concatenate([p.inputs for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.patients + o for p, o in zip(parts, offsets, strict=False)]),
        tuple(f"{i}/{name}" for i, p in enumerate(parts) for name in p.patient_ids),
    )


def train_baselines(
    plan: StudyPlan,
    hospitals: Sequence[Hospital],
    seed: int,
    device: str,
    *,
    open_plan: StudyPlan | None = None,
    insecure_reproducible: bool = False,
) -> dict[str, Any]:
    """Train the baselines and evaluate each on the pooled test patients.

    Args:
        open_plan: Settings of those without privacy; None for the study's own, see `Scenario`.
        seed: Of the order of the records where there is no privacy.
        insecure_reproducible: Let noise and draws of `pooled_dp` follow from the seed, too.

    Returns:
        Tables `local`, `pooled` and, under DP, `pooled_dp`, as results.json has them. `local`
        is each hospital alone without privacy: its metrics are the mean over hospitals, and its
        `per_site` tests each hospital's model on its own patients.
    """
    test = pool([h.test for h in hospitals])
    everyone = pool([h.train for h in hospitals])
    patients = sum(s.expected_patients for s in plan.cohort.sites)
    unprotected = _exactly(open_plan or plan, exact_bins(plan))
    results: dict[str, Any] = {"local": _local(unprotected, hospitals, test, seed, device)}
    model = _train(unprotected, everyone, patients, seed, device)
    results["pooled"] = {"metrics": evaluate(plan, model, test, device)}
    sigma = noise_multiplier_of(plan)
    if sigma is not None and plan.training.sample_rate and plan.privacy.delta:
        secret = noise_seed(plan, seed, insecure_reproducible=insecure_reproducible)
        model = _train(plan, everyone, patients, secret, device)
        steps = plan.training.charged_steps
        epsilon = epsilon_of(sigma, plan.training.sample_rate, steps, plan.privacy.delta)
        metrics = evaluate(plan, model, test, device)
        results["pooled_dp"] = {"metrics": metrics, "epsilon": epsilon}
    return results


def _local(
    plan: StudyPlan, hospitals: Sequence[Hospital], test: PatientDataset, seed: int, device: str
) -> dict[str, Any]:
    pooled, own = [], {}
    for hospital in hospitals:
        patients = plan.cohort.expected_patients(hospital.name)
        model = _train(plan, hospital.train, patients, seed, device)
        pooled.append(evaluate(plan, model, test, device))
        own[hospital.name] = evaluate(plan, model, hospital.test, device)
    keys = [k for k in pooled[0] if all(k in m for m in pooled)]
    mean = {k: float(np.mean([m[k] for m in pooled])) for k in keys}
    return {"metrics": mean, "per_site": own}


def _train(
    plan: StudyPlan, data: PatientDataset, expected_patients: int, seed: int | None, device: str
) -> FlatVector:
    """Train on one dataset for as many steps as a site takes in the study.

    Of the server's optimiser its momentum alone holds: the rest corrects for distance.
    """
    site = SitePlan(plan.cohort.names[0], expected_patients)
    others = [s for s in plan.cohort.sites if s.name != site.name]
    plan = replace(
        plan,
        cohort=replace(plan.cohort, sites=(site, *others)),
        training=replace(plan.training, proximal_mu=0.0),
        optimizer=OptimizerPlan(momentum=plan.optimizer.momentum),
    )
    trainer = LocalTrainer(plan, site.name, data, noise_multiplier_of(plan), device=device)
    random = ChaChaRandom.from_system()
    if seed is not None:
        random = ChaChaRandom(simulation_key(seed, "baseline"))
    state = initial_state(plan.optimizer, initial_parameters(plan))
    for round_no in range(1, plan.training.rounds + 1):
        update = trainer.train_round(state.parameters, random, round_no).update
        state = apply_update(plan.optimizer, state, update)
    return state.parameters


def exact_bins(plan: StudyPlan) -> int:
    """Bins of histograms without noise: noise asks for few, exact metrics for many."""
    return plan.evaluation.bins if plan.evaluation.release == "exact" else EXACT_BINS


def evaluate(
    plan: StudyPlan, model: FlatVector, test: PatientDataset, device: str
) -> dict[str, float]:
    """Exact metrics of a model on test patients, from the counts that a study sums."""
    return evaluate_each(plan, [(model, test)], device)


def evaluate_each(
    plan: StudyPlan, parts: Sequence[tuple[FlatVector, PatientDataset]], device: str
) -> dict[str, float]:
    """The same of all test patients together, where each part of them has a model of its own."""
    bins = exact_bins(plan)
    counts = sum(exact_counts(plan, model, test, device, bins) for model, test in parts)
    return exact_metrics(_exactly(plan, bins), np.asarray(counts) / EXACT_UNIT)


def exact_counts(
    plan: StudyPlan, model: FlatVector, test: PatientDataset, device: str, bins: int
) -> Units:
    """The counts of test patients, in units of 1 / EXACT_UNIT patients."""
    plan = _exactly(plan, bins)
    trainer = LocalTrainer(plan, plan.cohort.names[0], test, None, device=device)
    outputs = trainer.predict(model, test.inputs)
    records = Records(test.patients, test.labels, test.inputs, outputs)
    return count_kind(plan).count(plan, records, EXACT_UNIT)


def exact_statistics(plan: StudyPlan, parts: Sequence[PatientDataset]) -> list[dict[str, Any]]:
    """What a statistics study counts, without noise."""
    kind, nothing = count_kind(plan), np.zeros(0, dtype=np.float32)
    counts = sum(
        kind.count(plan, Records(p.patients, p.labels, p.inputs, nothing), EXACT_UNIT)
        for p in parts
    )
    return list(kind.read(plan, np.asarray(counts) / EXACT_UNIT, 0.0).features)


def _exactly(plan: StudyPlan, bins: int) -> StudyPlan:
    exact = EvaluationPlan(release="exact", bins=bins)
    return replace(plan, privacy=PrivacyPlan(mode="none"), evaluation=exact)
