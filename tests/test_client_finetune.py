"""Fine-tuning at the site: charged like a study, refused like a study, and it stays there."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from site_cases import make_site, open_books, study, write_policy
from training_cases import make_data

from client import finetune as finetuning
from client.cli import main
from client.config import SiteFolder
from client.data.prepared import write_prepared
from client.finetune import Tuning, tuning_plan
from client.own_model import FOLDER, own_version
from client.training import LocalTrainer
from shared.errors import PolicyError
from shared.models import initial_parameters
from shared.plan import StudyPlan
from shared.released import ReleasedModel, model_files, read_model

ENOUGH = Tuning(epsilon=3.0, steps=20, learning_rate=1.0, sample_rate=0.5, clip_norm=1.0)


def released(folder: Path, plan: StudyPlan) -> ReleasedModel:
    """A model that a study released: here, the study's starting point."""
    folder.mkdir()
    for name, data in model_files(plan, initial_parameters(plan), {}).items():
        (folder / name).write_bytes(data)
    return read_model(folder)


@pytest.fixture
def model(tmp_path: Path) -> ReleasedModel:
    return released(tmp_path / "released", study())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two hundred patients whose label is the sign of their first feature."""
    folder = make_site(tmp_path / "site")
    for seed, part in enumerate(("train", "test")):
        data = make_data(study(), patients=200, seed=seed)
        told = replace(data, labels=(data.inputs[:, 0] > 0).astype(np.int64))
        write_prepared(told, folder / f"{part}.safetensors")
    with (folder / "site.toml").open("a") as settings:
        settings.write('[source]\nkind = "table"\npath = "x"\n[source.table]\npatient = "id"\n')
    return folder


def finetune(folder: Path, model: ReleasedModel, tuning: Tuning = ENOUGH) -> finetuning.Tuned:
    site, books = SiteFolder(folder), open_books(folder)
    try:
        return finetuning.finetune(site, site.config(), books, model, tuning)
    finally:
        books.close()


def charged(folder: Path) -> list[tuple[int, float]]:
    books = open_books(folder)
    try:
        return [(c.steps, c.noise_multiplier) for c in books.ledger.charges()]
    finally:
        books.close()


def test_a_tuned_model_is_charged_stays_here_and_knows_this_hospital(
    site: Path, model: ReleasedModel
) -> None:
    before = sorted(p.name for p in site.iterdir())
    done = finetune(site, model)
    assert done.after["auroc"] > done.before["auroc"]
    assert done.after["auroc"] > 0.9
    assert done.epsilon == pytest.approx(3.0, abs=0.02)
    [(steps, sigma)] = charged(site)
    assert steps == 20
    assert sigma > 0.5
    books_own = {"ledger.db", "ledger.db-shm", "ledger.db-wal", "patients.key", "opt-out.json"}
    assert {p.name for p in site.iterdir()} - set(before) - books_own == {FOLDER}
    own = own_version(SiteFolder(site), model)
    assert own is not None
    assert own.plan == tuning_plan(model.plan, ENOUGH)
    assert own.plan.privacy.mode == "local"
    assert np.abs(own.parameters - model.parameters).max() > 0.1
    books = open_books(site)
    assert books.ledger.verify() >= 6
    books.close()


def test_the_officer_sees_it_among_the_studies(
    site: Path, model: ReleasedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(site, model)
    assert main(["--site", str(site), "spent"]) == 0
    shown = capsys.readouterr().out
    assert "trial-tuned" in shown
    assert "spent                         2.9" in shown


def test_studies_and_tunings_share_one_budget(site: Path, model: ReleasedModel) -> None:
    """max_epsilon is 4: the first tuning takes 3, a second does not fit and trains nothing."""
    done = finetune(site, model)
    kept = (done.folder / "model.safetensors").read_bytes()
    with pytest.raises(PolicyError, match="would bring a patient of this site from epsilon 2"):
        finetune(site, model)
    assert len(charged(site)) == 1
    assert (done.folder / "model.safetensors").read_bytes() == kept
    books = open_books(site)
    plan = study(privacy={"epsilon": 3.0, "noise_multiplier": 2.5})
    people = {"training": books.population(f"p{i}" for i in range(200))}
    with pytest.raises(PolicyError, match="would bring a patient of this site from epsilon 2"):
        books.consider(plan, people)
    books.close()


@pytest.mark.parametrize(
    ("limits", "tuning", "reason"),
    [
        ({"modes": ["distributed"]}, {}, "mode 'local' is not in modes"),
        ({"models": ["mlp"]}, {}, "model 'logistic' is not in models"),
        ({}, {"clip_norm": 2.0}, "clip_norm is 2, max_clip_norm is 1"),
        ({}, {"epsilon": 5.0}, "epsilon is 5, max_epsilon is 4"),
        ({}, {"steps": 1, "sample_rate": 0.01, "epsilon": 4.0}, "min_noise_multiplier"),
        ({"hours": []}, {}, "outside the hours"),
    ],
)
def test_the_policy_decides(
    site: Path,
    model: ReleasedModel,
    limits: dict[str, object],
    tuning: dict[str, float],
    reason: str,
) -> None:
    write_policy(site, **limits)
    with pytest.raises(PolicyError, match=reason):
        finetune(site, model, replace(ENOUGH, **tuning))
    assert charged(site) == []
    assert not (site / FOLDER).exists()


def test_what_is_interrupted_stays_charged(
    site: Path, model: ReleasedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalTrainer, "train_round", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(site, model)
    assert [steps for steps, _ in charged(site)] == [20]
    assert not (site / FOLDER).exists()


def test_every_tuning_draws_its_own_noise(site: Path, model: ReleasedModel) -> None:
    write_policy(site, max_epsilon=20.0, max_epsilon_alone=20.0)
    finetune(site, model)
    first = own_version(SiteFolder(site), model)
    finetune(site, model)
    second = own_version(SiteFolder(site), model)
    assert first is not None
    assert second is not None
    assert np.abs(first.parameters - second.parameters).min() > 0
    assert len(charged(site)) == 2


def test_predictions_use_it(
    site: Path, tmp_path: Path, model: ReleasedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["a", 0.9, 0, 0, 0, 0], ["b", -0.9, 0, 0, 0, 0]]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", *(f"f{i}" for i in range(5))], *rows])
    predict = [
        "--site",
        str(site),
        "predict",
        str(tmp_path / "released"),
        str(tmp_path / "new.csv"),
    ]

    def said(*more: str) -> list[float]:
        assert main([*predict, *more]) == 0
        out, err = capsys.readouterr()
        assert ("own version" in err) == (not more and (site / FOLDER).exists())
        return [float(line.split(",")[1]) for line in out.splitlines()[1:]]

    before = said()
    tune = ["--site", str(site), "finetune", str(tmp_path / "released"), "--epsilon", "3"]
    tune += ["--learning-rate", "1", "--rate", "0.5", "--dataset"]
    assert main([*tune, "cardiology"]) == 2  # these data are no such dataset
    assert main([*tune, "default"]) == 0
    assert "epsilon 2.9" in capsys.readouterr().out
    after = said()
    assert after[0] > 0.7
    assert after[1] < 0.3
    assert said("--as-released") == before


def test_it_prepares_the_hospitals_own_table_first(tmp_path: Path, model: ReleasedModel) -> None:
    folder = make_site(tmp_path / "hospital")
    (folder / "site.toml").write_text(
        'name = "site-0"\ndevice = "cpu"\n[source]\nkind = "table"\npath = "ward.csv"\n'
        '[source.table]\npatient = "id"\n'
    )
    inputs = np.random.default_rng(3).uniform(-1, 1, (120, 5))
    rows = [[f"m{i}", *row, int(row[0] > 0)] for i, row in enumerate(inputs.tolist())]
    with (folder / "ward.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", *(f"f{i}" for i in range(5)), "y"], *rows])
    assert finetune(folder, model).epsilon <= 3.0
    assert charged(folder)[0][0] == 20
