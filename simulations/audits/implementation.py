"""Does what leaves a site match what the accountant was told?

The product's own path is run, from a site's folder to the vector that would be masked, on patients
whose gradients the auditor computes alone. Checked are the properties that the accounting rests
on: sensitivity, scale, shape and independence of the noise, how patients are drawn, and that the
ledger charges every step before it leaves. No probe knows of any particular fault.

A claim counts as violated when a check fails by far, or when it fails twice, the second time on
fresh randomness; so the error rate of the whole family stays below `AuditOptions.alpha`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from client.guard import check_sensitivity
from shared.config import require
from shared.errors import FedwardError, PolicyError, SensitivityError
from shared.plan import StudyPlan
from simulations.audits.accounting import epsilon
from simulations.audits.canaries import distinct_canaries, live_start
from simulations.audits.count_probes import count_checks
from simulations.audits.edge_probes import edge_checks, granularity_check, pairs_check
from simulations.audits.finding import AuditOptions, AuditTarget, Finding, Verdict, artefact
from simulations.audits.measure import Check, Floats, smallest, two_sided, two_sided_all
from simulations.audits.noise_probes import noise_checks
from simulations.audits.own_counts import own_count_checks
from simulations.audits.own_state_probes import control_checks, own_layer_checks
from simulations.audits.regimes import (
    DrawRun,
    Effort,
    NoiseRun,
    Setting,
    draw_run,
    noise_run,
    setting_of,
    several_draws,
    several_run,
)
from simulations.audits.sampling_probes import contribution_checks, draw_checks
from simulations.audits.site_probe import (
    ProbedSite,
    changed,
    plain,
    system_randomness,
    write_probed_sites,
)
from simulations.audits.vote_probes import vote_checks

FIRST = 0.004
"""A check that fails at this level is repeated on fresh randomness."""

ASSUMPTIONS = (
    "the audited site runs this version of the code; a site that runs another is not seen",
    "the secure sum is taken out: what it hides is not part of this audit",
    "the task is made binary and images are not varied: gradients must be known to the auditor",
)
DENSE = 0.5
ACCOUNT_SLACK = 1.01


@dataclass(frozen=True)
class _Stage:
    checks: tuple[Check, ...]
    digest: str


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Probe the training and noise path of the plan.

    Returns:
        One finding per property.

    Raises:
        ConfigError: the plan promises no privacy.
    """
    plan = plain(target.plan) if target.plan.learns else target.plan
    require(
        plan.privacy.mode != "none", "mode 'none' promises no privacy: there is nothing to audit"
    )
    with system_randomness(options.seed):
        first = _stage(target.plan, plan, options, 0)
        far = options.alpha / (2 * len(first.checks))
        again = [c for c in first.checks if c.p is not None and far < c.p < FIRST]
        second = _stage(target.plan, plan, options, 1) if again else None
    return [_judge(check, first, second, far) for check in first.checks]


def _judge(check: Check, first: _Stage, second: _Stage | None, far: float) -> Finding:
    verdict: Verdict = "not refuted" if check.p is not None else "not testable"
    p = check.p
    if p is not None and p <= far:
        verdict = "violated"
    elif p is not None and p < FIRST and second is not None:
        repeated = next((c.p for c in second.checks if c.name == check.name), None)
        if repeated is not None and repeated < far / FIRST:
            verdict = "violated"
    return Finding(
        probe="implementation",
        name=check.name,
        claim=check.claim,
        statistic=check.statistic,
        value=check.value,
        interval=check.interval,
        alpha=2 * far,
        assumptions=ASSUMPTIONS + check.assumptions,
        verdict=verdict,
        explanation=check.note,
        expected=check.expected,
        tables=check.tables,
        charts=check.charts,
        details={"p": p},
        artefact_sha256=first.digest,
    )


def _stage(own: StudyPlan, plan: StudyPlan, options: AuditOptions, number: int) -> _Stage:
    """All checks once, on fresh randomness; `plan` is `own` on the auditor's stand-in."""
    seed = [] if options.seed is None else [options.seed, number]
    rng = np.random.default_rng(seed or None)
    effort = Effort(30, 15, 30, 8) if options.quick else Effort()
    parts = parts_of(own, plan, rng, effort)
    done, whole = 0.0, float(sum(weight for _, weight, _ in parts))
    checks: list[Check] = []
    digests: list[bytes] = []
    for name, weight, part in parts:
        options.progress(name, done / whole)
        found, digest = _guarded(name, part)
        checks += found
        digests.append(digest.encode())
        done += weight
    options.progress("done", 1.0)
    return _Stage(tuple(checks), artefact(*digests))


Part = Callable[[], tuple[list[Check], str]]


