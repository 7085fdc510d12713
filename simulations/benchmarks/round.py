"""A secure round of a CNN of a million parameters, four sites, against the same round in the clear.

    python -m simulations.benchmarks.round [--local-steps 1 5] [--width 136] [--images 64]
        [--prg aes-256-ctr] [--quick] [--json FILE]

Secure: the product as it is, with masks, signatures, recheck, ledger and the sites' stores. Clear:
a twin that exists in this file alone. Its sites get the model as float32 bytes through the same
grid, train with the same trainer, draws and noise, and send their updates as plain float32 bytes,
which are averaged and applied by the same optimiser; nothing is hidden, checked or kept. Both end
with the same model but for the rounding of the ring, which is checked.

Every step trains on all of a site's images, drawn at random once, so all rounds are equal work. The
rounds of the two take turns; the fastest of each counts, after a first one that is not counted.
Times are CPU seconds of this process, one torch thread; all sites share it, as on a laptop.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import forget_sites
from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from server.app import make_server_app
from server.rounds import RoundReport, StudyOutcome
from shared.evaluation_plan import EvaluationPlan
from shared.flower import body_of, content
from shared.models import initial_parameters, plan_spec
from shared.optimizers import ModelState, apply_update, initial_state
from shared.parameters import FlatVector
from shared.plan import SitePlan, StudyPlan
from shared.privacy import noise_multiplier_of
from shared.secagg.prg import Prg
from shared.task_plan import ImagePlan
from simulations.benchmarks.report import Row, one_thread, parser, publish
from simulations.engines import run_in_process
from simulations.grid import InProcessGrid
from simulations.hospitals import Hospital
from simulations.scenario import load_scenario
from simulations.sites import write_sites

SEED = 1
IMAGES = 64
"""Patients of each site if not told, one image of 28 x 28 each; every step draws them all."""

RUN_ID = "benchmark-round"
TARGET = 1.15


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--local-steps", type=int, nargs="+", help="a row for each (default 1 5)")
    options.add_argument("--width", type=int, help="of the CNN (default 136: a million parameters)")
    options.add_argument("--images", type=int, default=IMAGES, help="of a site (default 64)")
    options.add_argument(
        "--prg", choices=get_args(Prg), default="chacha20", help="masks (default chacha20)"
    )
    chosen = options.parse_args(arguments)
    one_thread()
    width = chosen.width or (4 if chosen.quick else 136)
    repetitions = 1 if chosen.quick else chosen.repetitions
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for steps in chosen.local_steps or ([1] if chosen.quick else [1, 5]):
        plan = benchmark_plan(width, steps, repetitions + 1, chosen.images)
        plan = replace(plan, secure_sum=replace(plan.secure_sum, prg=chosen.prg))
        pair = compare(plan)
        rows += pair
        ratio = pair[0]["cpu_s"] / pair[1]["cpu_s"]
        ratios[f"secure_to_clear_{steps}_steps"] = ratio
        ratios[f"target_to_ratio_{steps}_steps"] = TARGET / ratio
    publish(rows, ratios, chosen.json)


def benchmark_plan(width: int, local_steps: int, rounds: int, images: int = IMAGES) -> StudyPlan:
    """The nodules study with a CNN of this width, small images, and equal sites and rounds."""
    plan = load_scenario("nodules").plan
    sites = tuple(SitePlan(site.name, images) for site in plan.cohort.sites)
    return replace(
        plan,
        model=replace(plan.model, width=width),
        task=replace(plan.task, image=ImagePlan(channels=1, height=28, width=28)),
        cohort=replace(plan.cohort, sites=sites),
        training=replace(
            plan.training,
            rounds=rounds,
            local_steps=local_steps,
            sample_rate=1.0,
            learning_rate=0.1,
        ),
        evaluation=EvaluationPlan(release="none"),
    )


def compare(plan: StudyPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row for the secure rounds and one for their twins."""
    hospitals = [
        _hospital(site.name, place, site.expected_patients)
        for place, site in enumerate(plan.cohort.sites)
    ]
    clear = ClearStudy(plan, {hospital.name: hospital.train for hospital in hospitals})
    timer = Turns(clear)
    finished: list[StudyOutcome] = []
    with tempfile.TemporaryDirectory(prefix="fedward-benchmark-") as folder:
        base = Path(folder)
        roster = write_sites(base, plan, hospitals, seed=SEED, device="cpu")
        app = make_server_app(
            plan,
            RUN_ID,
            roster,
            observer=timer.round_ended,
            finished=lambda outcome, transport: finished.append(outcome),
        )
        run_in_process(app, {hospital.name: base / hospital.name for hospital in hospitals})
        forget_sites()
    difference = np.abs(finished[0].state.parameters - clear.state.parameters).max()
    assert difference < 1e-3, f"the twins end with different models: {difference}"
    report = timer.reports[-1]
    parameters = plan_spec(plan).length
    about = {
        "parameters": parameters,
        "local_steps": plan.training.local_steps,
        "images": plan.cohort.sites[0].expected_patients,
        "prg": plan.secure_sum.prg,
    }
    secure_bytes = {"mb_up": report.bytes_up / 1e6, "mb_down": report.bytes_down / 1e6}
    clear_bytes = {"mb_up": clear.bytes_up / 1e6, "mb_down": clear.bytes_down / 1e6}
    return (
        {"what": "secure", **about, **_fastest(timer.secure), **secure_bytes},
        {"what": "clear", **about, **_fastest(timer.clear), **clear_bytes},
    )


