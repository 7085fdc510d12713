"""A private step against an ordinary one: Opacus' modes and ours, time and memory.

    python -m simulations.benchmarks.training [--models mlp cnn28 ...] [--batches 32 64 256]
        [--memory | --study] [--quick] [--json FILE]

A step is forward, backward, clipping (C = 1, one record a patient) and the optimiser's step, on
one batch of made-up records. Noise is left out of all of them and measured apart ("noise"): it
depends on the generator and the number of parameters alone. Variants of a row take turns; the
fastest of each counts. CPU seconds, one torch thread. Ordinary training is tuned as well as ours:
both are tried in every memory layout of the model and cut into micro-batches or whole, and the
best counts; torch.compile is tried with --compile.

--study runs `fedward-sim run nodules` end to end, with our engine and with Opacus' own hooks in its
place, in turns, at the physical batches that each chooses; CPU seconds of the whole command.

--memory prints the peak resident memory of one step above the moment before it, each variant in
a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import client.run
from client.clipping import PatientClipper, RecordGradients
from client.engines import EngineName, choose_engine
from client.noise import ChaChaRandom
from simulations.benchmarks.report import Row, best_of, parser, publish
from simulations.benchmarks.training_models import CASES, Case, records
from simulations.cli import main as simulate

OPACUS = ("hooks", "ew", "ghost")
ENGINES: tuple[EngineName, ...] = ("book-keeping", "hooks")
MICRO = 64
SECONDS = 2.5
"""About how long one variant is measured."""

Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--models", nargs="+", choices=sorted(CASES), default=list(CASES))
    options.add_argument("--batches", nargs="+", type=int)
    options.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    options.add_argument("--study", action="store_true", help="measure a whole simulated study")
    options.add_argument("--compile", action="store_true", help="try torch.compile on ordinary")
    chosen = options.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    if chosen.study:
        publish(*study_rows(chosen), chosen.json)
        return
    batches = chosen.batches or ([8] if chosen.quick else [32, 64, 256])
    measure = memory_row if chosen.memory else time_row
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for name in chosen.models:
        for batch in batches:
            row = measure(name, batch, chosen)
            rows.append(row)
            print(row, flush=True)
            ratios |= _ratios(name, batch, row)
    publish(rows, ratios, chosen.json)


def time_row(name: str, batch: int, chosen: Any) -> dict[str, Any]:
    """Milliseconds of a step by every variant, of ordinary and ours the best."""
    case = CASES[name]
    steps = dict(variants(case, batch, compiled=chosen.compile))
    once: dict[str, float] = {}
    for variant, step in list(steps.items()):
        try:
            step()
            began = time.process_time()
            step()
            once[variant] = time.process_time() - began
        except Exception as error:
            once[variant] = float("nan")
            print(f"{name}, batch {batch}: {variant} fails: {type(error).__name__}", flush=True)
            del steps[variant]
    turns = 1 if chosen.quick else min(40, max(1, round(SECONDS / max(once.values()))))
    best = best_of(steps, turns)
    row: dict[str, Any] = {"model": name, "batch": batch}
    for kind in ("ordinary", "ours"):
        mine = {v: s for v, s in best.items() if v.startswith(kind)}
        row[kind] = 1e3 * min(mine.values())
        row[f"{kind}_by"] = min(mine, key=lambda v: mine[v]).partition(" ")[2]
    row |= {mode: 1e3 * best[mode] if mode in best else None for mode in OPACUS}
    return row | {"noise": _noise_ms(case), "turns": turns}


def study_rows(chosen: Any) -> tuple[list[Row], dict[str, float]]:
    """CPU seconds of `fedward-sim run nodules` by engine, the best of some turns."""
    least: dict[str, float] = {}
    for _ in range(1 if chosen.quick else min(2, chosen.repetitions)):
        for engine in ENGINES:
            with tempfile.TemporaryDirectory() as folder, _forced(engine):
                began = time.process_time()
                rounds = ["--rounds", "2"] if chosen.quick else []
                code = simulate(["run", "nodules", "--quiet", "--out", f"{folder}/run", *rounds])
                assert code == 0
                least[engine] = min(least.get(engine, float("inf")), time.process_time() - began)
    rows: list[Row] = [{"engine": name, "cpu_s": seconds} for name, seconds in least.items()]
    return rows, {"study_hooks_to_ours": least["hooks"] / least["book-keeping"]}


@contextmanager
def _forced(engine: EngineName) -> Iterator[None]:
    """Every trainer takes this engine; hooks as Opacus has them by default, without our shortcuts.

    Those are another gradient of convolutions, and a backward pass that leaves out the weight
    gradients of the whole batch, which Opacus computes and throws away.
    """
    client.run.check_once.cache_clear()
    with (
        patch("client.training.choose_engine", lambda _, *rest: choose_engine(engine, *rest)),
        patch.object(RecordGradients, "GRAD_SAMPLERS", GradSampleModule.GRAD_SAMPLERS),
        patch.object(RecordGradients, "backward", lambda _, loss: torch.autograd.backward(loss)),
    ):
        yield
    client.run.check_once.cache_clear()


def memory_row(name: str, batch: int, chosen: Any) -> dict[str, Any]:
    """MiB of a step's peak above the moment before it, by every variant."""
    del chosen
    fork = multiprocessing.get_context("fork")
    row: dict[str, Any] = {"model": name, "batch": batch}
    for variant in ("ordinary contiguous", *OPACUS, "ours contiguous", "ours contiguous micro"):
        if variant.endswith("micro") and batch <= MICRO:
            continue
        queue = fork.Queue()
        child = fork.Process(target=_peak, args=(name, batch, variant, queue))
        child.start()
        child.join()
        row[f"{variant} MiB"] = None if queue.empty() else queue.get()
    return row


