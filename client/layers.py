"""How each kind of layer gives per-patient gradient norms, and a weighted sum of gradients.

A layer's gradient for one record is a product of what went in and of the loss's gradient by what
came out. From these two the norm follows in one of two ways: from the gradient itself, stored for
every patient; or from two Gram matrices over positions, without it ("ghost norm": less memory
where 2 T^2 <= d p for T positions, d values in and p values out). A patient with several records
is one longer sequence of positions.

Source: Bu et al., "Differentially Private Optimization on Large Model at Small Cost", ICML 2023;
Li et al., "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from client.blocks import Sums

LOOP_WORK = 1 << 23  # multiplications a record, from which one convolution a record is faster
FEW_POSITIONS = 64  # fewer outputs of a convolution than this go through one matrix product
STORED_VALUES = 1 << 22  # per-patient gradients of a layer, in all, that are held in any case
ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Batch:
    """Whose records a physical batch holds.

    Attributes:
        owners: The patient (0 to patients - 1) of each record, sorted, int64, shape (records,).
        patients: How many patients there are.
    """

    owners: Tensor
    patients: int

    @property
    def records(self) -> int:
        """How many records there are."""
        return self.owners.shape[0]

    @cached_property
    def most(self) -> int:
        """Records of the patient who has most."""
        if self.records == self.patients:
            return 1
        return int(torch.bincount(self.owners, minlength=self.patients).max())

    @cached_property
    def _slots(self) -> Tensor:
        """Each record's place among patients x most."""
        counts = torch.bincount(self.owners, minlength=self.patients)
        first = counts.cumsum(0) - counts
        place = torch.arange(self.records, device=self.owners.device) - first[self.owners]
        return self.owners * self.most + place

    def by_patient(self, gradients: Tensor) -> Tensor:
        """Add up per-record gradients (records, ...) to per-patient ones (patients, ...)."""
        if self.most == 1:
            return gradients
        total = gradients.new_zeros((self.patients, *gradients.shape[1:]))
        return total.index_add_(0, self.owners, gradients)

    def sequences(self, rows: Tensor) -> Tensor:
        """Join a patient's records along positions: (records, T, d) -> (patients, most T, d).

        Missing records are zeros; where the output's gradient is zero, nothing is added.
        """
        if self.most == 1:
            return rows
        joined = rows.new_zeros((self.patients * self.most, *rows.shape[1:]))
        joined[self._slots] = rows
        return joined.view(self.patients, self.most * rows.shape[1], *rows.shape[2:])


@dataclass(eq=False)
class Flow:
    """What went through a layer in one pass, records first.

    Attributes:
        inputs: What went in.
        grads: The loss's gradient by what came out.
        saved: What the layer's rule kept of the forward pass, see `LayerRule.saved`.
    """

    inputs: Tensor
    grads: Tensor
    saved: tuple[Tensor, ...] = ()