def _hospital(name: str, place: int, images: int) -> Hospital:
    rng = np.random.default_rng([SEED, place])
    pixels = rng.normal(size=(images, 1, 28, 28)).astype(np.float32)
    ids = tuple(f"invented-{i}" for i in range(images))
    data = PatientDataset(pixels, rng.integers(0, 2, images), np.arange(images), ids)
    return Hospital(name, data, data)


def _fastest(spans: list[dict[str, float]]) -> dict[str, float]:
    counted = spans[1:] or spans
    return {key: min(span[key] for span in counted) for key in counted[0]}


@dataclass
class Turns:
    """Times the secure rounds, and runs a clear one after each."""

    twin: ClearStudy
    secure: list[dict[str, float]] = field(default_factory=list)
    clear: list[dict[str, float]] = field(default_factory=list)
    reports: list[RoundReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = _now()

    def round_ended(self, report: RoundReport) -> None:
        """A secure round is over; whatever came before its start was not a round."""
        self.reports.append(report)
        self.secure.append(_spent(self._since))
        started = _now()
        self.twin.run_round()
        self.clear.append(_spent(started))
        self._since = _now()


def _now() -> dict[str, float]:
    return {"cpu_s": time.process_time(), "wall_s": time.perf_counter()}


def _spent(since: dict[str, float]) -> dict[str, float]:
    return {key: now - since[key] for key, now in _now().items()}


class ClearStudy:
    """The same study without any protection between sites and server; for this benchmark alone."""

    def __init__(self, plan: StudyPlan, data: Mapping[str, PatientDataset]) -> None:
        self.state: ModelState = initial_state(plan.optimizer, initial_parameters(plan))
        self.bytes_up = self.bytes_down = 0
        self._plan = plan
        self._names = plan.cohort.names
        sigma = noise_multiplier_of(plan)
        self._trainers = {n: LocalTrainer(plan, n, data[n], sigma, "cpu") for n in self._names}
        self._random = {
            name: ChaChaRandom(simulation_key(SEED, name)).child(f"run {RUN_ID}")
            for name in self._names
        }
        contexts = {
            name: Context(1, node, {"state-dir": name}, RecordDict(), {})
            for node, name in enumerate(self._names, start=2)
        }
        self._nodes = {name: context.node_id for name, context in contexts.items()}
        self._grid = InProcessGrid(self._client_app(), contexts)

    def run_round(self) -> None:
        """Model out, updates in, weighted mean, server optimiser."""
        model = self.state.parameters.tobytes()
        messages = [
            self._grid.create_message(content(model), "train.round", node, group_id="round")
            for node in self._nodes.values()
        ]
        replies = self._grid.pull_messages(self._grid.push_messages(messages))
        bodies = [body_of(reply) for reply in replies]
        weights = [np.float32(self._plan.cohort.weight(name)) for name in self._names]
        total = np.zeros_like(self.state.parameters)
        for weight, body in zip(weights, bodies, strict=True):
            total += weight * np.frombuffer(body, np.float32)
        self.state = apply_update(self._plan.optimizer, self.state, total / sum(weights))
        self.bytes_up = sum(map(len, bodies))
        self.bytes_down = len(model) * len(messages)

    def _client_app(self) -> ClientApp:
        app = ClientApp()

        @app.train("round")
        def train(message: Message, context: Context) -> Message:
            name = str(context.node_config["state-dir"])
            update = self._train(name, np.frombuffer(body_of(message), np.float32))
            return Message(content(update.tobytes()), reply_to=message)

        return app

    def _train(self, name: str, model: FlatVector) -> FlatVector:
        round_no = self.state.round_no + 1
        return self._trainers[name].train_round(model, self._random[name], round_no).update


if __name__ == "__main__":
    main()
