"""How to break the product on purpose: noise, clipping, draws, data and books, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import client.run
from client.clipping import PatientClipper
from client.data.dataset import PatientDataset
from client.discrete import discrete_gaussian
from client.ledger import Ledger
from client.noise import ChaChaRandom
from client.run import SiteRun
from client.training import LocalTrainer
from shared.distributed import NoiseShare
from shared.plan import StudyPlan

Patches = contextlib.ExitStack
Gradients = list[Tensor]


@dataclass(frozen=True)
class Fault:
    """One way in which the product could be wrong.

    Attributes:
        name: Short.
        broken: Patches the product inside the given stack, for a privacy mode.
        listed: Whether it was known when the probes were written.
        modes: Privacy modes in which it acts.
        plan: Makes the plan on which it acts of the small one.
    """

    name: str
    broken: Callable[[Patches, str], None]
    listed: bool = True
    modes: tuple[str, ...] = ("local", "distributed", "statistics")
    plan: Callable[[StudyPlan], StudyPlan] | None = None


@contextlib.contextmanager
def patched(place: Any, name: str, value: Any) -> Iterator[None]:
    """Replace one attribute, and put it back."""
    original = place.__dict__[name]
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, original)


@contextlib.contextmanager
def seeded(fault: Fault, mode: str) -> Iterator[None]:
    """The product with one fault in it."""
    with contextlib.ExitStack() as patches:
        fault.broken(patches, mode)
        yield


# How noise is added: `local` in PatientClipper.finish_step, `distributed` in noisy_integers.

NoiseRule = Callable[[NDArray[np.float64], "Draw"], NDArray[np.float64]]


@dataclass(frozen=True)
class Draw:
    """What a noise rule may look at.

    Attributes:
        random: The site's stream.
        deviation: Of the noise, in the units of `sums`.
        batch: Patients drawn in this step.
        sums: The clean sums, flat.
        sizes: Coordinates of each tensor.
    """

    random: ChaChaRandom
    deviation: float
    batch: int
    sums: NDArray[np.float64]
    sizes: tuple[int, ...]


def noise_rule(rule: NoiseRule) -> Callable[[Patches, str], None]:
    """Replace the noise: from what would be right (flat, in the sums' units) to what is added."""

    def broken(patches: Patches, mode: str) -> None:
        seen: dict[str, Any] = {"batch": 0, "sizes": ()}
        original = LocalTrainer._sum_patients

        def sum_patients(self: LocalTrainer, batch: NDArray[np.int64]) -> int:
            seen["batch"] = len(batch)
            seen["sizes"] = tuple(p.numel() for p in self._parameters)
            return original(self, batch)

        def finish_step(self: PatientClipper, random: ChaChaRandom) -> None:
            deviation = float(self.noise_multiplier) * float(self.max_grad_norm)
            sums = self.finish_sum().numpy().astype(np.float64)
            right = deviation * random.gaussian(len(sums)).astype(np.float64)
            draw = Draw(random, deviation, seen["batch"], sums, seen["sizes"])
            total = torch.from_numpy((sums + rule(right, draw)).astype(np.float32)) / self.divisor
            for p, part in zip(self.params, torch.split(total, list(seen["sizes"])), strict=True):
                p.grad = part.view_as(p).clone()

        def noisy(
            clipped: NDArray[np.float32], share: NoiseShare, random: ChaChaRandom
        ) -> NDArray[np.int64]:
            whole = np.rint(clipped.astype(np.float64) * share.scale)
            right = discrete_gaussian(random, share.deviation, len(whole)).astype(np.float64)
            draw = Draw(random, share.deviation, seen["batch"], whole, seen["sizes"])
            return np.rint(whole + rule(right, draw)).astype(np.int64)

        patches.enter_context(patched(LocalTrainer, "_sum_patients", sum_patients))
        if mode == "local":
            patches.enter_context(patched(PatientClipper, "finish_step", finish_step))
        else:
            patches.enter_context(patched(client.run, "noisy_integers", noisy))

    return broken


def _without_a_layer(right: NDArray[np.float64], draw: Draw) -> NDArray[np.float64]:
    out = right.copy()
    out[: draw.sizes[0]] = 0.0
    return out


def _fixed_seed(right: NDArray[np.float64], draw: Draw) -> NDArray[np.float64]:
    fixed = ChaChaRandom(bytes(32)).gaussian(len(right))
    return np.asarray(draw.deviation * fixed, dtype=np.float64)


def _per_micro_batch(right: NDArray[np.float64], draw: Draw) -> NDArray[np.float64]:
    more = max(0, -(-draw.batch // 4) - 1)
    extra = [draw.random.gaussian(len(right)).astype(np.float64) for _ in range(more)]
    return np.asarray(right + draw.deviation * sum(extra, np.zeros_like(right)))


# How patients are clipped: every private mode sums in LocalTrainer._sum_patients.

ClipRule = Callable[[list[Gradients], float], list[Gradients]]


def clip_rule(rule: ClipRule) -> Callable[[Patches, str], None]:
    """Replace clipping: from patients' whole gradients, by tensor, to what is added for each."""

    def broken(patches: Patches, mode: str) -> None:
        original = LocalTrainer._sum_patients

        def sum_patients(self: LocalTrainer, batch: NDArray[np.int64]) -> int:
            clipper = self._clipper
            if clipper is None:
                return original(self, batch)
            clip, seen, whole = float(clipper.max_grad_norm), 0, list[Gradients]()
            clipper.max_grad_norm = 1e30
            for patient in batch:
                seen += original(self, np.array([patient]))
                whole.append([p.summed_grad.clone() for p in clipper.params])
            clipper.max_grad_norm = clip
            clipper.begin_step()
            for gradients in rule(whole, clip):
                for p, gradient in zip(clipper.params, gradients, strict=True):
                    p.summed_grad += gradient
            return seen

        patches.enter_context(patched(LocalTrainer, "_sum_patients", sum_patients))

    return broken


def norm_of(gradients: Gradients) -> float:
    """L2 norm over all tensors."""
    return float(torch.cat([g.reshape(-1) for g in gradients]).double().norm())


def scaled(gradients: Gradients, limit: float) -> Gradients:
    """Clip to a norm."""
    factor = min(1.0, limit / max(norm_of(gradients), 1e-12))
    return [g * factor for g in gradients]


def _clip_of_batch(whole: list[Gradients], clip: float) -> list[Gradients]:
    if not whole:
        return []
    return [scaled([torch.stack(parts).sum(0) for parts in zip(*whole, strict=True)], clip)]


def _by_layer(whole: list[Gradients], clip: float) -> list[Gradients]:
    return [[scaled([g], clip)[0] for g in gradients] for gradients in whole]


# Draws, data and books.


def sampling(
    rule: Callable[[ChaChaRandom, int, float], NDArray[np.int64]],
) -> Callable[[Patches, str], None]:
    """Replace `ChaChaRandom.sample`."""

    def broken(patches: Patches, mode: str) -> None:
        patches.enter_context(patched(ChaChaRandom, "sample", rule))

    return broken


def _higher_rate(random: ChaChaRandom, count: int, rate: float) -> NDArray[np.int64]:
    words = random.words(count).astype(np.float64) * 2.0**-64
    return np.flatnonzero(words < min(1.0, 1.3 * rate))


def data_rule(rule: Callable[[PatientDataset], PatientDataset]) -> Callable[[Patches, str], None]:
    """Change the patients between the disk and the training."""

    def broken(patches: Patches, mode: str) -> None:
        original = SiteRun._data

        def data(self: SiteRun, *use: Any) -> PatientDataset:
            return rule(original(self, *use))

        patches.enter_context(patched(SiteRun, "_data", data))

    return broken


def _twice(data: PatientDataset) -> PatientDataset:
    rows = np.concatenate([np.arange(len(data.labels)), data.records_of[0]])
    owners = np.concatenate(
        [data.patients, np.full(len(data.records_of[0]), data.patient_count)]
    ).astype(np.int64)
    names = (*data.patient_ids, "once more")
    return PatientDataset(data.inputs[rows], data.labels[rows], owners, names)


def _restarted_books(patches: Patches, mode: str) -> None:
    def steps(self: Ledger, run_id: str, used_for: str = "training") -> int:
        charges = [c for c in self.charges(run_id) if c.used_for == used_for]
        return charges[-1].steps if charges else 0

    patches.enter_context(patched(Ledger, "steps", steps))


LISTED = (
    Fault("no noise", noise_rule(lambda right, draw: 0 * right)),
    Fault("noise divided by the batch", noise_rule(lambda right, draw: right / max(1, draw.batch))),
    Fault("noise 20 % low", noise_rule(lambda right, draw: 0.8 * right)),
    Fault("no clipping", clip_rule(lambda whole, clip: whole)),
    Fault("the batch clipped, not the patient", clip_rule(_clip_of_batch)),
    Fault("clipping by layer", clip_rule(_by_layer)),
    Fault("wrong sampling rate", sampling(_higher_rate)),
    Fault("accounting restarted every round", _restarted_books),
    Fault("noise from a fixed seed", noise_rule(_fixed_seed)),
    Fault("one layer without noise", noise_rule(_without_a_layer)),
    Fault("a patient twice in the data", data_rule(_twice)),
    Fault("noise added by micro-batch", noise_rule(_per_micro_batch)),
)
