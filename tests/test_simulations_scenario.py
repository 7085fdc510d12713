"""Scenario files and --set: what loads, and how a typo is answered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.features import feature_width
from simulations.scenario import BUNDLED, list_scenarios, load_scenario

NAMES = (
    "adrenal",
    "as_approved",
    "breast_cancer",
    "breast_cancer_16",
    "breast_cancer_32",
    "breast_cancer_trees",
    "breastmnist",
    "breastmnist_resnet",
    "breastmnist_vit",
    "diabetes",
    "diabetes_trees",
    "heart",
    "heart_flamby_fedadam",
    "heart_flamby_fedavg",
    "heart_ft",
    "heart_severity",
    "heart_trees",
    "indo_rct",
    "nodules",
    "nodules_6000",
    "nodules_contrast",
    "statistics",
    "tcga_brca",
)
NOISED = ("as_approved", "statistics")
"""What real hospitals could approve as it stands; these have tests of their own."""


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_scenario(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_bundled_scenario_has_a_title() -> None:
    titles = list_scenarios()
    assert tuple(titles) == NAMES
    assert all(20 < len(title) < 80 for title in titles.values())  # one line of a terminal


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NOISED)))
def test_bundled_scenarios_keep_the_common_promises(name: str) -> None:
    scenario = load_scenario(name)
    plan = scenario.plan
    assert plan.name == name.replace("_", "-")
    assert plan.privacy.mode == ("none" if "flamby" in name else "local")
    many = {"breast_cancer_16": (16, 13, 1), "breast_cancer_32": (32, 26, 1)}
    many["tcga_brca"] = (6, 5, 1)
    cohort = (len(plan.cohort.sites), plan.cohort.threshold, plan.cohort.colluders)
    assert cohort == many.get(name, (4, 3, 1))
    assert plan.evaluation.release == "exact"


def test_the_synthetic_images_are_called_synthetic() -> None:
    scenario = load_scenario("nodules")
    assert "Synthetic" in scenario.simulation.title
    assert "SYNTHETIC" in scenario.plan.description


def test_hyphens_and_paths_find_the_same_file() -> None:
    by_name = load_scenario("breast-cancer")
    by_path = load_scenario(str(BUNDLED / "breast_cancer.toml"))
    assert by_name == by_path
    assert feature_width(by_name.plan.task) == 30


def test_overrides_are_typed_and_change_the_plans_hash() -> None:
    plain = load_scenario("breast_cancer")
    changed = load_scenario(
        "breast_cancer",
        [
            "plan.privacy.epsilon=2",
            "training.rounds = 3",
            "simulation.seed=7",
            "simulation.title=Another title",
            "simulation.site_sizes=[4, 3, 2, 1]",
            "cohort.sites.3.expected-patients=50",
            'task.positive="benign"',
        ],
    )
    assert changed.plan.privacy.epsilon == 2.0
    assert changed.plan.training.rounds == 3
    assert changed.simulation.seed == 7
    assert changed.simulation.title == "Another title"
    assert changed.simulation.site_sizes == (4, 3, 2, 1)
    assert changed.plan.cohort.sites[3].expected_patients == 50
    assert changed.plan.task.positive == "benign"
    assert changed.plan.sha256 != plain.plan.sha256
    assert load_scenario("breast_cancer", ["privacy.epsilon=4"]).plan.sha256 == plain.plan.sha256


def test_an_override_may_add_a_whole_table() -> None:
    added = load_scenario("breast_cancer", ["secure_sum.bits=16", "optimizer.name=fedadam"])
    assert added.plan.secure_sum.bits == 16
    assert added.plan.optimizer.name == "fedadam"


def test_typos_in_overrides_are_named() -> None:
    assert "Did you mean 'epsilon'?" in refused("breast_cancer", "privacy.epsilom=2")
    assert "unknown key 'privcy'" in refused("breast_cancer", "privcy.epsilon=2")
    assert "Did you mean 'seed'?" in refused("breast_cancer", "simulation.sed=2")
    assert "epsilon is 'two'; it must be a number" in refused(
        "breast_cancer", "privacy.epsilon=two"
    )
    assert "not key=value" in refused("breast_cancer", "privacy.epsilon")
    assert "is not TOML" in refused("breast_cancer", "simulation.site_sizes=[1, 2")
    assert "0 to 3" in refused("breast_cancer", "cohort.sites.4.name=x")
    assert "not a table" in refused("breast_cancer", "privacy.epsilon.x=1")


def test_an_override_cannot_smuggle_in_a_second_key() -> None:
    message = refused("breast_cancer", "simulation.seed=1\nsource='npz'")
    assert "not TOML" in message or "must be a whole number" in message


def test_an_unknown_scenario_offers_the_nearest() -> None:
    assert "Did you mean 'nodules'?" in refused("nodule")
    assert "does not exist" in refused("nowhere/study.toml")


def test_a_wrong_file_is_named_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = (BUNDLED / "breast_cancer.toml").read_text()
    path.write_text(text.replace("test_fraction", "test_fracton"))
    message = refused(str(path))
    assert f"{path} [simulation]: unknown key 'test_fracton'" in message
    path.write_text(text.replace("[plan.training]", "[plan.trainig]"))
    assert "Did you mean 'training'?" in refused(str(path))
    path.write_text("[plan]\nname = 'x'\n")
    assert "[simulation] is missing" in refused(str(path))
    path.write_text(text + "\n[plot]\n")
    assert "unknown table plot" in refused(str(path))
    path.write_text(text.replace("[228, 171, 114, 56]", "[228, 171, 114]"))
    assert "site_sizes has 3 entries for 4 sites" in refused(str(path))


def test_a_folder_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    shutil.copy(BUNDLED / "heart.toml", path)
    path.write_text(path.read_text().replace("[simulation]", '[simulation]\nfolder = "data"'))
    assert load_scenario(str(path)).simulation.folder == str(tmp_path / "data")
    given = load_scenario(str(path), ["simulation.folder=elsewhere"])
    assert given.simulation.folder == "elsewhere"
