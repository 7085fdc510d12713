"""Faults that were invented after the probes of `implementation` were frozen.

They were tried once on the frozen probes, and RESULTS.md in this folder says which were found
then. Each is one function that patches the product; simulations/audits/faults.py runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from client.data.dataset import PatientDataset
from client.ledger import Charge, Ledger
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared import privacy
from simulations.audits.faults_kit import (
    Draw,
    Fault,
    Gradients,
    Patches,
    clip_rule,
    data_rule,
    noise_rule,
    norm_of,
    patched,
    sampling,
    scaled,
)

Noise = NDArray[np.float64]


def _correlated() -> Callable[[Noise, Draw], Noise]:
    kept: list[Noise] = []

    def rule(right: Noise, draw: Draw) -> Noise:
        before = kept[0] if kept and len(kept[0]) == len(right) else right
        out = math.sqrt(0.91) * right + 0.3 * before
        kept[:] = [out]
        return out

    return rule


def _antithetic() -> Callable[[Noise, Draw], Noise]:
    kept: list[Noise] = []

    def rule(right: Noise, draw: Draw) -> Noise:
        if kept and len(kept[0]) == len(right):
            return -kept.pop()
        kept[:] = [right]
        return right

    return rule


def _truncated(right: Noise, draw: Draw) -> Noise:
    return np.clip(right, -3 * draw.deviation, 3 * draw.deviation)


def _laplace(right: Noise, draw: Draw) -> Noise:
    ranks = np.clip(_uniform_of(right, draw), 1e-12, 1 - 1e-12) - 0.5
    size = -np.log1p(-2 * np.abs(ranks)) / math.sqrt(2)
    return np.asarray(draw.deviation * np.sign(ranks) * size)


def _uniform_of(right: Noise, draw: Draw) -> Noise:
    return np.asarray(stats.norm.cdf(right / draw.deviation))


def _flat(right: Noise, draw: Draw) -> Noise:
    return (_uniform_of(right, draw) - 0.5) * math.sqrt(12) * draw.deviation


def _heavy(right: Noise, draw: Draw) -> Noise:
    law = stats.t(8)
    return np.asarray(law.ppf(_uniform_of(right, draw)) / law.std() * draw.deviation)


def _non_empty(right: Noise, draw: Draw) -> Noise:
    return right if draw.batch else np.zeros_like(right)


def _where_gradients_are(right: Noise, draw: Draw) -> Noise:
    return np.where(np.abs(draw.sums) > 1e-9, right, 0.0) if draw.sums.any() else right


def _paired(right: Noise, draw: Draw) -> Noise:
    half = (len(right) + 1) // 2
    return np.concatenate([right[:half], right[:half]])[: len(right)]


def _coarse(right: Noise, draw: Draw) -> Noise:
    return np.rint(right / draw.deviation * 4) / 4 * draw.deviation


def _with_the_norm(right: Noise, draw: Draw) -> Noise:
    return right * (1.0 if draw.batch < 3 else 0.85)


def _fading() -> Callable[[Noise, Draw], Noise]:
    steps = [0]

    def rule(right: Noise, draw: Draw) -> Noise:
        steps[0] += 1
        return right * max(0.5, 1 - 0.002 * (steps[0] % 200))

    return rule


def _one_sided(right: Noise, draw: Draw) -> Noise:
    out = right.copy()
    out[0] = abs(out[0])
    return out


def _large_looser(whole: list[Gradients], clip: float) -> list[Gradients]:
    return [scaled(g, 2 * clip if norm_of(g) > 5 * clip else clip) for g in whole]


def _first_unclipped(whole: list[Gradients], clip: float) -> list[Gradients]:
    return [g if i == 0 else scaled(g, clip) for i, g in enumerate(whole)]


def _by_coordinate(whole: list[Gradients], clip: float) -> list[Gradients]:
    return [[g.clamp(-clip, clip) for g in gradients] for gradients in whole]


def _leftover() -> Callable[[list[Gradients], float], list[Gradients]]:
    before: list[Gradients] = []

    def rule(whole: list[Gradients], clip: float) -> list[Gradients]:
        clipped = [scaled(g, clip) for g in whole]
        fitting = [g for g in before if clipped and g[0].shape == clipped[0][0].shape]
        again = [[0.5 * part for part in g] for g in fitting]
        before[:] = clipped
        return clipped + again

    return rule


def _fixed_size(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
    return np.sort(random.permutation(count)[: max(1, round(count * rate))])


def _epochs() -> Callable[[ChaChaRandom, int, float], NDArray[np.int64]]:
    left: dict[int, list[int]] = {}

    def rule(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
        queue = left.setdefault(count, [])
        size = max(1, round(count * rate))
        if len(queue) < size:
            queue[:] = random.permutation(count).tolist()
        drawn, queue[:] = queue[:size], queue[size:]
        return np.sort(np.array(drawn, dtype=np.int64))

    return rule


def _later_ones_rarer(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
    words = random.words(count).astype(np.float64) * 2.0**-64
    tilt = np.linspace(1.35, 0.65, count)
    return np.flatnonzero(words < np.minimum(1.0, rate * tilt))


def _same_after_restart(patches: Patches, mode: str) -> None:
    fixed = classmethod(lambda cls: ChaChaRandom(bytes(range(32))))
    patches.enter_context(patched(ChaChaRandom, "from_system", fixed))


def _divisor_of_data(patches: Patches, mode: str) -> None:
    def divisor(self: LocalTrainer, site_name: str) -> float:
        return float(max(1, int(self.data.patient_count * (self.plan.training.sample_rate or 1))))

    patches.enter_context(patched(LocalTrainer, "public_divisor", divisor))


def _one_batch_a_round(patches: Patches, mode: str) -> None:
    original = LocalTrainer._draws

    def draws(
        self: LocalTrainer, stream: ChaChaRandom, random: ChaChaRandom
    ) -> Iterator[NDArray[np.int64]]:
        first = next(iter(original(self, stream, random)))
        for _ in range(self.plan.training.local_steps):
            yield first

    patches.enter_context(patched(LocalTrainer, "_draws", draws))


def _charged_late(patches: Patches, mode: str) -> None:
    waiting: list[tuple[Ledger, Charge, int]] = []
    reserve, release = Ledger.reserve, Ledger.release

    def later(self: Ledger, charge: Charge, *, limit: int) -> None:
        waiting.append((self, charge, limit))

    def now(self: Ledger, charge: Charge) -> None:
        for ledger, due, limit in waiting:
            if ledger is self:
                reserve(ledger, due, limit=limit)
        waiting.clear()
        release(self, charge)

    patches.enter_context(patched(Ledger, "reserve", later))
    patches.enter_context(patched(Ledger, "release", now))


def _told_half_the_steps(patches: Patches, mode: str) -> None:
    original = privacy.calibrate

    def half(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        return original(epsilon, delta, sample_rate, max(1, steps // 2))

    patches.enter_context(patched(privacy, "calibrate", half))


def _records_clipped_singly(data: PatientDataset) -> PatientDataset:
    """Each record becomes a patient of its own on the way into training."""
    count = len(data.labels)
    names = tuple(f"record-{i}" for i in range(count))
    return PatientDataset(data.inputs, data.labels, np.arange(count), names)


def _shares_for_all_sites(right: Noise, draw: Draw) -> Noise:
    """As if no site could drop out or collude: less noise from each."""
    return right * math.sqrt(2 / 4)


def _duplicate_last(data: PatientDataset) -> PatientDataset:
    """The last patient's records twice under one name: one gradient, of the same mean."""
    rows = np.concatenate([np.arange(len(data.labels)), data.records_of[-1]])
    owners = np.concatenate([data.patients, data.patients[data.records_of[-1]]])
    return PatientDataset(data.inputs[rows], data.labels[rows], owners, data.patient_ids)


