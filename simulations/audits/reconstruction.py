"""Pictures from updates: in the clear, clipped, under privacy, and as the server sees them.

Illustration, never proof: a better attack may come. Two attacks try four releases of the very
training code: the clear update of one patient, the clipped one, the one with the plan's noise,
and the masked upload. The imprinting model is what a malicious server would send; no site of this
product trains a model that it did not compute itself. It is shown to work through a secure sum
without noise, as a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.config import require
from shared.distributed import noise_share
from shared.models import (
    build_model,
    load_parameters,
    parameter_spec,
    read_parameters,
    starting_point,
)
from shared.plan import StudyPlan
from shared.privacy import noise_multiplier_of
from shared.task_plan import ImagePlan, TaskPlan
from simulations.audits.finding import (
    AuditOptions,
    AuditTarget,
    Finding,
    Picture,
    Table,
    Verdict,
    artefact,
)
from simulations.audits.inversion import (
    Images,
    Imprint,
    LeNet,
    imprinted,
    invert,
    levels_of,
    nearest,
    psnr,
    ssim,
    strip,
)
from simulations.audits.site_probe import changed, plain
from simulations.audits.sum_play import SumPlay
from simulations.hospitals import load_hospitals
from simulations.scenario import load_scenario

SIDE = 32
SITES = 8
CONTROL_DB = 25.0
RELEASES = ("clear", "clipped", "private", "masked")
Build = Callable[[StudyPlan], nn.Module]


@dataclass(frozen=True)
class Trial:
    """What one attack made of one release, for some patients.

    Attributes:
        pictures: The attack's best picture of each patient.
        truth: The patients' own.
        gains: Decibels of PSNR over the mean image.
    """

    attack: str
    release: str
    pictures: list[Images]
    truth: list[Images]
    gains: NDArray[np.float64]
    levels: NDArray[np.float64]
    alike: float
    found: float


@dataclass(frozen=True)
class Scene:
    """Victims, the public images that an attacker has of the same kind, and the plan."""

    plan: StudyPlan
    victims: Images
    public: Images
    gallery: Images
    random: ChaChaRandom

    @property
    def mean(self) -> Images:
        """The mean public image: what an attacker has for nothing."""
        return np.asarray(self.public.mean(axis=0), dtype=np.float32)


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Attack single patients' updates, and sums over eight sites.

    Raises:
        ConfigError: the plan promises no privacy.
    """
    rng = np.random.default_rng(options.seed)
    scene = _scene(target, rng, 2 if options.quick else 6)
    steps = 150 if options.quick else 400
    trials = []
    for number, release in enumerate(RELEASES):
        options.progress(f"inversion, {release}", 0.05 + 0.2 * number)
        trials.append(_inversion(scene, release, "inversion", _lenet, steps))
    options.progress("inversion of the product's CNN", 0.82)
    trials.append(_inversion(scene, "clear", "inversion, product's CNN", build_model, steps))
    options.progress("imprint", 0.9)
    trials += [_imprint(scene, release) for release in RELEASES]
    options.progress("done", 1.0)
    return _findings(scene, trials)


def _scene(target: AuditTarget, rng: np.random.Generator, victims: int) -> Scene:
    images = _images(target)
    order = rng.permutation(len(images))
    images = images[order]
    half = len(images) // 2
    plan = _image_plan(plain(target.plan))
    random = ChaChaRandom(rng.bytes(32))
    return Scene(plan, images[:victims], images[half:], images[:half], random)


def _images(target: AuditTarget) -> Images:
    """The target's own training images, or drawn ones, at most 32 pixels a side."""
    plan, hospitals = target.plan, target.hospitals
    if plan.task.image is None or not hospitals:
        scenario = load_scenario("nodules", ["simulation.site_sizes=[80,80,80,80]"])
        hospitals = load_hospitals(scenario.simulation, scenario.plan)
    inputs = np.concatenate([h.train.inputs[:200] for h in hospitals])
    require(inputs.ndim == 4, "pictures are needed: records of shape (channels, height, width)")
    grey = torch.from_numpy(inputs.mean(axis=1, keepdims=True))
    small = torch.nn.functional.adaptive_avg_pool2d(grey, (SIDE, SIDE))
    return np.asarray(small[:, 0].numpy(), dtype=np.float32)


