"""A site with n patients against the same site with n - 1, told apart from one release?

The real training runs many times on both; half of the releases teach a classifier, the other half
try it. Differential privacy bounds how well any classifier can do. Whatever depends on the exact
number of patients (a divisor, a batch size, a weight) shows here, though no sensitivity was
broken: neighbours of 150 and 149 patients were told apart in one step where the divisor was
int(n q), at a claimed epsilon of 0.14.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.plan import StudyPlan
from simulations.audits.bounds import Mechanism, declared_bound, error_rates, most_power
from simulations.audits.finding import AuditOptions, AuditTarget, Finding, Table, artefact
from simulations.audits.measure import Floats
from simulations.audits.one_run import canary_data, canary_plan
from simulations.audits.site_probe import (
    ProbedSite,
    changed,
    plain,
    system_randomness,
    write_probed_sites,
)

INPUTS = 2000
RELEASES, QUICK_RELEASES = 400, 200
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""False-positive rates, on the learning half, at which the classifier is tried."""


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Try to tell n patients from n - 1.

    Raises:
        ConfigError: the plan promises no privacy.
    """
    count = QUICK_RELEASES if options.quick else RELEASES
    study, mechanism = canary_plan(plain(target.plan), INPUTS)
    study = changed(study, training={"rounds": count + 1}, privacy={"epsilon": 1e6})
    step = Mechanism(mechanism.noise, mechanism.rate, 1, mechanism.delta)
    patients = crowd_size(mechanism.rate)
    with system_randomness(options.seed):
        rows = []
        for number, size in enumerate((patients - 1, patients)):
            options.progress(f"{size} patients", number / 2)
            rows.append(_features(study, size, patients, count))
    options.progress("done", 1.0)
    return [_judge(rows[0], rows[1], step, patients, options.alpha)]


def crowd_size(rate: float) -> int:
    """About 25 expected draws, and a count at which n q passes a whole number."""
    expected = max(1, min(25, int(200 * rate)))
    return math.ceil(expected / rate)


def _features(study: StudyPlan, size: int, most: int, count: int) -> Floats:
    """What a classifier may look at, of each release: (releases, features)."""
    start = np.zeros(INPUTS + 1, dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        members = np.arange(size, dtype=np.int64)
        one = canary_data(members[:1], INPUTS)
        folders = write_probed_sites(
            Path(work), study, one, first=canary_data(members, INPUTS), at_once=64
        )
        probe = ProbedSite(folders[study.cohort.names[0]], study, "audit", start, None)
        rows = [_look(probe.release().sums.astype(np.float64), most) for _ in range(count)]
        probe.close()
    return np.array(rows)


def _look(sums: Floats, most: int) -> list[float]:
    rest = sums[most:]
    return [
        float(sums[most - 1]),
        float(sums[: most - 1].sum()),
        float(np.log(np.mean(rest**2))),
        float(rest.mean()),
        float(np.log(np.mean(np.abs(rest)))),
        float(np.abs(rest).max()),
    ]


def _judge(without: Floats, whole: Floats, step: Mechanism, patients: int, alpha: float) -> Finding:
    half = len(whole) // 2
    centre = np.concatenate([without[:half], whole[:half]])
    scale = centre.std(axis=0) + 1e-12

    def wide(x: Floats) -> Floats:
        z = (x - centre.mean(axis=0)) / scale
        return np.concatenate([z, z**2], axis=1)

    weights = _learn(wide(without[:half]), wide(whole[:half]))
    learnt = wide(without[:half]) @ weights
    thresholds = np.quantile(learnt, 1 - np.array(LEVELS)).tolist()
    scores = np.concatenate([wide(without[half:]) @ weights, wide(whole[half:]) @ weights])
    inside = np.repeat([False, True], [len(without) - half, len(whole) - half])
    ps = error_rates(scores, inside, thresholds, alpha)
    refuted = any(most_power(step, fpr) < 1 - fnr for fpr, fnr in ps)
    rows = tuple(
        (
            round(level, 3),
            round(float(np.mean(scores[~inside] > t)), 4),
            round(float(np.mean(scores[inside] > t)), 4),
            round(most_power(step, float(np.mean(scores[~inside] > t))), 4),
        )
        for level, t in zip(LEVELS, thresholds, strict=True)
    )
    accuracy = max(
        0.5 * float(np.mean(scores[~inside] <= t) + np.mean(scores[inside] > t)) for t in thresholds
    )
    allowed = 0.5 * max(1 - f + most_power(step, f) for f in np.linspace(0, 1, 201))
    columns = ("aimed false positives", "false positives", "true positives", "allowed at most")
    return Finding(
        probe="neighbour",
        name="n-against-n-minus-1",
        claim=f"one release of {patients} patients and one of {patients - 1} can hardly be told "
        f"apart (epsilon {step.epsilon:.3f} a step)",
        statistic="best accuracy of a classifier on releases that it did not learn from",
        value=accuracy,
        interval=None,
        alpha=alpha,
        assumptions=("releases are independent of each other",),
        verdict="violated" if refuted else "not refuted",
        expected=allowed,
        explanation="The limit is the best accuracy that the accounted step allows to anyone; "
        "the verdict rests on exact intervals of the error rates, not on this number.",
        tables=(Table("Classifier on held-back releases", columns, rows),),
        details={"epsilon_lower_bound": declared_bound(ps, step), "releases": 2 * len(whole)},
        artefact_sha256=artefact(without, whole),
    )


def _learn(out: Floats, inner: Floats) -> NDArray[np.float64]:
    """Logistic regression by a few ridge-regularised Newton steps."""
    x = np.concatenate([out, inner])
    y = np.repeat([0.0, 1.0], [len(out), len(inner)])
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    w = np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        slope = x.T @ (y - p) - w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(w))
        w += np.linalg.solve(curvature, slope)
    return np.asarray(w[:-1])
