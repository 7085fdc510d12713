"""A third set of faults, invented from the product's code alone, before any probe was read.

They were tried once on the probes as they stood; RESULTS.md in this folder says which were found
then. Each fault has one line that says what a careless or malicious programmer did, and one that
says what it costs a patient. Epsilons in it are at the promised delta of 1e-4, for promises of 1
and 8, first in mode `local` and then in `distributed`, computed on the plan of `faults.small_plan`
by the accountant or, for draws and the better of two, from 100,000 or more simulated studies.
"""

from __future__ import annotations

import functools
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
    Fault,
    Patches,
    clip_rule,
    noise_rule,
    patched,
    sampling,
)
from simulations.audits.faults_third_training import (
    across_alone,
    better_of_two,
    block_shares_a_draw,
    by_class,
    cancelling,
    centred,
    clip_at_the_median,
    coarse_angles,
    draws_from_the_noise,
    half_again,
    in_rounds,
    none_in_the_last,
    norm_without_the_last,
    one_always_in,
    stays_for_the_next_step,
    stream_of_the_descriptor,
    to_the_expected,
    watching_batches,
)

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
    _third("a patient stays for the next step", sampling(stays_for_the_next_step())),
    # No amplification for one patient: 2.2, 18.8; 3.9, 30.3.
    _third("one patient always in", sampling(one_always_in)),
    # The neighbours' gradients betray the draw: 1.27, 12.2; 2.1, 15.4.
    _third("32 neighbours share a draw", sampling(block_shares_a_draw)),
    # Large noise betrays the draw: in `local` a loss without bound with chance 0.68, 0.99 over the
    # study; in `distributed` rejection shifts the words, and the loss was not computed.
    _third("draws and noise from the same words", draws_from_the_noise),
    # A patient moves up to 1.41 C: 1.5, 12.8; 1.5, 14.1.
    _third("the norm forgets the bias", clip_rule(norm_without_the_last)),
    # Half of a batch moves with one patient; no bound but batch / 2 times C.
    _third("clipped at the batch's median", clip_rule(clip_at_the_median)),
    # The rarer class weighs more, up to batch / 2 times C.
    _third("classes balanced after the clip", watching_batches(by_class)),
    # Everybody moves with the batch's size, in all up to 2 C: 2.2, 21.1; 2.3, 26.6; and more in
    # small batches.
    _third("sums brought to the expected batch", watching_batches(to_the_expected)),
    # One release without noise: no epsilon.
    _third("no noise in the last round", in_rounds(none_in_the_last)),
    # Costs such a round as much as four; 2.2, 21.1; 2.3, 26.6 if every round is trained twice.
    _third("half the noise when trained again", in_rounds(half_again)),
    # A patient moves two coordinates off all rays: no epsilon.
    _third("noise with angles of eight bits", noise_rule(coarse_angles)),
    # The sum of all coordinates leaves without noise: no epsilon.
    _third("noise whose sum is zero", noise_rule(centred)),
    # The noise points where the patient does: 15, 28; 5.6, 16.
    _third("the better of two noises", noise_rule(better_of_two)),
    # The size of the clean sum can be solved for: no epsilon.
    _third("noise only across the gradient", noise_rule(across_alone)),
    # The server subtracts the noise: no epsilon against it.
    _third("the stream of the round's descriptor", stream_of_the_descriptor),
    # The published sum has no noise: no epsilon.
    _third("sites' noise cancels in pairs", cancelling),
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
