"""A second set of faults, invented after the first one had changed the probes.

Like those of `faults_unseen`, they were tried once on the probes as they stood; RESULTS.md in this
folder says which were found then, and what was done about the others.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ledger import Charge, Ledger
from client.noise import ChaChaRandom
from client.run import SiteRun
from client.training import LocalTrainer
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


def _repeated_when_trained_again(patches: Patches, mode: str) -> None:
    """A label gives the same stream however often it is used in a process."""
    patches.enter_context(patched(ChaChaRandom, "fresh_child", ChaChaRandom.child))


def _sixteen_bits(patches: Patches, mode: str) -> None:
    """Keys with 16 bits of randomness, stretched to 32 bytes."""

    def short(cls: type[ChaChaRandom]) -> ChaChaRandom:
        return cls(os.urandom(2) * 16, renewed=True)

    patches.enter_context(patched(ChaChaRandom, "from_system", classmethod(short)))


def _later_physical_batches_unclipped(patches: Patches, mode: str) -> None:
    """What does not fit into the first physical batch is added as it is."""
    original, fits = LocalTrainer._accumulate, LocalTrainer._sum_fits
    place = [0]

    def sum_fits(self: LocalTrainer, batch: Any, counts: Any) -> bool:
        place[0] = 0
        return fits(self, batch, counts)

    def accumulate(self: LocalTrainer, patients: Any, counts: Any) -> None:
        place[0] += 1
        clipper = self._clipper
        if clipper is None or place[0] == 1:
            original(self, patients, counts)
            return
        clip, clipper.max_grad_norm = clipper.max_grad_norm, 1e30
        original(self, patients, counts)
        clipper.max_grad_norm = clip

    patches.enter_context(patched(LocalTrainer, "_sum_fits", sum_fits))
    patches.enter_context(patched(LocalTrainer, "_accumulate", accumulate))


def _half_precision(right: Noise, draw: Draw) -> Noise:
    if not draw.deviation:
        return right
    small = (right / draw.deviation).astype(np.float16)
    return small.astype(np.float64) * draw.deviation


def _drawn_until_somebody(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
    while True:
        drawn = np.flatnonzero(random.words(count) * 2.0**-64 < rate)
        if len(drawn) or not count:
            return drawn


def _less_beside_large_gradients(patches: Patches, mode: str) -> None:
    """A fifth less noise in steps in which somebody's gradient was clipped hard."""
    large = [False]

    def rule(whole: list[Gradients], clip: float) -> list[Gradients]:
        large[0] = any(norm_of(g) > 8 * clip for g in whole)
        return [scaled(g, clip) for g in whole]

    clip_rule(rule)(patches, mode)
    noise_rule(lambda right, draw: right * (0.8 if large[0] else 1.0))(patches, mode)


def _drawn_by_records(patches: Patches, mode: str) -> None:
    """A patient takes part as soon as any of the own records is drawn."""
    counts: list[NDArray[np.int64]] = []
    original = LocalTrainer._begin

    def begin(self: LocalTrainer, start: Any) -> None:
        counts[:] = [self._records_of.counts]
        original(self, start)

    def sample(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
        chance = 1 - (1 - rate) ** counts[0][:count].astype(np.float64)
        return np.flatnonzero(random.words(count) * 2.0**-64 < chance)

    patches.enter_context(patched(LocalTrainer, "_begin", begin))
    sampling(sample)(patches, mode)


def _books_with_twice_the_noise(patches: Patches, mode: str) -> None:
    original = SiteRun._charge

    def charge(self: SiteRun, use: Any, ticket: Any) -> Charge:
        right = original(self, use, ticket)
        return replace(right, noise_multiplier=2 * right.noise_multiplier)

    patches.enter_context(patched(SiteRun, "_charge", charge))


def _last_site_quieter(patches: Patches, mode: str) -> None:
    """The site that comes last by name adds half of its noise."""
    last = [False]
    train, total = LocalTrainer.train_round, LocalTrainer.clipped_sum

    def noticing(original: Any) -> Any:
        def call(self: LocalTrainer, *arguments: Any, **named: Any) -> Any:
            names = self.plan.cohort.names
            last[0] = self.public_divisor(names[-1]) == self._divisor
            return original(self, *arguments, **named)

        return call

    patches.enter_context(patched(LocalTrainer, "train_round", noticing(train)))
    patches.enter_context(patched(LocalTrainer, "clipped_sum", noticing(total)))
    noise_rule(lambda right, draw: right * (0.5 if last[0] else 1.0))(patches, mode)


def _never_again_charged(patches: Patches, mode: str) -> None:
    """A round that is trained again under another descriptor costs nothing more."""
    original = Ledger.reserve

    def reserve(self: Ledger, charge: Charge, *, limit: int) -> None:
        if any(c.round_no == charge.round_no for c in self.charges(charge.run)):
            return
        original(self, charge, limit=limit)

    patches.enter_context(patched(Ledger, "reserve", reserve))


SECOND = (
    Fault("the same noise when trained again", _repeated_when_trained_again, False),
    Fault("keys of 16 bits", _sixteen_bits, False),
    Fault("later physical batches unclipped", _later_physical_batches_unclipped, False),
    Fault("noise in half precision", noise_rule(_half_precision), False),
    Fault("drawn again while nobody is in", sampling(_drawn_until_somebody), False),
    Fault("less noise beside large gradients", _less_beside_large_gradients, False),
    Fault("patients drawn by their records", _drawn_by_records, False),
    Fault("books with twice the noise", _books_with_twice_the_noise, False),
    Fault("the last site adds half its noise", _last_site_quieter, False),
    Fault("trained again without a charge", _never_again_charged, False),
)