class LayerRule(ABC):
    """One layer's parameters, which are used together."""

    def __init__(self, *parameters: nn.Parameter | None) -> None:
        self.parameters = tuple(p for p in parameters if p is not None)

    @abstractmethod
    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """Each patient's gradient of every parameter, shape (patients, *parameter.shape)."""

    def takes_ghost(self, flow: Flow, batch: Batch) -> bool:
        """Whether norms without the gradients cost less."""
        del flow, batch
        return False

    def ghost_squares(self, flow: Flow, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Squared norms without the gradients, and how far rounding may have moved them.

        Returns:
            Two tensors of shape (patients,); None where no more than rounding is possible.
        """
        raise NotImplementedError

    def add_weighted(self, flow: Flow, weights: Tensor, sums: Sums) -> None:
        """Add the sum over records of weight times gradient, for every parameter.

        Args:
            weights: One a record, shape (records,).
        """
        raise NotImplementedError

    def joined(self, flows: Sequence[Flow]) -> Flow | None:
        """Several uses in one forward pass as one, or None where their gradients are added."""
        del flows
        return None

    def saved(self, output: Tensor) -> tuple[Tensor, ...]:
        """What the forward pass already computed and `stored` wants."""
        del output
        return ()


class LinearRule(LayerRule):
    """A linear map of the last dimension; what lies between it and the records are positions."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias)
        self.weight, self.bias = weight, bias
        self._width_out, self._width_in = weight.shape
        self._bias = bias is not None

    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """See `LayerRule`."""
        a, g = batch.sequences(_rows(flow.inputs)), batch.sequences(_rows(flow.grads))
        found = [torch.bmm(g.transpose(1, 2), a)]
        return [*found, g.sum(1)] if self._bias else found

    def takes_ghost(self, flow: Flow, batch: Batch) -> bool:
        """See `LayerRule`; a single position is a product of two norms."""
        positions = batch.most * math.prod(flow.inputs.shape[1:-1])
        return positions == 1 or _pays(positions, self.weight.numel(), batch)

    def ghost_squares(self, flow: Flow, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `LayerRule`."""
        a, g = batch.sequences(_rows(flow.inputs)), batch.sequences(_rows(flow.grads))
        return _gram_squares(a, g, bias=self._bias)

    def add_weighted(self, flow: Flow, weights: Tensor, sums: Sums) -> None:
        """See `LayerRule`."""
        g = (flow.grads * _beside(weights, flow.grads)).reshape(-1, self._width_out)
        sums[self.weight].addmm_(g.t(), flow.inputs.reshape(-1, self._width_in))
        if self.bias is not None:
            sums[self.bias].add_(g.sum(0))

    def joined(self, flows: Sequence[Flow]) -> Flow | None:
        """Uses are further positions, as in a recurrent network."""
        return Flow(
            torch.cat([_rows(f.inputs) for f in flows], 1),
            torch.cat([_rows(f.grads) for f in flows], 1),
        )


class ConvRule(LayerRule):
    """A convolution in one, two or three dimensions, with any stride, padding and groups."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(*layer.parameters(recurse=False))
        self._layer = layer
        self._bias = layer.bias is not None
        kinds = (conv1d_weight, conv2d_weight, conv3d_weight)
        self._gradient: Callable[..., Tensor] = kinds[layer.weight.dim() - 3]

    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """See `LayerRule`; by whichever of three ways is fastest on a CPU."""
        layer, grads, records = self._layer, flow.grads, len(flow.inputs)
        positions = math.prod(grads.shape[2:])
        if positions * layer.weight.numel() > LOOP_WORK:
            pairs = zip(_singly(flow.inputs), _singly(grads), strict=True)
            weight = torch.stack([self._weight_gradient(a, g, 1) for a, g in pairs])
        elif layer.groups == 1 and grads.dim() == 4 and positions < FEW_POSITIONS:
            weight = self._by_rows_of_pixels(flow)
        else:
            # All records as the groups of one convolution.
            weight = self._weight_gradient(
                flow.inputs.reshape(1, -1, *flow.inputs.shape[2:]),
                grads.reshape(1, -1, *grads.shape[2:]),
                records,
            ).view(records, *layer.weight.shape)
        found = [batch.by_patient(weight)]
        return [*found, batch.by_patient(_over_positions(grads))] if self._bias else found

    def takes_ghost(self, flow: Flow, batch: Batch) -> bool:
        """See `LayerRule`."""
        positions = batch.most * math.prod(flow.grads.shape[2:])
        return self._layer.groups == 1 and _pays(positions, self._layer.weight.numel(), batch)

    def ghost_squares(self, flow: Flow, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `LayerRule`."""
        a = batch.sequences(self._columns(flow.inputs))
        g = batch.sequences(flow.grads.flatten(2).transpose(1, 2))
        return _gram_squares(a, g, bias=self._bias)

    def add_weighted(self, flow: Flow, weights: Tensor, sums: Sums) -> None:
        """See `LayerRule`."""
        g = flow.grads * _beside(weights, flow.grads)
        found = [self._weight_gradient(flow.inputs, g, 1)]
        if self._bias:
            found.append(_over_positions(g).sum(0))
        for p, part in zip(self.parameters, found, strict=True):
            sums[p].add_(part)

    def _by_rows_of_pixels(self, flow: Flow) -> Tensor:
        """Per-record gradients by one matrix product; a kernel's row is one piece of memory."""
        records, channels, high, wide = flow.grads.shape
        (tall, broad), (down, right) = self._layer.kernel_size, self._layer.stride
        (gap_y, gap_x) = self._layer.dilation
        pixels = self._padded(flow.inputs).permute(0, 2, 3, 1).contiguous()
        # Not `stride()`: that of an axis of length 1 may be anything.
        _, lines, in_line, a_pixel = pixels.shape
        a_record, a_line = lines * in_line * a_pixel, in_line * a_pixel
        patches = pixels.as_strided(
            (records, high, wide, tall, broad, a_pixel),
            (a_record, down * a_line, right * a_pixel, gap_y * a_line, gap_x * a_pixel, 1),
        ).reshape(records, high * wide, -1)
        grads = flow.grads.permute(0, 2, 3, 1).reshape(records, high * wide, channels)
        weight = torch.bmm(grads.transpose(1, 2), patches)
        return weight.view(records, channels, tall, broad, a_pixel).permute(0, 1, 4, 2, 3)

    def _weight_gradient(self, inputs: Tensor, grads: Tensor, times: int) -> Tensor:
        """The weight's gradient, of `times` groups of records side by side."""
        layer = self._layer
        padding: int | tuple[int, ...] = 0
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            padding = layer.padding
        else:
            inputs = self._padded(inputs)
        shape = (times * layer.weight.shape[0], *layer.weight.shape[1:])
        groups = times * layer.groups
        return self._gradient(inputs, shape, grads, layer.stride, padding, layer.dilation, groups)

    def _padded(self, inputs: Tensor) -> Tensor:
        layer = self._layer
        around: list[int] = list(layer._reversed_padding_repeated_twice)
        if not any(around):
            return inputs
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return functional.pad(inputs, around, mode=mode)

    def _columns(self, inputs: Tensor) -> Tensor:
        """What each position of the output sees, shape (records, positions, values)."""
        layer, patches = self._layer, self._padded(inputs)
        dimensions = layer.weight.dim() - 2
        for i in range(dimensions):
            gap = layer.dilation[i]
            patches = patches.unfold(2 + i, gap * (layer.kernel_size[i] - 1) + 1, layer.stride[i])
            patches = patches[..., ::gap]
        # (records, channels, *out, *kernel) -> (records, channels, *kernel, *out)
        places = list(range(2, 2 + dimensions))
        kernel = list(range(2 + dimensions, 2 + 2 * dimensions))
        values = math.prod(layer.weight.shape[1:])
        columns = patches.permute(0, 1, *kernel, *places).reshape(len(inputs), values, -1)
        return columns.transpose(1, 2)


class GroupNormRule(LayerRule):
    """GroupNorm's scale and shift, one of each a channel."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__(layer.weight, layer.bias)
        self._layer = layer

    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """See `LayerRule`; the sums that torch's own backward pass takes."""
        mean, scale = flow.saved or self._statistics(flow.inputs)
        records, channels = flow.inputs.shape[:2]
        by_group = (records, self._layer.num_groups, -1)
        shift = _over_positions(flow.grads)
        products = _over_positions(flow.inputs * flow.grads).view(by_group)
        centred = products - mean[..., None] * shift.view(by_group)
        weight = (centred * scale[..., None]).view(records, channels)
        return [batch.by_patient(weight), batch.by_patient(shift)]

    def saved(self, output: Tensor) -> tuple[Tensor, ...]:
        """See `LayerRule`: mean and 1 / deviation of each record's groups."""
        node = output.grad_fn
        mean, scale = getattr(node, "_saved_result1", None), getattr(node, "_saved_result2", None)
        return () if mean is None or scale is None else (mean, scale)

    def _statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        grouped = inputs.reshape(len(inputs), self._layer.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
        return mean, torch.rsqrt(variance + self._layer.eps)


class LayerNormRule(LayerRule):
    """LayerNorm's scale and shift, one of each a normalised value."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__(layer.weight, layer.bias)
        self._layer = layer

    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """See `LayerRule`."""
        layer, inputs, grads = self._layer, flow.inputs, flow.grads
        shape = tuple(layer.normalized_shape)
        normal = functional.layer_norm(inputs, shape, eps=layer.eps)
        split = (len(inputs), -1, *shape)
        found = [batch.by_patient((normal * grads).reshape(split).sum(1))]
        if layer.bias is not None:
            found.append(batch.by_patient(grads.reshape(split).sum(1)))
        return found


class EmbeddingRule(LayerRule):
    """A table of vectors, looked up by whole numbers."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__(*layer.parameters(recurse=False))
        self._layer = layer

    def stored(self, flow: Flow, batch: Batch) -> list[Tensor]:
        """See `LayerRule`."""
        table = flow.grads.new_zeros((batch.patients, *self._layer.weight.shape))
        words, g = _rows(flow.inputs[..., None])[..., 0], _rows(self._unpadded(flow))
        patients = batch.owners[:, None].expand_as(words)
        return [table.index_put_((patients, words), g, accumulate=True)]

    def takes_ghost(self, flow: Flow, batch: Batch) -> bool:
        """See `LayerRule`."""
        positions = batch.most * math.prod(flow.inputs.shape[1:])
        return 2 * positions**2 <= self._layer.weight.numel()

    def ghost_squares(self, flow: Flow, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `LayerRule`: two positions overlap where they looked up the same vector."""
        words = batch.sequences(_rows(flow.inputs[..., None]))
        g = batch.sequences(_rows(self._unpadded(flow)))
        same = (words == words.transpose(1, 2)).to(g.dtype)
        return _overlap(same, torch.bmm(g, g.transpose(1, 2)))

    def add_weighted(self, flow: Flow, weights: Tensor, sums: Sums) -> None:
        """See `LayerRule`."""
        g = self._unpadded(flow) * _beside(weights, flow.grads)
        (p,) = self.parameters
        sums[p].index_add_(0, flow.inputs.reshape(-1), g.reshape(-1, p.shape[1]))

    def _unpadded(self, flow: Flow) -> Tensor:
        if self._layer.padding_idx is None:
            return flow.grads
        return flow.grads * (flow.inputs != self._layer.padding_idx)[..., None]


_RULES: dict[type[nn.Module], Callable[[Any], LayerRule]] = {
    nn.Linear: lambda layer: LinearRule(layer.weight, layer.bias),
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.GroupNorm: GroupNormRule,
    nn.LayerNorm: LayerNormRule,
    nn.Embedding: EmbeddingRule,
}


def rule_of(layer: nn.Module) -> LayerRule | None:
    """The rule of a layer with parameters of its own, or None where there is no exact one.

    Subclasses of the supported layers may compute something else and have none.
    """
    if type(layer) not in _RULES:
        return None
    if isinstance(layer, nn.Embedding):
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return EmbeddingRule(layer) if plain else None
    return _RULES[type(layer)](layer)


def _rows(x: Tensor) -> Tensor:
    """(records, ..., width) -> (records, positions, width)."""
    if x.dim() == 3:
        return x
    return x.reshape(len(x), -1, x.shape[-1])


def _beside(weights: Tensor, x: Tensor) -> Tensor:
    """Weights of shape (records, 1, ...), to multiply `x` by."""
    return weights.view(-1, *[1] * (x.dim() - 1))


def _singly(x: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(x, 1)
    return parts


def _over_positions(x: Tensor) -> Tensor:
    """Sum of (records, channels, ...) over all that follows, in whatever memory layout."""
    return x.sum(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def _pays(positions: int, values: int, batch: Batch) -> bool:
    """Whether Gram matrices cost less than holding `values` numbers for every patient.

    Held gradients save the second pass over the layer, so while they fit a cache they win.
    """
    return 2 * positions**2 <= values and batch.patients * values > STORED_VALUES


def _gram_squares(a: Tensor, g: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Squared norms of sum_t g_t a_t', shape (patients,), the bias's included."""
    if a.shape[1] == 1:
        inputs = torch.linalg.vector_norm(a[:, 0], dim=1).square()
        grads = torch.linalg.vector_norm(g[:, 0], dim=1).square()
        return (inputs.add_(1.0) if bias else inputs).mul_(grads), None
    inputs = torch.bmm(a, a.transpose(1, 2))
    if bias:
        inputs += 1.0
    return _overlap(inputs, torch.bmm(g, g.transpose(1, 2)))


def _overlap(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of products of two Gram matrices, and what its rounding may have been."""
    products = inputs.mul_(grads).flatten(1)
    squares = products.sum(1).clamp_(min=0.0)
    return squares, products.abs_().sum(1) * ROUNDING
