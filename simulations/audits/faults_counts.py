"""How to break what a site counts: its noise, a patient's weight, and the charge for a release."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import client.run
from client.counting import noisy_counts
from client.ledger import Charge, Ledger
from client.noise import ChaChaRandom
from shared import counts, privacy
from shared.counts import CountNoise, Units
from simulations.audits.faults_kit import Fault, Patches, patched

CountRule = Callable[[Units, Units, CountNoise, ChaChaRandom], Units]
"""(clean counts, what they should be with noise, noise, stream) -> what leaves."""


def count_rule(rule: CountRule) -> Callable[[Patches, str], None]:
    """Replace what is done to counts before they are masked."""

    def broken(patches: Patches, mode: str) -> None:
        def noisy(clean: Units, noise: CountNoise, random: ChaChaRandom) -> Units:
            return rule(clean, noisy_counts(clean, noise, random), noise, random)

        patches.enter_context(patched(client.run, "noisy_counts", noisy))

    return broken


def _scaled(factor: float) -> CountRule:
    return lambda clean, right, noise, random: np.rint(clean + factor * (right - clean)).astype(
        np.int64
    )


def _fixed(clean: Units, right: Units, noise: CountNoise, random: ChaChaRandom) -> Units:
    return noisy_counts(clean, noise, ChaChaRandom(bytes(32)))


def _reused() -> CountRule:
    """Noise is drawn once in a process and added to every release."""
    kept: dict[tuple[int, float], Units] = {}

    def rule(clean: Units, right: Units, noise: CountNoise, random: ChaChaRandom) -> Units:
        return clean + kept.setdefault((len(clean), noise.deviation), right - clean)

    return rule


def _paired(clean: Units, right: Units, noise: CountNoise, random: ChaChaRandom) -> Units:
    """Every other cell's noise is its neighbour's."""
    own = right - clean
    own[1::2] = own[: len(own) - 1 : 2][: len(own[1::2])]
    return clean + own


def _where_somebody_is(
    clean: Units, right: Units, noise: CountNoise, random: ChaChaRandom
) -> Units:
    """Empty cells leave without noise."""
    return np.where(clean == 0, clean, right)


def _by_records(patches: Patches, mode: str) -> None:
    """Each record weighs as much as a patient."""

    def weights(owners: Units, unit: int) -> Units:
        return np.full(len(owners), unit, dtype=np.int64)

    patches.enter_context(patched(counts, "record_weights", weights))


def _uncharged(patches: Patches, mode: str) -> None:
    """A release of counts costs its patients nothing."""
    original = Ledger.reserve

    def reserve(self: Ledger, charge: Charge, *, limit: int) -> None:
        if charge.used_for == "training":
            original(self, charge, limit=limit)

    patches.enter_context(patched(Ledger, "reserve", reserve))


def _one_release_paid(patches: Patches, mode: str) -> None:
    """The noise is calibrated for one release, however many there are."""

    def one(plan: Any) -> int:
        return 1

    privacy.costs_of.cache_clear()
    counts.count_noise.cache_clear()
    patches.callback(privacy.costs_of.cache_clear)
    patches.callback(counts.count_noise.cache_clear)
    patches.enter_context(patched(privacy, "count_releases_of", one))


COUNTED = (
    Fault("counts without noise", count_rule(_scaled(0.0))),
    Fault("counts with half their noise", count_rule(_scaled(0.5))),
    Fault("counts' shares sized for all sites", count_rule(_scaled(math.sqrt(2 / 4)))),
    Fault("counts with 5 % less noise", count_rule(_scaled(0.95))),
    Fault("counts' noise from a fixed seed", count_rule(_fixed)),
    Fault("counts' noise used again", count_rule(_reused())),
    Fault("counts' noise in pairs", count_rule(_paired)),
    Fault("no noise in empty cells", count_rule(_where_somebody_is)),
    Fault("records counted as patients", _by_records),
    Fault("counts not charged", _uncharged),
    Fault("counts' noise for one release", _one_release_paid),
)