def parts_of(
    own: StudyPlan, plan: StudyPlan, rng: np.random.Generator, effort: Effort
) -> list[tuple[str, float, Part]]:
    """What is probed, each with its share of the work; `plan` is `own` on the stand-in."""
    if not plan.learns:
        return [("counts", 1.0, lambda: count_checks(plan, None, rng, effort))]
    setting = setting_of(plan, rng, effort)
    parts: list[tuple[str, float, Part]] = [
        ("guard", 1.0, lambda: (_guard(plan), "")),
        ("accounting", 1.0, lambda: (_limits(setting), "")),
        ("noise", 4.0, lambda: _noise(setting)),
        ("draws", 3.0, lambda: _draws(setting)),
        ("edges", 2.0, lambda: (edge_checks(setting), "")),
    ]
    if setting.rate != DENSE:
        parts.append(("crowd", 3.0, lambda: _crowd(setting)))
    if plan.training.local_steps > 1:
        parts.append(("several steps", 2.0, lambda: _several(setting)))
    if plan.evaluation.release == "noised":
        parts.append(("counts", 2.0, lambda: count_checks(plan, setting, rng, effort)))
        parts.append(("own counts", 0.1, lambda: (own_count_checks(own, rng), "")))
    if own.privacy.adapts:
        parts.append(("votes", 1.0, lambda: (vote_checks(setting), "")))
    if own.model.personal:
        parts.append(("own layers", 1.0, lambda: (own_layer_checks(own, setting), "")))
    if own.optimizer.name == "scaffold" and setting.step_plan.privacy.mode == "local":
        parts.append(("control variates", 1.0, lambda: (control_checks(setting), "")))
    return parts


def _guarded(name: str, part: Part) -> tuple[list[Check], str]:
    """A product that fails on the auditor's patients did not keep its word either."""
    try:
        return part()
    except FedwardError as error:
        check = Check(
            f"{name}-runs",
            "an approved study runs to its end",
            "whether the site went on",
            0.0,
            note=f"The site refused: {error}",
        )
        return [check], ""


def _guard(plan: StudyPlan) -> list[Check]:
    p, note, value = 1.0, "", None
    try:
        value = check_sensitivity(plan, "cpu").sensitivity
    except SensitivityError as error:
        p, note = 0.0, str(error)
    return [
        Check(
            "guard",
            "the site's own sensitivity guard lets this plan pass",
            "largest move of the sum when one made-up patient is left out, over the clip norm",
            p, value, 1.0, note=note,
        )
    ]  # fmt: skip


def _limits(setting: Setting) -> list[Check]:
    """What the noise costs by the auditor's own accounting, and that a run ends where it must."""
    plan = setting.plan
    promised, delta, _ = plan.privacy.promise
    cost = epsilon(setting.told, setting.rate, plan.training.charged_steps, delta)
    checks = [
        Check(
            "epsilon-of-plan",
            "the plan's noise keeps the promised epsilon over all charged steps",
            "epsilon by the auditor's own accountant (PLD)",
            1.0 if cost <= promised * ACCOUNT_SLACK else 0.0,
            cost, promised,
        )
    ]  # fmt: skip
    short = changed(setting.step_plan, training={"rounds": 2})
    canaries = distinct_canaries(short, live_start(short), 6, setting.rng)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), short, canaries.data, runs=1)
        folder = folders[short.cohort.names[0]]
        checks += _ends(ProbedSite(folder, short, "audit-end", live_start(short), None))
    return checks


def _ends(probe: ProbedSite) -> list[Check]:
    probe.release()
    try:
        again = probe.release(round_no=1, salt=b"another descriptor").charged
    except PolicyError:
        again = 2
    probe.restart()
    probe.release(round_no=2)
    beyond = 1.0
    try:
        probe.release(round_no=3)
    except PolicyError:
        beyond = 0.0
    probe.close()
    return [
        Check(
            "round-charged-again",
            "a round that is trained again is refused or charged again",
            "steps charged after two trainings of one round",
            1.0 if again >= 2 else 0.0, float(again), 2.0,
        ),
        Check(
            "budget-ends",
            "a run stops when the steps that were paid for are taken, restarts included",
            "rounds released beyond those paid for",
            1.0 if not beyond else 0.0, beyond, 0.0,
        ),
    ]  # fmt: skip


def _noise(setting: Setting) -> tuple[list[Check], str]:
    seen = noise_run(setting)
    checks = noise_checks(seen.alone) + noise_checks(seen.live, "live-noise", seen.lively)
    checks += _amounts(seen, setting.rate) + _charges(seen, setting)
    fine = (seen.raw, seen.deviation, seen.grid)
    checks += [granularity_check(*fine), pairs_check(*fine)]
    return checks, artefact(seen.alone.values, seen.live.values, seen.amounts)


def _amounts(seen: NoiseRun, rate: float) -> list[Check]:
    """Sums of patients under the accounted noise: mean, spread, and no tie to the noise."""
    mean = seen.crowd * rate
    spread = np.sqrt(seen.crowd * rate * (1 - rate) + seen.amount_spread**2)
    n = len(seen.amounts)
    z = (seen.amounts - mean) / spread
    centred = two_sided_all(z.mean(axis=0) * math.sqrt(n))
    energy = np.mean(z**2, axis=0)
    excess = seen.crowd * rate * (1 - rate) * (1 - 6 * rate * (1 - rate)) / spread**4
    spreads = two_sided_all((energy - 1) / np.sqrt((2 + excess) / n))
    load = np.sum(seen.amounts, axis=1)
    rest = np.mean(seen.live.values**2, axis=1)
    tie = stats.spearmanr(load, rest).pvalue if np.ptp(load) > 0 else 1.0
    return [
        Check(
            "live-amount",
            "patients add up as accounted, under the accounted noise",
            "largest mean amount of one kind of patients over the expected one",
            smallest([smallest(centred), smallest(spreads)]),
            float(np.max(seen.amounts.mean(axis=0) / mean)), 1.0,
        ),
        Check(
            "noise-independent-of-batch",
            "the noise does not depend on how many patients were drawn",
            "p of the rank correlation of noise energy with the amount of patients",
            float(tie),
        ),
    ]  # fmt: skip


