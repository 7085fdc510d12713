"""Scattering features: fixed, each record's from that record alone, and worth having."""

from __future__ import annotations

import numpy as np
import pytest

from client.guard import check_sensitivity
from shared.errors import ConfigError
from shared.features import feature_width, image_inputs
from shared.models import build_model, input_shape
from shared.plan import StudyPlan
from shared.scattering import drawn_images, scattering, scattering_width
from shared.task_plan import ImagePlan
from simulations.scenario import load_scenario


def images(count: int = 5, size: int = 28) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (count, 1, size, size)).astype(np.float32)


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    overrides = ("privacy.mode=distributed", "task.image.features=scattering")
    return load_scenario("breastmnist", (*overrides, "model.name=logistic")).plan


@pytest.mark.parametrize("cells", [1, 3])
def test_each_record_has_its_own_features_whoever_else_is_there(cells: int) -> None:
    batch = images()
    together = scattering(batch, cells)
    assert together.shape == (5, scattering_width(1, cells))
    alone = np.concatenate([scattering(image[None], cells) for image in batch])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_features_hardly_move_with_a_shift_and_do_with_a_turn() -> None:
    """What makes them features: small shifts stay near, another texture does not."""
    x = np.linspace(0, 6 * np.pi, 32)
    stripes = np.tile(np.sin(x), (32, 1)).astype(np.float32)[None, None]
    plain, shifted, turned = (
        scattering(image, 1)[0]
        for image in (stripes, np.roll(stripes, 2, axis=3), stripes.transpose(0, 1, 3, 2))
    )
    assert np.linalg.norm(plain - shifted) < 0.25 * np.linalg.norm(plain - turned)


def test_an_image_without_structure_has_finite_features() -> None:
    for value in (-1.0, 0.0, 1.0):
        features = scattering(np.full((1, 1, 28, 28), value, dtype=np.float32), 2)
        assert np.isfinite(features).all()
        assert np.linalg.norm(features) < 1 + 1e-5


def test_colours_are_separate_channels() -> None:
    colour = np.repeat(images(2), 3, axis=1)
    assert scattering(colour, 1).shape == (2, scattering_width(3, 1))


def test_the_public_reference_is_the_same_everywhere() -> None:
    """Pinned: a site that centred by other constants would train on other inputs."""
    drawn = drawn_images(2, 8, 8)
    assert drawn.shape == (2, 1, 8, 8)
    pinned = [0.3531914, -0.5269949, 0.2667681]
    np.testing.assert_allclose(drawn[0, 0, 0, :3], pinned, atol=1e-6)


def test_a_table_model_trains_on_them_and_an_image_model_refuses(plan: StudyPlan) -> None:
    width = feature_width(plan.task)
    assert input_shape(plan) == (width,)
    assert plan.task.image is not None
    pixels = np.zeros((2, 28, 28), dtype=np.uint8)
    assert image_inputs(plan.task.image, pixels).shape == (2, width)
    assert sum(p.numel() for p in build_model(plan).parameters()) == width + 1
    assert check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4
    overrides = ("model.name=cnn",)
    with pytest.raises(ConfigError, match="reads pixels"):
        build_model(load_scenario("breastmnist", overrides).plan)
    with pytest.raises(ConfigError, match="scattering"):
        build_model(load_scenario("breastmnist", ("task.image.features=pixels",)).plan)


def test_sizes_that_do_not_fit_are_refused_at_load() -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        ImagePlan(channels=1, height=30, width=28, features="scattering")
    with pytest.raises(ConfigError, match="cells is 8; valid: 1 to 7"):
        ImagePlan(channels=1, height=28, width=28, features="scattering", cells=8)
