"""Encoding by public knowledge: ranges, categories, missing values, pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.features import (
    clamped_counts,
    column_names,
    encode,
    feature_width,
    fit_zscore,
    scale_pixels,
)
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

AGE = FeaturePlan("age", minimum=0, maximum=100, missing="indicator")
PAIN = FeaturePlan("pain", type="category", categories=("none", "mild", "bad"))
PULSE = FeaturePlan("pulse", minimum=40, maximum=200)


def task(*features: FeaturePlan, **options: str) -> TaskPlan:
    return TaskPlan("ill", features=features, **options)  # type: ignore[arg-type]


def test_a_small_table_worked_by_hand() -> None:
    columns = {
        "age": np.array([50.0, np.nan, 100.0]),
        "pain": np.array([0, 2, 1]),
        "pulse": np.array([120.0, 40.0, 240.0]),
    }
    expected = [[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, -1], [1, 0, 0, 1, 0, 1]]
    plan = task(AGE, PAIN, PULSE)
    np.testing.assert_array_equal(encode(plan, columns), np.array(expected, np.float32))
    assert column_names(plan) == (
        "age",
        "age is missing",
        "pain=none",
        "pain=mild",
        "pain=bad",
        "pulse",
    )
    assert clamped_counts(plan, columns) == {"pulse": 1}


def test_drop_first_leaves_out_the_first_category() -> None:
    plan = task(PAIN, encoding="drop-first")
    assert encode(plan, {"pain": np.array([0, 1, 2])}).tolist() == [[0, 0], [1, 0], [0, 1]]
    assert column_names(plan) == ("pain=mild", "pain=bad")


def test_a_missing_value_at_the_midpoint() -> None:
    number = FeaturePlan("age", minimum=0, maximum=100, missing="midpoint")
    category = FeaturePlan("sex", type="category", categories=("f", "m"), missing="midpoint")
    encoded = encode(task(number, category), {"age": np.array([np.nan]), "sex": np.array([-1])})
    assert encoded.tolist() == [[0.0, 0.5, 0.5]]


def test_a_missing_category_with_an_indicator_is_no_category() -> None:
    sex = FeaturePlan("sex", type="category", categories=("f", "m"), missing="indicator")
    assert encode(task(sex), {"sex": np.array([-1, 1])}).tolist() == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("feature", [PULSE, PAIN])
def test_a_refused_missing_value_names_file_column_and_row(feature: FeaturePlan) -> None:
    values = np.array([0, -1]) if feature is PAIN else np.array([80.0, np.nan])
    with pytest.raises(ConfigError, match=rf"ward\.csv: column '{feature.name}'.*data row 2"):
        encode(task(feature), {feature.name: values}, "ward.csv")


def test_an_absent_column_is_named() -> None:
    with pytest.raises(ConfigError, match="'pulse'"):
        encode(task(AGE, PULSE), {"age": np.array([1.0])})


numbers = st.floats(-1e12, 1e12) | st.just(float("nan"))


@given(st.lists(st.tuples(numbers, st.integers(-1, 2)), min_size=1, max_size=20))
def test_public_ranges_bound_every_input(rows: list[tuple[float, int]]) -> None:
    pain = FeaturePlan("pain", type="category", categories=("a", "b", "c"), missing="indicator")
    plan = task(AGE, pain)
    age, code = (np.array(column) for column in zip(*rows, strict=True))
    encoded = encode(plan, {"age": age, "pain": code})
    assert encoded.shape == (len(rows), feature_width(plan))
    assert encoded.dtype == np.float32
    assert np.isfinite(encoded).all()
    assert np.abs(encoded).max() <= 1


@given(st.lists(numbers, min_size=2, max_size=20))
def test_an_encoded_row_does_not_depend_on_other_rows(age: list[float]) -> None:
    plan = task(AGE)
    whole = encode(plan, {"age": np.array(age)})
    without_first = encode(plan, {"age": np.array(age[1:])})
    np.testing.assert_array_equal(whole[1:], without_first)


def test_zscore_uses_the_sample_deviation_and_zeroes_constants() -> None:
    plan = task(PULSE, PAIN, scaling="site-zscore")
    columns = {"pulse": np.array([60.0, 300.0]), "pain": np.array([1, 1])}
    raw = encode(plan, columns)
    assert raw[:, 0].tolist() == [60, 300]  # in its own unit, not clamped
    scaled = fit_zscore(raw).apply(raw)
    np.testing.assert_allclose(scaled[:, 0], [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-6)
    assert not scaled[:, 1:].any()


def test_pixels_are_scaled_by_white_and_clamped() -> None:
    image = ImagePlan(1, 8, 8, white=200)
    pixels = np.zeros((2, 8, 8), np.uint8)
    pixels[0, 0, :3] = 100, 200, 255
    scaled = scale_pixels(image, pixels)
    assert scaled.shape == (2, 1, 8, 8)
    assert scaled[0, 0, 0, :4].tolist() == [0, 1, 1, -1]


def test_colour_channels_come_first() -> None:
    pixels = np.zeros((1, 8, 9, 3), np.uint8)
    pixels[0, 2, 5, 1] = 255
    scaled = scale_pixels(ImagePlan(3, 8, 9), pixels)
    assert np.argwhere(scaled > 0).tolist() == [[0, 1, 2, 5]]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(9, 8\); the plan needs 8 x 8"):
        scale_pixels(ImagePlan(1, 8, 8), np.zeros((1, 9, 8), np.uint8))


def test_an_image_task_has_no_columns() -> None:
    with pytest.raises(ConfigError, match="image"):
        feature_width(TaskPlan("ill", image=ImagePlan(1, 8, 8)))


def test_a_volume_is_scaled_by_its_public_window() -> None:
    image = ImagePlan(1, 8, 9, depth=4, black=-1000, white=400)
    hounsfield = np.array([-2000, -1000, -300, 400, 3000]).repeat(288).reshape(5, 4, 8, 9)
    scaled = scale_pixels(image, hounsfield)
    assert scaled.shape == (5, 1, 4, 8, 9)
    np.testing.assert_allclose(scaled[:, 0, 0, 0, 0], [-1, -1, 0, 1, 1], atol=1e-6)
    with pytest.raises(ConfigError, match="the plan needs 4 x 8 x 9 with 1 channel"):
        scale_pixels(image, np.zeros((1, 8, 9)))
