"""Opacus: the one file that imports it to train.

Its optimiser holds a step's sum, clips where its own hooks give the gradients, and finishes the
step. Three of its defaults are replaced: the unit is the patient, the noise comes from the site's
own stream, and the divisor is a public constant.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional

from client.noise import ChaChaRandom
from shared.errors import SensitivityError

NORM_PIECE = 1 << 16


class RecordGradients(GradSampleModule):  # type: ignore[misc]  # opacus ships no types
    """A module whose backward pass keeps every record's own gradient in `grad_sample`.

    Opacus' hooks with two shortcuts that change no value: a faster gradient of Conv2d, and a
    backward pass that leaves out the weight gradients of the whole batch, which nobody reads.

    Args:
        module: The model, without hooks.
        example: One record, shape (1, *input_shape), on the module's device.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        entry = _entry_parameters(module, example)
        super().__init__(module, loss_reduction="sum", strict=True)
        self._entry = entry

    def backward(self, loss: Tensor) -> None:
        """Fill every parameter's `grad_sample` from a sum of per-record losses."""
        with warnings.catch_warnings():
            # Torch remarks that the model's input asks for no gradient; it need not.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(loss, inputs=self._entry)


class PatientClipper(DPOptimizer):  # type: ignore[misc]  # opacus ships no types
    """Opacus' clipping with patients as the unit, our noise, and a public divisor.

    One step is begin_step, add_patients for each physical batch, finish_step; the result is in
    the parameters' `grad`. The ordinary optimiser then steps by it. Hooks that are attached as
    to any of Opacus' optimisers, such as its accountants', run once a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float | None,
        max_grad_norm: float,
        divisor: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.divisor = divisor

    @property
    def grad_samples(self) -> list[Tensor]:
        """Per-patient gradients in pieces, of which Opacus takes the norms.

        The float32 norm of millions of values at once comes out as much as 1e-4 too small, which
        would let a patient of a large model through with more than C. In pieces it is exact
        to about 1e-6.
        """
        flat = [p.grad_sample.reshape(len(p.grad_sample), -1) for p in self.params]
        return [piece for g in flat for piece in torch.split(g, NORM_PIECE, dim=1)]

    @property
    def sums(self) -> dict[nn.Parameter, Tensor]:
        """The step's sum of clipped gradients so far, for an engine that adds to it."""
        return {p: p.summed_grad for p in self.params}

    def begin_step(self) -> None:
        """Start a sum of zero; an empty draw leaves it there."""
        for p in self.params:
            p.grad = p.grad_sample = None
            p.summed_grad = torch.zeros_like(p)

    def add_patients(self, owners: Tensor, patients: int) -> Tensor:
        """Clip the gradients of a physical batch's patients and add them to the sum.

        Args:
            owners: Which patient (0 to patients - 1) each record belongs to, shape (records,).
            patients: How many there are.

        Returns:
            The patients' norms before clipping, shape (patients,).

        Raises:
            SensitivityError: a parameter has no gradient for each record.
        """
        for p in self.params:
            p.grad_sample = _by_patient(p.grad_sample, tuple(p.shape), owners, patients)
        squares = [g.norm(2, dim=-1) ** 2 for g in self.grad_samples]
        norms = torch.stack(squares).sum(0).sqrt().nan_to_num(nan=torch.inf)
        before = [p.summed_grad for p in self.params]
        self._clip()
        if not all(bool(torch.isfinite(p.summed_grad).all()) for p in self.params):
            self._drop_broken_patients()
            self._clip()
        for p, total in zip(self.params, before, strict=True):
            p.summed_grad += total
            p.grad = p.grad_sample = None
        return norms

    def finish_step(self, random: ChaChaRandom) -> None:
        """Add N(0, (noise_multiplier C)^2) to every coordinate and divide by the divisor."""
        scale = float(self.noise_multiplier) * float(self.max_grad_norm)
        sizes = [p.numel() for p in self.params]
        noise = torch.from_numpy(random.gaussian(sum(sizes)) * np.float32(scale))
        start = 0
        for p, size in zip(self.params, sizes, strict=True):
            part = noise[start : start + size].view_as(p).to(p.device)
            p.grad = (p.summed_grad + part) / self.divisor
            p.summed_grad = None
            start += size
        if self.step_hook is not None:
            self.step_hook(self)

    @property
    def accumulated_iterations(self) -> int:
        """One: a step is one Poisson draw, however many physical batches it took."""
        return 1

    def finish_sum(self) -> Tensor:
        """The step's sum of clipped gradients, float32 (d,), still without noise."""
        total = torch.cat([p.summed_grad.reshape(-1) for p in self.params]).cpu()
        for p in self.params:
            p.summed_grad = None
        return total

    def _clip(self) -> None:
        for p in self.params:
            p.summed_grad = None
        self.clip_and_accumulate()

    def _drop_broken_patients(self) -> None:
        """A patient with a non-finite gradient counts as zero: it would erase all others."""
        finite = torch.stack(
            [torch.isfinite(g).reshape(len(g), -1).all(dim=1) for g in self.grad_samples]
        ).all(dim=0)
        for p in self.params:
            keep = finite.view(-1, *[1] * p.dim())
            p.grad_sample = torch.where(keep, p.grad_sample, torch.zeros_like(p.grad_sample))


