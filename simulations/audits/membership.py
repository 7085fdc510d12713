"""Who was in the training data? Shadow models against the model that training releases.

Many models are trained on random halves of the same patients by the product's own trainer; each
is attacked with all others as its shadows. Two attacks: LiRA (Carlini et al., "Membership
Inference Attacks From First Principles", S&P 2022, online, Gaussian fits of the margin) and RMIA
(Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024). Shown
beside the true-positive rate that the plan's privacy allows to anyone.

Illustration, never proof. Rates at 0.1 % false positives rest on few patients: see the intervals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.errors import ConfigError
from shared.models import initial_parameters
from shared.plan import SitePlan, StudyPlan
from shared.privacy import noise_multiplier_of
from simulations.audits.bounds import Mechanism, error_rates, most_power
from simulations.audits.canaries import candidates
from simulations.audits.finding import (
    AuditOptions,
    AuditTarget,
    Chart,
    Finding,
    Series,
    Table,
    Verdict,
    artefact,
)
from simulations.audits.measure import Floats, rate_interval
from simulations.audits.site_probe import changed, plain
from simulations.baselines import pool

MOST_PATIENTS = 400
MOST_MODELS, FEWEST_MODELS = 64, 12
BUDGET_S, QUICK_BUDGET_S = 60.0, 12.0
RATES = (0.001, 0.01)
GAMMA = 1.0
CONTROL_AUC = 0.6
CURVE = np.geomspace(1e-3, 1.0, 40)


@dataclass(frozen=True)
class Models:
    """What the attacker has of many models.

    Attributes:
        margins: Margin of every patient's true label under every model, (models, patients).
        inside: Who was in whose training data, (models, patients).
    """

    margins: Floats
    inside: NDArray[np.bool_]


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Attack the plan's model trained with and without privacy, and one that memorises.

    Raises:
        ConfigError: the plan promises no privacy.
    """
    if target.plan.task.kind not in ("binary", "statistics"):
        return [_not_testable(target.plan.task.kind)]
    plan = plain(target.plan)
    told, rate = noise_multiplier_of(plan), plan.training.sample_rate
    if told is None or rate is None:
        raise ConfigError("mode 'none' promises no privacy: there is nothing to audit")
    rng = np.random.default_rng(options.seed)
    data = _patients(target, rng)
    budget = QUICK_BUDGET_S if options.quick else BUDGET_S
    bare = _without_privacy(plan)
    kinds = {
        "private": Study(plan, told, data),
        "clear": Study(bare, None, data),
        "control": Study(_memorising(bare), None, _scrambled(data, rng)),
    }
    trained: dict[str, Models] = {}
    for number, (name, study) in enumerate(kinds.items()):

        def tick(share: float, number: int = number, name: str = name) -> None:
            options.progress(f"shadow models, {name}", (number + share) / len(kinds))

        trained[name] = _train_many(study, rng, budget, tick)
    options.progress("done", 1.0)
    mechanism = Mechanism(told, rate, plan.training.charged_steps, plan.privacy.promise[1])
    return _findings(trained, mechanism)


def _patients(target: AuditTarget, rng: np.random.Generator) -> PatientDataset:
    """The hospitals' training patients, or made-up ones; at most 400."""
    if not target.hospitals:
        return candidates(target.plan, MOST_PATIENTS, rng, labelled=True)
    whole = pool([h.train for h in target.hospitals])
    count = min(MOST_PATIENTS, whole.patient_count)
    return whole.select(np.sort(rng.choice(whole.patient_count, count, replace=False)))


def _without_privacy(plan: StudyPlan) -> StudyPlan:
    return changed(
        plan,
        privacy={"mode": "none", "noise_multiplier": None},
        evaluation={"release": "none", "epsilon": None, "delta": None, "noise_multiplier": None},
        optimizer={"name": "fedavg"},
        training={"proximal_mu": 0.0},
    )


def _memorising(plan: StudyPlan) -> StudyPlan:
    """A study that learns its patients by heart: the attacks must succeed on it."""
    table = plan.task.image is None
    model = replace(plan.model, name="mlp", hidden=(128,)) if table else plan.model
    training = {
        "rounds": 1, "spare_rounds": 0, "local_steps": 400 if table else 150,
        "learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.0, "sample_rate": 0.5,
    }  # fmt: skip
    return replace(changed(plan, training=training), model=model)


def _scrambled(data: PatientDataset, rng: np.random.Generator) -> PatientDataset:
    """The same patients with labels by the toss of a coin: nothing can be learnt but them."""
    labels = rng.integers(0, 2, data.patient_count)[data.patients]
    return replace(data, labels=labels.astype(np.int64))


