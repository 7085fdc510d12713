"""Votes on the clip norm: what a patient adds to them, and what covers it.

A vote is one more number that a patient moves, beside a gradient of the clip norm. It must weigh
what the noise was sized for, carry that noise, and the norm that it leads to must bind: sums are
sent in units of the plan's own clip norm, whatever norm the round clips to.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from simulations.audits.canaries import (
    candidates,
    gradients,
    kinds,
    live_start,
    repeated,
    saturated_start,
)
from simulations.audits.expected_release import site_noise
from simulations.audits.measure import Check, scale_interval, scale_p, two_sided
from simulations.audits.regimes import Setting
from simulations.audits.site_probe import ProbedSite, changed, write_probed_sites

RELEASES, PATIENTS = 48, 12
QUIET = 1e-6
"""Noise in clip norms, where a single patient is measured."""

FACTORS = (1 / 8, 1.0, 8.0)
"""Of the plan's clip norm: where a round may clip."""


def vote_checks(setting: Setting) -> list[Check]:
    """Every check of this file, for a plan that adapts its clip norm."""
    return [*_noise(setting), *_one_patient(setting)]


def _noise(setting: Setting) -> list[Check]:
    """Of patients without a gradient, who all vote that they were not clipped."""
    plan = setting.lengthened(1, 1.0)  # everybody is drawn, so that noise alone varies
    basis, kind = kinds(plan, live_start(plan), PATIENTS, setting.rng)
    start = saturated_start(plan, basis.data)
    count = min(RELEASES, plan.training.rounds)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind))
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-votes", start, None)
        seen = np.array([probe.release().votes for _ in range(count)])
        share = probe.run.layout.share
        probe.close()
    noise = site_noise(plan, setting.told, len(start), share.scale if share else None)
    z = (seen - PATIENTS) * plan.privacy.adaptive_clip.weight / noise
    energy = float(np.mean(z**2))
    return [
        Check(
            "votes-noise-scale",
            "votes on the clip norm carry the accounted noise",
            "standard deviation over the accounted one",
            float(scale_p(energy, count)), math.sqrt(energy), 1.0, scale_interval(energy, count),
        ),
        Check(
            "votes-mean",
            "a patient who is not clipped counts as one vote",
            "mean of the votes over the number of patients",
            two_sided(float(z.sum()) / math.sqrt(count)), float(seen.mean()) / PATIENTS, 1.0,
        ),
    ]  # fmt: skip


def _one_patient(setting: Setting) -> list[Check]:
    """A patient who is far too strong, at norms that clip hardly and much, below the noise."""
    votes, sums = list[float](), list[float]()
    with _alone(setting) as probe:
        clip = probe.plan.privacy.promise[2]
        for factor in FACTORS:
            probe.set_clip_norm(clip * factor)
            for _ in range(2):
                seen = probe.release()
                votes.append(abs(seen.votes))
                sums.append(float(np.linalg.norm(seen.sums.astype(np.float64))))
        grid = probe.grid * math.sqrt(len(probe.run.state.parameters) + 1)
    heaviest, largest = max(votes), max(sums)
    weight = probe.plan.privacy.adaptive_clip.weight
    slack = 1e-3 + 8 * grid
    return [
        Check(
            "votes-weight",
            "a patient's vote weighs what the noise was sized for",
            f"the heaviest vote of one patient, at {len(FACTORS)} clip norms",
            1.0 if heaviest <= 1 + slack / weight else 0.0, heaviest, 1.0,
        ),
        Check(
            "votes-clip-norm-binds",
            "whatever norm the votes lead to, a patient moves what leaves by the promised one",
            f"the largest sum of one strong patient in clip norms, at {len(FACTORS)} of them",
            1.0 if largest <= 1 + slack else 0.0, largest, 1.0,
        ),
    ]  # fmt: skip


@contextmanager
def _alone(setting: Setting) -> Iterator[ProbedSite]:
    """A site with the strongest of some patients, who is drawn in every round."""
    plan = changed(setting.lengthened(1, 1.0), training={"rounds": 2 * len(FACTORS)})
    start = live_start(plan)
    data = candidates(plan, 16, setting.rng)
    norms = np.linalg.norm(gradients(plan, start, data).astype(np.float64), axis=1)
    strongest = data.select(np.array([int(norms.argmax())]))
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, strongest)
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-vote", start, QUIET)
        yield probe
        probe.close()
