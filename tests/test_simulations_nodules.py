"""The drawn images are frozen, and hard for a linear model but not for a small CNN."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from shared.models.image import SmallCnn
from simulations.hospitals import Hospital, load_hospitals
from simulations.localisation import times_above_chance
from simulations.nodules import SIDE, SITES, NoduleSite, draw_nodules
from simulations.scenario import load_scenario

FEW = NoduleSite(6, prevalence=0.5, brightness=3, contrast=0.9, noise=10)
FROZEN = "894ae1c34f8e4b03cca2c85540d9a62dfc89b5e4b0f8c6e22f70c8c18c04277b"


def sha256(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def test_the_generator_is_frozen() -> None:
    assert sha256(draw_nodules(FEW, seed=1, site_number=0).pixels) == FROZEN


def test_seeds_and_sites_differ() -> None:
    digests = {
        sha256(draw_nodules(FEW, seed, number).pixels) for seed in (1, 2) for number in (0, 1)
    }
    assert len(digests) == 4


def test_patients_labels_and_looks() -> None:
    dark = draw_nodules(SITES[1], seed=1, site_number=1)
    assert dark.pixels.shape == (len(dark.labels), SIDE, SIDE)
    per_patient = np.bincount(dark.patients, minlength=SITES[1].patients)
    assert set(per_patient.tolist()) == {1, 2, 3}
    assert np.count_nonzero(per_patient > 1) == round(SITES[1].repeats * SITES[1].patients)
    ill = {int(p) for p, label in zip(dark.patients, dark.labels, strict=True) if label}
    well = {int(p) for p, label in zip(dark.patients, dark.labels, strict=True) if not label}
    assert not ill & well  # a patient's images agree
    assert len(ill) == round(SITES[1].prevalence * SITES[1].patients)
    bright = draw_nodules(SITES[2], seed=1, site_number=1)
    assert bright.pixels.mean() > dark.pixels.mean() + 10


def test_a_nodule_is_all_that_a_label_adds() -> None:
    """The same draws with and without nodules differ in one small round place alone."""
    quiet = NoduleSite(6, prevalence=1.0, brightness=0, contrast=1.0, noise=0)
    ill = draw_nodules(quiet, 5, 0)
    well = draw_nodules(NoduleSite(6, 0.0, 0, 1.0, 0), 5, 0)
    for with_nodule, without in zip(ill.pixels, well.pixels, strict=True):
        difference = with_nodule.astype(int) - without
        assert difference.min() >= 0
        assert difference.max() >= 60
        rows, columns = np.nonzero(difference)
        assert np.ptp(rows) <= 11
        assert np.ptp(columns) <= 11


def _parts(hospitals: tuple[Hospital, ...]) -> tuple[NDArray[np.float32], ...]:
    parts = ([h.train for h in hospitals], [h.test for h in hospitals])
    train, test = (
        [np.concatenate([getattr(p, n) for p in part]) for n in ("inputs", "labels")]
        for part in parts
    )
    return (*train, *test)


@dataclass(frozen=True)
class Trained:
    """A small CNN, and the images that it has not seen."""

    net: SmallCnn
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


@pytest.fixture(scope="module")
def trained() -> Iterator[Trained]:
    """Trained on all hospitals' images at one place, without privacy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine wait for each other longer than they work
    scenario = load_scenario("nodules")
    x, y, x_test, y_test = _parts(load_hospitals(scenario.simulation, scenario.plan))
    torch.manual_seed(0)
    net = SmallCnn(1, 8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    images, labels = torch.from_numpy(x), torch.from_numpy(y).float()
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                net(images[batch]), labels[batch]
            )
            loss.backward()
            optimizer.step()
    yield Trained(net, x, y, x_test, y_test)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_pixels_alone_do_not_tell_but_a_small_cnn_does(trained: Trained) -> None:
    x, y, x_test, y_test = trained.x, trained.y, trained.x_test, trained.y_test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        linear = [
            LogisticRegression(C=c, max_iter=50).fit(x.reshape(len(x), -1), y) for c in (1e-4, 1e-2)
        ]
    flat = x_test.reshape(len(x_test), -1)
    assert max(roc_auc_score(y_test, m.decision_function(flat)) for m in linear) < 0.75
    with torch.no_grad():
        scores = trained.net(torch.from_numpy(x_test)).numpy()
    assert roc_auc_score(y_test, scores) > 0.95


@pytest.mark.slow
def test_gradcam_looks_at_the_nodule(trained: Trained) -> None:
    """Its mass lies in the drawn nodule at least 3 times above chance; untrained, it does not."""
    assert times_above_chance(copy.deepcopy(trained.net)).mean() >= 3
    torch.manual_seed(1)
    assert times_above_chance(SmallCnn(1, 8)).mean() < 3