@dataclass(frozen=True)
class Study:
    """What many models are trained by, and the patients of whom each gets a half."""

    plan: StudyPlan
    noise: float | None
    data: PatientDataset


def _train_many(
    study: Study, rng: np.random.Generator, budget: float, tick: Callable[[float], None]
) -> Models:
    """Train models on random halves until 64 are there or the time is spent; 12 at least."""
    began = time.process_time()
    margins, inside = [], []
    for number in range(MOST_MODELS):
        spent = time.process_time() - began
        if number >= FEWEST_MODELS and spent > budget:
            break
        tick(max(number / MOST_MODELS, min(1.0, spent / budget)))
        members = rng.random(study.data.patient_count) < 0.5
        margins.append(_margins(study, members, ChaChaRandom(rng.bytes(32))))
        inside.append(members)
    return Models(np.stack(margins), np.stack(inside))


def _margins(study: Study, members: NDArray[np.bool_], random: ChaChaRandom) -> Floats:
    """Train on the members, by the product's trainer, and look at everybody's margin."""
    plan, data = study.plan, study.data
    site = SitePlan(plan.cohort.names[0], max(1, int(members.sum())))
    others = tuple(s for s in plan.cohort.sites if s.name != site.name)
    plan = replace(plan, cohort=replace(plan.cohort, sites=(site, *others)))
    mine = data.select(np.flatnonzero(members))
    trainer = LocalTrainer(plan, site.name, mine, study.noise, "cpu")
    model = initial_parameters(plan)
    for round_no in range(1, plan.training.rounds + 1):
        model = model + trainer.train_round(model, random, round_no).update
    logits = trainer.predict(model, data.inputs).astype(np.float64)
    signed = np.where(data.labels == 1, logits, -logits)
    counts = np.bincount(data.patients, minlength=data.patient_count)
    summed = np.bincount(data.patients, weights=signed, minlength=data.patient_count)
    return np.asarray(summed / counts)


def lira(models: Models) -> Floats:
    """Log likelihood ratio of "in" against "out" for every model and patient."""
    scores = np.empty_like(models.margins)
    for target in range(len(models.margins)):
        others = np.arange(len(models.margins)) != target
        values, inside = models.margins[others], models.inside[others]
        mean_in, spread_in = _moments(values, inside)
        mean_out, spread_out = _moments(values, ~inside)
        x = models.margins[target]
        scores[target] = stats.norm.logpdf(x, mean_in, spread_in) - stats.norm.logpdf(
            x, mean_out, spread_out
        )
    return scores


