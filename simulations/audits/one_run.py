"""Lower bounds of epsilon from canaries in one training run of the plan.

The study is the plan's own noise, rate and number of steps on a linear model whose inputs are the
canaries: each has a coordinate of its own and a gradient far above the clip norm, and was put
into the hospital's data by the toss of a coin. The attacker sees every step's sum, as the
accountant assumes. In mode `distributed` that is the sum of as many sites as the promise counts
on. A bound above the claimed epsilon refutes the claim; one below it proves nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from client.data.dataset import PatientDataset
from shared.errors import ConfigError
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from shared.task_plan import FeaturePlan, TaskPlan
from simulations.audits.bounds import (
    Bits,
    Mechanism,
    Scores,
    curve_bound,
    declared_bound,
    error_rates,
    gaussian_bound,
    one_run_bound,
)
from simulations.audits.finding import (
    AuditOptions,
    AuditTarget,
    Finding,
    Table,
    Verdict,
    artefact,
)
from simulations.audits.site_probe import (
    ProbedSite,
    changed,
    plain,
    system_randomness,
    write_probed_sites,
)

CANARIES, QUICK_CANARIES = 6000, 2000
MOST_STEPS = 200
STRENGTH = 1000.0
QUIET, QUIET_STEPS = 2e-3, 4
CONFIDENCE = 0.95
THRESHOLDS = 12


@dataclass(frozen=True)
class Observed:
    """One training run as the attacker saw it.

    Attributes:
        sums: Each step's sum at the canaries' coordinates, over the clip norm, (steps, canaries).
        inside: Which canaries were in the data.
        amplitudes: What canaries added when they were drawn, noise turned down, (draws,).
        claimed: What the accountant was told.
    """

    sums: NDArray[np.float32]
    inside: Bits
    amplitudes: Scores
    claimed: Mechanism


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Attack one run, and return one finding per bound.

    Raises:
        ConfigError: the plan promises no privacy.
    """
    plan = plain(target.plan)
    count = QUICK_CANARIES if options.quick else CANARIES
    rng = np.random.default_rng(options.seed)
    with system_randomness(options.seed):
        seen = observe(plan, count, rng, options)
    options.progress("bounds", 0.7)
    findings = judge(seen, rng, options)
    options.progress("done", 1.0)
    return findings


def canary_plan(plan: StudyPlan, count: int) -> tuple[StudyPlan, Mechanism]:
    """The plan's noise, rate and steps on a linear model with `count` inputs, and what it claims.

    Of more than 200 steps the first 200 are attacked, against what they cost.
    """
    told, rate = noise_multiplier_of(plan), plan.training.sample_rate
    if told is None or rate is None:
        raise ConfigError("the plan promises no privacy")
    steps = min(plan.training.charged_steps, MOST_STEPS)
    mechanism = Mechanism(told, rate, steps, plan.privacy.promise[1])
    features = tuple(FeaturePlan(f"canary-{i}", minimum=-1.0, maximum=1.0) for i in range(count))
    training = {"rounds": steps + QUIET_STEPS, "local_steps": 1, "spare_rounds": 0}
    still = {"momentum": 0.0, "weight_decay": 0.0, "proximal_mu": 0.0}
    longer = mechanism.with_noise(told).epsilon * 1.01 + 0.5
    expected = min(site.expected_patients for site in plan.cohort.sites)
    step = plan.training.learning_rate * plan.privacy.promise[2] / (rate * expected)
    reach = {"bits": 32, "clip_range": max(1.0, 16 * (told + 1) * step)}
    if plan.privacy.mode == "distributed":
        reach = {"bits": 32, "clip_range": 1.0}
    study = changed(
        plan,
        training=training | still,
        model={"name": "logistic", "hidden": (), "init": "uniform"},
        privacy={"epsilon": 2 * longer, "noise_multiplier": told},
        optimizer={"name": "fedavg"},
        secure_sum=reach,
        evaluation={"release": "none"},
    )
    task = TaskPlan(label=plan.task.label, features=features)
    return replace(study, task=task), mechanism


