"""From a hospital's own table to what training reads, by commands."""

from __future__ import annotations

import re
import stat
from contextlib import closing
from pathlib import Path

import pytest
from site_cases import make_site, open_books, study, trained, write_plan, write_policy

from client import commands_study, patients
from client.cli import main
from client.config import SiteFolder
from client.data.prepared import read_prepared
from client.preflight import Surroundings, check
from shared.plan import StudyPlan

SOURCE = """
[source]
kind = "table"
path = "ward.csv"
test_fraction = 0.25

[source.table]
patient = "MRN"
drop_incomplete = true

[[source.table.columns]]
name = "{label}"
column = "krank"
values = [["ja", "{positive}"], ["nein", "no"]]
"""


def command(site: Path, *words: object) -> int:
    return main(["--site", str(site), *map(str, words)])


@pytest.fixture
def plan() -> StudyPlan:
    return study()


@pytest.fixture
def site(tmp_path: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site whose data is a table with one record of most patients and two of some.

    Its key is fixed: with one key in 1,700 the test part is larger than the training part.
    """
    folder = make_site(tmp_path / "site")
    text = 'name = "site-0"\ndevice = "cpu"\n' + SOURCE.format(
        label=plan.task.label, positive=plan.task.positive
    )
    (folder / "site.toml").write_text(text)
    names = [f.name for f in plan.task.features]
    rows = [f"MRN,krank,{','.join(names)}"]
    for i in range(48):
        middle = [str((f.minimum or 0) + 0.01 * i) for f in plan.task.features]
        rows.append(f"P{i % 40:03},{'ja' if i % 40 < 20 else 'nein'},{','.join(middle)}")
    rows.append("P900,," + ",".join(["1"] * len(names)))
    (folder / "ward.csv").write_text("\n".join(rows))
    with monkeypatch.context() as fixed:
        fixed.setattr(patients.os, "urandom", lambda count: bytes([7] * count))
        open_books(folder).close()
    return folder


def test_the_own_table_becomes_two_parts_by_patient(
    site: Path, tmp_path: Path, plan: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_plan(plan, tmp_path / "plan.toml")
    assert command(site, "data", "prepare", file) == 0
    shown = capsys.readouterr().out
    assert "1 incomplete rows left out" in shown
    folder = SiteFolder(site)
    parts = {p: folder.data_file(folder.config(), plan, p) for p in ("train", "test")}
    train, test = (read_prepared(path) for path in parts.values())
    assert sorted(train.patient_ids + test.patient_ids) == [f"P{i:03}" for i in range(40)]
    assert 0 < len(test.patient_ids) < len(train.patient_ids)
    for part, data in (("train", train), ("test", test)):
        ill = sum(int(data.labels[rows].max()) for rows in data.records_of)
        assert f"{part:<6} {len(data.patient_ids)} patients, {ill} with the positive" in shown
    assert stat.S_IMODE(parts["train"].stat().st_mode) == 0o600
    assert command(site, "data", "prepare", file) == 0  # again after the source changed


def test_a_patient_stays_in_his_part_while_the_export_grows(
    site: Path, tmp_path: Path, plan: StudyPlan
) -> None:
    """Whoever was trained on must not be tested on later: the model would look too good."""
    file, folder = write_plan(plan, tmp_path / "plan.toml"), SiteFolder(site)

    def parts() -> list[set[str]]:
        assert command(site, "data", "prepare", file) == 0
        paths = [folder.data_file(folder.config(), plan, part) for part in ("train", "test")]
        return [set(read_prepared(path).patient_ids) for path in paths]

    train, test = parts()
    table = site / "ward.csv"
    header, *rows = table.read_text().splitlines()
    new = [row.replace("P0", "P5") for row in rows[:40]]
    # New patients come between the old, some of whom have left; and the order is another.
    table.write_text("\n".join([header, *new[::2], *rows[:4:-1], *new[1::2]]))
    later_train, later_test = parts()
    gone = {f"P{i:03}" for i in range(5)} & (train | test) - later_train - later_test
    assert later_train & (train | test) == train - gone
    assert later_test & (train | test) == test - gone
    assert len(later_train | later_test) > 70
    settings = site / "site.toml"
    settings.write_text(settings.read_text().replace("0.25", "0.4"))
    assert test - gone < parts()[1]  # a larger part takes in others, and gives nobody back


def test_plans_with_one_task_share_what_was_prepared(site: Path, plan: StudyPlan) -> None:
    folder, other = SiteFolder(site), study("other", training={"rounds": 3})
    config = folder.config()
    assert folder.data_file(config, plan, "train") == folder.data_file(config, other, "train")


def test_approving_prepares_by_itself(
    site: Path, tmp_path: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_study, "_sensitivity", lambda plan, config: 1.0)
    file = write_plan(plan, tmp_path / "plan.toml")
    lines = {line.name: line for line in check(SiteFolder(site), plan, Surroundings(lambda: 0, {}))}
    assert lines["data"].state == "red"
    assert "data prepare" in lines["data"].remedy
    assert command(site, "approve", file, "--yes") == 0
    lines = {line.name: line for line in check(SiteFolder(site), plan, Surroundings(lambda: 0, {}))}
    assert lines["data"].state == "green"
    assert re.search(r"\b[23]\d patients", lines["data"].private)
    assert "1 incomplete" in lines["data"].private


def test_a_table_without_a_patient_column_needs_the_policys_word(
    site: Path, plan: StudyPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engineer's word alone is not enough: row numbers are nobody the ledger could know."""
    settings = site / "site.toml"
    text = settings.read_text().replace('patient = "MRN"', "one_row_per_patient = true")
    settings.write_text(text)
    file = write_plan(plan, tmp_path / "plan.toml")
    assert command(site, "approve", file, "--yes") == 3
    assert "names no patient column" in capsys.readouterr().err
    write_policy(site, rows_are_patients=True)
    assert command(site, "approve", file, "--yes") == 0
    # All rows are charged as one: another file of the same dataset inherits it.
    with closing(open_books(site)) as books:
        cost = books.consider(study("next"), trained(books, ["row 7 of another file"]))
    assert cost.before > 0


def test_mapping_compares_names_alone(
    tmp_path: Path, plan: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "export.csv"
    first = plan.task.features[0].name
    table.write_text(f"Patient_ID,{first}x,{plan.task.label}\nSECRET-1,1,1\n")
    file = write_plan(plan, tmp_path / "plan.toml")
    assert main(["data", "map", str(file), str(table)]) == 0
    shown = capsys.readouterr().out
    assert 'patient = "Patient_ID"' in shown
    assert f'column = "{first}x"  # a guess' in shown
    assert f'name = "{plan.task.label}"' not in shown  # called alike
    assert "SECRET" not in shown
    assert main(["data", "map", str(file), str(tmp_path / "none.csv")]) == 2


def test_without_a_source_the_way_out_is_named(
    tmp_path: Path, plan: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site(tmp_path / "prepared")
    file = write_plan(plan, tmp_path / "plan.toml")
    assert command(site, "data", "prepare", file) == 2
    assert "data map" in capsys.readouterr().err