def _moments(values: Floats, chosen: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Mean of each patient over the chosen models, and one spread for all: models are few."""
    count = np.maximum(chosen.sum(axis=0), 1)
    mean = np.sum(values * chosen, axis=0) / count
    square = np.sum((values - mean) ** 2 * chosen, axis=0) / np.maximum(count - 1, 1)
    common = float(np.mean(square))
    return mean, np.sqrt(0.5 * square + 0.5 * common) + 1e-9


def rmia(models: Models) -> Floats:
    """Share of other patients whose likelihood rose less over the shadows' than this one's."""
    likelihood = 1 / (1 + np.exp(-np.clip(models.margins, -50, 50)))
    scores = np.empty_like(likelihood)
    for target in range(len(likelihood)):
        others = np.arange(len(likelihood)) != target
        usual = np.maximum(likelihood[others].mean(axis=0), 1e-12)
        ratio = likelihood[target] / usual
        order = np.sort(ratio)
        scores[target] = np.searchsorted(order, ratio / GAMMA, side="right") / len(ratio)
        scores[target] += 1e-9 * ratio  # ties
    return scores


@dataclass(frozen=True)
class _Attack:
    name: str
    model: str
    scores: Floats
    inside: NDArray[np.bool_]

    @property
    def auc(self) -> float:
        return float(roc_auc_score(self.inside, self.scores))

    def power(self, rate: float) -> tuple[float, tuple[float, float], float]:
        """True-positive rate at a false-positive rate, its 95 % interval, and the threshold."""
        out = np.sort(self.scores[~self.inside])
        threshold = float(out[min(len(out) - 1, math.ceil(len(out) * (1 - rate)))])
        inner = self.scores[self.inside]
        hits = int(np.sum(inner > threshold))
        return hits / len(inner), rate_interval(hits, len(inner), 0.95), threshold

    def curve(self) -> Series:
        points = tuple((float(r), self.power(float(r))[0]) for r in CURVE)
        return Series(f"{self.name}, {self.model}", points)


_MODELS = {
    "private": "with the plan's privacy",
    "clear": "without privacy",
    "control": "random labels learnt by heart",
}


def _findings(trained: dict[str, Models], mechanism: Mechanism) -> list[Finding]:
    attacks = [
        _Attack(name, kind, attack(models).reshape(-1), models.inside.reshape(-1))
        for kind, models in trained.items()
        for name, attack in (("LiRA", lira), ("RMIA", rmia))
    ]
    table, chart = _table(attacks, mechanism), _chart(attacks, mechanism)
    by = {(a.name, a.model): a for a in attacks}
    findings = [_below_ceiling(by[n, "private"], mechanism) for n in ("LiRA", "RMIA")]
    first = replace(findings[0], tables=(table,), charts=(chart,))
    return [first, findings[1], _control(by["LiRA", "control"])]


def _table(attacks: list[_Attack], mechanism: Mechanism) -> Table:
    rows = []
    for attack in attacks:
        cells: list[str | float] = [attack.name, _MODELS[attack.model], round(attack.auc, 3)]
        for rate in RATES:
            power, (low, high), _ = attack.power(rate)
            cells.append(f"{power:.2%} ({low:.2%} to {high:.2%})")
        rows.append(tuple(cells))
    allowed = [f"{most_power(mechanism, rate):.2%}" for rate in RATES]
    rows.append(("any attack", f"allowed by epsilon {mechanism.epsilon:.2f}", None, *allowed))  # type: ignore[arg-type]
    columns = ("attack", "model", "AUC", *(f"true positives at {r:.1%} false" for r in RATES))
    return Table("Membership inference", columns, tuple(rows))


def _chart(attacks: list[_Attack], mechanism: Mechanism) -> Chart:
    ceiling = Series(
        "allowed by the plan", tuple((float(r), most_power(mechanism, float(r))) for r in CURVE)
    )
    lines = tuple(a.curve() for a in attacks if a.name == "LiRA")
    return Chart(
        "Membership inference", "false-positive rate", "true-positive rate",
        (*lines, ceiling), log_x=True, log_y=True,
    )  # fmt: skip


def _below_ceiling(attack: _Attack, mechanism: Mechanism) -> Finding:
    power, interval, _ = attack.power(RATES[1])
    thresholds = [attack.power(r)[2] for r in (0.005, 0.01, 0.05, 0.2)]
    rates = error_rates(attack.scores, attack.inside, thresholds, 0.05)
    beyond = any(most_power(mechanism, fpr) < 1 - fnr for fpr, fnr in rates)
    verdict: Verdict = "violated" if beyond else "not refuted"
    return Finding(
        probe="membership",
        name=f"{attack.name.lower()}-private",
        claim="no attack on the released model finds members more often than its privacy allows",
        statistic=f"true-positive rate of {attack.name} at 1 % false positives",
        value=power,
        interval=interval,
        alpha=0.05,
        assumptions=(
            "attacks on different models and patients count as independent; they nearly are",
            "the attacker sees the final model alone, and knows half of the patients' fate",
        ),
        verdict=verdict,
        expected=most_power(mechanism, RATES[1]),
        explanation="The expected value is the ceiling that (epsilon, delta) and the mechanism "
        "leave to any attack; a weak attack below it proves nothing.",
        details={"auc": attack.auc, "trials": len(attack.scores)},
        artefact_sha256=artefact(attack.scores, attack.inside),
    )


def _not_testable(kind: str) -> Finding:
    return Finding(
        probe="membership",
        name="lira-private",
        claim="no attack on the released model finds members more often than its privacy allows",
        statistic="",
        value=None,
        interval=None,
        alpha=0.05,
        assumptions=(),
        verdict="not testable",
        explanation=f"These attacks are written for binary tasks; the plan's is {kind}.",
    )


def _control(attack: _Attack) -> Finding:
    works = attack.auc > CONTROL_AUC
    return Finding(
        probe="membership",
        name="control-memorising",
        claim="the attack finds members of a model that learnt its patients by heart (control)",
        statistic="area under the curve of LiRA",
        value=attack.auc,
        interval=None,
        alpha=0.05,
        assumptions=(),
        verdict="not refuted" if works else "not testable",
        expected=CONTROL_AUC,
        explanation=""
        if works
        else "The attack does not even work here, so its failure on the "
        "private model says nothing.",
        artefact_sha256=artefact(attack.scores, attack.inside),
    )