def variants(case: Case, batch: int, *, compiled: bool = False) -> Iterator[tuple[str, Step]]:
    """(name, step) of every way to train; ordinary and ours in several layouts."""
    inputs = records(case, batch)
    labels = (torch.arange(batch) % 2).float()
    for layout in case.layouts:
        yield f"ordinary {layout}", ordinary(case, inputs, labels, layout)
        yield f"ours {layout}", ours(case, inputs, labels, layout, batch)
        if batch > MICRO:
            yield f"ordinary {layout} micro", ordinary(case, inputs, labels, layout, MICRO)
            yield f"ours {layout} micro", ours(case, inputs, labels, layout, MICRO)
    if compiled:
        yield "ordinary compiled", ordinary(case, inputs, labels, case.layouts[0], compiled=True)
    for mode in OPACUS:
        yield mode, opacus(case, inputs, labels, mode)


def ordinary(
    case: Case,
    inputs: Tensor,
    labels: Tensor,
    layout: str,
    micro: int = 0,
    *,
    compiled: bool = False,
) -> Step:
    """A step of plain SGD."""
    module = _module(case, layout)
    run: Callable[[Tensor], Tensor] = torch.compile(module) if compiled else module
    sgd = torch.optim.SGD(module.parameters(), lr=1e-3)
    parts = list(zip(_split(inputs, micro, layout), torch.split(labels, micro or len(labels)),
                     strict=True))  # fmt: skip

    def step() -> None:
        sgd.zero_grad()
        for x, y in parts:
            loss = functional.binary_cross_entropy_with_logits(run(x), y, reduction="sum")
            torch.autograd.backward(loss)
        sgd.step()

    return step


def ours(case: Case, inputs: Tensor, labels: Tensor, layout: str, micro: int) -> Step:
    """A step by the engine that a site would choose."""
    module = _module(case, layout)
    sgd = torch.optim.SGD(module.parameters(), lr=1e-3)
    clipper = PatientClipper(sgd, noise_multiplier=0.0, max_grad_norm=1.0, divisor=len(inputs))
    engine = choose_engine("auto", module, clipper, case.shape)
    parts = list(zip(_split(inputs, micro, layout), torch.split(labels, micro), strict=True))

    def step() -> None:
        clipper.begin_step()
        for x, y in parts:
            loss = functional.binary_cross_entropy_with_logits(engine(x), y, reduction="sum")
            engine.add(loss, torch.arange(len(x)), len(x))
        for p in clipper.params:
            p.grad = p.summed_grad.div_(clipper.divisor)
        sgd.step()

    return step


def opacus(case: Case, inputs: Tensor, labels: Tensor, mode: str) -> Step:
    """A step as Opacus' documentation has it, in one of its modes, without noise."""
    module = _module(case, "contiguous")
    batches = DataLoader(TensorDataset(inputs, labels), batch_size=len(inputs))
    if not ModuleValidator.is_valid(module):
        module = ModuleValidator.fix(module)  # nn.GRU becomes Opacus' own
    made = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1e-3),
        data_loader=batches,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        criterion=nn.BCEWithLogitsLoss(),
    )
    private, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.BCEWithLogitsLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(private(inputs), labels).backward()
        optimizer.step()

    return step


def _module(case: Case, layout: str) -> nn.Module:
    torch.manual_seed(0)
    module = case.build()
    return module.to(memory_format=_format(layout)) if len(case.shape) == 3 else module  # type: ignore[call-overload]


def _split(inputs: Tensor, micro: int, layout: str) -> list[Tensor]:
    parts = torch.split(inputs, micro or len(inputs))
    if inputs.dim() != 4:
        return list(parts)
    return [part.contiguous(memory_format=_format(layout)) for part in parts]


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def _noise_ms(case: Case) -> float:
    count = sum(p.numel() for p in case.build().parameters())
    random = ChaChaRandom(bytes(32))
    return 1e3 * best_of({"noise": lambda: random.gaussian(count)}, 3)["noise"]


def _peak(name: str, batch: int, variant: str, queue: Any) -> None:
    case = CASES[name]
    inputs, labels = records(case, batch), (torch.arange(batch) % 2).float()
    kind, _, how = variant.partition(" ")
    if kind in OPACUS:
        step = opacus(case, inputs, labels, kind)
    else:
        layout, _, micro = how.partition(" ")
        make = ordinary if kind == "ordinary" else ours
        step = make(case, inputs, labels, layout, MICRO if micro else batch)
    gc.collect()
    before = _resident()
    step()
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _ratios(name: str, batch: int, row: dict[str, Any]) -> dict[str, float]:
    if "ours" not in row:
        return {}
    opacus_best = min(float(row[m]) for m in OPACUS if row[m] is not None)
    key = f"{name}_{batch}"
    ours_to_ordinary = row["ours"] / row["ordinary"]
    return {
        f"{key}_ours_to_ordinary": ours_to_ordinary,
        f"{key}_hooks_to_ordinary": float(row["hooks"] or np.nan) / row["ordinary"],
        f"{key}_opacus_best_to_ours": opacus_best / row["ours"],
        f"{key}_target_to_ratio": CASES[name].target / ours_to_ordinary,
    }


if __name__ == "__main__":
    main()
