"""Patients who opted out: from the next round they are neither trained on nor counted."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from site_cases import make_site, open_books, write_policy
from study_cases import Sites

from client.cli import main
from client.data.dataset import PatientDataset
from client.training import LocalTrainer
from shared.errors import PolicyError
from simulations.scenario import load_scenario


def command(site: Path, *words: object) -> int:
    return main(["--site", str(site), *map(str, words)])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


def data(names: list[str]) -> PatientDataset:
    count = len(names)
    inputs = np.arange(count, dtype=np.float32)[:, None]
    return PatientDataset(inputs, np.arange(count) % 2, np.arange(count), tuple(names))


def test_a_patient_who_opts_out_during_a_study_is_in_no_later_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = load_scenario(
        "breast_cancer", ["training.rounds=4", "training.local_steps=2", "evaluation.bins=16"]
    )
    sites = Sites(scenario, tmp_path)
    city, tested = sites.data["city"], sites.test["city"]
    gone = (*city.patient_ids[::2], *tested.patient_ids[::2])
    trained: list[set[str]] = []
    evaluated: list[int] = []
    train, predict = LocalTrainer.train_round, LocalTrainer.predict

    def of_the_city(trainer: LocalTrainer) -> bool:
        return set(trainer.data.patient_ids) <= set(city.patient_ids)

    def watched_train(self: LocalTrainer, *args: Any, **named: Any) -> Any:
        if of_the_city(self):
            trained.append(set(self.data.patient_ids))
        return train(self, *args, **named)

    def watched_predict(self: LocalTrainer, parameters: Any, inputs: Any) -> Any:
        if of_the_city(self):
            evaluated.append(len(inputs))
        return predict(self, parameters, inputs)

    monkeypatch.setattr(LocalTrainer, "train_round", watched_train)
    monkeypatch.setattr(LocalTrainer, "predict", watched_predict)

    def opt_out_after_two(report: Any) -> None:
        if report.round_no == 2:
            assert command(sites.folders["city"], "opt-out", "add", *gone) == 0

    sites.study("run-1", observer=opt_out_after_two)
    everyone, left = set(city.patient_ids), set(city.patient_ids) - set(gone)
    assert trained == [everyone, everyone, left, left]
    records = [len(tested.labels), int((~np.isin(tested.patient_ids, gone)).sum())]
    assert evaluated == [records[0]] * 2 + [records[1]] * 3  # the last one is of the final model
    books = open_books(sites.folders["city"])
    last = list(books.ledger.events("charge"))[-1]["population"]
    assert len(books.ledger.members(last)) == len(left)


def test_test_patients_are_left_out_as_well(site: Path) -> None:
    books = open_books(site)
    kept = books.opt_out.without(data(["a", "b", "c"]))
    assert kept.patient_ids == ("a", "b", "c")
    books.opt_out.add(("b",), "2026-11-25")
    kept = books.opt_out.without(data(["a", "b", "c"]))
    assert kept.patient_ids == ("a", "c")
    assert kept.inputs.ravel().tolist() == [0, 2]


def test_spelling_does_not_bring_a_patient_back(site: Path) -> None:
    books = open_books(site)
    books.opt_out.add(("  mrn-7 ", "00042"), "2026-11-25")
    assert books.opt_out.without(data(["MRN-7", "42", "x"])).patient_ids == ("x",)


def test_the_list_names_nobody(site: Path) -> None:
    assert command(site, "opt-out", "add", "MRN-KLMN-Smith") == 0
    file = site / "opt-out.json"
    # No part of it is a hexadecimal number, of which the file has 80 random digits.
    assert not any(part in file.read_text() for part in ("MRN", "KLMN", "Smith"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_commands(
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("p1\n\n p2 \n")
    assert command(site, "opt-out", "add", "p1", "--file", names) == 0
    assert command(site, "opt-out", "add", "p1") == 0
    assert "0 of 1 changed" in capsys.readouterr().out
    assert command(site, "opt-out", "list", "p2", "p3") == 0
    shown = capsys.readouterr().out
    assert "identifier 1: opted out" in shown
    assert "identifier 2: not on the list" in shown
    assert "p2" not in shown
    assert command(site, "opt-out", "list") == 0
    assert "2 patient(s) opted out" in capsys.readouterr().out
    assert command(site, "opt-out", "remove", "p1") == 0
    assert command(site, "opt-out", "add") == 2
    write_policy(site, rows_are_patients=True)
    assert command(site, "opt-out", "add", "p9") == 2
    assert "prepare it again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{}", "[]", "delete", "another key"])
def test_a_list_that_is_lost_stops_everything(site: Path, damage: str) -> None:
    books = open_books(site)
    books.opt_out.add(("p1",), "2026-11-25")
    file = site / "opt-out.json"
    if damage == "delete":
        file.unlink()
    elif damage == "another key":
        file.write_text(file.read_text().replace(books.key.check, "00" * 32))
    else:
        file.write_text(damage)
    with pytest.raises(PolicyError, match="nothing may run"):
        open_books(site).opt_out.without(data(["p1", "p2"]))


def test_where_everybody_opted_out_nothing_runs(site: Path) -> None:
    books = open_books(site)
    books.opt_out.add(("a", "b"), "2026-11-25")
    with pytest.raises(PolicyError, match="every patient"):
        books.opt_out.without(data(["a", "b"]))