def observe(
    plan: StudyPlan, count: int, rng: np.random.Generator, options: AuditOptions
) -> Observed:
    """Run the canaries' study once with the accounted noise, and a few steps without."""
    study, claimed = canary_plan(plan, count)
    inside = rng.random(count) < 0.5
    cohort = study.cohort
    honest = cohort.threshold - cohort.colluders if study.privacy.mode == "distributed" else 1
    sites = cohort.names[:honest]
    start = np.zeros(count + 1, dtype=np.float32)
    sums = np.zeros((claimed.steps, count), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        data = [canary_data(np.flatnonzero(inside), count), canary_data(np.arange(1), count)]
        folders = write_probed_sites(Path(work), study, data[1], runs=1, at_once=64, first=data[0])
        for number, name in enumerate(sites):
            probe = ProbedSite(folders[name], study, "audit-run", start, None)
            for step in range(claimed.steps):
                seen = probe.release().sums[:count]
                sums[step] += seen
                options.progress("training", 0.6 * (number + step / claimed.steps) / len(sites))
            probe.close()
        amplitudes = _amplitudes(folders[sites[0]], study, start, inside)
    # The other sites hold one patient each: canary 0, which is left out.
    return Observed(sums[:, 1:], inside[1:], amplitudes, claimed)


def canary_data(members: NDArray[np.int64], count: int) -> PatientDataset:
    """One patient with one record for each canary: its own coordinate, far too strong."""
    inputs = np.zeros((len(members), count), dtype=np.float32)
    inputs[np.arange(len(members)), members] = STRENGTH
    labels = np.zeros(len(members), dtype=np.int64)
    names = tuple(f"canary-{i}" for i in members.tolist())
    return PatientDataset(inputs, labels, np.arange(len(members)), names)


def _amplitudes(folder: Path, study: StudyPlan, start: NDArray[np.float32], inside: Bits) -> Scores:
    """What a drawn canary adds, read with the noise turned down."""
    probe = ProbedSite(folder, study, "audit-run", start, QUIET)
    rows = [
        probe.release(round_no=study.training.rounds - 1 - k).sums[: len(inside)]
        for k in range(QUIET_STEPS)
    ]
    probe.close()
    values = np.stack(rows)[:, inside].astype(np.float64)
    return values[values > 0.5]


def scores_of(sums: NDArray[np.float32], claimed: Mechanism) -> Scores:
    """Each canary's log likelihood ratio under the claimed mechanism, (canaries,)."""
    shift = (sums.astype(np.float64) - 0.5) / claimed.noise**2
    q = claimed.rate
    if q >= 1:
        return np.asarray(shift.sum(axis=0))
    return np.asarray(np.logaddexp(math.log1p(-q), math.log(q) + shift).sum(axis=0))


def thresholds_of(claimed: Mechanism, rng: np.random.Generator, count: int = 20_000) -> Scores:
    """Thresholds fixed before the run is seen: spread over both ends of simulated scores."""
    scores = []
    for inside in (False, True):
        sums = claimed.noise * rng.standard_normal((claimed.steps, count // 2))
        if inside:
            sums += rng.random(sums.shape) < claimed.rate
        scores.append(scores_of(sums.astype(np.float32), claimed))
    out, inner = scores
    ends = [np.quantile(out, 1 - np.geomspace(1e-3, 0.3, 6)),
            np.quantile(inner, np.geomspace(1e-3, 0.3, 6))]  # fmt: skip
    return np.asarray(np.concatenate(ends))


def judge(seen: Observed, rng: np.random.Generator, options: AuditOptions) -> list[Finding]:
    """All bounds at 95 % confidence, side by side."""
    claimed, alpha = seen.claimed, 1 - CONFIDENCE
    scores = scores_of(seen.sums, claimed)
    rates = error_rates(scores, seen.inside, thresholds_of(claimed, rng).tolist(), alpha)
    any_dp = ("the canaries' coins are fair and independent",)
    apart = (*any_dp, "canaries' scores are independent of each other")
    declared = (*apart, "the sampling rate and the number of steps are as declared")
    options.progress("bounds", 0.75)
    bounds = [
        _Bound("one-run", "Steinke, Nasr, Jagielski 2023, theorem 5.2",
               one_run_bound(scores, seen.inside, claimed.delta, alpha), any_dp),
        _Bound("one-run-curve", "Mahloujifar, Melis, Chaudhuri 2024, algorithm 3, declared curve",
               curve_bound(scores, seen.inside, claimed, alpha),
               (*any_dp, "the sampling rate and the number of steps are as declared")),
        _Bound("gaussian", "Clopper and Pearson with Gaussian DP, Nasr et al. 2023",
               gaussian_bound(rates, claimed.delta), apart),
        _Bound("declared", "Clopper and Pearson with the declared loss distribution",
               declared_bound(rates, claimed), declared),
    ]  # fmt: skip
    rows = tuple((b.name, b.source, round(b.value, 2)) for b in bounds)
    table = Table(f"Claimed epsilon {claimed.epsilon:.2f}", ("bound", "source", "epsilon"), rows)
    digest = artefact(seen.sums, seen.inside)
    return [*(_finding(b, claimed, digest, table) for b in bounds), component(seen, digest)]


@dataclass(frozen=True)
class _Bound:
    name: str
    source: str
    value: float
    assumptions: tuple[str, ...]


def _finding(bound: _Bound, claimed: Mechanism, digest: str, table: Table) -> Finding:
    verdict: Verdict = "violated" if bound.value > claimed.epsilon else "not refuted"
    return Finding(
        probe="one_run",
        name=bound.name,
        claim=f"training keeps epsilon {claimed.epsilon:.3f} at delta {claimed.delta:g}",
        statistic=f"largest epsilon that an attack on one run refutes; {bound.source}",
        value=bound.value,
        interval=(bound.value, math.inf),
        alpha=1 - CONFIDENCE,
        assumptions=bound.assumptions,
        verdict=verdict,
        expected=claimed.epsilon,
        explanation="A lower bound: the true epsilon is at least this, with 95 % confidence.",
        tables=(table,),
        artefact_sha256=digest,
    )


def component(seen: Observed, digest: str) -> Finding:
    """Epsilon of the noise, sensitivity and rate that were measured, each with an interval.

    The three intervals hold together with 95 % confidence. It sees no fault in the noise's shape
    or independence, and is never to be used alone.
    """
    claimed = seen.claimed
    tail = (1 - CONFIDENCE) / 6
    out = seen.sums[:, ~seen.inside].astype(np.float64)
    energy, count = float(np.sum(out**2)), out.size
    low, high = np.sqrt(energy / stats.chi2.isf([tail, 1 - tail], count))
    z = float(stats.norm.isf(tail))
    amplitude = float(seen.amplitudes.mean())
    reach = z * float(seen.amplitudes.std()) / math.sqrt(len(seen.amplitudes)) + 1e-4
    inner = seen.sums[:, seen.inside].astype(np.float64)
    mean = float(inner.mean()) / amplitude
    spread = z * float(inner.std()) / amplitude / math.sqrt(inner.size)
    rates = [claimed.rate] * 2 if claimed.rate >= 1 else [mean - spread, mean + spread]
    ends = [
        Mechanism(float(noise) / size, min(1.0, max(rate, 1e-6)), claimed.steps, claimed.delta)
        for noise, size, rate in (
            (high, amplitude - reach, rates[0]), (low, amplitude + reach, rates[1])
        )
    ]  # fmt: skip
    interval = (ends[0].epsilon, ends[1].epsilon)
    rows: Sequence[tuple[str, float, float, float]] = (
        ("noise over clip norm", float(low), float(high), claimed.noise),
        ("part of one patient", amplitude - reach, amplitude + reach, 1.0),
        ("sampling rate", rates[0], rates[1], claimed.rate),
    )
    shown = tuple((n, round(a, 4), round(b, 4), round(c, 4)) for n, a, b, c in rows)
    found = Mechanism(math.sqrt(energy / count) / amplitude, min(1.0, mean), claimed.steps,
                      claimed.delta)  # fmt: skip
    return Finding(
        probe="one_run",
        name="component",
        claim=f"training keeps epsilon {claimed.epsilon:.3f} at delta {claimed.delta:g}",
        statistic="epsilon of the measured noise, sensitivity and sampling rate",
        value=found.epsilon,
        interval=interval,
        alpha=1 - CONFIDENCE,
        assumptions=("the noise is Gaussian and independent", "the log of steps is honest"),
        verdict="violated" if interval[0] > claimed.epsilon else "not refuted",
        expected=claimed.epsilon,
        explanation="Two-sided; it says what the parts amount to, not that the whole is right.",
        tables=(Table("Measured parts", ("part", "at least", "at most", "accounted"), shown),),
        artefact_sha256=digest,
    )
