"""The runs of a site that the implementation probes look at.

noise     the accounted noise; first patients without any gradient, so that noise alone leaves,
          then patients of three kinds, whose sums lie in three dimensions
draws     the noise turned down; few patients who can be told apart in every release
crowd     the same with every other patient drawn, so that patients meet in nearly every batch
rounds    the plan's own local steps, with noise alone, and with the noise turned down
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from simulations.audits.accounting import epsilon
from simulations.audits.canaries import (
    Canaries,
    distinct_canaries,
    kinds,
    live_start,
    repeated,
    saturated_start,
    tensor_of,
)
from simulations.audits.expected_release import response, site_noise
from simulations.audits.measure import Floats
from simulations.audits.noise_probes import Residuals
from simulations.audits.sampling_probes import Decoded, decode
from simulations.audits.site_probe import (
    AUDITED,
    ProbedSite,
    changed,
    missing_on_charges,
    people_of,
    write_probed_sites,
)

RUNS, PROCESSES = 2, 2
QUIET = 2e-3
"""Noise over clip norm where the noise is turned down."""

SLOW = 3e-3
"""Of the learning rate, where a round of several steps should hardly move the model."""

MOST_COORDINATES = 8192
MOST_ROTATED = 1500
MOST_PATIENTS = 24
MOST_CROWD = 300


@dataclass(frozen=True)
class Effort:
    """Rounds of each process: noise alone, live patients, draws; and rounds of several steps."""

    noise: int = 40
    live: int = 20
    draws: int = 40
    several: int = 12


@dataclass
class Setting:
    """What the audit runs on: the plan's noise and rate, in a study as long as the audit needs."""

    plan: StudyPlan
    rng: np.random.Generator
    effort: Effort
    told: float
    rate: float
    step_plan: StudyPlan = field(init=False)

    def __post_init__(self) -> None:
        self.step_plan = self.lengthened(1, self.rate)

    def lengthened(self, local_steps: int, rate: float) -> StudyPlan:
        """The plan's noise over more rounds, each of `local_steps`, with draws at `rate`."""
        _, delta, _ = self.plan.privacy.promise
        effort = self.effort
        rounds = 4 + PROCESSES * max(effort.noise + effort.live, effort.draws, effort.several)
        cost = epsilon(self.told, rate, rounds * local_steps, delta)
        return changed(
            self.plan,
            training={
                "rounds": rounds, "spare_rounds": 0, "local_steps": local_steps,
                "sample_rate": rate,
            },
            privacy={"noise_multiplier": self.told, "epsilon": 1.01 * cost + 0.1},
            secure_sum=self._ring(),
            evaluation={
                "release": "none", "epsilon": None, "delta": None, "noise_multiplier": None,
            },
        )  # fmt: skip

    def _ring(self) -> dict[str, object]:
        """A ring in which rounding and clamping do not blur what is measured."""
        training = self.plan.training
        if self.plan.privacy.mode == "distributed":
            largest = max(s.expected_patients for s in self.plan.cohort.sites) * self.rate
            reach = max(self.plan.secure_sum.clip_range, MOST_PATIENTS / max(largest, 1.0))
            return {"bits": 32, "clip_range": reach}
        smallest = min(s.expected_patients for s in self.plan.cohort.sites)
        step = training.learning_rate * self.plan.privacy.promise[2] / (self.rate * smallest)
        speed = 1 / (1 - training.momentum)
        reach = (8 * self.told + MOST_CROWD) * step * training.local_steps * speed
        return {"bits": 32, "clip_range": max(self.plan.secure_sum.clip_range, reach)}

    @property
    def several_plan(self) -> StudyPlan:
        """The plan's own local steps."""
        return self.lengthened(self.plan.training.local_steps, self.rate)


def setting_of(plan: StudyPlan, rng: np.random.Generator, effort: Effort) -> Setting:
    """Ask the product what noise the plan needs; a probe checks the answer."""
    told = noise_multiplier_of(plan)
    rate = plan.training.sample_rate
    if told is None or rate is None:
        raise ValueError("privacy is off: nothing is promised, so nothing can be violated")
    return Setting(plan, rng, effort, told, rate)


