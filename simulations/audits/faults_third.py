"""A third set of faults, invented from the product's code alone, before any probe was read.

They were tried once on the probes as they stood; RESULTS.md in this folder says which were found
then. Each fault has one line that says what a careless or malicious programmer did, and one that
says what it costs a patient. Epsilons in it are at the promised delta of 1e-4, for promises of 1
and 8, first in mode `local` and then in `distributed`, computed on the plan of `faults.small_plan`
by the accountant or, for draws and the better of two, from 100,000 or more simulated studies.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.clipping import PatientClipper
from client.consent import People
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.own_state import OwnState
from client.run import SiteRun
from client.training import LocalTrainer
from shared import counts, distributed, more_counts, own_noise, privacy
from shared.counts import Units
from shared.evaluation_plan import GroupPlan
from shared.plan import StudyPlan
from shared.secagg import transcript
from shared.statistics import Records
from simulations.audits.faults_kit import (
    Draw,
    Fault,
    Gradients,
    Patches,
    clip_rule,
    noise_rule,
    norm_of,
    patched,
    sampling,
    scaled,
)

Noise = NDArray[np.float64]
Indices = NDArray[np.int64]
EIGHT_BITS = 256

# Who is drawn.


def _stays_for_the_next_step() -> Callable[[ChaChaRandom, int, float], Indices]:
    """With chance 9/10 a patient stays in, or out, as in the step before; the rate is right."""
    before: dict[int, NDArray[np.bool_]] = {}

    def sample(random: ChaChaRandom, count: int, rate: float) -> Indices:
        inside = random.words(count) * 2.0**-64 < rate
        stays = random.words(count) * 2.0**-64 < 0.9
        if count in before:
            inside = np.where(stays, before[count], inside)
        before[count] = inside
        return np.flatnonzero(inside)

    return sample


def _one_always_in(random: ChaChaRandom, count: int, rate: float) -> Indices:
    """One patient, the fourth, is in every batch."""
    inside = random.words(count) * 2.0**-64 < rate
    inside[3:4] = True
    return np.flatnonzero(inside)


def _block_shares_a_draw(random: ChaChaRandom, count: int, rate: float) -> Indices:
    """Neighbours in the file are drawn together, 32 by one word."""
    words = random.words(-(-count // 32)) * 2.0**-64
    return np.flatnonzero(np.repeat(words < rate, 32)[:count])


def _draws_from_the_noise(patches: Patches, mode: str) -> None:
    """The words that choose patients are used again as the first words of the noise."""
    again: dict[int, bytes] = {}
    take = ChaChaRandom.bytes

    def bytes_of(self: ChaChaRandom, length: int) -> bytes:
        start = again.pop(id(self), b"")
        if len(start) > length:
            again[id(self)] = start[length:]
        return start[:length] + take(self, max(0, length - len(start)))

    def sample(self: ChaChaRandom, count: int, rate: float) -> Indices:
        drawn = take(self, 8 * count)
        again[id(self)] = drawn
        return np.flatnonzero(np.frombuffer(drawn, "<u8") * 2.0**-64 < rate)

    def one_stream(self: ChaChaRandom, label: str) -> ChaChaRandom:
        use = self._uses.get(label, 0)
        self._uses[label] = use + 1
        return self.child(f"{label.replace('rounding', 'round')} / use {use}")

    patches.enter_context(patched(ChaChaRandom, "bytes", bytes_of))
    patches.enter_context(patched(ChaChaRandom, "sample", sample))
    patches.enter_context(patched(ChaChaRandom, "fresh_child", one_stream))


# What a patient may add.


def _norm_without_the_last(whole: list[Gradients], clip: float) -> list[Gradients]:
    """The norm is taken before the last tensor, a bias, is there."""
    factors = [min(1.0, clip / max(norm_of(g[:-1]), 1e-12)) for g in whole]
    return [[part * f for part in g] for g, f in zip(whole, factors, strict=True)]


def _clip_at_the_median(whole: list[Gradients], clip: float) -> list[Gradients]:
    """Clipped to the batch's median norm where that is below C; noise stays that of C."""
    if not whole:
        return []
    limit = min(clip, float(np.median([norm_of(g) for g in whole])))
    return [scaled(g, limit) for g in whole]


