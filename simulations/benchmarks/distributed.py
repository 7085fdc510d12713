"""What mode distributed costs: its noise, a long study, and a round of a CNN of a million numbers.

    python -m simulations.benchmarks.distributed [--rounds N] [--images 64 256] [--width 136]
        [--quick] [--json FILE]

The sampler of discrete Gaussian noise stands beside three others: the published algorithm as
written, one draw at a time in exact arithmetic, with Python's own generator; the float32 noise of
mode local; and torch.randn, which is neither cryptographic nor discrete.

The long study is breast_cancer (four hospitals, logistic regression, counts of test patients in
every round) as a user runs it, results and report included.

The CNN's rounds take turns with a twin that exists in this file alone: its sites compute the same
clipped sums of the same batches with the same trainer, and the sums are added up as float32. No
noise, no ring, no masks, messages, ledger or store. Batches of more images make training a larger
part of a round.

Times are CPU seconds of this process, one torch thread, so that other programs do not count; wall
time stands beside them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.app import forget_sites
from client.data.dataset import PatientDataset
from client.discrete import discrete_gaussian
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from server.app import make_server_app
from shared.distributed import divisor
from shared.evaluation_plan import EvaluationPlan
from shared.models import initial_parameters, plan_spec
from shared.optimizers import apply_update, initial_state
from shared.plan import SitePlan, StudyPlan
from shared.privacy import noise_multiplier_of
from shared.task_plan import ImagePlan
from simulations.benchmarks.report import Row, best_of, one_thread, parser, publish
from simulations.engines import run_in_process
from simulations.hospitals import Hospital
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario
from simulations.sites import write_sites

SEED = 1
DEVIATIONS = {24: 50_000, 32: 8_000_000}
"""One site's share of the noise in ring units, about as in the bundled studies, by bits."""

TARGET_ROUNDS = 1000
TARGET_STUDY_S = 60.0
TARGET_ROUND = 1.3


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--rounds", type=int, help="of the long study (default 1000)")
    options.add_argument("--width", type=int, help="of the CNN (default 136: a million parameters)")
    options.add_argument(
        "--images", type=int, nargs="+", help="of a site's batch, a row for each (default 64 256)"
    )
    options.add_argument(
        "--only", choices=("noise", "study", "round"), help="one of the three parts"
    )
    chosen = options.parse_args(arguments)
    one_thread()
    parts = {"noise": sampling, "study": long_study, "round": cnn_rounds}
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for name, measure in parts.items():
        if chosen.only in (None, name):
            more_rows, more_ratios = measure(chosen)
            rows += more_rows
            ratios |= more_ratios
    publish(rows, ratios, chosen.json)