@dataclass(frozen=True)
class NoiseRun:
    """What the noise regime saw.

    Attributes:
        alone: Noise of releases without any gradient.
        live: Noise of releases with patients of few kinds, their part projected out: along axes
            at right angles to it, so that what is left is independent.
        lively: The same by coordinates, each brought back to unit scale.
        amounts: How much of each kind each live release holds, (releases, kinds).
        amount_spread: Standard deviation that noise gives each amount, (kinds,).
        crowd: Patients of each kind, (kinds,).
        charged: (steps charged on disk, steps taken) at each release.
        receipts: (epsilon, steps) of each run's receipt, and the steps that it took.
        missing: Patients who are not on a charge of training, at most.
        spent: Epsilon that the site's books hold against its patients at the end, and the steps.
        raw: As `alone`, as it left: in units of the clip norm.
        deviation: Standard deviation of the accounted noise, in that unit.
        grid: Distance of neighbouring values that can leave, in that unit.
    """

    alone: Residuals
    live: Residuals
    lively: Residuals
    amounts: Floats
    amount_spread: Floats
    crowd: NDArray[np.int64]
    charged: NDArray[np.int64]
    receipts: list[tuple[float, int, int]]
    missing: int
    spent: list[tuple[float, int]]
    raw: Floats
    deviation: float
    grid: float


@dataclass
class _Rows:
    values: list[NDArray[np.float32]] = field(default_factory=list)
    labels: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, values: NDArray[np.float32], label: tuple[int, int, int, int]) -> None:
        self.values.append(values)
        self.labels.append(label)


def processes(
    folders: dict[str, Path], plan: StudyPlan, start: FlatVector, quiet: float | None
) -> Iterator[tuple[ProbedSite, int, int, int]]:
    """Every process of every run of every audited site; a process ends, the next goes on."""
    for number, name in enumerate(plan.cohort.names[:AUDITED]):
        for run in range(RUNS):
            probe = ProbedSite(folders[name], plan, f"audit-{run}", start, quiet)
            for process in range(PROCESSES):
                if process:
                    probe.restart()
                yield probe, number, run, process
            probe.close()


def noise_run(setting: Setting) -> NoiseRun:
    """Two sites, two runs, each restarted once, with the accounted noise."""
    plan, effort, rng = setting.step_plan, setting.effort, setting.rng
    live = live_start(plan)
    count = int(np.clip(np.ceil(6 / setting.rate), 12, MOST_CROWD))
    basis, kind = kinds(plan, live, count, rng)
    data = repeated(basis, kind)
    still = saturated_start(plan, basis.data)
    alone, lively = _Rows(), _Rows()
    charged: list[tuple[int, int]] = []
    receipts: list[tuple[float, int, int]] = []
    spent: list[tuple[float, int]] = []
    missing = 0
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, data, runs=RUNS)
        taken = 0
        for probe, site, run, process in processes(folders, plan, still, None):
            taken = 0 if not process else taken
            for start, rows, rounds in ((still, alone, effort.noise), (live, lively, effort.live)):
                probe.set_start(start)
                for time in range(rounds):
                    seen = probe.release()
                    taken += 1
                    charged.append((seen.charged, taken))
                    rows.add(seen.sums, (site, run, process, time))
            if process == PROCESSES - 1:
                receipt = probe.run.receipt()
                receipts.append((receipt.epsilon, receipt.steps, taken))
                missing = max(missing, missing_on_charges(probe, data, "training"))
                if run == RUNS - 1:
                    spent.append((_spent(probe, data), RUNS * taken))
        share = probe.run.layout.share
        spec, grid = probe.run.spec, probe.grid
    deviation = site_noise(plan, setting.told, len(live), share.scale if share else None)
    keep = kept_coordinates(tensor_of(spec), rng)
    frame = (tensor_of(spec), spec.names)
    noise = _residuals(np.stack(alone.values)[:, keep], alone.labels, frame, keep, deviation)
    sums = np.stack(lively.values)
    decoded = decode(sums, basis, deviation, np.array(lively.labels))
    rest, kept = _off_span(sums, basis, keep)
    by_coordinate = _residuals(rest, lively.labels, frame, kept, deviation)
    rotated = _rotated(sums, basis, by_coordinate, deviation)
    return NoiseRun(
        noise, rotated, by_coordinate, decoded.parts, decoded.deviations,
        np.bincount(kind), np.array(charged), receipts, missing, spent,
        np.stack(alone.values)[:, keep].astype(np.float64), deviation, grid,
    )  # fmt: skip


def _spent(probe: ProbedSite, data: PatientDataset) -> float:
    """What the site's books hold against its patients, as its officer would see it."""
    books = probe.site.books
    plan = changed(probe.plan, training={"rounds": 1})
    return books.consider(plan, people_of(probe.site, plan, data)).before


