"""The book-keeping engine: the same clipped sum as the definition and as Opacus, layer by layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from torch import Tensor, nn
from torch.nn import functional
from training_cases import KEY, make_data, make_plan

import client.bookkeeping
import client.layers
from client.bookkeeping import BookKeeping, UnsupportedLayerError
from client.clipping import PatientClipper
from client.engines import EngineName, _say_once, choose_engine
from client.guard import check_sensitivity
from client.layers import Batch, Flow, LinearRule
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.errors import ConfigError, SensitivityError
from shared.models import initial_parameters
from shared.models.image import SmallCnn
from shared.models.resnet import ResNet

CLOSE = 1e-5  # relative


@pytest.fixture(scope="module", params=[0, 1 << 22], ids=["ghost", "stored"], autouse=True)
def _ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gram matrices wherever 2 T^2 <= d p; and gradients, as small models have them held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.layers, "STORED_VALUES", request.param)
        yield


def definition(
    module: nn.Module, inputs: Tensor, weights: Tensor, owners: Tensor, clip: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Norms, clipped sum and C (the median norm) by one float64 backward pass a patient."""
    exact = copy.deepcopy(module).double()
    parameters = list(exact.parameters())
    found = []
    for patient in range(int(owners.max()) + 1):
        rows = owners == patient
        part = inputs[rows].double() if inputs.is_floating_point() else inputs[rows]
        out = exact(part)
        loss = (out * weights[rows].double().view(-1, *[1] * (out.dim() - 1))).sum()
        grads = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    norms = torch.stack([g.norm() for g in found])
    c = float(norms.median()) if clip is None else clip
    factors = (c / (norms + 1e-6)).clamp(max=1)
    return norms, (factors[:, None] * torch.stack(found)).sum(0), c


