"""What the large regimes do not reach: further sites, a study's ends, empty draws, keys, grids."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from client.run import SiteRun
from simulations.audits.canaries import kinds, live_start, repeated, saturated_start, tensor_of
from simulations.audits.expected_release import site_noise
from simulations.audits.measure import Check, Floats, scale_p, smallest
from simulations.audits.regimes import Setting, draw_run, kept_coordinates
from simulations.audits.sampling_probes import untied
from simulations.audits.site_probe import AUDITED, ProbedSite, changed, write_probed_sites

MOST_SITES = 6
"""Sites beyond the first two that are looked at, drawn by lot."""

KEYS = 4096
SHORT, MOST_STUDIES, VALUES = 3, 5, 300
"""Rounds of a short study, how many are played at most, values that each of their rounds needs."""

MOST_PAIRED, CLOSE = 64, 1e-5
"""Coordinates that are compared by pairs; how close two angles are, in parts of a turn."""

FEW = 0.3
"""Share of draws that should hold nobody, where few patients are there."""


def edge_checks(setting: Setting) -> list[Check]:
    """Every check of this file."""
    checks = [*_other_sites(setting), *_keys(setting), _first_and_last(setting)]
    if setting.rate < 1:
        checks += _few_patients(setting)
    return checks


def _other_sites(setting: Setting) -> list[Check]:
    """Every site adds its noise: whoever is first by name is not the only one that is audited."""
    plan, rng = setting.step_plan, setting.rng
    names = list(plan.cohort.names[AUDITED:])
    if len(names) > MOST_SITES:
        names = [str(n) for n in rng.choice(names, MOST_SITES, replace=False)]
    if not names:
        return []
    basis, kind = kinds(plan, live_start(plan), 12, rng)
    start = saturated_start(plan, basis.data)
    energies, sizes = [], []
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind))
        for name in names:
            probe = ProbedSite(folders[name], plan, "audit-others", start, None)
            sums = np.stack([probe.release().sums for _ in range(setting.effort.live)])
            share = probe.run.layout.share
            keep = kept_coordinates(tensor_of(probe.run.spec), rng)
            scale = share.scale if share else None
            deviation = site_noise(plan, setting.told, len(start), scale)
            energies.append(float(np.mean((sums[:, keep] / deviation) ** 2)))
            sizes.append(sums[:, keep].size)
            probe.close()
    ps = scale_p(np.array(energies), np.array(sizes))
    worst = int(np.argmin(ps))
    return [
        Check(
            "noise-scale-sites",
            "every site adds as much noise as the accountant was told",
            f"standard deviation over the accounted one, at the oddest site ({names[worst]})",
            smallest(ps), math.sqrt(energies[worst]), 1.0,
            note=f"Looked at beside the first {AUDITED} sites: {', '.join(sorted(names))}.",
        )
    ]  # fmt: skip


def _first_and_last(setting: Setting) -> Check:
    """Short studies from their first round to their last; the one between fails and comes again."""
    plan = changed(setting.step_plan, training={"rounds": SHORT})
    basis, kind = kinds(plan, live_start(plan), 12, setting.rng)
    start = saturated_start(plan, basis.data)
    studies = int(np.clip(math.ceil(VALUES / len(start)), 2, MOST_STUDIES))
    rounds: list[list[NDArray[np.float32]]] = [[] for _ in range(SHORT)]
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind), runs=studies)
        for study in range(studies):
            probe = ProbedSite(
                folders[plan.cohort.names[0]], plan, f"audit-short-{study}", start, None
            )
            for number, seen in enumerate(rounds):
                if number == 1:
                    probe.interrupted()
                seen.append(probe.release().sums)
            share, spec = probe.run.layout.share, probe.run.spec
            probe.close()
    keep = kept_coordinates(tensor_of(spec), setting.rng)
    deviation = site_noise(plan, setting.told, len(start), share.scale if share else None)
    values = np.stack([np.stack(seen)[:, keep] for seen in rounds]) / deviation
    energy = np.mean(values.astype(np.float64) ** 2, axis=(1, 2))
    ps = scale_p(energy, values[0].size)
    return Check(
        "noise-scale-ends",
        "a study's first round, its last, and one that failed before carry all the accounted noise",
        f"standard deviation over the accounted one, in the oddest round of {SHORT}",
        smallest(ps), math.sqrt(float(energy[np.argmin(ps)])), 1.0,
        note=f"{studies} studies of {SHORT} rounds were played to their ends.",
    )  # fmt: skip


def _keys(setting: Setting) -> list[Check]:
    """Thousands of streams as a site makes them when it starts: none may come twice."""
    plan = setting.step_plan
    basis, kind = kinds(plan, live_start(plan), 12, setting.rng)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind))
        folder = folders[plan.cohort.names[0]]
        probe = ProbedSite(folder, plan, "audit-keys", live_start(plan), None)
        made = cast(Any, SiteRun.__dict__["_random"]).func
        first = [made(probe.run).bytes(16) for _ in range(KEYS)]
        probe.close()
    repeats = KEYS - len(set(first))
    table = np.frombuffer(b"".join(first), dtype=np.uint8)
    flat = stats.chisquare(np.bincount(table, minlength=256)).pvalue
    return [
        Check(
            "keys-fresh",
            "every start of a site draws its noise from a key of its own",
            f"streams that came twice among {KEYS:,}",
            smallest([0.0 if repeats else 1.0, float(flat)]), float(repeats), 0.0,
            note="Keys of up to about 22 bits are found so; longer ones that are guessable are "
            "not: where a key comes from is for a reading of client/noise.py.",
        )
    ]  # fmt: skip


def _few_patients(setting: Setting) -> list[Check]:
    """With few patients a draw often holds nobody; such a step is released like any other.

    And few hide little of the noise, which must not tell who they were.
    """
    few = max(1, math.ceil(math.log(FEW) / math.log(1 - setting.rate)))
    seen = draw_run(setting, setting.rate, most=few)
    count = len(seen.canaries.norms)
    drawn = np.rint(seen.decoded.parts).sum(axis=1)
    empty, chance = int(np.sum(drawn == 0)), (1 - setting.rate) ** count
    return [
        Check(
            "empty-draws",
            "a draw that holds nobody is a step like any other",
            f"draws without anybody over those expected, with {count} patients",
            float(stats.binomtest(empty, len(drawn), chance).pvalue),
            empty / (chance * len(drawn)), 1.0,
        ),
        untied(seen.decoded, "few-"),
    ]  # fmt: skip


def granularity_check(values: Floats, deviation: float, grid: float) -> Check:
    """Noise as fine as it is rounded by what follows: equal values are as rare as they should be.

    Args:
        values: Releases that hold noise alone, float32 as they are read.
        deviation: Their standard deviation.
        grid: Distance of neighbouring values that can leave, in the same unit.

    Coarse noise on a fine sum shows the sum's last digits (Mironov, CCS 2012).
    """
    flat = np.sort(values.reshape(-1).astype(np.float32))
    n = float(len(flat))
    _, sizes = np.unique(flat, return_counts=True)
    ties = float(np.sum(sizes * (sizes - 1.0)) / 2)
    # Values of float32 within 4 deviations lie this close or closer.
    step = (grid + 4 * deviation * 2.0**-23) / deviation
    expected = n * (n - 1) / 2 * step / (2 * math.sqrt(math.pi))
    triples = n**3 * step**2 * (1 / (2 * math.sqrt(3) * math.pi) - 1 / (4 * math.pi))
    z = (ties - expected - 1) / math.sqrt(expected + triples + 1)
    return Check(
        "noise-granularity",
        "the noise is as fine as the numbers that leave",
        "pairs of equal values over those expected",
        1.0 if z < 4 or ties < 1.2 * expected else float(stats.norm.sf(z)),
        ties / max(expected, 1.0), 1.0,
        note=f"Neighbouring values that can leave are {grid / deviation:.2g} deviations apart.",
    )  # fmt: skip


def pairs_check(values: Floats, deviation: float, grid: float) -> Check:
    """Two coordinates together are as fine as each alone: no few rays, no few rings.

    A Gaussian pair has a uniform angle and, of its radius r, a uniform exp(-r^2 / 2). On few angles
    or radii, values of the same pair come too close to each other.

    Args:
        values, deviation, grid: As in `granularity_check`; values of shape (releases, d).
    """
    name, claim = "noise-pairs-fine", "the noise of two coordinates together is as fine as of each"
    statistic = "neighbouring angles or radii of the oddest pair that coincide, over those expected"
    n, d = values.shape
    half = (d + 1) // 2
    first = np.linspace(0, half - 1, min(half, MOST_PAIRED // 2)).astype(int)
    columns = np.unique(np.concatenate([first, np.minimum(first + half, d - 1)]))
    if len(columns) < 2 or grid > 1e-3 * deviation:
        return Check(name, claim, statistic, None, note="There is no pair, or numbers are coarse.")
    a, b = np.triu_indices(len(columns), 1)
    z = values[:, columns] / deviation
    angle = np.arctan2(z[:, a], z[:, b]) / (2 * math.pi)
    radius = np.exp(-(z[:, a] ** 2 + z[:, b] ** 2) / 2)
    places = np.sort(np.concatenate([angle, radius], axis=1), axis=0)
    close = np.sum(np.diff(places, axis=0) < CLOSE, axis=0)
    expected = (n - 1) * (1 - (1 - CLOSE) ** n)
    ps = stats.poisson.sf(close - 1, expected)
    return Check(
        name, claim, statistic, smallest(ps), float(close.max()) / expected, 1.0,
        note=f"{len(a)} pairs of coordinates in {n} releases. The expected number is a mean, so "
        "the largest of many lies above it.",
    )  # fmt: skip
