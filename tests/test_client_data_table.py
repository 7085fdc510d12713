"""A hospital's table: what is read, and how each bad input is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client.data.mapping import ColumnMapping, TableMapping
from client.data.table import read_table
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, TaskPlan

TASK = TaskPlan(
    "outcome",
    positive="died",
    features=(
        FeaturePlan("age", minimum=0, maximum=100),
        FeaturePlan("sex", type="category", categories=("f", "m")),
        FeaturePlan("crp", minimum=0, maximum=200, missing="indicator"),
    ),
)
MAPPING = TableMapping(
    patient="MRN",
    columns=(
        ColumnMapping("age", "Alter"),
        ColumnMapping("sex", "Geschlecht", values=(("w", "f"), ("1", "f"), ("2", "m"))),
        ColumnMapping("crp", missing=("-9",)),
        ColumnMapping("outcome", values=(("1", "died"), ("0", "lived"))),
    ),
)
HEADER = "MRN,Alter,Geschlecht,crp,outcome\n"
GOOD = HEADER + "P-771,50,w,100,1\nP-442,100,m,-9,0\nP-771,60,1.0,,1\n"
SECRETS = ("P-771", "P-442", "SECRET")


def written(folder: Path, text: str, name: str = "ward.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, mapping: TableMapping = MAPPING, task: TaskPlan = TASK) -> str:
    """The message with which the text is refused: one paragraph that names the file, no secret."""
    with pytest.raises(ConfigError) as caught:
        read_table(written(folder, text), mapping, task)
    message = str(caught.value)
    assert "ward.csv" in message
    assert "\n" not in message
    assert not [secret for secret in SECRETS if secret in message]
    return message


def test_a_table_is_read_by_its_mapping(tmp_path: Path) -> None:
    reading = read_table(written(tmp_path, GOOD), MAPPING, TASK)
    expected = [[0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0.2, 1, 0, 0, 1]]
    np.testing.assert_allclose(reading.data.inputs, np.array(expected, np.float32), atol=1e-6)
    assert reading.data.labels.tolist() == [1, 0, 1]
    assert reading.data.patients.tolist() == [0, 1, 0]
    assert reading.data.patient_ids == ("P-771", "P-442")
    assert reading.notes.rows == 3


def test_a_missing_code_is_found_in_any_spelling(tmp_path: Path) -> None:
    text = HEADER + "a,50,w,-9.0,1\nb,60,m,-9,0\n"
    inputs = read_table(written(tmp_path, text), MAPPING, TASK).data.inputs
    assert inputs[:, -1].tolist() == [1, 1]


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    table = {
        "outcome": [1.0, 0.0, 1.0],
        "crp": [100.0, -9.0, None],
        "Geschlecht": ["w", "m", "1"],
        "Alter": [50, 100, 60],
        "MRN": ["P-771", "P-442", "P-771"],
        "unused": ["x", "y", "z"],
    }
    pq.write_table(pa.table(table), tmp_path / "ward.parquet")
    from_parquet = read_table(tmp_path / "ward.parquet", MAPPING, TASK).data
    from_csv = read_table(written(tmp_path, GOOD), MAPPING, TASK).data
    np.testing.assert_array_equal(from_parquet.inputs, from_csv.inputs)
    np.testing.assert_array_equal(from_parquet.labels, from_csv.labels)
    assert from_parquet.patient_ids == from_csv.patient_ids


def test_values_outside_the_range_are_clamped_and_counted(tmp_path: Path) -> None:
    text = HEADER + "a,130,f,100,1\nb,-5,m,300,0\nc,50,f,100,1\nd,50,m,100,0\n"
    reading = read_table(written(tmp_path, text), MAPPING, TASK)
    assert reading.data.inputs[:2, 0].tolist() == [1, -1]
    assert reading.notes.clamped == {"age": 2, "crp": 1}
    assert "age: 2 values outside the plan's plausible range were clamped" in reading.notes.lines()


def test_a_file_without_header_and_another_delimiter(tmp_path: Path) -> None:
    mapping = TableMapping(
        one_row_per_patient=True, header=("age", "sex", "crp", "outcome"), delimiter=";"
    )
    data = read_table(written(tmp_path, "50;f;3;died\n60;m;4;lived\n"), mapping, TASK).data
    assert data.patient_ids == ("1", "2")


def test_incomplete_rows_can_be_left_out(tmp_path: Path) -> None:
    mapping = TableMapping(patient="MRN", columns=MAPPING.columns, drop_incomplete=True)
    text = HEADER + "a,,w,1,1\nb,50,w,1,\nc,50,w,1,1\nd,60,m,,0\n"
    reading = read_table(written(tmp_path, text), mapping, TASK)
    assert reading.data.patient_ids == ("c", "d")  # crp may be missing: the plan has an indicator
    assert reading.notes.dropped == 2


def test_a_missing_label_column_offers_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD.replace("outcome", "outcomes"))
    assert "no column 'outcome'" in message
    assert "Did you mean 'outcomes'?" in message


def test_a_missing_patient_column(tmp_path: Path) -> None:
    assert "no column 'MRN'" in refused(tmp_path, GOOD.replace("MRN", "ID"))


def test_text_in_a_numeric_column(tmp_path: Path) -> None:
    for text in ("SECRET", "12,5 SECRET", "1_0", "inf", "1e999", "NAN"):
        bad = HEADER + f'P-771,50,w,1,1\nP-442,"{text}",m,1,0\n'
        message = refused(tmp_path, bad)
        assert "column 'Alter' must hold numbers" in message
        assert "data row 2" in message
        assert text not in message.replace("data row 2", "")


def test_an_unknown_category(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "P-3,50,SECRET,1,0\n")
    assert "column 'Geschlecht' has in data row 4" in message
    assert "f, m" in message


def test_one_class_only(tmp_path: Path) -> None:
    text = HEADER + "P-771,50,w,1,1\nP-442,60,m,1,1\n"
    assert "one class only" in refused(tmp_path, text)
    mapping = TableMapping(patient="MRN", columns=MAPPING.columns, allow_one_class=True)
    assert read_table(written(tmp_path, text), mapping, TASK).data.labels.tolist() == [1, 1]


def test_more_than_two_labels(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "P-3,50,w,1,SECRET\n")
    assert "column 'outcome' has 2 different labels besides 'died'" in message


def test_zero_rows(tmp_path: Path) -> None:
    assert "no data rows" in refused(tmp_path, HEADER)
    assert "no column" in refused(tmp_path, "")


def test_a_missing_value_that_the_plan_refuses(tmp_path: Path) -> None:
    message = refused(tmp_path, HEADER + "P-771,50,w,1,1\nP-442,,m,1,0\n")
    assert "column 'Alter' has 1 missing value(s), the first in data row 2" in message
    assert "drop_incomplete = true" in message


def test_a_missing_label_and_a_missing_patient(tmp_path: Path) -> None:
    label = refused(tmp_path, HEADER + "P-771,50,w,1,1\nP-442,50,m,1,\n")
    assert "column 'outcome' (the label) is missing in 1 row(s)" in label
    patient = refused(tmp_path, HEADER + "P-771,50,w,1,1\n,50,m,1,0\n")
    assert "column 'MRN'" in patient
    assert "data row 2" in patient


def test_a_ragged_row_and_bytes_that_are_not_text(tmp_path: Path) -> None:
    assert "data row 4 has 6 cells" in refused(tmp_path, GOOD + "P-442,50,w,1,0,SECRET\n")
    path = tmp_path / "ward.csv"
    path.write_bytes(HEADER.encode() + b"P-771,50,\xff,1,0\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_table(path, MAPPING, TASK)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    text = HEADER.replace("\n", ",Alter\n") + "P-771,50,w,1,1,51\n"
    assert "2 columns named 'Alter'" in refused(tmp_path, text)


def test_a_file_that_is_missing_or_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv does not exist"):
        read_table(tmp_path / "nowhere.csv", MAPPING, TASK)
    with pytest.raises(ConfigError, match="not a readable Parquet"):
        read_table(written(tmp_path, GOOD, "ward.parquet"), MAPPING, TASK)
    with pytest.raises(ConfigError, match="not a file"):
        read_table(tmp_path, MAPPING, TASK)


def test_a_mapping_that_the_plan_does_not_know(tmp_path: Path) -> None:
    mapping = TableMapping(patient="MRN", columns=(*MAPPING.columns, ColumnMapping("agee")))
    assert "'agee', which the plan does not have" in refused(tmp_path, GOOD, mapping)


def test_the_patient_must_be_settled() -> None:
    with pytest.raises(ConfigError, match="one_row_per_patient"):
        TableMapping()
    with pytest.raises(ConfigError, match="one_row_per_patient"):
        TableMapping(patient="MRN", one_row_per_patient=True)