def _image_plan(plan: StudyPlan) -> StudyPlan:
    """The plan's privacy on small grey images."""
    task = TaskPlan(label=plan.task.label, image=ImagePlan(channels=1, height=SIDE, width=SIDE))
    model = replace(plan.model, name="cnn", hidden=(), init="uniform")
    return replace(plan, task=task, model=model)


def _lenet(plan: StudyPlan) -> nn.Module:
    model = LeNet(SIDE)
    load_parameters(model, starting_point(model, 7) * np.float32(3.0))
    return model


def _released(scene: Scene, victims: Images, build: Build, release: str) -> NDArray[np.float32]:
    """The release of one site whose batch is these patients, each with label 1; flat (d,)."""
    plan, measuring = scene.plan, False
    noise: float | None = None
    if release in ("clear", "masked"):
        plan = changed(
            plan,
            privacy={"mode": "none", "noise_multiplier": None},
            evaluation={"release": "none"},
        )
    elif release == "clipped":
        noise, measuring = 0.0, True
    else:
        noise = _own_noise(plan, parameter_spec(build(plan)).length)
    count = len(victims)
    data = PatientDataset(
        victims[:, None], np.ones(count, dtype=np.int64), np.arange(count),
        tuple(f"victim-{i}" for i in range(count)),
    )  # fmt: skip
    site = plan.cohort.names[0]
    trainer = LocalTrainer(plan, site, data, noise, "cpu", build=build, measuring=measuring)
    start = read_parameters(build(plan))
    found = trainer.gradient(start, np.arange(count), scene.random.fresh_child("victim"))
    return np.asarray(found * np.float32(trainer.public_divisor(site)), dtype=np.float32)


def _own_noise(plan: StudyPlan, parameters: int) -> float | None:
    """Noise multiplier of one site's own release; its share in mode `distributed`."""
    if plan.privacy.mode == "distributed":
        wide = changed(plan, secure_sum={"bits": 32, "clip_range": 1.0})
        return noise_share(wide, parameters).alone
    return noise_multiplier_of(plan)


