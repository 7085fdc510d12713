"""nn.GRU and nn.LSTM step by step, as the linear maps that they are made of.

Torch's own layers hide what goes into their maps. Unrolled, every time step is one more position
of two linear maps a layer and direction: one of the input, one of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.layers import LayerRule, LinearRule

Note = Callable[[LayerRule, Tensor, Tensor], None]
"""(rule, what went into a linear map, what came out)."""


class RecurrentRules:
    """The linear maps of an nn.GRU or nn.LSTM, and its forward pass by them.

    Args:
        layer: One that `is_plain` accepts.
    """

    def __init__(self, layer: nn.GRU | nn.LSTM) -> None:
        self._layer = layer
        self._directions = 2 if layer.bidirectional else 1
        self._maps = [
            (self._rule("ih", f"{k}{d}"), self._rule("hh", f"{k}{d}"))
            for k in range(layer.num_layers)
            for d in ("", "_reverse")[: self._directions]
        ]
        self.rules = [rule for pair in self._maps for rule in pair]

    @staticmethod
    def is_plain(layer: nn.GRU | nn.LSTM) -> bool:
        """Whether a layer is batch-first, without dropout, a projection or a subclass's ways."""
        known = type(layer) in (nn.GRU, nn.LSTM)
        return known and layer.batch_first and not layer.dropout and not layer.proj_size

    def forward(self, note: Note, inputs: Tensor, state: object = None) -> tuple[Tensor, object]:
        """What the layer returns for inputs (records, steps, values), from a state of zeros.

        Raises:
            NotImplementedError: a state is given, or the records' lengths differ (packed).
        """
        if state is not None or not isinstance(inputs, Tensor) or inputs.dim() != 3:
            raise NotImplementedError(
                f"{type(self._layer).__name__} takes records of equal length, shape (records, "
                "steps, values), and starts from a state of zeros"
            )
        run = self._gru if isinstance(self._layer, nn.GRU) else self._lstm
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        x = inputs
        for k in range(self._layer.num_layers):
            sides = []
            for d in range(self._directions):
                into, across = self._maps[k * self._directions + d]
                steps, last, cell = run(note, into, across, x, backwards=d == 1)
                sides.append(torch.stack(steps, 1))
                hidden.append(last)
                cells += [] if cell is None else [cell]
            x = torch.cat(sides, 2)
        if cells:
            return x, (torch.stack(hidden), torch.stack(cells))
        return x, torch.stack(hidden)

    def _rule(self, kind: str, place: str) -> LinearRule:
        bias = getattr(self._layer, f"bias_{kind}_l{place}", None)
        return LinearRule(getattr(self._layer, f"weight_{kind}_l{place}"), bias)

    def _gru(
        self, note: Note, into: LinearRule, across: LinearRule, x: Tensor, *, backwards: bool
    ) -> tuple[list[Tensor], Tensor, None]:
        width = self._layer.hidden_size
        gates = _apply(note, into, x).unbind(1)
        h = x.new_zeros(len(x), width)
        steps: list[Tensor] = []
        for i in _order(x, backwards):
            own = _apply(note, across, h)
            both = torch.sigmoid(gates[i][:, : 2 * width] + own[:, : 2 * width])
            reset, keep = both.chunk(2, 1)
            new = torch.tanh(gates[i][:, 2 * width :] + reset * own[:, 2 * width :])
            h = torch.lerp(new, h, keep)
            steps.append(h)
        return steps[::-1] if backwards else steps, h, None

    def _lstm(
        self, note: Note, into: LinearRule, across: LinearRule, x: Tensor, *, backwards: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        width = self._layer.hidden_size
        gates = _apply(note, into, x).unbind(1)
        h = c = x.new_zeros(len(x), width)
        steps: list[Tensor] = []
        for i in _order(x, backwards):
            total = gates[i] + _apply(note, across, h)
            enter, forget, new, leave = total.chunk(4, 1)
            c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(leave) * torch.tanh(c)
            steps.append(h)
        return steps[::-1] if backwards else steps, h, c


def _order(x: Tensor, backwards: bool) -> range:
    steps = x.shape[1]
    return range(steps - 1, -1, -1) if backwards else range(steps)


def _apply(note: Note, rule: LinearRule, x: Tensor) -> Tensor:
    out = functional.linear(x, rule.weight, rule.bias)
    note(rule, x, out)
    return out
