"""Local training of one site: DP-SGD per patient.

An engine (client/engines.py) sums clipped per-patient gradients. The rest is done here, since
Opacus' defaults would break the promise without a word: patients are drawn by our own Poisson
mask, a patient's records count as one gradient, the divisor is a public constant of the plan, the
noise comes from the site's own ChaCha20 stream, and every step is counted, empty draws included.

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, with the
patient as the unit (McMahan et al., "Learning Differentially Private Recurrent Language Models",
ICLR 2018).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.augment import variants
from client.clipping import PatientClipper
from client.data.dataset import PatientDataset
from client.data.mapped import release
from client.engines import Engine, EngineName, choose_engine
from client.memory import free_bytes, is_out_of_memory, physical_records
from client.noise import ChaChaRandom
from shared.config import require
from shared.errors import ConfigError, SensitivityError
from shared.models import (
    build_model,
    check_model,
    input_shape,
    load_parameters,
    read_parameters,
    trained,
)
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.tasks import RecordLosses, task_kind
from shared.tasks import record_losses as task_losses

BuildModel = Callable[[StudyPlan], nn.Module]

_LOG = logging.getLogger("fedward.client")


@dataclass(frozen=True)
class RoundLog:
    """What happened in a round; it is about patients, so it stays on the site."""

    seconds: float
    patients_drawn: tuple[int, ...]
    records_seen: int


@dataclass(frozen=True)
class RoundResult:
    """A site's contribution to one round.

    Attributes:
        update: local parameters less the starting ones, float32, shape (d,).
        votes: In mode `distributed`: how many drawn patients' norms were within the clip norm, less
            how many were not; it has no noise yet.
        steps: noisy steps taken, to be charged; every step counts, an empty draw, too.
        log: facts for the site's own log alone.
    """

    update: FlatVector
    steps: int
    log: RoundLog
    votes: int = 0


class LocalTrainer:
    """Trains the plan's model on one site's patients, round after round.

    Build it once per study: the model and its engine are kept, and every round starts from clean
    gradients, whatever interrupted the one before.

    Args:
        plan: The approved study.
        site_name: A site of the plan's cohort; its declared patient count sets the divisor.
        data: The site's training patients; records past `max_records_per_patient` are unused.
        noise_multiplier: Noise over clip norm, above 0; None exactly where privacy is off.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        max_physical_records: Records that are computed at once; bounds memory and never changes
            the result but for rounding. Default: from the model and the free memory. It is
            halved where memory runs out.
        engine: How clipped gradients are summed, see `choose_engine`; the sum is the same.
        build: Model factory; `record_losses`: loss factory. For tests and the guard.
        measuring: Allow noise 0, for the sensitivity guard; such a trainer trains no round.

    Raises:
        ConfigError: data, model, noise or device do not fit the plan.
    """

    def __init__(
        self,
        plan: StudyPlan,
        site_name: str,
        data: PatientDataset,
        noise_multiplier: float | None,
        device: str = "auto",
        *,
        max_physical_records: int | None = None,
        engine: EngineName = "auto",
        build: BuildModel = build_model,
        record_losses: RecordLosses | None = None,
        measuring: bool = False,
    ) -> None:
        _check_noise(plan, noise_multiplier, measuring)
        shape = input_shape(plan)
        require(site_name in plan.cohort.names, f"the plan knows no site {site_name!r}")
        require(
            data.inputs.shape[1:] == shape,
            f"site {site_name!r}: records have shape {data.inputs.shape[1:]}; the plan's have "
            f"{shape}",
        )
        self.plan = plan
        self.data = data
        self.steps_taken = 0
        self._step_key = b""
        self._within = 0
        self.private = plan.privacy.mode != "none"
        self.device = choose_device(device)
        self._measuring = measuring
        self._record_losses = record_losses or task_losses(plan.task)
        self._outputs = task_kind(plan.task).outputs(plan.task)
        self._divisor = self.public_divisor(site_name)
        self._inputs = torch.from_numpy(np.ascontiguousarray(data.inputs))
        self._labels = torch.from_numpy(data.labels.astype(np.float32))
        used = plan.training.max_records_per_patient
        self._records_of = data.records_of.first(used)
        self.module = build(plan)
        check_model(self.module)
        self.module.to(self.device)
        self._parameters = list(trained(self.module).values())
        if max_physical_records is not None:
            require(
                max_physical_records >= 1,
                f"max_physical_records is {max_physical_records}; 1 or more",
            )
        training = plan.training
        self._sgd = torch.optim.SGD(
            self._parameters,
            lr=training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        self._engine: Engine | None = None
        self._clipper: PatientClipper | None = None
        if self.private:
            self._clipper = PatientClipper(
                self._sgd,
                noise_multiplier=noise_multiplier,
                max_grad_norm=plan.privacy.promise[2],
                divisor=self._divisor,
            )
            self._engine = choose_engine(engine, self.module, self._clipper, shape)
        self._max_records = max_physical_records or physical_records(
            self.module,
            torch.zeros(1, *shape, device=self.device),
            holds_gradients=self.engine_name == "hooks",
            free=free_bytes(self.device),
        )

    @property
    def engine_name(self) -> str:
        """Which engine sums clipped gradients; "none" where privacy is off."""
        return "none" if self._engine is None else self._engine.name

    def public_divisor(self, site_name: str) -> float:
        """What summed gradients are divided by: a public constant, never a true count."""
        rate = self.plan.training.sample_rate
        if rate is None:
            return 1.0
        return rate * self.plan.cohort.expected_patients(site_name)

    def train_round(
        self,
        start: FlatVector,
        random: ChaChaRandom,
        round_no: int,
        *,
        correction: FlatVector | None = None,
    ) -> RoundResult:
        """Take the plan's local steps from `start`, with a fresh local optimiser.

        Args:
            start: Parameters, float32, shape (d,); not modified.
            random: The site's stream. A round that is trained again from the same object gets
                other noise.
            round_no: The round, 1 or more.
            correction: Of the drift (SCAFFOLD), float32 (d,), added in equal parts after the
                steps. It must be a function of what noise already covers.

        Raises:
            ConfigError: the parameters do not fit, or training diverged.
            SensitivityError: a record's gradient cannot be told from another's.
        """
        require(not self._measuring, "a trainer that measures sensitivity trains no round")
        began = time.perf_counter()
        self._begin(start)
        stream = random.fresh_child(f"round {round_no}")
        origin = [p.detach().clone() for p in self._parameters]
        nudges = self._nudges(correction)
        drawn, seen = [], 0
        for batch in self._draws(stream, random):
            drawn.append(len(batch))
            with self._exact_arithmetic():
                seen += self._gradient(batch, stream)
            if self.plan.training.proximal_mu:
                self._pull_towards(origin)
            self._sgd.step()
            with torch.no_grad():
                for p, nudge in zip(self._parameters, nudges, strict=False):
                    p.add_(nudge)
            self.steps_taken += 1
        update = read_parameters(self.module) - start
        require(
            bool(np.isfinite(update).all()),
            f"training diverged in round {round_no}: the model is not finite. Lower "
            "learning_rate, or start again from an earlier round.",
        )
        log = RoundLog(time.perf_counter() - began, tuple(drawn), seen)
        return RoundResult(update, len(drawn), log)

    def clipped_sum(
        self,
        start: FlatVector,
        random: ChaChaRandom,
        round_no: int,
        *,
        clip_norm: float | None = None,
    ) -> RoundResult:
        """The sum of one Poisson batch's clipped gradients at `start`, without noise.

        For mode `distributed`: the caller adds the site's share of the noise in the ring before
        anything leaves. An empty draw gives zeros, and the site sends noise alone.

        Args:
            start: Parameters, float32, shape (d,); not modified.
            random: The site's stream.
            round_no: The round, 1 or more.
            clip_norm: Of this round, where it adapts; the sum is scaled by the plan's own over it,
                so that a patient moves it by the plan's clip norm at most, whatever it is.

        Raises:
            SensitivityError: a record's gradient cannot be told from another's.
        """
        if self._clipper is None or self.plan.training.sample_rate is None:
            raise ConfigError("a clipped sum needs a private mode with Poisson draws")
        require(not self._measuring, "a trainer that measures sensitivity trains no round")
        began = time.perf_counter()
        planned = self.plan.privacy.promise[2]
        self._clipper.max_grad_norm = clip_norm or planned
        self._begin(start)
        stream = random.fresh_child(f"round {round_no}")
        batch = stream.sample(self.data.patient_count, self.plan.training.sample_rate)
        with self._exact_arithmetic():
            self._begin_step(stream)
            seen = self._sum_patients(batch)
        self.steps_taken += 1
        log = RoundLog(time.perf_counter() - began, (len(batch),), seen)
        total = self._clipper.finish_sum()
        if clip_norm is not None:
            total *= planned / clip_norm
        return RoundResult(total.numpy(), 1, log, 2 * self._within - len(batch))

    def gradient(
        self,
        start: FlatVector,
        patients: NDArray[np.int64],
        random: ChaChaRandom,
        *,
        clip_norm: float | None = None,
    ) -> FlatVector:
        """The gradient that one step at `start` on these patients would use, float32 (d,).

        In private modes (clipped sum + noise) / divisor. This is the code that `train_round`
        steps by; the sensitivity guard and audits measure it, with other clip norms, too.
        """
        require(clip_norm is None or self._measuring, "only measuring may change the clip norm")
        if self._clipper is not None:
            self._clipper.max_grad_norm = clip_norm or self.plan.privacy.promise[2]
        self._begin(start)
        with self._exact_arithmetic():
            self._gradient(patients, random)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat: FlatVector = torch.cat([g.reshape(-1) for g in grads]).cpu().numpy()
        return flat

    def predict(self, parameters: FlatVector, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs under the given parameters, float32, (records,) or (records, outputs)."""
        load_parameters(self.module, parameters)
        self.module.eval()
        records = torch.from_numpy(np.ascontiguousarray(inputs))
        with torch.inference_mode():
            parts = []
            for part in torch.split(records, self._max_records):
                parts.append(self.module(part.to(self.device)).cpu())
                release(inputs)
            logits: NDArray[np.float32] = torch.cat(parts).numpy()
        return logits

    def _begin(self, start: FlatVector) -> None:
        """Load `start`, and forget all that an earlier, perhaps interrupted, round left."""
        load_parameters(self.module, start)
        self.module.train()
        self._sgd.state.clear()
        self._sgd.zero_grad(set_to_none=True)
        if self._engine is not None:
            self._engine.forget()

    def _exact_arithmetic(self) -> AbstractContextManager[None]:
        """On a GPU: full float32, and one algorithm whatever else is in the batch."""
        if self.device.type == "cpu":
            return nullcontext()
        return torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )

    def _draws(self, stream: ChaChaRandom, random: ChaChaRandom) -> Iterator[NDArray[np.int64]]:
        """The patients of each step; in mode none with batch_size, the records."""
        training = self.plan.training
        for _ in range(training.local_steps):
            if training.sample_rate is not None:
                yield stream.sample(self.data.patient_count, training.sample_rate)
            else:
                yield self._shuffled_batch(random)

    def _shuffled_batch(self, random: ChaChaRandom) -> NDArray[np.int64]:
        """The next records of a pass over all; passes go on from round to round."""
        size = self.plan.training.batch_size or 1
        records = self._records_of.together(np.arange(self.data.patient_count))
        epoch, position = divmod(self.steps_taken, -(-len(records) // size))
        order = random.child(f"epoch {epoch}").permutation(len(records))
        return records[order[position * size : (position + 1) * size]]

    def _gradient(self, batch: NDArray[np.int64], random: ChaChaRandom) -> int:
        """Leave one step's gradient in the parameters; return how many records it read."""
        if self.plan.training.sample_rate is None:
            return self._mean_gradient(batch)
        self._begin_step(random)
        seen = self._sum_patients(batch)
        if self._clipper is not None:
            self._clipper.finish_step(random)
        else:
            for p in self._parameters:
                if p.grad is not None:
                    p.grad /= self._divisor
        return seen

    def _begin_step(self, random: ChaChaRandom) -> None:
        """Draw what a step's variants follow from, whoever is in the batch."""
        if self.plan.training.augment.variants:
            self._step_key = random.bytes(32)

    def _sum_patients(self, batch: NDArray[np.int64]) -> int:
        """Add up a batch's gradients, clipped in private modes; return how many records it read."""
        counts = self._records_of.counts[batch]
        while not self._sum_fits(batch, counts):
            # From the start: some layers of the last physical batch may be in the sum already.
            self._use_less_memory()
        return int(counts.sum())

    def _sum_fits(self, batch: NDArray[np.int64], counts: NDArray[np.int64]) -> bool:
        """Start the step's sum and add all patients; False where memory ran out on the way."""
        self._within = 0
        if self._clipper is not None:
            self._clipper.begin_step()
        else:
            for p in self._parameters:
                p.grad = torch.zeros_like(p)
        try:
            each = max(1, self.plan.training.augment.variants)
            for part in physical_batches(counts * each, self._max_records):
                self._accumulate(batch[part], counts[part])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _use_less_memory(self) -> None:
        if self._max_records == 1:
            raise ConfigError(
                "a single patient's records do not fit into memory. Lower the plan's "
                "max_records_per_patient, use a smaller model, or a machine with more memory."
            )
        self._max_records //= 2
        _LOG.warning("out of memory: physical batches of %d records from here", self._max_records)
        if self._engine is not None:
            self._engine.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _accumulate(self, patients: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Add some patients' gradients, clipped in private modes, to the step's sum."""
        augment = self.plan.training.augment
        each = max(1, augment.variants)
        rows = torch.from_numpy(self._records_of.together(patients))
        owners = torch.from_numpy(np.repeat(np.arange(len(patients)), counts * each))
        owners = owners.to(self.device)
        shares = torch.from_numpy((1.0 / (counts * each)).astype(np.float32))
        shares = shares.to(self.device)[owners]
        inputs = self._inputs[rows]
        release(self.data.inputs)
        if augment.variants:
            inputs = variants(inputs, augment, self._step_key)
        loss = self._losses(inputs.to(self.device), rows.repeat_interleave(each))
        loss = (loss * shares).sum()
        if self._engine is not None:
            norms = self._engine.add(loss, owners, len(patients))
            if self.plan.privacy.adapts and self._clipper is not None:
                self._within += int((norms <= self._clipper.max_grad_norm).sum())
        else:
            torch.autograd.backward(loss)

    def _mean_gradient(self, records: NDArray[np.int64]) -> int:
        """Ordinary mini-batch gradient of the mean loss, without privacy."""
        self._sgd.zero_grad(set_to_none=True)
        for rows in torch.split(torch.from_numpy(records), self._max_records):
            inputs = self._inputs[rows].to(self.device)
            release(self.data.inputs)
            torch.autograd.backward(self._losses(inputs, rows).sum() / len(records))
        return len(records)

    def _losses(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """One loss a record, shape (records,)."""
        logits = (self._engine or self.module)(inputs)
        expected = (len(rows), self._outputs)[: 1 if self._outputs == 1 else 2]
        if logits.shape != expected:
            raise SensitivityError(
                f"the model returns outputs of shape {tuple(logits.shape)} for {len(rows)} "
                f"records; it must return {self._outputs} a record, shape {expected}, or the loss "
                "would mix records"
            )
        losses = self._record_losses(logits, self._labels[rows].to(self.device))
        if losses.shape != (len(rows),):
            raise SensitivityError(
                f"the loss returns shape {tuple(losses.shape)} for {len(rows)} records; it must "
                "return each record's own loss, shape (records,), neither mean nor sum"
            )
        return losses

    def _nudges(self, correction: FlatVector | None) -> list[Tensor]:
        """What SCAFFOLD adds to each parameter after each step; none without a correction."""
        if correction is None:
            return []
        each = torch.from_numpy(correction / np.float32(self.plan.training.local_steps))
        sizes = [p.numel() for p in self._parameters]
        parts = zip(torch.split(each, sizes), self._parameters, strict=True)
        return [part.view_as(p).to(p.device) for part, p in parts]

    def _pull_towards(self, origin: list[Tensor]) -> None:
        """FedProx: add mu (w - w0), after the noise (Li et al., MLSys 2020, algorithm 2)."""
        mu = self.plan.training.proximal_mu
        for p, p0 in zip(self._parameters, origin, strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - p0, alpha=mu)


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a torch device; ConfigError where there is no such one."""
    require(name in ("auto", "cpu", "cuda"), f"device is {name!r}; valid: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this machine has no usable GPU. Use auto or cpu.")
    use_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def physical_batches(counts: NDArray[np.int64], most: int) -> list[slice]:
    """Cut patients, in order, into runs of at most `most` records; none is ever split.

    A patient with more than `most` records is a run alone. Runs are about equally long: a short
    last one would cost nearly as much time as a full one.
    """
    total = int(counts.sum())
    even = -(-total // max(1, -(-total // most)))
    runs, start, records = [], 0, 0
    for i, count in enumerate(counts.tolist()):
        full = records >= even or records + count > most
        if i > start and full:
            runs.append(slice(start, i))
            start, records = i, 0
        records += count
    if start < len(counts):
        runs.append(slice(start, len(counts)))
    return runs


def _check_noise(plan: StudyPlan, noise_multiplier: float | None, measuring: bool) -> None:
    if plan.privacy.mode == "none":
        require(noise_multiplier is None, "privacy is off; leave noise_multiplier out (None)")
        return
    if noise_multiplier is None or (noise_multiplier <= 0 and not measuring):
        raise ConfigError(
            f"mode {plan.privacy.mode!r} needs a noise_multiplier above 0; calibrate one with "
            "shared.privacy.noise_multiplier_of"
        )