def _watching_batches(rule: Callable[[LocalTrainer, Indices, list[Gradients]], list[float]]) -> Any:
    """Clip rightly, then weigh each patient by a rule that sees the batch."""

    def broken(patches: Patches, mode: str) -> None:
        now: list[tuple[LocalTrainer, Indices]] = []

        def weighed(whole: list[Gradients], clip: float) -> list[Gradients]:
            trainer, batch = now[0]
            clipped = [scaled(g, clip) for g in whole]
            weights = rule(trainer, batch, clipped) if len(batch) == len(whole) else []
            return [[p * w for p in g] for g, w in zip(clipped, weights, strict=True)]

        clip_rule(weighed)(patches, mode)
        inner = LocalTrainer._sum_patients

        def sum_patients(self: LocalTrainer, batch: Indices) -> int:
            now[:] = [(self, batch)]
            return inner(self, batch)

        patches.enter_context(patched(LocalTrainer, "_sum_patients", sum_patients))

    return broken


def _by_class(trainer: LocalTrainer, batch: Indices, clipped: list[Gradients]) -> list[float]:
    """Both classes weigh the same in a batch, by its own private counts, after the clip."""
    labels = [float(trainer._labels[trainer._records_of[p][0]]) for p in batch.tolist()]
    return [len(labels) / (2 * labels.count(label)) for label in labels]


def _to_the_expected(
    trainer: LocalTrainer, batch: Indices, clipped: list[Gradients]
) -> list[float]:
    """A small batch's sum is blown up to the expected size, a large one's shrunk; then noise."""
    return [trainer._divisor / max(1, len(batch))] * len(batch)


# Noise.


def _in_rounds(
    quiet: Callable[[SiteRun, int], float],
) -> Callable[[Patches, str], None]:
    """Noise times a factor that follows from the run and the round."""

    def broken(patches: Patches, mode: str) -> None:
        factor = [1.0]
        original = SiteRun._train

        def train(self: SiteRun, round_no: int) -> Any:
            factor[0] = quiet(self, round_no)
            return original(self, round_no)

        patches.enter_context(patched(SiteRun, "_train", train))
        noise_rule(lambda right, draw: right * factor[0])(patches, mode)

    return broken


def _none_in_the_last(run: SiteRun, round_no: int) -> float:
    """The plan's last round goes out without noise, for a better model."""
    return 0.0 if round_no == run.plan.training.rounds else 1.0


def _half_again(run: SiteRun, round_no: int) -> float:
    """A round that is trained again in the same process gets half the noise."""
    seen = run.__dict__.setdefault("rounds_trained", set())
    again = round_no in seen
    seen.add(round_no)
    return 0.5 if again else 1.0


def _coarse_angles(right: Noise, draw: Draw) -> Noise:
    """Box and Muller's angle comes from one byte: two coordinates lie on one of 256 rays."""
    pairs = (len(right) + 1) // 2
    uniform = (draw.random.words(pairs).astype(np.float64) + 0.5) * 2.0**-64
    angles = np.frombuffer(draw.random.bytes(pairs), np.uint8) * (2 * math.pi / EIGHT_BITS)
    radius = draw.deviation * np.sqrt(-2 * np.log(uniform))
    return np.concatenate([radius * np.cos(angles), radius * np.sin(angles)])[: len(right)]


def _centred(right: Noise, draw: Draw) -> Noise:
    """The mean is taken off the noise, "so that it biases nothing", and its variance restored."""
    count = len(right)
    spread = math.sqrt(count / (count - 1)) if count > 1 else 1.0
    return np.asarray((right - right.mean()) * spread)


def _better_of_two(right: Noise, draw: Draw) -> Noise:
    """Noise is drawn twice, and what hinders the step less is kept."""
    other = draw.deviation * draw.random.gaussian(len(right)).astype(np.float64)
    return right if right @ draw.sums >= other @ draw.sums else other