UNSEEN = (
    Fault("noise correlated over steps (0.3)", noise_rule(_correlated()), False),
    Fault("noise undone in the next step", noise_rule(_antithetic()), False),
    Fault("noise cut at 3 deviations", noise_rule(_truncated), False),
    Fault("Laplace noise of the same variance", noise_rule(_laplace), False),
    Fault("uniform noise of the same variance", noise_rule(_flat), False),
    Fault("Student noise, 8 degrees of freedom", noise_rule(_heavy), False),
    Fault("noise on non-empty batches alone", noise_rule(_non_empty), False),
    Fault("noise only where gradients are", noise_rule(_where_gradients_are), False),
    Fault("the same noise in both halves", noise_rule(_paired), False),
    Fault("noise on a grid of a quarter deviation", noise_rule(_coarse), False),
    Fault("15 % less noise on larger batches", noise_rule(_with_the_norm), False),
    Fault("noise that fades over steps", noise_rule(_fading()), False),
    Fault("one coordinate's noise never negative", noise_rule(_one_sided), False),
    Fault("noise 4 % low", noise_rule(lambda right, draw: 0.96 * right), False),
    Fault("shares sized for all sites", noise_rule(_shares_for_all_sites), False),
    Fault("large gradients clipped at 2 C", clip_rule(_large_looser), False),
    Fault("a batch's first patient unclipped", clip_rule(_first_unclipped), False),
    Fault("coordinates clipped, not the norm", clip_rule(_by_coordinate), False),
    Fault("half of the last batch added again", clip_rule(_leftover()), False),
    Fault("batches of a fixed size", sampling(_fixed_size), False),
    Fault("shuffled passes, not Poisson", sampling(_epochs()), False),
    Fault("first patients drawn more often", sampling(_later_ones_rarer), False),
    Fault("the same stream after a restart", _same_after_restart, False),
    Fault("the divisor counts patients", _divisor_of_data, False),
    Fault("one batch for a round's steps", _one_batch_a_round, False),
    Fault("charged after the release", _charged_late, False),
    Fault("calibrated for half the steps", _told_half_the_steps, False),
    Fault("records clipped, not patients", data_rule(_records_clipped_singly), False),
    Fault("a patient's records twice under one name", data_rule(_duplicate_last), False),
)
"""The last one is harmless: a patient's mean gradient stays the same. It should not be found."""