def sampling(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Draws a second of each sampler."""
    count = 20_000 if chosen.quick else 1_000_000
    few = 200 if chosen.quick else 5_000
    stream, plain = ChaChaRandom(simulation_key(SEED, "noise")), random.Random(SEED)
    wide = DEVIATIONS[24]
    samplers = {
        "discrete Gaussian": (count, lambda: discrete_gaussian(stream, DEVIATIONS[24], count)),
        "the same, 32 bits": (count, lambda: discrete_gaussian(stream, DEVIATIONS[32], count)),
        "one draw at a time": (few, lambda: [plain_draw(plain, wide) for _ in range(few)]),
        "float32 Gaussian": (count, lambda: stream.gaussian(count)),
        "torch.randn": (count, lambda: torch.randn(count)),
    }
    repetitions = 1 if chosen.quick else chosen.repetitions
    seconds = best_of({name: task for name, (_, task) in samplers.items()}, repetitions)
    rates = {name: draws / seconds[name] for name, (draws, _) in samplers.items()}
    rows: list[Row] = [
        {"what": name, "draws": draws, "cpu_s": seconds[name], "million_per_s": rates[name] / 1e6}
        for name, (draws, _) in samplers.items()
    ]
    ours = rates["discrete Gaussian"]
    return rows, {
        "discrete_to_one_at_a_time": ours / rates["one draw at a time"],
        "discrete_to_float32": ours / rates["float32 Gaussian"],
        "discrete_to_torch_randn": ours / rates["torch.randn"],
    }


def plain_draw(source: random.Random, deviation: int) -> int:
    """One discrete Gaussian draw by the published algorithm, in exact arithmetic.

    Source: Canonne, Kairouz and Steinke, "The Discrete Gaussian for Differential Privacy",
    NeurIPS 2020, algorithms 1 to 3.
    """
    scale = deviation + 1
    while True:
        draw = _plain_laplace(source, scale)
        distance = abs(draw) - Fraction(deviation**2, scale)
        if _happens(source, distance**2 / (2 * deviation**2)):
            return draw


def _plain_laplace(source: random.Random, scale: int) -> int:
    while True:
        low = source.randrange(scale)
        if not _happens(source, Fraction(low, scale)):
            continue
        high = 0
        while _happens(source, Fraction(1)):
            high += 1
        size, negative = low + scale * high, source.random() < 0.5
        if size or not negative:
            return -size if negative else size


def _happens(source: random.Random, exponent: Fraction) -> bool:
    """True with probability exp(-exponent)."""
    while exponent > 1:
        if not _happens(source, Fraction(1)):
            return False
        exponent -= 1
    turn = 1
    while source.randrange(exponent.denominator * turn) < exponent.numerator:
        turn += 1
    return turn % 2 == 1


def long_study(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """A tabular study of many rounds, as `fedward-sim run` does it."""
    rounds = chosen.rounds or (4 if chosen.quick else TARGET_ROUNDS)
    overrides = ["privacy.mode=distributed", f"training.rounds={rounds}"]
    scenario = load_scenario("breast_cancer", overrides)
    marks: list[dict[str, float]] = [_now()]
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        prepared = prepare(scenario, RunOptions(out=Path(folder) / "run", device="cpu"))
        execute(prepared, lambda report: marks.append(_now()))
    marks.append(_now())
    spans = [
        ("prepare, set up, first round", 1, marks[0], marks[1]),
        ("the other rounds", rounds, marks[1], marks[-2]),
        ("finish, results, report", 1, marks[-2], marks[-1]),
        ("whole study", rounds + 1, marks[0], marks[-1]),
    ]
    rows: list[Row] = [_row(*span) for span in spans]
    # Measured as it is with 1,000 rounds; shorter studies are continued at the same pace.
    more_s = rows[1]["ms_per_round"] / 1000 * (TARGET_ROUNDS - rounds)
    thousand_s = rows[-1]["cpu_s"] + more_s
    return rows, {
        "cpu_s_of_1000_rounds": thousand_s,
        "target_to_1000_rounds": TARGET_STUDY_S / thousand_s,
    }


def cnn_rounds(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Rounds of a CNN beside rounds of its twin, for each size of a site's batch."""
    width = chosen.width or (4 if chosen.quick else 136)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for images in chosen.images or ([8] if chosen.quick else [64, 256]):
        rounds = 2 if chosen.quick else chosen.repetitions + 1
        secure, plain = compare(cnn_plan(width, images, rounds), images)
        rows += [secure, plain]
        ratio = secure["cpu_s"] / plain["cpu_s"]
        ratios[f"distributed_to_plain_{images}_images"] = ratio
        ratios[f"target_to_ratio_{images}_images"] = TARGET_ROUND / ratio
    return rows, ratios


def cnn_plan(width: int, images: int, rounds: int) -> StudyPlan:
    """The nodules study in mode distributed, with small images and equal sites and rounds."""
    plan = load_scenario("nodules", ["privacy.mode=distributed"]).plan
    sites = tuple(SitePlan(site.name, images) for site in plan.cohort.sites)
    return replace(
        plan,
        model=replace(plan.model, width=width),
        task=replace(plan.task, image=ImagePlan(channels=1, height=28, width=28)),
        cohort=replace(plan.cohort, sites=sites),
        training=replace(plan.training, rounds=rounds, sample_rate=1.0, learning_rate=0.1),
        evaluation=EvaluationPlan(release="none"),
    )


def compare(plan: StudyPlan, images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row for the rounds of mode distributed and one for their twins."""
    hospitals = [_hospital(s.name, place, images) for place, s in enumerate(plan.cohort.sites)]
    turns = _Turns(PlainStudy(plan, {h.name: h.train for h in hospitals}))
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        base = Path(folder)
        roster = write_sites(base, plan, hospitals, seed=SEED, device="cpu")
        app = make_server_app(
            plan,
            "benchmark",
            roster,
            observer=turns.round_ended,
            finished=lambda outcome, transport: None,
        )
        run_in_process(app, {h.name: base / h.name for h in hospitals})
        forget_sites()
    about = {
        "parameters": plan_spec(plan).length,
        "ring_bits": plan.secure_sum.bits,
        "images": images,
    }
    secure = {"what": "CNN, distributed", **about, **_fastest(turns.secure)}
    return secure, {"what": "CNN, plain twin", **about, **_fastest(turns.plain)}


class PlainStudy:
    """The same steps in the open, without noise; for this benchmark alone."""

    def __init__(self, plan: StudyPlan, data: Mapping[str, PatientDataset]) -> None:
        self.state = initial_state(plan.optimizer, initial_parameters(plan))
        self._plan = plan
        sigma = noise_multiplier_of(plan)
        self._trainers = {n: LocalTrainer(plan, n, data[n], sigma, "cpu") for n in data}
        self._random = {n: ChaChaRandom(simulation_key(SEED, n)) for n in data}

    def run_round(self) -> None:
        """One step over all sites' batches."""
        start, names = self.state.parameters, tuple(self._trainers)
        total = np.zeros_like(start)
        for name, trainer in self._trainers.items():
            number = self.state.round_no + 1
            total += trainer.clipped_sum(start, self._random[name], number).update
        rate = self._plan.training.learning_rate / divisor(self._plan, names)
        self.state = apply_update(self._plan.optimizer, self.state, np.float32(-rate) * total)


@dataclass
class _Turns:
    """Times the secure rounds, and runs a plain one after each."""

    twin: PlainStudy
    secure: list[dict[str, float]] = field(default_factory=list)
    plain: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = _now()

    def round_ended(self, report: object) -> None:
        """A secure round is over; whatever came before its start was not a round."""
        del report
        self.secure.append(_spent(self._since))
        started = _now()
        self.twin.run_round()
        self.plain.append(_spent(started))
        self._since = _now()


def _hospital(name: str, place: int, images: int) -> Hospital:
    rng = np.random.default_rng([SEED, place])
    pixels = rng.normal(size=(images, 1, 28, 28)).astype(np.float32)
    ids = tuple(f"invented-{i}" for i in range(images))
    data = PatientDataset(pixels, rng.integers(0, 2, images), np.arange(images), ids)
    return Hospital(name, data, data)


def _fastest(spans: Sequence[dict[str, float]]) -> dict[str, float]:
    """The fastest round, the first one aside."""
    counted = spans[1:] or spans
    return {key: min(span[key] for span in counted) for key in counted[0]}


def _now() -> dict[str, float]:
    return {"cpu_s": time.process_time(), "wall_s": time.perf_counter()}


def _spent(since: dict[str, float]) -> dict[str, float]:
    return {key: now - since[key] for key, now in _now().items()}


def _row(what: str, rounds: int, start: dict[str, float], end: dict[str, float]) -> Row:
    spent = {key: end[key] - start[key] for key in start}
    return {"what": what, "rounds": rounds, **spent, "ms_per_round": 1000 * spent["cpu_s"] / rounds}


if __name__ == "__main__":
    main()
