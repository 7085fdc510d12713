"""Fine-tuning after a study: a released model goes on learning from this hospital's own patients.

It is one more study of this hospital alone: a plan of mode `local` whose single round ends here.
So the policy allows it or not, the ledger reserves and charges it like any other, the sensitivity
guard measures it, and the budget of every patient holds over studies and fine-tuning together.
Nothing leaves the site; the noise protects patients from whoever sees what the model says.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.config import SiteConfig, SiteFolder
from client.consent import Books, People
from client.data.dataset import PatientDataset
from client.ledger import Charge
from client.noise import ChaChaRandom
from client.own_model import own_version, write_own_model
from client.people import PARTS, people_of, read_parts
from client.prediction import outputs_of
from client.prepare import ensure_prepared
from client.run import check_once
from client.training import LocalTrainer
from shared.counts import EXACT_UNIT, count_kind, exact_metrics
from shared.errors import ConfigError
from shared.evaluation_plan import EvaluationPlan
from shared.plan import OptimizerPlan, StudyPlan, TrainingPlan
from shared.privacy import costs_of, epsilon_of
from shared.privacy_plan import PrivacyPlan
from shared.released import ReleasedModel
from shared.statistics import Records


@dataclass(frozen=True)
class Tuning:
    """How to go on training; None takes what the study used.

    Attributes:
        epsilon: Promised to each patient for this fine-tuning, above 0.
        delta: Of that promise.
        steps: Noisy steps.
        sample_rate: Chance of each patient in each step.
        learning_rate: Above 0.
        clip_norm: Of a patient's gradient.
    """

    epsilon: float
    delta: float | None = None
    steps: int = 20
    sample_rate: float | None = None
    learning_rate: float | None = None
    clip_norm: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning did; `before` and `after` are about this site's patients and stay here.

    Attributes:
        folder: Of the site's own version.
        epsilon: Charged to each training patient.
        delta: To that epsilon.
        before: Metrics of the released model on the site's test patients; empty without any.
        after: Of the own version.
    """

    folder: Path
    epsilon: float
    delta: float
    before: dict[str, float]
    after: dict[str, float]


def tuning_plan(plan: StudyPlan, tuning: Tuning) -> StudyPlan:
    """The plan of a fine-tuning: the study's task, model and cohort, in mode `local`, one round.

    Raises:
        ConfigError: a value is out of range, or the study leaves one open and none was given.
    """
    training, privacy = plan.training, plan.privacy
    rate = tuning.sample_rate or training.sample_rate
    delta, clip = tuning.delta or privacy.delta, tuning.clip_norm or privacy.clip_norm
    missing = [n for n, v in (("--rate", rate), ("--delta", delta), ("--clip", clip)) if v is None]
    if missing:
        raise ConfigError(f"the study of this model has no value for {', '.join(missing)}; give it")
    return replace(
        plan,
        name=f"{plan.name[:57].rstrip('-')}-tuned",
        model=replace(plan.model, personal=()),
        training=TrainingPlan(
            rounds=1,
            local_steps=tuning.steps,
            learning_rate=tuning.learning_rate or training.learning_rate,
            sample_rate=rate,
            max_records_per_patient=training.max_records_per_patient,
            augment=training.augment,
        ),
        optimizer=OptimizerPlan(),
        privacy=PrivacyPlan("local", tuning.epsilon, delta, clip),
        evaluation=EvaluationPlan(),
    )


def finetune(
    folder: SiteFolder, config: SiteConfig, books: Books, model: ReleasedModel, tuning: Tuning
) -> Tuned:
    """Train a released model on, and keep the result as this site's own version of it.

    Where the study left layers to each site, it starts from what this site has of them. Started
    again, it costs again: the noise is drawn anew.

    Raises:
        PolicyError: the policy does not allow it, or a patient's budget does not; nothing was
            trained then.
        SensitivityError: the guard refuses the model.
        ConfigError: the data do not fit the model's plan.
    """
    model_here = own_version(folder, model) if model.plan.model.personal else None
    plan = tuning_plan(model.plan, tuning)
    books.allow(plan)
    check_once(plan, config.device)
    ensure_prepared(folder, config, plan, books.key)
    people = people_of(folder, config, books, plan)
    books.approve(plan, people)
    try:
        own = _train(folder, config, books, model_here or model, plan=plan, people=people)
    finally:
        books.withdraw(plan)  # closes the run; what was reserved and not charged is given back
    event = costs_of(plan)["training"]
    _, delta = plan.privacy.budget
    epsilon = epsilon_of(event.noise_multiplier, event.sample_rate, event.steps, delta)
    facts = {"made_by": "fine-tuning at this site", "epsilon": epsilon, "delta": delta}
    where = write_own_model(folder, model.key, plan, own.parameters, facts)
    test = read_parts(folder, config, books, plan, ("test",))
    before = metrics_of(model_here or model, test)
    return Tuned(where, epsilon, delta, before, metrics_of(own, test))


def _train(
    folder: SiteFolder,
    config: SiteConfig,
    books: Books,
    model: ReleasedModel,
    *,
    plan: StudyPlan,
    people: People,
) -> ReleasedModel:
    run = f"tuning-{secrets.token_hex(8)}"
    books.admit(plan, run, people)
    data = read_parts(folder, config, books, plan, PARTS["training"])
    event = costs_of(plan)["training"]
    trainer = LocalTrainer(
        plan,
        config.name,
        data,
        event.noise_multiplier,
        device=config.device,
        max_physical_records=config.max_physical_records,
    )
    charge = Charge(
        run=run,
        plan_sha256=plan.sha256,
        round_no=1,
        descriptor=hashlib.sha256(model.key.encode()).hexdigest(),
        noise_multiplier=event.noise_multiplier,
        alone=event.noise_multiplier,
        sample_rate=event.sample_rate,
        steps=event.steps,
        population=people["training"].digest,
    )
    books.ledger.reserve(charge, limit=event.steps)
    result = trainer.train_round(model.parameters, _randomness(config, run), 1)
    books.ledger.release(charge)
    return replace(model, parameters=(model.parameters + result.update).astype(np.float32))


def _randomness(config: SiteConfig, run: str) -> ChaChaRandom:
    key = config.random_key
    random = ChaChaRandom(bytes.fromhex(key)) if key else ChaChaRandom.from_system()
    return random.child(f"run {run}")


def metrics_of(model: ReleasedModel, test: PatientDataset) -> dict[str, float]:
    """Metrics on this site's test patients, without noise; for its own eyes alone."""
    if not test.patient_count:
        return {}
    plan = replace(model.plan, evaluation=EvaluationPlan(bins=256))
    records = Records(test.patients, test.labels, test.inputs, outputs_of(model, test.inputs))
    counts = count_kind(plan).count(plan, records, EXACT_UNIT)
    return exact_metrics(plan, counts / EXACT_UNIT)