def _charges(seen: NoiseRun, setting: Setting) -> list[Check]:
    _, delta, _ = setting.step_plan.privacy.promise
    short = int(np.max(seen.charged[:, 1] - seen.charged[:, 0]))
    receipt = [
        epsilon(setting.told, setting.rate, steps, delta) / max(claimed, 1e-9)
        for claimed, _, steps in seen.receipts
    ]
    steps = [told - taken for _, told, taken in seen.receipts]
    books = [
        epsilon(setting.told, setting.rate, steps, delta) / max(held, 1e-9)
        for held, steps in seen.spent
    ]
    return [
        Check(
            "charged-before-release",
            "every step is charged on disk before its sum is handed over",
            "most steps released beyond those charged",
            1.0 if short <= 0 else 0.0, float(short), 0.0,
        ),
        Check(
            "everybody-charged",
            "every patient who may be drawn is on each charge",
            "patients who are missing on a charge, at most",
            1.0 if not seen.missing else 0.0, float(seen.missing), 0.0,
        ),
        Check(
            "receipt-steps",
            "a receipt names every step that was taken",
            "steps on the receipt less steps taken",
            1.0 if all(s == 0 for s in steps) else 0.0, float(min(steps)), 0.0,
        ),
        Check(
            "receipt-epsilon",
            "a receipt's epsilon covers all steps taken since the run began",
            "the auditor's epsilon over the receipt's, at most",
            1.0 if max(receipt) <= ACCOUNT_SLACK else 0.0, max(receipt), 1.0,
        ),
        Check(
            "books-epsilon",
            "the books hold the epsilon of all runs against a patient",
            "the auditor's epsilon over the books', at most",
            1.0 if max(books) <= ACCOUNT_SLACK else 0.0, max(books), 1.0,
        ),
    ]  # fmt: skip


def _draws(setting: Setting) -> tuple[list[Check], str]:
    seen = draw_run(setting, setting.rate)
    return _draw_checks(seen, ""), artefact(seen.decoded.parts)


def _crowd(setting: Setting) -> tuple[list[Check], str]:
    seen = draw_run(setting, DENSE)
    return _draw_checks(seen, "crowd-"), artefact(seen.decoded.parts)


def _draw_checks(seen: DrawRun, prefix: str) -> list[Check]:
    return contribution_checks(seen.decoded, seen.canaries, prefix) + draw_checks(
        seen.decoded, seen.rate, prefix
    )


def _several(setting: Setting) -> tuple[list[Check], str]:
    noise, charged = several_run(setting)
    wanted = ("several-noise-scale", "several-noise-scale-tensors", "several-noise-shape",
              "several-noise-steps-independent", "several-noise-scale-steps",
              "several-noise-coordinates-independent", "several-noise-mean")  # fmt: skip
    checks = [c for c in noise_checks(noise, "several-noise") if c.name in wanted]
    short = int(np.max(charged[:, 1] - charged[:, 0]))
    checks.append(
        Check(
            "several-steps-charged",
            "a round of several local steps is charged for each of them, before it is released",
            "most steps released beyond those charged",
            1.0 if short <= 0 else 0.0, float(short), 0.0,
        )
    )  # fmt: skip
    parts = several_draws(setting)
    checks.append(_several_draws(parts, setting))
    return checks, artefact(noise.values, parts)


def _several_draws(parts: Floats, setting: Setting) -> Check:
    """Each local step draws anew: how often a patient is in a round is binomial."""
    steps, rate = setting.plan.training.local_steps, setting.rate
    counts = np.rint(parts)
    odd = float(np.abs(parts - counts).max())
    variance = steps * rate * (1 - rate)
    hits = int(counts.clip(0, steps).sum())
    mean_p = stats.binomtest(hits, counts.size * steps, rate).pvalue
    spread_p = 1.0
    if variance > 0:
        energy = float(np.mean((counts - steps * rate) ** 2) / variance)
        excess = (1 - 6 * rate * (1 - rate)) / variance
        spread_p = two_sided((energy - 1) / math.sqrt((2 + excess) / counts.size))
    whole = 1.0 if odd < 0.3 else 0.0
    return Check(
        "several-steps-draw-anew",
        "every local step draws its patients anew, with the accounted rate",
        "draws of a patient in a round over those expected",
        smallest([float(mean_p), spread_p, whole]),
        float(counts.mean() / (steps * rate)), 1.0,
        note=f"Largest distance of a count from a whole number: {odd:.3f}.",
    )  # fmt: skip