def _masked(scene: Scene, clear: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same update as the server receives it: quantised and masked, read as if it were not."""
    play = SumPlay(scene.plan, len(clear))
    ring, reach = play.session.ring, float(np.abs(clear).max()) or 1.0
    vector = ring.quantise(clear, clip_range=reach, key=scene.random.bytes(32))
    vectors = {name: np.zeros_like(vector) for name in play.session.names}
    vectors[play.session.names[0]] = vector
    seen = play.play(1, vectors).uploads[play.session.names[0]]
    return ring.dequantise(seen, clip_range=reach)


def _inversion(scene: Scene, release: str, attack: str, build: Build, steps: int) -> Trial:
    pictures = []
    steps = steps if release in ("clear", "clipped") else steps // 3
    for victim in scene.victims:
        observed = _released(scene, victim[None], build, release)
        if release == "masked":
            observed = _masked(scene, observed)
        model = build(scene.plan)
        model.train()
        guess = scene.mean[None] + np.float32(0.05) * scene.random.gaussian(SIDE * SIDE).reshape(
            1, SIDE, SIDE
        )
        pictures.append(invert(model, observed, 1.0, guess, steps)[0])
    return _trial(scene, attack, release, pictures, list(scene.victims))


def _imprint(scene: Scene, release: str) -> Trial:
    """Eight sites, one patient each; the attacker sees the sum, or one masked upload."""
    levels = levels_of(scene.public)

    def build(plan: StudyPlan) -> nn.Module:
        return Imprint(SIDE * SIDE, levels)

    victims = scene.gallery[:SITES]
    parts = [_released(scene, v[None], build, release) for v in victims]
    observed = np.sum(parts, axis=0)
    if release == "masked":
        observed = _masked(scene, parts[0])
    candidates = imprinted(observed, (SIDE, SIDE))
    pictures = [candidates[nearest(victim, candidates)] for victim in victims]
    return _trial(scene, "imprint, sum of 8 sites", release, pictures, list(victims))


def _trial(
    scene: Scene, attack: str, release: str, pictures: list[Images], truth: list[Images]
) -> Trial:
    levels = np.array([psnr(a, b) for a, b in zip(pictures, truth, strict=True)])
    free = np.array([psnr(scene.mean, b) for b in truth])
    alike = float(np.mean([ssim(a, b) for a, b in zip(pictures, truth, strict=True)]))
    hits = [
        np.array_equal(scene.gallery[nearest(a, scene.gallery)], b)
        for a, b in zip(pictures, truth, strict=True)
    ]
    return Trial(
        attack, release, pictures, truth, levels - free, levels, alike, float(np.mean(hits))
    )


_SHOWN = {
    "clear": "in the clear",
    "clipped": "clipped, no noise",
    "private": "with the plan's noise",
    "masked": "as the server sees it",
}


def _findings(scene: Scene, trials: list[Trial]) -> list[Finding]:
    gallery = len(scene.gallery)
    columns = ("attack", "release", "PSNR, dB", "over the mean image, dB", "SSIM",
               f"re-identified among {gallery}")  # fmt: skip
    rows = tuple(
        (
            t.attack, _SHOWN[t.release], round(float(t.levels.mean()), 1),
            round(float(t.gains.mean()), 1), round(t.alike, 2), f"{t.found:.0%}",
        )
        for t in trials
    )  # fmt: skip
    table = Table("What attacks make of an update", columns, rows)
    pictures = tuple(_picture(t) for t in trials)
    by = {(t.attack, t.release): t for t in trials}
    sums = "imprint, sum of 8 sites"
    return [
        _control(by["inversion", "clear"], table, pictures),
        _no_better(by["inversion", "private"], "inversion-private"),
        _no_better(by["inversion", "masked"], "inversion-masked"),
        _warning(by[sums, "clear"]),
        _no_better(by[sums, "private"], "imprint-private"),
        _no_better(by[sums, "masked"], "imprint-masked"),
    ]


def _picture(trial: Trial) -> Picture:
    return Picture(
        f"{trial.attack}, {_SHOWN[trial.release]}",
        "above the patients' images, below what the attack made",
        strip([trial.truth, trial.pictures]),
    )


def _control(trial: Trial, table: Table, pictures: tuple[Picture, ...]) -> Finding:
    level = float(trial.levels.mean())
    works = level >= CONTROL_DB
    return Finding(
        probe="reconstruction",
        name="inversion-clear-control",
        claim=f"the inversion works on a CNN's clear update of one patient, at {CONTROL_DB:g} dB "
        "or more (positive control)",
        statistic="PSNR of the pictures, mean over patients, dB",
        value=level,
        interval=_interval(trial.levels),
        alpha=0.05,
        assumptions=("the network is the one that the attack's authors used; the product's own "
                     "CNN pools over the image, and its row shows how far that helps",),
        verdict="not refuted" if works else "not testable",
        expected=CONTROL_DB,
        explanation="An update in the clear is a picture of the patient. If this control fails, "
        "the attacks' failures below say nothing.",
        tables=(table,),
        pictures=pictures,
        artefact_sha256=artefact(*trial.pictures),
    )  # fmt: skip


def _warning(trial: Trial) -> Finding:
    level = float(trial.gains.mean())
    return Finding(
        probe="reconstruction",
        name="imprint-clear-sum-warning",
        claim="WARNING: through a secure sum without noise a malicious model still gets pictures",
        statistic="PSNR over the mean image, mean over eight sites' patients, dB",
        value=level,
        interval=_interval(trial.gains),
        alpha=0.05,
        assumptions=("a site trains the model that the server sends; this product's sites do not",),
        verdict="not refuted" if level > 10 else "not testable",
        explanation="Secure aggregation alone does not stop a malicious model. What stops it: "
        "every site adds noise before anything leaves, and computes each model itself.",
        artefact_sha256=artefact(*trial.pictures),
    )


def _no_better(trial: Trial, name: str) -> Finding:
    low, high = _interval(trial.gains)
    verdict: Verdict = "violated" if low > 0 else "not refuted"
    return Finding(
        probe="reconstruction",
        name=name,
        claim=f"{trial.attack}: pictures from a release {_SHOWN[trial.release]} are no better "
        "than the mean image",
        statistic="PSNR over the mean image, mean over patients, dB",
        value=float(trial.gains.mean()),
        interval=(low, high),
        alpha=0.05,
        assumptions=("the attacker has public images of the same kind, and knows the label",),
        verdict=verdict,
        expected=0.0,
        explanation="This attack failed; another may not. Differential privacy bounds all of them.",
        artefact_sha256=artefact(*trial.pictures),
    )


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % by Student's t; the whole line for a single value."""
    if len(values) < 2:
        return -math.inf, math.inf
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)
