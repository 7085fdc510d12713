"""The simulated hospitals: real files, published splits, unequal and unlike sites."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.data.mapping import ColumnMapping, TableMapping
from shared.errors import ConfigError
from shared.features import column_names
from shared.task_plan import FeaturePlan, ImagePlan
from simulations.hospitals import Hospital, deal_out, load_hospitals
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario


def loaded(scenario: Scenario, seed: int | None = None) -> tuple[Hospital, ...]:
    return load_hospitals(scenario.simulation, scenario.plan, seed)


def assert_same(one: tuple[Hospital, ...], other: tuple[Hospital, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        for part in ("train", "test"):
            np.testing.assert_array_equal(getattr(a, part).inputs, getattr(b, part).inputs)
            assert getattr(a, part).patient_ids == getattr(b, part).patient_ids


def assert_patients_apart(hospitals: tuple[Hospital, ...]) -> None:
    """No patient is in two parts or at two sites."""
    ids = [i for h in hospitals for part in (h.train, h.test) for i in part.patient_ids]
    assert len(set(ids)) == len(ids)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.floats(0, 1), st.integers(0, 2**32))
def test_dealing_out_gives_everyone_away_once(sizes: list[int], skew: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = deal_out(rng.normal(size=120), tuple(sizes), skew, rng)
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    expected = np.array(sizes) / sum(sizes) * 120
    assert np.abs([len(p) for p in parts] - expected).max() <= 1


def test_skew_makes_sites_unlike() -> None:
    score = np.random.default_rng(0).normal(size=4000)
    gaps = []
    for skew in (0.0, 0.4, 1.0):
        first, second = deal_out(score, (1, 1), skew, np.random.default_rng(1))
        gaps.append(score[first].mean() - score[second].mean())
    assert abs(gaps[0]) < 0.1
    assert 0.5 < gaps[1] < 1.4
    assert gaps[2] > 1.5
    assert gaps[2] == pytest.approx(2 * np.sqrt(2 / np.pi), abs=0.1)  # means of a normal's halves


def test_breast_cancer_is_dealt_out_to_unequal_unlike_hospitals() -> None:
    scenario = load_scenario("breast_cancer")
    hospitals = loaded(scenario)
    assert [h.name for h in hospitals] == ["university", "city", "county", "rural"]
    sizes = [h.train.patient_count + h.test.patient_count for h in hospitals]
    assert sizes == [228, 171, 114, 56]
    assert_patients_apart(hospitals)
    malignant = [float(h.train.labels.mean()) for h in hospitals]
    assert malignant[0] > malignant[1] + 0.1 > malignant[3] + 0.2
    assert sum(int(h.train.labels.sum() + h.test.labels.sum()) for h in hospitals) == 212
    for hospital, site in zip(hospitals, scenario.plan.cohort.sites, strict=True):
        assert site.expected_patients == pytest.approx(hospital.train.patient_count, abs=3)
        assert hospital.test.labels.mean() == pytest.approx(hospital.train.labels.mean(), abs=0.03)


def test_breast_cancer_repeats_by_seed() -> None:
    scenario = load_scenario("breast_cancer")
    assert_same(loaded(scenario), loaded(scenario, seed=1))
    other = loaded(scenario, seed=2)
    assert other[0].train.patient_ids != loaded(scenario)[0].train.patient_ids


def test_the_ranges_hold_nearly_all_of_the_breast_measurements() -> None:
    inputs = np.concatenate([h.train.inputs for h in loaded(load_scenario("breast_cancer"))])
    assert (np.abs(inputs) == 1).mean() < 0.01
    assert inputs.std(axis=0).min() > 0.1  # no range so wide that a feature goes flat


def test_nodules_have_several_images_of_some_patients() -> None:
    scenario = load_scenario("nodules", ["simulation.site_sizes=[24, 20, 16, 12]"])
    hospitals = loaded(scenario)
    assert [h.train.patient_count + h.test.patient_count for h in hospitals] == [24, 20, 16, 12]
    assert_patients_apart(hospitals)
    assert all(len(h.train.labels) > h.train.patient_count for h in hospitals)
    assert all(i.startswith("synthetic-") for h in hospitals for i in h.train.patient_ids)
    assert hospitals[0].train.inputs.shape[1:] == (1, 64, 64)
    assert_same(hospitals, loaded(scenario))


FLAMBY_COUNTS = {
    "cleveland": (199, 91, 104, 48),
    "hungarian": (172, 65, 89, 33),
    "switzerland": (30, 30, 16, 15),
    "va": (85, 66, 45, 35),
}


def heart(folder: Path, name: str = "heart", *overrides: str) -> Scenario:
    return load_scenario(name, [f"simulation.folder={folder}", *overrides])


@pytest.mark.parametrize("name", ["heart", "heart_flamby_fedavg", "heart_flamby_fedadam"])
def test_heart_counts_are_flambys(heart_folder: Path, name: str) -> None:
    hospitals = loaded(heart(heart_folder, name))
    assert_patients_apart(
        tuple(
            replace(
                h,
                train=replace(h.train, patient_ids=tuple(h.name + i for i in h.train.patient_ids)),
                test=replace(h.test, patient_ids=tuple(h.name + i for i in h.test.patient_ids)),
            )
            for h in hospitals
        )
    )
    counts = {
        h.name: (len(h.train.labels), h.train.labels.sum(), len(h.test.labels), h.test.labels.sum())
        for h in hospitals
    }
    assert counts == FLAMBY_COUNTS


def test_heart_inputs_are_flambys_features(heart_folder: Path) -> None:
    scenario = heart(heart_folder, "heart_flamby_fedavg")
    hospitals = loaded(scenario)
    with (heart_folder / "flamby_features.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = [n for n in rows[0] if n not in ("site", "split", "label")]
    assert [n.replace("=", "_") for n in column_names(scenario.plan.task)] == [
        f"{n}_1" if n in ("sex", "fbs", "exang") else n for n in names
    ]
    for hospital in hospitals:
        features = {
            split: np.array(
                [
                    [float(row[n]) for n in (*names, "label")]
                    for row in rows
                    if (row["site"], row["split"]) == (hospital.name, split)
                ]
            )
            for split in ("train", "test")
        }
        train = features["train"][:, :-1]
        mean, std = train.mean(axis=0), train.std(axis=0, ddof=1)
        for split, part in (("train", hospital.train), ("test", hospital.test)):
            centred = features[split][:, :-1] - mean
            expected = np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)
            np.testing.assert_allclose(part.inputs, expected, atol=2e-6)
            np.testing.assert_array_equal(part.labels, features[split][:, -1])


def test_heart_without_the_split_file_draws_the_same_split(
    heart_folder: Path, tmp_path: Path
) -> None:
    for path in heart_folder.glob("processed.*.data"):
        shutil.copy(path, tmp_path)
    assert_same(loaded(heart(heart_folder)), loaded(heart(tmp_path)))
    shutil.copy(heart_folder / "flamby_split.csv", tmp_path)
    text = (tmp_path / "flamby_split.csv").read_text()
    (tmp_path / "flamby_split.csv").write_text(text.replace("va,1,", "va,2000,"))
    with pytest.raises(ConfigError, match="same rows of va"):
        loaded(heart(tmp_path))


def test_heart_split_at_random_differs_by_seed(heart_folder: Path) -> None:
    one, two = (
        loaded(heart(heart_folder, "heart", "simulation.split=random", f"simulation.seed={seed}"))
        for seed in (1, 2)
    )
    assert one[0].train.patient_ids != two[0].train.patient_ids
    assert [h.train.patient_count + h.test.patient_count for h in one] == [303, 261, 46, 130]


def test_a_missing_folder_says_what_to_fetch(tmp_path: Path) -> None:
    for folder in ("", str(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            loaded(load_scenario("heart", [f"simulation.folder={folder}"] if folder else []))
        message = str(caught.value)
        assert "processed.cleveland.data" in message
        assert "--data FOLDER" in message
        assert "\n" not in message
    with pytest.raises(ConfigError, match=r"MedMNIST file.*--data FOLDER"):
        loaded(load_scenario("breastmnist"))


def test_a_site_that_the_heart_data_does_not_have(heart_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no hospital 'zurich'"):
        loaded(heart(heart_folder, "heart", "cohort.sites.0.name=zurich"))


def test_breastmnist_keeps_the_official_test_part(breastmnist_folder: Path) -> None:
    scenario = load_scenario(
        "breastmnist", [f"simulation.folder={breastmnist_folder}", "task.image.features=pixels"]
    )
    hospitals = loaded(scenario)
    assert_patients_apart(hospitals)
    assert [h.train.patient_count for h in hospitals] == [200, 160, 120, 66]
    assert sum(len(h.test.labels) for h in hospitals) == 156
    assert sum(int(h.test.labels.sum()) for h in hospitals) == 42
    share = [float(h.train.labels.mean()) for h in hospitals]
    assert max(share) - min(share) > 0.1
    random = replace(scenario.simulation, split="random")
    assert sum(len(h.test.labels) for h in load_hospitals(random, scenario.plan)) == pytest.approx(
        546 / 4, abs=4
    )


def test_csv_hospitals_each_have_a_file(tmp_path: Path) -> None:
    scenario = load_scenario("breast_cancer", ["simulation.source=csv"])
    task = replace(
        scenario.plan.task,
        label="ill",
        positive="yes",
        features=(FeaturePlan("age", minimum=0, maximum=100),),
    )
    plan = replace(scenario.plan, task=task)
    mapping = TableMapping(patient="id", columns=(ColumnMapping("age", "Alter"),))
    simulation = replace(scenario.simulation, folder=str(tmp_path), table=mapping)
    names = [s.name for s in plan.cohort.sites]
    for name in names:
        rows = "".join(f"{name}-{i},{20 + i},{'yes' if i % 2 else 'no'}\n" for i in range(8))
        (tmp_path / f"{name}.csv").write_text("id,Alter,ill\n" + rows)
    hospitals = load_hospitals(simulation, plan)
    assert [h.train.patient_count for h in hospitals] == [6, 6, 6, 6]
    (tmp_path / f"{names[2]}.csv").unlink()
    with pytest.raises(ConfigError, match=rf"{names[2]}\.csv does not exist"):
        load_hospitals(simulation, plan)


def test_image_folder_hospitals_each_have_a_folder(tmp_path: Path) -> None:
    scenario = load_scenario("nodules", ["simulation.source=image-folder"])
    task = replace(scenario.plan.task, positive="ill", image=ImagePlan(1, 8, 8))
    plan = replace(scenario.plan, task=task)
    images = replace(scenario.simulation.images, one_image_per_patient=True)
    simulation = replace(scenario.simulation, folder=str(tmp_path), images=images)
    for site in plan.cohort.sites:
        for i in range(8):
            path = tmp_path / site.name / ("ill" if i % 2 else "well") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(path)
    hospitals = load_hospitals(simulation, plan)
    assert [h.test.patient_count for h in hospitals] == [2, 2, 2, 2]


def test_a_site_too_small_to_split_is_named() -> None:
    scenario = load_scenario("breast_cancer", ["simulation.site_sizes=[300, 267, 1, 1]"])
    with pytest.raises(ConfigError, match="site 'county': too few patients"):
        loaded(scenario)


def test_a_plan_that_the_source_cannot_answer() -> None:
    with pytest.raises(ConfigError, match="no feature 'mean radios'"):
        loaded(load_scenario("breast_cancer", ["task.features.0.name=mean radios"]))
    with pytest.raises(ConfigError, match="draws images"):
        loaded(load_scenario("breast_cancer", ["simulation.source=nodules"]))


def test_volumes_are_learnt_privately(adrenal_folder: Path, tmp_path: Path) -> None:
    scenario = load_scenario("adrenal", [f"simulation.folder={adrenal_folder}"])
    hospitals = loaded(scenario)
    assert hospitals[0].train.inputs.shape == (400, 1, 28, 28, 28)
    assert sum(len(h.test.labels) for h in hospitals) == 298
    assert float(hospitals[0].train.inputs.min()) == 0.0  # what is no gland
    run = prepare(scenario, RunOptions(out=tmp_path / "run", insecure_reproducible=True))
    results = execute(run, lambda report: None)
    assert results["final"]["metrics"]["auroc"] > 0.7