def by_engine(
    module: nn.Module, inputs: Tensor, weights: Tensor, owners: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Norms and clipped sum of the book-keeping engine."""
    engine = BookKeeping(module, inputs)
    sums = {p: torch.zeros_like(p) for p in module.parameters()}
    out = engine(inputs)
    loss = (out * weights.view(-1, *[1] * (out.dim() - 1))).sum()
    norms = engine.add(loss, owners, int(owners.max()) + 1, clip, sums)
    return norms, torch.cat([sums[p].flatten() for p in module.parameters()])


def agree(module: nn.Module, inputs: Tensor, owners: Tensor) -> None:
    """The engine's norms and sum are the definition's."""
    weights = torch.linspace(-1, 2, len(inputs))
    norms, want, clip = definition(module, inputs, weights, owners)
    got_norms, got = by_engine(module, inputs, weights, owners, clip)
    assert float((got_norms - norms).abs().max()) <= CLOSE * float(norms.max()) + 1e-12
    assert float((got - want).norm()) <= CLOSE * max(float(want.norm()), float(clip)) + 1e-12


@st.composite
def patients(draw: st.DrawFn) -> Tensor:
    """Owners of 2 to 6 records: one each, or several."""
    several = st.lists(st.integers(1, 3), min_size=2, max_size=3)
    counts = draw(st.one_of(st.integers(2, 5).map(lambda n: [1] * n), several))
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


seeds = st.integers(0, 2**31)


# --- layer by layer -------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds, st.lists(st.integers(1, 5), max_size=2), st.booleans(), st.data())
def test_linear(
    owners: Tensor, seed: int, between: list[int], bias: bool, data: st.DataObject
) -> None:
    d, p = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    torch.manual_seed(seed)
    agree(nn.Linear(d, p, bias=bias), torch.randn(len(owners), *between, d), owners)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=40, derandomize=True)
@given(patients(), seeds, st.integers(1, 3), st.data())
def test_convolutions(owners: Tensor, seed: int, dimensions: int, data: st.DataObject) -> None:
    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(
            data.draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions))
        )

    groups = data.draw(st.sampled_from([1, 1, 2]))
    kernel, dilation = some(1, 3), some(1, 2)
    mode = data.draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from([some(0, 2), "same", "valid"]))
    stride = (1,) * dimensions if padding == "same" else some(1, 3)
    torch.manual_seed(seed)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3)), kernel,
        stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode,
        bias=data.draw(st.booleans()),
    )  # fmt: skip
    agree(layer, torch.randn(len(owners), layer.in_channels, *some(6, 9)), owners)


def test_a_convolution_of_a_single_pixel() -> None:
    torch.manual_seed(1)  # torch gives an axis of length 1 any stride
    agree(nn.Conv2d(3, 4, 1), torch.randn(3, 3, 1, 1), torch.tensor([0, 0, 1]))


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds, st.integers(3, 6), st.sampled_from([(4, 2), (6, 3), (3, 1), (5, 5)]))
def test_group_norm(owners: Tensor, seed: int, size: int, channels: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    # From 12 values a group; smaller ones are below.
    layer = nn.GroupNorm(channels[1], channels[0])
    inputs = 1 + torch.randn(len(owners), channels[0], size, size + 1)
    agree(nn.Sequential(layer, nn.Tanh()), inputs, owners)


def autograd_norms(module: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
    """Norms by float32 autograd, one record at a time."""
    found = []
    for record, weight in zip(inputs.split(1), weights, strict=True):
        grads = torch.autograd.grad((module(record) * weight).sum(), list(module.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


@settings(max_examples=60, derandomize=True)
@given(
    seeds,
    st.sampled_from([(2, 1, 1), (4, 2, 1), (4, 4, 2), (4, 2, 2), (4, 1, 1), (3, 1, 2)]),
    st.sampled_from([1.0, 0.1, 1e-3]),
)
def test_tiny_groups_are_as_exact_as_autograd(
    seed: int, sizes: tuple[int, int, int], spread: float
) -> None:
    # Of two values that are nearly equal, float32 has no exact deviation, whoever takes it.
    channels, groups, wide = sizes
    torch.manual_seed(seed)
    module = nn.Sequential(nn.GroupNorm(groups, channels), nn.Tanh())
    inputs, weights = 1 + spread * torch.randn(3, channels, wide), torch.linspace(-1, 2, 3)
    norms, _, clip = definition(module, inputs, weights, torch.arange(3))
    got, _ = by_engine(module, inputs, weights, torch.arange(3), clip)
    least = float((autograd_norms(module, inputs, weights) - norms).abs().max())
    assert float((got - norms).abs().max()) <= 3 * least + CLOSE * float(norms.max())


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds, st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_layer_norm(owners: Tensor, seed: int, between: list[int], bias: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.LayerNorm((3, 4), bias=bias)
    inputs = 1 + torch.randn(len(owners), *between, 3, 4)
    agree(nn.Sequential(layer, nn.Tanh()), inputs, owners)


@settings(max_examples=40, derandomize=True)
@given(
    patients(), seeds, st.integers(1, 9), st.sampled_from([None, 0, 2]), st.sampled_from([3, 70])
)
def test_embedding(owners: Tensor, seed: int, steps: int, padding: int | None, words: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Embedding(words, 5, padding_idx=padding)
    agree(nn.Sequential(layer, nn.Tanh()), torch.randint(0, words, (len(owners), steps)), owners)


class Last(nn.Module):
    """The last step's output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(x)
        state = state if isinstance(state, Tensor) else state[1]
        return torch.cat([steps[:, -1], state[-1]], 1)


@settings(max_examples=20, derandomize=True)
@given(
    patients(),
    seeds,
    st.sampled_from([nn.GRU, nn.LSTM]),
    st.integers(1, 2),
    st.tuples(st.booleans(), st.booleans()),
)
def test_recurrent_layers(
    owners: Tensor, seed: int, kind: Callable[..., nn.Module], layers: int, flags: tuple[bool, bool]
) -> None:
    torch.manual_seed(seed)
    both, bias = flags
    layer = kind(3, 4, num_layers=layers, bidirectional=both, bias=bias, batch_first=True)
    agree(Last(layer), torch.randn(len(owners), 5, 3), owners)


class Attention(nn.Module):
    """Multi-head attention from nn.Linear, in a residual block with LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        records, steps, width = x.shape
        parts = self.into(self.norm(x)).view(records, steps, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(mixed.transpose(1, 2).reshape(records, steps, width))
        return out


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds, st.integers(1, 12))
def test_multi_head_attention(owners: Tensor, seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    agree(Attention(8, 2), torch.randn(len(owners), steps, 8), owners)


class Shared(nn.Module):
    """Every layer twice, one of them followed by an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(self.linear(x)))
        x = self.conv(torch.relu_(self.conv(x.transpose(1, 2))))
        return torch.tanh(self.norm(x.mean(2)))


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds)
def test_layers_used_twice(owners: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    agree(Shared(), torch.randn(len(owners), 5, 4), owners)


@settings(max_examples=40, derandomize=True)
@given(patients(), seeds)
def test_cancelling_gradients_are_not_believed_from_gram_matrices(
    owners: Tensor, seed: int
) -> None:
    # Almost equal inputs at every position, and gradients that add up to almost nothing: the sum
    # over pairs of positions loses all digits.
    torch.manual_seed(seed)
    layer = nn.Linear(60, 60)
    inputs = 3 + 1e-4 * torch.randn(len(owners), 16, 60)

    class Differences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[:, ::2] - y[:, 1::2]

    weights = torch.ones(len(owners))
    norms, _, clip = definition(Differences(), inputs, weights, owners)
    got, _ = by_engine(Differences(), inputs, weights, owners, clip)
    assert float(((got - norms) / norms).abs().max()) < 1e-3
    a, g = inputs, torch.ones(len(owners), 16, 60)
    g[:, 1::2] = -1
    one_each = Batch(torch.arange(len(a)), len(a))
    gram, _ = LinearRule(layer.weight, None).ghost_squares(Flow(a, g), one_each)
    true = torch.bmm(g.double().transpose(1, 2), a.double()).flatten(1).norm(dim=1)
    assert float((gram.sqrt() / true - 1).abs().max()) > 0.01  # what was not to be believed


# --- the same as Opacus ---------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1] * 6, [2, 1, 3]])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: SmallCnn(1, 8), (1, 28, 28)),
        (lambda: ResNet("resnet18", 1, 8, small_stem=True), (1, 16, 16)),
        (lambda: ResNet("resnet18", 3, 8, small_stem=False), (3, 80, 80)),
        (lambda: nn.Sequential(Attention(8, 2), nn.Flatten(), nn.Linear(48, 1)), (6, 8)),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 1)), (2, 8)),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten(), nn.Linear(108, 1)), (1, 5, 5, 5)),
    ],
)  # fmt: skip
def test_the_sum_is_that_of_opacus_hooks(
    module: Callable[[], nn.Module], shape: tuple[int, ...], counts: list[int]
) -> None:
    torch.manual_seed(1)
    one = module()
    inputs = torch.randn(6, *shape)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found = []
    for name in ("hooks", "book-keeping"):
        model = copy.deepcopy(one)
        clipper = PatientClipper(
            torch.optim.SGD(model.parameters(), lr=1.0),
            noise_multiplier=0.0, max_grad_norm=0.7, divisor=1.0,
        )  # fmt: skip
        engine = choose_engine(name, model, clipper, shape)  # type: ignore[arg-type]
        assert engine.name == name
        clipper.begin_step()
        norms = engine.add(engine(inputs).flatten().square().sum(), owners, len(counts))
        found.append((norms, clipper.finish_sum()))
    (norms, want), (other, got) = found
    torch.testing.assert_close(other, norms, rtol=CLOSE, atol=1e-7)
    assert float((got - want).norm()) <= CLOSE * float(want.norm())


