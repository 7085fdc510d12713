"""How the third set breaks training: who is drawn, what a patient may add, and the noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.noise import ChaChaRandom
from client.run import SiteRun
from client.training import LocalTrainer
from simulations.audits.faults_kit import (
    Draw,
    Gradients,
    Patches,
    clip_rule,
    noise_rule,
    norm_of,
    patched,
    scaled,
)

Noise = NDArray[np.float64]
Indices = NDArray[np.int64]
EIGHT_BITS = 256

# Who is drawn.


def stays_for_the_next_step() -> Callable[[ChaChaRandom, int, float], Indices]:
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


def one_always_in(random: ChaChaRandom, count: int, rate: float) -> Indices:
    """One patient, the fourth, is in every batch."""
    inside = random.words(count) * 2.0**-64 < rate
    inside[3:4] = True
    return np.flatnonzero(inside)


def block_shares_a_draw(random: ChaChaRandom, count: int, rate: float) -> Indices:
    """Neighbours in the file are drawn together, 32 by one word."""
    words = random.words(-(-count // 32)) * 2.0**-64
    return np.flatnonzero(np.repeat(words < rate, 32)[:count])


def draws_from_the_noise(patches: Patches, mode: str) -> None:
    """The words that choose patients are used again as the first words of the noise."""
    take = ChaChaRandom.bytes

    def bytes_of(self: ChaChaRandom, length: int) -> bytes:
        start: bytes = self.__dict__.pop("again", b"")
        if len(start) > length:
            self.__dict__["again"] = start[length:]
        return start[:length] + take(self, max(0, length - len(start)))

    def sample(self: ChaChaRandom, count: int, rate: float) -> Indices:
        drawn = take(self, 8 * count)
        self.__dict__["again"] = drawn
        return np.flatnonzero(np.frombuffer(drawn, "<u8") * 2.0**-64 < rate)

    def one_stream(self: ChaChaRandom, label: str) -> ChaChaRandom:
        use = self._uses.get(label, 0)
        self._uses[label] = use + 1
        return self.child(f"{label.replace('rounding', 'round')} / use {use}")

    patches.enter_context(patched(ChaChaRandom, "bytes", bytes_of))
    patches.enter_context(patched(ChaChaRandom, "sample", sample))
    patches.enter_context(patched(ChaChaRandom, "fresh_child", one_stream))


# What a patient may add.


def norm_without_the_last(whole: list[Gradients], clip: float) -> list[Gradients]:
    """The norm is taken before the last tensor, a bias, is there."""
    factors = [min(1.0, clip / max(norm_of(g[:-1]), 1e-12)) for g in whole]
    return [[part * f for part in g] for g, f in zip(whole, factors, strict=True)]


def clip_at_the_median(whole: list[Gradients], clip: float) -> list[Gradients]:
    """Clipped to the batch's median norm where that is below C; noise stays that of C."""
    if not whole:
        return []
    limit = min(clip, float(np.median([norm_of(g) for g in whole])))
    return [scaled(g, limit) for g in whole]


def watching_batches(rule: Callable[[LocalTrainer, Indices, list[Gradients]], list[float]]) -> Any:
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


def by_class(trainer: LocalTrainer, batch: Indices, clipped: list[Gradients]) -> list[float]:
    """Both classes weigh the same in a batch, by its own private counts, after the clip."""
    labels = [float(trainer._labels[trainer._records_of[p][0]]) for p in batch.tolist()]
    return [len(labels) / (2 * labels.count(label)) for label in labels]


def to_the_expected(trainer: LocalTrainer, batch: Indices, clipped: list[Gradients]) -> list[float]:
    """A small batch's sum is blown up to the expected size, a large one's shrunk; then noise."""
    return [trainer._divisor / max(1, len(batch))] * len(batch)


# Noise.


def in_rounds(
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


def none_in_the_last(run: SiteRun, round_no: int) -> float:
    """The plan's last round goes out without noise, for a better model."""
    return 0.0 if round_no == run.plan.training.rounds else 1.0


def half_again(run: SiteRun, round_no: int) -> float:
    """A round that is trained again in the same process gets half the noise."""
    seen = run.__dict__.setdefault("rounds_trained", set())
    again = round_no in seen
    seen.add(round_no)
    return 0.5 if again else 1.0


def coarse_angles(right: Noise, draw: Draw) -> Noise:
    """Box and Muller's angle comes from one byte: two coordinates lie on one of 256 rays."""
    pairs = (len(right) + 1) // 2
    uniform = (draw.random.words(pairs).astype(np.float64) + 0.5) * 2.0**-64
    angles = np.frombuffer(draw.random.bytes(pairs), np.uint8) * (2 * math.pi / EIGHT_BITS)
    radius = draw.deviation * np.sqrt(-2 * np.log(uniform))
    return np.concatenate([radius * np.cos(angles), radius * np.sin(angles)])[: len(right)]


def centred(right: Noise, draw: Draw) -> Noise:
    """The mean is taken off the noise, "so that it biases nothing", and its variance restored."""
    count = len(right)
    spread = math.sqrt(count / (count - 1)) if count > 1 else 1.0
    return np.asarray((right - right.mean()) * spread)


def better_of_two(right: Noise, draw: Draw) -> Noise:
    """Noise is drawn twice, and what hinders the step less is kept."""
    other = draw.deviation * draw.random.gaussian(len(right)).astype(np.float64)
    return right if right @ draw.sums >= other @ draw.sums else other


def across_alone(right: Noise, draw: Draw) -> Noise:
    """The part of the noise along the clean sum is taken out, "so that the step keeps its size"."""
    square = float(draw.sums @ draw.sums)
    if not square:
        return right
    return np.asarray(right - draw.sums * (right @ draw.sums) / square)


def stream_of_the_descriptor(patches: Patches, mode: str) -> None:
    """The stream follows from the round's descriptor, so that a run can be repeated; all see it."""
    original = SiteRun._reserve

    def reserve(self: SiteRun, ticket: Any) -> Any:
        self.__dict__["_random"] = ChaChaRandom(hashlib.sha256(ticket.digest).digest())
        return original(self, ticket)

    patches.enter_context(patched(SiteRun, "_reserve", reserve))


def cancelling(patches: Patches, mode: str) -> None:
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
