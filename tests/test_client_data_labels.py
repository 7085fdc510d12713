"""Labels of each kind, units, and dates: what a hospital's table says in the plan's words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.data.labels import read_labels
from client.data.mapping import ColumnMapping, TableMapping
from client.data.split import split_by_patient
from client.data.table import read_table
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, TaskPlan
from shared.tasks import VALUE_STEPS

AGE = FeaturePlan("age", minimum=0, maximum=120)
CREATININE = FeaturePlan("creatinine", unit="umol/L", minimum=0, maximum=1000)
STAGE = TaskPlan("stage", kind="multiclass", classes=("0", "I", "II"), features=(AGE,))
DAYS = TaskPlan("stay", kind="regression", minimum=0, maximum=30, features=(AGE,))
DEATH = TaskPlan("died", positive="yes", kind="survival", time="days", intervals=(30, 90),
                 features=(AGE,))  # fmt: skip
ROWS = TableMapping(one_row_per_patient=True)
HERE = Path("ward.csv")


def test_classes_are_places_in_the_plans_list() -> None:
    mapping = TableMapping(
        one_row_per_patient=True,
        columns=(ColumnMapping("stage", "Stadium", values=(("zwei", "II"),)),),
    )
    codes = read_labels(HERE, {"stage": ["0.0", "zwei", "", "I"]}, STAGE, mapping)
    assert codes.tolist() == [0, 2, -1, 1]
    with pytest.raises(ConfigError, match=r"'Stadium' has in data row 2 .* classes: 0, I, II"):
        read_labels(HERE, {"stage": ["0", "IV"]}, STAGE, mapping)


def test_numbers_are_steps_of_the_public_range_and_clamped() -> None:
    codes = read_labels(HERE, {"stay": ["0", "15", "NA", "99", "-1"]}, DAYS, ROWS)
    assert codes.tolist() == [0, VALUE_STEPS // 2, -1, VALUE_STEPS, 0]
    with pytest.raises(ConfigError, match="'stay' must hold numbers, but data row 1"):
        read_labels(HERE, {"stay": ["long"]}, DAYS, ROWS)


def test_follow_up_ends_in_an_interval_with_or_without_the_event() -> None:
    columns = {
        "died": ["yes", "no", "yes", "no", "yes", "no", "yes", ""],
        "days": ["30", "30", "30.5", "90", "91", "5000", "", "3"],
    }
    codes = read_labels(HERE, columns, DEATH, ROWS)
    assert codes.tolist() == [1, 0, 3, 2, 4, 4, -1, -1]  # 4: alive past the grid
    with pytest.raises(ConfigError, match=r"'days' .* below 0 in data row 2"):
        read_labels(HERE, {"died": ["yes", "no"], "days": ["3", "-3"]}, DEATH, ROWS)
    with pytest.raises(ConfigError, match="needs the column 'days' beside the label"):
        read_labels(HERE, {"died": ["yes"]}, DEATH, ROWS)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_units_are_converted_and_a_forgotten_one_is_refused(tmp_path: Path) -> None:
    task = TaskPlan("ill", features=(CREATININE,))
    path = write(tmp_path / "lab.csv", "ill,krea\n0,0.8\n1,2.0\n0,1.1\n")
    column = ColumnMapping("creatinine", "krea", factor=88.42)
    data = read_table(path, TableMapping(one_row_per_patient=True, columns=(column,)), task).data
    np.testing.assert_allclose(data.inputs[:, 0], np.array([0.8, 2.0, 1.1]) * 88.42 / 500 - 1, 1e-5)
    # The same column a thousand times too large: nmol instead of umol.
    path = write(tmp_path / "nmol.csv", "ill,creatinine\n0,70736\n1,176840\n0,97262\n1,900\n")
    with pytest.raises(ConfigError, match=r"'creatinine': 3 of 4 values lie outside.*give factor"):
        read_table(path, ROWS, task)
    path = write(tmp_path / "one.csv", "ill,creatinine\n0,70\n1,176840\n0,97\n")
    assert read_table(path, ROWS, task).notes.clamped == {"creatinine": 1}


def test_dates_become_ages(tmp_path: Path) -> None:
    task = TaskPlan("ill", features=(AGE,))
    text = "ill,born,seen\n0,01.07.1950,01.07.2020\n1,29.02.2000,NA\n"
    path = write(tmp_path / "ward.csv", text)
    column = ColumnMapping("age", "seen", since="born", date_format="%d.%m.%Y")
    mapping = TableMapping(one_row_per_patient=True, columns=(column,), drop_incomplete=True,
                           allow_one_class=True)  # fmt: skip
    read = read_table(path, mapping, task)
    assert (read.data.inputs[:, 0] + 1) * 60 == pytest.approx([70.0], abs=0.01)
    assert read.notes.dropped == 1
    odd = ColumnMapping("age", "seen", since="born")
    with pytest.raises(
        ConfigError, match=r"'born' and 'seen' must hold dates.*data row 1"
    ) as caught:
        read_table(path, TableMapping(one_row_per_patient=True, columns=(odd,)), task)
    assert "1950" not in str(caught.value).replace(str(path), "")


def test_a_survival_table_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "ward.csv", "age,died,days\n50,yes,12\n60,no,400\n70,no,80\n")
    assert read_table(path, ROWS, DEATH).data.labels.tolist() == [1, 4, 2]
    path = write(tmp_path / "alive.csv", "age,died,days\n50,no,12\n60,no,400\n")
    with pytest.raises(ConfigError, match="one class only"):
        read_table(path, ROWS, DEATH)


def test_both_parts_of_a_split_span_the_same_range(tmp_path: Path) -> None:
    rows = "".join(f"{20 + i % 60},{i % 29}.{i}\n" for i in range(200))
    data = read_table(write(tmp_path / "ward.csv", f"age,stay\n{rows}"), ROWS, DAYS).data
    train, test = split_by_patient(data, 0.25, np.random.default_rng(1))
    assert (train.patient_count, test.patient_count) == (150, 50)
    quarters = np.quantile(data.labels, [0, 0.25, 0.5, 0.75, 1])
    shares = [np.histogram(part.labels, quarters)[0] / len(part.labels) for part in (train, test)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.08)