@pytest.mark.parametrize("engine", ["book-keeping", "hooks"])
def test_opacus_accountants_count_the_steps_of_either_engine(engine: EngineName) -> None:
    plan = make_plan(training={"local_steps": 3})
    trainer = LocalTrainer(
        plan, "site-0", make_data(plan), 1.5, "cpu", engine=engine, max_physical_records=2
    )
    accountant = RDPAccountant()
    assert trainer._clipper is not None
    trainer._clipper.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.5))
    trainer.train_round(initial_parameters(plan), ChaChaRandom(KEY), 1)
    assert accountant.history == [(1.5, 0.5, 3)]


# --- what is refused, and what takes over ---------------------------------------------------


class Functional(nn.Module):
    """A weight that is also used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(functional.linear(self.first(x), self.first.weight))
        logits: Tensor = self.head(x)
        return logits.squeeze(1)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Functional, "do not add up to autograd's"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "is a MultiheadAttention"),
        (lambda: Scaled(5, 1), "is a Scaled"),
        (lambda: nn.Embedding(5, 2, max_norm=1.0), "is a Embedding"),
        (lambda: nn.GRU(5, 2, batch_first=True, num_layers=2, dropout=0.5), "is a GRU"),
    ],
)
def test_what_has_no_exact_rule_is_refused(module: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        BookKeeping(module(), torch.ones(2, 5))


def test_opacus_hooks_take_over_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.RMSNorm(5), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(x))
            return logits.squeeze(1)

    plan = make_plan()
    with caplog.at_level(logging.WARNING, logger="fedward.client"):
        for _ in range(2):
            trainer = LocalTrainer(
                plan, "site-0", make_data(plan), 1.0, "cpu", build=lambda _: Model()
            )
            assert trainer.engine_name == "hooks"
    assert [r.message for r in caplog.records] == [
        "per-patient gradients by Opacus' hooks, which are slower: norm is a RMSNorm"
    ]
    with pytest.raises(ConfigError, match="Use engine auto"):
        LocalTrainer(
            plan,
            "site-0",
            make_data(plan),
            1.0,
            "cpu",
            engine="book-keeping",
            build=lambda _: Model(),
        )


def test_an_input_changed_in_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y: Tensor = self.linear(x)
            x.zero_()
            return y.sum(1)

    monkeypatch.setattr(BookKeeping, "_compare_with_autograd", lambda *_: None)
    module = InPlace()
    engine = BookKeeping(module, torch.ones(2, 5))
    sums = {p: torch.zeros_like(p) for p in module.parameters()}
    with pytest.raises(SensitivityError, match="changed in place"):
        engine.add(engine(torch.ones(3, 5)).sum(), torch.arange(3), 3, 1.0, sums)


def test_the_shipped_models_train_by_book_keeping() -> None:
    for name, image in (("logistic", None), ("mlp", None), ("cnn", 16), ("resnet18", 16)):
        plan = make_plan(name, image=image, model={"width": 4})
        trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
        assert trainer.engine_name == "book-keeping"


# --- the guard measures this very engine ----------------------------------------------------


def too_small(squares: Tensor, doubt: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return squares * 0.9, doubt


FAULTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "norms of stored gradients": (
        client.bookkeeping, "squares_of", lambda real: lambda g: [0.9 * s for s in real(g)]),
    "norms of single positions": (
        client.layers, "_gram_squares", lambda real: lambda *a, **k: too_small(*real(*a, **k))),
    "a patient's records apart": (
        Batch, "most", lambda real: property(lambda self: 1)),
    "the weighted sum of a linear layer": (
        LinearRule, "add_weighted",
        lambda real: lambda self, flow, w, sums: real(self, flow, 1.1 * w, sums)),
    "factors above one": (
        BookKeeping, "_add",
        lambda real: lambda self, blocks, f, *rest: real(self, blocks, f * 1.01, *rest)),
    "a factor from the batch": (
        BookKeeping, "_add",
        lambda real: lambda self, blocks, f, w, sums: real(
            self, blocks, f * 0 + f.mean(), w * 0 + f.mean(), sums)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_engine_is_caught_before_it_sees_a_patient(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("cnn", image=8, model={"width": 2}, privacy={"clip_norm": 1e-3})
    owner, name, breaking = FAULTS[fault]
    real = getattr(owner, name) if name != "most" else None
    monkeypatch.setattr(owner, name, breaking(real))
    monkeypatch.setattr(BookKeeping, "_compare_with_autograd", lambda *_: None)
    with pytest.raises(SensitivityError):
        check_sensitivity(plan, "cpu")
