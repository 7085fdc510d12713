"""The book-keeping engine: a sum of clipped per-patient gradients from one backward pass.

Ordinary training asks autograd for every layer's weight gradient of the whole batch. Here it is
asked for the gradients by the layers' outputs alone. With what went into a layer they give every
patient's norm (client/layers.py), and, once the norms of all layers are known and the patients'
clipping factors with them, the clipped sum, by one weighted weight gradient a layer. Nobody's
gradient is ever held for layers in which it would be large.

Source: Bu et al., "Differentially Private Optimization on Large Model at Small Cost", ICML 2023,
algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client.blocks import Block, Sums, blocks_of, squares_of
from client.layers import Batch, Flow, LayerRule, rule_of
from client.recurrent import RecurrentRules
from shared.errors import SensitivityError

DOUBT = 1e-4
"""Rounding of a squared norm, relative, above which it is taken from the gradient itself."""

AGREEMENT = 1e-3  # relative; far above rounding, far below a forgotten use of a parameter


class UnsupportedLayerError(Exception):
    """A module has a part for which this engine knows no exact rule."""


@dataclass(eq=False)
class _Use:
    """One call of a layer in the forward pass."""

    inputs: Tensor
    version: int
    edge: torch.autograd.graph.GradientEdge | None
    saved: tuple[Tensor, ...]
    grads: Tensor | None = None


@dataclass(eq=False)
class _Kept:
    """What is kept of a layer until the clipping factors are known.

    Either every patient's gradient of each of its parameters, or what went through it and the
    squared norms that follow from that.
    """

    stored: Sequence[Tensor] = ()
    flow: Flow | None = None
    squares: Tensor | None = None
    doubt: Tensor | None = None


class BookKeeping:
    """A module whose clipped per-patient gradients are summed without holding them all.

    A step of a physical batch is `engine(inputs)`, a loss of its logits, `engine.add(...)`.

    Args:
        module: The model; it must see records as the first dimension of every layer's input.
        example: At least two records that the module accepts, on its device. The engine's norms
            and sums on them are compared with autograd's.

    Raises:
        UnsupportedLayerError: a layer has no rule here, a parameter is used outside its layer, or
            the comparison failed.
    """

    name = "book-keeping"

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = module
        self._rules: list[LayerRule] = []
        self._unrolled: list[tuple[nn.Module, RecurrentRules]] = []
        self._uses: dict[LayerRule, list[_Use]] = {}
        self._kept: dict[LayerRule, _Kept] = {}
        self._batch = Batch(torch.zeros(0, dtype=torch.int64), 0)
        self._recording = False
        self._find_rules()
        self._compare_with_autograd(example)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The module's logits; what goes through its layers is remembered until `add`."""
        self.forget()
        self._recording = True
        try:
            logits: Tensor = self.module(inputs)
        finally:
            self._recording = False
        return logits

    def forget(self) -> None:
        """Drop what a forward pass left, whatever interrupted it."""
        self._uses.clear()
        self._kept.clear()

    def add(
        self,
        loss: Tensor,
        owners: Tensor,
        patients: int,
        clip_norm: float,
        sums: Sums,
    ) -> Tensor:
        """Add a physical batch's clipped per-patient gradients to `sums`.

        Args:
            loss: The sum of the records' losses, from the last forward pass.
            owners: Which patient (0 to patients - 1) each record belongs to, sorted.
            patients: How many there are.
            clip_norm: C. A patient's factor is min(1, C / (norm + 1e-6)), as in Opacus.
            sums: The step's sum so far of every parameter's gradients; changed in place.

        Returns:
            The patients' norms, shape (patients,); a patient whose gradient is not finite has
            an infinite one and adds nothing.

        Raises:
            SensitivityError: a layer's records cannot be told apart, or a parameter is unused.
        """
        self._batch = Batch(owners, patients)
        self._backward(loss)
        with torch.no_grad():
            blocks = blocks_of(
                (p, gradients)
                for rule, kept in self._kept.items()
                for p, gradients in zip(rule.parameters, kept.stored, strict=False)
            )
            squares = self._squares(blocks)
            norms = squares.sqrt()
            factors = (clip_norm / (norms + 1e-6)).clamp_(max=1.0)
            if not math.isfinite(float(squares.sum())):
                # Zero times infinity is not zero: their rows must go, not only their weight.
                finite = torch.isfinite(squares)
                norms = torch.where(finite, norms, torch.inf)
                factors = torch.where(finite, factors, 0.0)
                self._drop_patients(finite, blocks)
            weights = factors if self._batch.most == 1 else factors[owners]
            self._add(blocks, factors, weights, sums)
        self.forget()
        return norms

    # --- which layers -----------------------------------------------------------------------

    def _find_rules(self) -> None:
        for name, layer in self.module.named_modules():
            if not any(p.requires_grad for p in layer.parameters(recurse=False)):
                continue
            rule = rule_of(layer)
            if rule is not None:
                self._rules.append(rule)
                layer.register_forward_hook(functools.partial(self._called, rule), with_kwargs=True)
            elif isinstance(layer, nn.GRU | nn.LSTM) and RecurrentRules.is_plain(layer):
                unrolled = RecurrentRules(layer)
                self._rules += unrolled.rules
                self._replace_forward(layer, unrolled)
            else:
                raise UnsupportedLayerError(f"{name or 'the model'} is a {type(layer).__name__}")
        covered = [id(p) for rule in self._rules for p in rule.parameters]
        wanted = [p for p in self.module.parameters() if p.requires_grad]
        if sorted(covered) != sorted(id(p) for p in wanted):
            raise UnsupportedLayerError("a parameter is shared by two layers, or partly frozen")

    def _replace_forward(self, layer: nn.Module, unrolled: RecurrentRules) -> None:
        ordinary = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._recording:
                return unrolled.forward(self._note, *args, **kwargs)
            return ordinary(*args, **kwargs)

        layer.forward = forward

    # --- the two passes ---------------------------------------------------------------------

    def _called(
        self,
        rule: LayerRule,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        del layer
        if self._recording:
            self._note(rule, args[0] if args else kwargs["input"], output)

    def _note(self, rule: LayerRule, inputs: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            return
        # The edge stays that of this output, even if something changes it in place later.
        edge = None if inputs.requires_grad else torch.autograd.graph.get_gradient_edge(output)
        use = _Use(inputs.detach(), inputs._version, edge, rule.saved(output))
        self._uses.setdefault(rule, []).append(use)
        hook = functools.partial(self._arrived, rule, use)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _backward(self, loss: Tensor) -> None:
        """Take the loss's gradient to every layer's output; `_arrived` gets them one by one."""
        first = [u.edge for uses in self._uses.values() for u in uses if u.edge is not None]
        if first:
            torch.autograd.grad(loss, first, allow_unused=True)
        for rule in self._rules:
            if rule in self._kept:
                continue
            uses = [u for u in self._uses.get(rule, []) if u.grads is not None]
            if not uses:
                raise SensitivityError(_unlike(rule, "none", self._batch.records))
            with torch.no_grad():
                self._keep(rule, uses)

    def _arrived(self, rule: LayerRule, use: _Use, grads: Tensor) -> None:
        records = self._batch.records
        if grads.shape[0] != records or use.inputs.shape[0] != records:
            raise SensitivityError(_unlike(rule, str(tuple(grads.shape)), records))
        if use.inputs._version != use.version:
            raise SensitivityError(
                "a layer's input is changed in place after the layer has read it, so its gradient "
                "is lost. Use operations that return a new tensor."
            )
        use.grads = grads
        if len(self._uses[rule]) == 1:
            with torch.no_grad():
                self._keep(rule, [use])

    # --- norms and sums ---------------------------------------------------------------------

    def _keep(self, rule: LayerRule, uses: list[_Use]) -> None:
        flows = [
            Flow(_full(u.inputs), _full(u.grads), u.saved) for u in uses if u.grads is not None
        ]
        if len(flows) > 1 and (joined := rule.joined(flows)) is not None:
            flows = [joined]
        if len(flows) == 1 and rule.takes_ghost(flows[0], self._batch):
            squares, doubt = rule.ghost_squares(flows[0], self._batch)
            self._kept[rule] = _Kept(flow=flows[0], squares=squares, doubt=doubt)
        else:
            stored = rule.stored(flows[0], self._batch)
            for more in flows[1:]:
                others = rule.stored(more, self._batch)
                stored = [total + part for total, part in zip(stored, others, strict=True)]
            self._kept[rule] = _Kept(stored=stored)
        for use in uses:  # the graph holds on to them; what is not needed goes at once
            use.inputs, use.grads, use.saved = use.inputs[:0], None, ()

    def _squares(self, blocks: Sequence[Block]) -> Tensor:
        """Each patient's squared norm; where rounding could show, from the gradients themselves."""
        found = [k.squares for k in self._kept.values() if k.squares is not None]
        total = torch.stack([*found, *squares_of([block.rows for block in blocks])]).sum(0)
        doubts = [k.doubt for k in self._kept.values() if k.doubt is not None]
        if not doubts:
            return total
        doubtful = torch.stack(doubts).sum(0) > DOUBT * total
        for patient in torch.nonzero(doubtful).flatten().tolist():
            rows = self._batch.owners == patient
            alone = Batch(self._batch.owners[rows] - patient, 1)
            for rule, kept in self._kept.items():
                if kept.flow is not None and kept.squares is not None and kept.doubt is not None:
                    flow = Flow(kept.flow.inputs[rows], kept.flow.grads[rows])
                    stored = [g.reshape(1, -1) for g in rule.stored(flow, alone)]
                    exact = torch.stack(squares_of(stored)).sum(0)
                    total[patient] += exact[0] - kept.squares[patient]
        return total

    def _add(self, blocks: Sequence[Block], factors: Tensor, weights: Tensor, sums: Sums) -> None:
        """Add every layer's part, by a factor a patient, or as a weight a record."""
        for block in blocks:
            block.add_weighted(factors, sums)
        for rule, kept in self._kept.items():
            if kept.flow is not None:
                rule.add_weighted(kept.flow, weights, sums)

    def _drop_patients(self, finite: Tensor, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.rows = _only(finite, block.rows)
        rows = finite[self._batch.owners]
        for kept in self._kept.values():
            if kept.flow is not None:
                kept.flow = Flow(_only(rows, kept.flow.inputs), _only(rows, kept.flow.grads))

    # --- the check at the start -------------------------------------------------------------

    def _compare_with_autograd(self, example: Tensor) -> None:
        """Refuse a module whose sum differs: a parameter that is also used elsewhere, say."""
        parameters = [p for rule in self._rules for p in rule.parameters]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = torch.autograd.grad(self.module(example).sum(), parameters, allow_unused=True)
            torch.manual_seed(0)
            sums = {p: torch.zeros_like(p) for p in parameters}
            everyone = torch.arange(len(example), device=example.device)
            try:
                self.add(self(example).sum(), everyone, len(example), torch.inf, sums)
            except SensitivityError:
                return  # the first step says the same to whoever trains
        want = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, found, strict=True)])  # fmt: skip
        got = torch.cat([sums[p].flatten() for p in parameters])
        if not bool((got - want).norm() <= AGREEMENT * want.norm() + 1e-12):
            raise UnsupportedLayerError(
                "its layers' gradients do not add up to autograd's: a parameter is used outside "
                "its layer, or the model keeps a state"
            )


def _full(x: Tensor) -> Tensor:
    """Norms and sums are float32, also where the layers computed in bfloat16."""
    return x.float() if x.is_floating_point() else x


def _only(keep: Tensor, x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))


def _unlike(rule: LayerRule, found: str, records: int) -> str:
    shape = tuple(rule.parameters[0].shape)
    return (
        f"a parameter of shape {shape} has per-record gradients of outputs {found} for {records} "
        "records, which must come first. Use every parameter once in each forward pass, and keep "
        "the records as the first dimension of every layer's input."
    )
