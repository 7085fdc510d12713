"""The study plan: one record, one byte string, one hash; every mistake is named at load."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import plan as plans
from shared.errors import ConfigError

PLAN = """
name = "heart"
[task]
label = "disease"
[[task.features]]
name = "age"
unit = "years"
minimum = 18
maximum = 100
[[task.features]]
name = "sex"
type = "category"
categories = ["female", "male"]
[model]
name = "logistic"
[training]
rounds = 10
local_steps = 5
learning_rate = 0.5
sample_rate = 0.2
[privacy]
mode = "local"
epsilon = 2
delta = 1e-4
clip_norm = 1.0
[cohort]
threshold = 3
colluders = 1
sites = [
  {name = "north", expected_patients = 200},
  {name = "east", expected_patients = 100},
  {name = "south", expected_patients = 50},
  {name = "west", expected_patients = 50},
]
"""


def table() -> dict[str, Any]:
    return tomllib.loads(PLAN)


def changed(path: str, value: object) -> dict[str, Any]:
    """The plan's table with one value changed, added, or removed (value None)."""
    here: Any = (new := copy.deepcopy(table()))
    *parents, last = path.split(".")
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here[part]
    if value is None:
        del here[last]
    else:
        here[last] = value
    return new


def test_bytes_and_plan_are_each_others_inverse() -> None:
    plan = plans.from_table(table(), "plan")
    again = plans.from_bytes(plan.canonical_bytes)
    assert again == plan
    assert again.sha256 == plan.sha256


def test_order_of_keys_and_written_out_defaults_do_not_change_the_hash() -> None:
    plan = plans.from_table(table(), "plan")
    reordered = dict(reversed(table().items()))
    reordered["optimizer"] = {"name": "fedavg", "learning-rate": 1}
    assert plans.from_table(reordered, "plan").sha256 == plan.sha256


def test_a_key_that_came_later_changes_no_plan_from_before_it() -> None:
    """Nor its bytes: a site of an older version still reads and approves it."""
    plan = plans.from_table(table(), "plan")
    assert plan.sha256 == "72ad322fc7c6befda65f0459402d04937e9c3d6c00a829d51cc62dc7933ebf4f"
    assert b"trees" not in plan.canonical_bytes
    assert plans.from_table(changed("model.trees", 0), "p").sha256 == plan.sha256
    with_trees = plans.from_table(changed("model.trees", 5), "p")
    assert plans.from_bytes(with_trees.canonical_bytes) == with_trees
    assert with_trees.sha256 != plan.sha256
    spelled = plan.canonical_bytes.replace(b'"width":16', b'"trees":0,"width":16')
    with pytest.raises(ConfigError, match="not in canonical form"):
        plans.from_bytes(spelled)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.rounds", 11),
        ("privacy.epsilon", 2.000001),
        ("cohort.sites.0.expected_patients", 201),
        ("task.features.0.maximum", 101),
        ("model.init_seed", 1),
        ("description", "x"),
    ],
)
def test_any_changed_value_changes_the_hash(path: str, value: object) -> None:
    assert plans.from_table(changed(path, value), "p").sha256 != (
        plans.from_table(table(), "p").sha256
    )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("privacy.epslon", 1, ["privacy", "epslon", "Did you mean 'epsilon'"]),
        ("privacy.epsilon", 0, ["epsilon is 0", "above 0"]),
        ("privacy.epsilon", -1.0, ["epsilon", "above 0"]),
        ("privacy.epsilon", "two", ["epsilon", "number"]),
        ("privacy.epsilon", None, ["needs epsilon"]),
        ("privacy.delta", 0.5, ["delta", "0.01"]),
        ("privacy.clip_norm", 0, ["clip_norm", "above 0"]),
        ("privacy.mode", "global", ["mode", "'local'"]),
        ("cohort.threshold", 2, ["2 threshold", "5", "valid: 3 to 4"]),
        ("cohort.threshold", 5, ["threshold is 5", "4 sites"]),
        ("cohort.colluders", 0, ["colluders", "at least 1"]),
        ("cohort.sites.1.name", "north", ["same name"]),
        ("cohort.sites.1.name", "North Hospital", ["site name"]),
        ("task.features.0.minimum", 120, ["age", "minimum 120", "swap"]),
        ("task.features.0.minimum", None, ["age", "minimum and maximum"]),
        ("task.features.1.categories", ["female"], ["sex", "categories"]),
        ("task.features.1.name", "age", ["same name"]),
        ("task.features.1.name", "disease", ["label", "feature"]),
        ("task.label", None, ["task", "label", "missing"]),
        ("training.rounds", 0, ["rounds is 0"]),
        ("training.rounds", 2.5, ["rounds", "whole number"]),
        ("training.rounds", True, ["rounds", "whole number"]),
        ("training.sample_rate", 1.5, ["sample_rate", "at most 1"]),
        ("training.sample_rate", None, ["sample_rate", "missing"]),
        ("training.batch_size", 4, ["batch_size", "Poisson"]),
        ("training.proximal_mu", 0.1, ["proximal_mu", "fedprox"]),
        ("task.scaling", "site-zscore", ["site-zscore", "none"]),
        ("task.image", {"channels": 1, "height": 28, "width": 28}, ["features", "image"]),
        ("secure_sum", {"bits": 20}, ["bits", "16, 24, 32"]),
        ("name", "Heart Study", ["name"]),
    ],
)
def test_a_mistake_fails_at_load_and_names_the_key(
    path: str, value: object, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plans.from_table(changed(path, value), "heart.toml")
    message = str(caught.value)
    assert message.startswith("heart.toml")
    for word in words:
        assert word in message


def test_bytes_that_are_not_canonical_are_refused() -> None:
    plan = plans.from_table(table(), "plan")
    spaced = plan.canonical_bytes.replace(b'":', b'": ', 1)
    with pytest.raises(ConfigError, match="canonical"):
        plans.from_bytes(spaced)


@given(st.binary(max_size=64) | st.text(max_size=40).map(str.encode))
def test_junk_bytes_are_refused_as_configuration(junk: bytes) -> None:
    with pytest.raises(ConfigError):
        plans.from_bytes(junk)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist"):
        plans.load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        plans.load(broken)


def test_weights_are_public_constants_of_the_plan() -> None:
    cohort = plans.from_table(table(), "plan").cohort
    assert [cohort.weight(n) for n in ("north", "east", "south")] == [1.0, 0.5, 0.25]
    uniform = plans.from_table(changed("cohort.weighting", "uniform"), "p").cohort
    assert uniform.weight("south") == 1.0


def test_spare_rounds_are_part_of_the_promise() -> None:
    plan = plans.from_table(changed("training.spare_rounds", 3), "plan")
    assert plan.training.charged_steps == (10 + 3) * 5