def _across_alone(right: Noise, draw: Draw) -> Noise:
    """The part of the noise along the clean sum is taken out, "so that the step keeps its size"."""
    square = float(draw.sums @ draw.sums)
    if not square:
        return right
    return np.asarray(right - draw.sums * (right @ draw.sums) / square)


def _stream_of_the_descriptor(patches: Patches, mode: str) -> None:
    """The stream follows from the round's descriptor, so that a run can be repeated; all see it."""
    original = SiteRun._reserve

    def reserve(self: SiteRun, ticket: Any) -> Any:
        self.__dict__["_random"] = ChaChaRandom(hashlib.sha256(ticket.digest).digest())
        return original(self, ticket)

    patches.enter_context(patched(SiteRun, "_reserve", reserve))


def _cancelling(patches: Patches, mode: str) -> None:
    """The sites' noise comes from a common stream, added by one site and subtracted by the next."""
    original = SiteRun._reserve
    now: dict[str, Any] = {"sign": 1.0, "random": ChaChaRandom(bytes(32))}

    def reserve(self: SiteRun, ticket: Any) -> Any:
        place = self.plan.cohort.names.index(self.config.name)
        key = hashlib.sha256(b"pair %d " % (place // 2) + ticket.digest).digest()
        now.update(sign=1.0 - 2.0 * (place % 2), random=ChaChaRandom(key))
        return original(self, ticket)

    def rule(right: Noise, draw: Draw) -> Noise:
        drawn = now["random"].gaussian(len(right)).astype(np.float64)
        return np.asarray(now["sign"] * draw.deviation * drawn)

    patches.enter_context(patched(SiteRun, "_reserve", reserve))
    noise_rule(rule)(patches, mode)


# Books.


def _one_on_no_charge(patches: Patches, mode: str) -> None:
    """The population that is charged lacks the data's last patient."""

    def people(self: SiteRun) -> People:
        ids = {}
        for use in self._costs:
            data = self.train_data if use == "training" else self.counted_data
            ids[use] = data.patient_ids[:-1]
        return self._books.people(self.plan, ids)

    cached = functools.cached_property(people)
    cached.__set_name__(SiteRun, "_people")
    patches.enter_context(patched(SiteRun, "_people", cached))


def _anew(patches: Patches) -> None:
    """Forget what was computed of plans, now and when the fault is taken out."""
    for known in (
        privacy.costs_of,
        counts.count_noise,
        distributed.noise_share,
        own_noise.alone_multipliers,
    ):
        known.cache_clear()
        patches.callback(known.cache_clear)


def _ten_times_delta(patches: Patches, mode: str) -> None:
    """Noise is calibrated for ten times the promised delta."""
    original = privacy.calibrate

    def generous(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        return original(epsilon, 10 * delta, sample_rate, steps)

    _anew(patches)
    patches.enter_context(patched(privacy, "calibrate", generous))


# Counts.


def _training_patients_counted(patches: Patches, mode: str) -> None:
    """The histograms are of the training patients; the test patients are charged for them."""
    original = SiteRun._count

    def count(self: SiteRun, round_no: int) -> Any:
        right: PatientDataset = self.counted_data
        self.__dict__["counted_data"] = self.train_data
        try:
            return original(self, round_no)
        finally:
            self.__dict__["counted_data"] = right

    patches.enter_context(patched(SiteRun, "_count", count))


def _number_in_an_idle_cell(patches: Patches, mode: str) -> None:
    """Where no counts are due, the first of their cells holds how many patients there are."""
    original = SiteRun._count

    def count(self: SiteRun, round_no: int) -> tuple[Units, Any]:
        cells, facts = original(self, round_no)
        if len(cells) and not self._counts_now():
            cells = cells.copy()
            cells[0] = self.train_data.patient_count
        return cells, facts

    patches.enter_context(patched(SiteRun, "_count", count))


def _noise_of_one_block(patches: Patches, mode: str) -> None:
    """Noise is sized for the histogram alone, as before groups and importances were added."""
    original = counts._with_more

    def with_more(kind: counts.CountKind) -> counts.CountKind:
        return replace(original(kind), blocks=kind.blocks)

    _anew(patches)
    patches.enter_context(patched(counts, "_with_more", with_more))


def _importances_unclipped(patches: Patches, mode: str) -> None:
    """A patient's vector of importances is added whatever its norm."""

    def count(plan: StudyPlan, records: Records, unit: int) -> Units:
        patients = int(records.owners.max()) + 1 if len(records.owners) else 0
        sizes = np.bincount(records.owners, minlength=patients)
        means = [
            np.bincount(records.owners, weights=column, minlength=patients) / np.maximum(sizes, 1)
            for column in np.nan_to_num(records.moves).T
        ]
        scale = more_counts.importance_scale(len(plan.task.features), unit)
        vectors = np.stack(means, axis=1) / plan.evaluation.importance_clip
        sums = np.rint(scale * vectors).astype(np.int64).sum(axis=0)
        return np.append(sums, scale * int((sizes > 0).sum())).astype(np.int64)

    patches.enter_context(patched(more_counts, "count_importances", count))


# What stays at a site, and the secure sum.


def _own_layers_without_noise(patches: Patches, mode: str) -> None:
    """Layers that stay at the site step by the clean sum, since "they never leave"."""
    original = OwnState.stepped

    class Silent:
        def gaussian(self, count: int) -> NDArray[np.float32]:
            return np.zeros(count, dtype=np.float32)

    def stepped(self: OwnState, start: Any, clipped_sum: Any, divisor: float, random: Any) -> None:
        silent: Any = Silent()
        original(self, start, clipped_sum, divisor, silent)

    patches.enter_context(patched(OwnState, "stepped", stepped))


def _control_from_clean_sums(patches: Patches, mode: str) -> None:
    """A site's control variate is made of its sums before the noise; the next update holds it."""
    clean: dict[str, list[NDArray[np.floating[Any]]]] = {"steps": []}
    finish, begin, trained = PatientClipper.finish_step, LocalTrainer._begin, OwnState.trained

    def begin_round(self: LocalTrainer, start: Any) -> None:
        clean["steps"] = []
        begin(self, start)

    def finish_step(self: PatientClipper, random: ChaChaRandom) -> None:
        flat = [p.summed_grad.detach().cpu().numpy().ravel() for p in self.params]
        clean["steps"].append(np.concatenate(flat) / np.float32(self.divisor))
        finish(self, random)

    def keep(self: OwnState, start: Any, update: Any, correction: Any, round_no: int) -> None:
        rate = self._layout.plan.training.learning_rate
        moved = -rate * np.sum(clean["steps"], axis=0)
        trained(self, start, np.asarray(moved, dtype=np.float32), None, round_no)

    patches.enter_context(patched(LocalTrainer, "_begin", begin_round))
    patches.enter_context(patched(PatientClipper, "finish_step", finish_step))
    patches.enter_context(patched(OwnState, "trained", keep))


def _one_mask_for_a_batch(patches: Patches, mode: str) -> None:
    """A pair of sites has one mask for all rounds of a batch of keys."""
    chain, mask = transcript.round_keys, transcript.pair_mask_key

    def round_keys(batch_key: bytes, rounds: int) -> bytes:
        return chain(batch_key, rounds)[:32] * rounds

    def pair_mask_key(key: bytes, round_digest: bytes) -> bytes:
        return mask(key, bytes(32))

    patches.enter_context(patched(transcript, "round_keys", round_keys))
    patches.enter_context(patched(transcript, "pair_mask_key", pair_mask_key))


# Plans on which some of them act.


def _with(**sections: dict[str, Any]) -> Callable[[StudyPlan], StudyPlan]:
    def change(plan: StudyPlan) -> StudyPlan:
        inner = {name: replace(getattr(plan, name), **values) for name, values in sections.items()}
        return replace(plan, **inner)

    return change


_COUNTS = {"release": "noised", "epsilon": 2.0, "bins": 16}
_COUNTED = _with(evaluation=_COUNTS)
_SELDOM = _with(evaluation={**_COUNTS, "every": 5})
_MORE = _with(
    evaluation={
        **_COUNTS,
        "importance_clip": 0.5,
        "groups": (GroupPlan("mean radius", (12.0, 16.0)),),
    }
)
_OWN_BIAS = _with(model={"personal": ("linear.bias",)})
_SCAFFOLD = _with(optimizer={"name": "scaffold"})


def _third(name: str, broken: Callable[[Patches, str], None], **more: Any) -> Fault:
    return Fault(name, broken, listed=False, **more)


THIRD = (
    # No amplification between steps: 1.07, 12.0; 1.53, 21.3.
    _third("a patient stays for the next step", sampling(_stays_for_the_next_step())),
    # No amplification for one patient: 2.2, 18.8; 3.9, 30.3.
    _third("one patient always in", sampling(_one_always_in)),
    # The neighbours' gradients betray the draw: 1.27, 12.2; 2.1, 15.4.
    _third("32 neighbours share a draw", sampling(_block_shares_a_draw)),
    # Large noise betrays the draw: a loss without bound
    # with chance 0.68, 0.99; 0.58, 0.94 over the study.
    _third("draws and noise from the same words", _draws_from_the_noise),
    # A patient moves up to 1.41 C: 1.5, 12.8; 1.5, 14.1.
    _third("the norm forgets the bias", clip_rule(_norm_without_the_last)),
    # Half of a batch moves with one patient; no bound but batch / 2 times C.
    _third("clipped at the batch's median", clip_rule(_clip_at_the_median)),
    # The rarer class weighs more, up to batch / 2 times C.
    _third("classes balanced after the clip", _watching_batches(_by_class)),
    # Everybody moves with the batch's size, in all up to 2 C: 2.2, 21.1; 2.3, 26.6; and more in
    # small batches.
    _third("sums brought to the expected batch", _watching_batches(_to_the_expected)),
    # One release without noise: no epsilon.
    _third("no noise in the last round", _in_rounds(_none_in_the_last)),
    # Costs such a round as much as four; 2.2, 21.1; 2.3, 26.6 if every round is trained twice.
    _third("half the noise when trained again", _in_rounds(_half_again)),
    # A patient moves two coordinates off all rays: no epsilon.
    _third("noise with angles of eight bits", noise_rule(_coarse_angles)),
    # The sum of all coordinates leaves without noise: no epsilon.
    _third("noise whose sum is zero", noise_rule(_centred)),
    # The noise points where the patient does: 15, 28; 5.6, 16.
    _third("the better of two noises", noise_rule(_better_of_two)),
    # The size of the clean sum can be solved for: no epsilon.
    _third("noise only across the gradient", noise_rule(_across_alone)),
    # The server subtracts the noise: no epsilon against it.
    _third("the stream of the round's descriptor", _stream_of_the_descriptor),
    # The published sum has no noise: no epsilon.
    _third("sites' noise cancels in pairs", _cancelling),
    # That patient may be in any number of studies: no cap holds.
    _third("one patient on no charge", _one_on_no_charge),
    # Less noise: 1.27, 9.4; 1.28, 9.7.
    _third("calibrated for ten times delta", _ten_times_delta),
    # Training patients pay epsilon 2 more than they are charged.
    _third("training patients counted", _training_patients_counted, plan=_COUNTED),
    # An exact number of patients: no epsilon.
    _third("the number of patients in an idle cell", _number_in_an_idle_cell, plan=_SELDOM),
    # A patient moves sqrt(3) of what noise is sized for: 3.8 instead of 2.
    _third("counts' noise for one block", _noise_of_one_block, plan=_MORE),
    # A patient's 30 importances have norm up to 11 times the clip.
    _third("importances not clipped", _importances_unclipped, plan=_MORE),
    # The next sum is taken at a model that holds a patient bare: everybody's gradient moves.
    _third(
        "own layers step without noise",
        _own_layers_without_noise,
        plan=_OWN_BIAS,
        modes=("distributed",),
    ),
    # Each clean sum leaves twice: 1.5, 12.8.
    _third(
        "control variates of clean sums",
        _control_from_clean_sums,
        plan=_SCAFFOLD,
        modes=("local",),
    ),
    # Differences of a site's vectors, with one share of noise, reach the server: 1.5; 14.1
    # (in mode `local` the promise holds for each vector; the secure sum is broken all the same).
    _third("one mask for all rounds", _one_mask_for_a_batch),
)