class HookedGradients:
    """Opacus' hooks as an engine (see client/engines.py): every patient's gradient is held.

    Args:
        module: The model, without hooks.
        clipper: Clips and holds the step's sum.
        example: One record, shape (1, *input_shape), on the module's device.
    """

    name = "hooks"

    def __init__(self, module: nn.Module, clipper: PatientClipper, example: Tensor) -> None:
        self.hooked, self._clipper = RecordGradients(module, example), clipper

    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.hooked(inputs)
        return logits

    def add(self, loss: Tensor, owners: Tensor, patients: int) -> Tensor:
        """See `client.engines.Engine`."""
        self.hooked.backward(loss)
        return self._clipper.add_patients(owners, patients)

    def forget(self) -> None:
        """Drop what an interrupted step left."""
        forget_gradients(self.hooked)


def forget_gradients(module: nn.Module) -> None:
    """Clear what Opacus keeps on a module between forward and step."""
    for p in module.parameters():
        p.grad = p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]
        p._forward_counter = 0  # type: ignore[attr-defined]
        if hasattr(p, "_current_grad_sample"):
            del p._current_grad_sample
    for part in module.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(part, name):
                delattr(part, name)


def _by_patient(
    sample: object, shape: tuple[int, ...], owners: Tensor, patients: int
) -> torch.Tensor:
    """Add up per-record gradients to per-patient ones, shape (patients, *shape)."""
    records = len(owners)
    if not isinstance(sample, Tensor) or sample.shape != (records, *shape):
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise SensitivityError(
            f"a parameter of shape {shape} has per-record gradients {found} for {records} "
            f"records; {(records, *shape)} is needed. Use every parameter once in each forward "
            "pass, and keep the records as the first dimension of every layer's input."
        )
    if records == patients:
        return sample
    grouped = sample.new_zeros((patients, *shape))
    return grouped.index_add_(0, owners, sample)


def conv2d_gradients(
    layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Per-record gradients of a Conv2d, as Opacus' own but from strided views: about half the time.

    Args:
        layer: The convolution.
        activations: Its input, shape (records, channels_in, h, w), in a list of one.
        backprops: Gradient by its output, shape (records, channels_out, h_out, w_out).

    Returns:
        Gradients of shape (records, *parameter.shape), for the weight and, if any, the bias.
    """
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        fallback: dict[Tensor, Tensor] = compute_conv_grad_sample(layer, activations, backprops)
        return fallback
    records, channels, height, width = backprops.shape
    (pad_y, pad_x), (step_y, step_x) = layer.padding, layer.stride
    (size_y, size_x), (gap_y, gap_x) = layer.kernel_size, layer.dilation
    padded = functional.pad(activations[0], (pad_x, pad_x, pad_y, pad_y))
    patches = padded.unfold(2, gap_y * (size_y - 1) + 1, step_y)
    patches = patches.unfold(3, gap_x * (size_x - 1) + 1, step_x)[..., ::gap_y, ::gap_x]
    columns = patches.permute(0, 1, 4, 5, 2, 3).reshape(records, -1, height * width)
    rows = backprops.reshape(records, channels, height * width)
    weight = torch.bmm(rows, columns.transpose(1, 2)).view(records, *layer.weight.shape)
    gradients: dict[Tensor, Tensor] = {layer.weight: weight}
    if layer.bias is not None:
        gradients[layer.bias] = rows.sum(dim=2)
    return gradients


RecordGradients.GRAD_SAMPLERS = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: conv2d_gradients}


def _entry_parameters(module: nn.Module, example: Tensor) -> list[nn.Parameter]:
    """The smallest parameter of each layer that the input reaches first.

    Asking the backward pass for these alone still takes it through the output of every layer,
    which is where the hooks sit.
    """
    entry: list[nn.Parameter] = []

    def note(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            entry.append(min(learnt[layer], key=lambda p: p.numel()))

    learnt = {
        part: own
        for part in module.modules()
        if (own := [p for p in part.parameters(recurse=False) if p.requires_grad])
    }
    handles = [layer.register_forward_pre_hook(note) for layer in learnt]
    with torch.enable_grad():
        module(example)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(entry))