def kept_coordinates(tensor: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """All coordinates of a small model; of a large one a random part of every tensor, in order."""
    if len(tensor) <= MOST_COORDINATES:
        return np.arange(len(tensor))
    sizes = np.bincount(tensor)
    quota = np.minimum(sizes, np.maximum(64, MOST_COORDINATES * sizes // len(tensor)))
    parts = [
        np.sort(rng.choice(np.flatnonzero(tensor == n), quota[n], replace=False))
        for n in range(len(sizes))
    ]
    return np.concatenate(parts)


def _residuals(
    values: NDArray[np.floating],
    labels: list[tuple[int, int, int, int]],
    frame: tuple[NDArray[np.int64], tuple[str, ...]],
    keep: NDArray[np.int64],
    deviation: float,
) -> Residuals:
    table = np.array(labels)
    sequence = table[:, 0] * RUNS + table[:, 1]
    tensor, names = frame
    return Residuals(values.astype(np.float64) / deviation, sequence, tensor[keep], names, table)


def _off_span(
    sums: NDArray[np.float32], basis: Canaries, keep: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.int64]]:
    """What no kind of patient explains, by coordinate, each brought back to unit scale."""
    axes, _ = np.linalg.qr(basis.clipped.T.astype(np.float64))
    keep = keep[np.sum(axes[keep] ** 2, axis=1) < 0.5]
    rest = sums[:, keep].astype(np.float64) - (sums @ axes) @ axes[keep].T
    return rest / np.sqrt(1 - np.sum(axes[keep] ** 2, axis=1)), keep


def _rotated(
    sums: NDArray[np.float32], basis: Canaries, plain: Residuals, deviation: float
) -> Residuals:
    """Along axes at right angles to all kinds; a large model's coordinates nearly are."""
    d = sums.shape[1]
    if d > MOST_ROTATED:
        return plain
    axes, _ = np.linalg.qr(basis.clipped.T.astype(np.float64), mode="complete")
    values = sums.astype(np.float64) @ axes[:, len(basis.clipped) :] / deviation
    one = np.zeros(values.shape[1], dtype=np.int64)
    return Residuals(values, plain.sequence, one, ("rotated",), plain.labels)


@dataclass(frozen=True)
class DrawRun:
    """Releases below the noise, taken apart."""

    canaries: Canaries
    decoded: Decoded
    rate: float


def draw_run(setting: Setting, rate: float, most: int = MOST_PATIENTS) -> DrawRun:
    """At most so many patients who can be told apart, with the noise turned down."""
    plan = setting.lengthened(1, rate)
    canaries = distinct_canaries(plan, live_start(plan), most, setting.rng)
    rows = _Rows()
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, canaries.data, runs=RUNS)
        start = live_start(plan)
        for probe, site, run, process in processes(folders, plan, start, QUIET):
            for time in range(setting.effort.draws):
                seen = probe.release()
                rows.add(seen.sums, (site, run, process, time))
    noise = QUIET
    decoded = decode(np.stack(rows.values), canaries, noise, np.array(rows.labels))
    return DrawRun(canaries, decoded, rate)


def several_run(setting: Setting) -> tuple[Residuals, NDArray[np.int64]]:
    """Rounds of the plan's own local steps, with noise alone; and (charged, taken) steps."""
    plan, steps = setting.several_plan, setting.plan.training.local_steps
    live = live_start(plan)
    basis, kind = kinds(plan, live, 24, setting.rng)
    start = saturated_start(plan, basis.data)
    rows, charged = _Rows(), list[tuple[int, int]]()
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind), runs=1)
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-several", start, None)
        for time in range(2 * setting.effort.several):
            if time == setting.effort.several:
                probe.restart()
            seen = probe.release()
            charged.append((seen.charged, (time + 1) * steps))
            rows.add(seen.sums, (0, 0, 0, time))
        spec = probe.run.spec
        probe.close()
    keep = kept_coordinates(tensor_of(spec), setting.rng)
    deviation = setting.told * response(plan).gain
    frame = (tensor_of(spec), spec.names)
    values = np.stack(rows.values)[:, keep]
    return _residuals(values, rows.labels, frame, keep, deviation), np.array(charged)


def several_draws(setting: Setting) -> Floats:
    """How often each patient is in a round of several steps, where the model hardly moves."""
    plan = setting.several_plan
    slow = SLOW * plan.training.learning_rate
    still = {"momentum": 0.0, "weight_decay": 0.0, "proximal_mu": 0.0}
    plan = changed(
        plan,
        training={"learning_rate": slow} | still,
        secure_sum={"clip_range": SLOW * plan.secure_sum.clip_range},
        optimizer={"name": "fedavg"},
    )
    start = live_start(plan)
    canaries = distinct_canaries(plan, start, MOST_PATIENTS, setting.rng)
    rows = _Rows()
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, canaries.data, runs=1)
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-slow", start, QUIET)
        for time in range(2 * setting.effort.several):
            rows.add(probe.release().sums, (0, 0, 0, time))
        probe.close()
    noise = QUIET * np.sqrt(plan.training.local_steps)
    return decode(np.stack(rows.values), canaries, noise, np.array(rows.labels)).parts
