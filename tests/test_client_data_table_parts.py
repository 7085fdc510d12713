"""Tables larger than memory: read in parts, the same records, patients and refusals."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_client_data_table import TASK as WHOLE

from client.data import columns
from client.data.dataset import PatientDataset
from client.data.mapped import Spool
from client.data.mapping import ColumnMapping, TableMapping
from client.data.prepared import read_prepared, write_prepared
from client.data.table import Reading, read_inputs, read_table
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, TaskPlan

ROWS = 23
TASK = replace(WHOLE, features=(*WHOLE.features, FeaturePlan("years", minimum=0, maximum=100)))
MAPPING = TableMapping(
    patient="MRN",
    columns=(ColumnMapping("years", "until", since="from", date_format="%Y-%m-%d"),),
)


def ward(**changes: dict[int, str]) -> dict[str, list[str]]:
    """A table's columns, with some cells changed: `column={data row: text}`."""
    random = np.random.default_rng(1)
    table = {
        "MRN": [f"P-{n}" for n in random.integers(0, 15, ROWS)],
        "age": [str(n) for n in random.integers(20, 130, ROWS)],
        "sex": ["fm"[n] for n in random.integers(0, 2, ROWS)],
        "crp": [["", "31.5"][n] for n in random.integers(0, 2, ROWS)],
        "from": ["1950-01-01"] * ROWS,
        "until": [f"20{n:02}-02-01" for n in random.integers(1, 25, ROWS)],
        "outcome": [["died", "lived"][n] for n in random.integers(0, 2, ROWS)],
    }
    for column, cells in changes.items():
        for row, text in cells.items():
            table[column][row - 1] = text
    return table


def written(folder: Path, name: str, table: dict[str, list[str]]) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table(table), path, row_group_size=7)
    else:
        lines = [",".join(table), *(",".join(cells) for cells in zip(*table.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at once, and nothing stays in memory."""
    monkeypatch.setattr(columns, "AT_ONCE", 5 * 6)
    monkeypatch.setattr(Spool.__init__, "__defaults__", (0,))


def same(a: Reading, b: Reading) -> None:
    for name in ("inputs", "labels", "patients"):
        np.testing.assert_array_equal(getattr(a.data, name), getattr(b.data, name))
    assert a.data.patient_ids == b.data.patient_ids
    assert a.notes == b.notes


@pytest.mark.parametrize("name", ["ward.csv", "ward.parquet"])
@pytest.mark.parametrize("gaps", [{}, {"age": {4: "", 17: "NA"}, "outcome": {9: ""}}])
def test_parts_make_the_same_dataset(
    name: str, gaps: dict[str, dict[int, str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mapping = replace(MAPPING, drop_incomplete=bool(gaps))
    path = written(tmp_path, name, ward(**gaps))
    whole = read_table(path, mapping, TASK)
    assert whole.notes.dropped == 3 * bool(gaps)
    assert not isinstance(whole.data.inputs, np.memmap)
    request.getfixturevalue("in_parts")
    parts = read_table(path, mapping, TASK)
    same(parts, whole)
    assert isinstance(parts.data.inputs, np.memmap)
    write_prepared(parts.data, tmp_path / "train.safetensors")
    again = read_prepared(tmp_path / "train.safetensors")
    np.testing.assert_array_equal(again.inputs, whole.data.inputs)


@pytest.mark.parametrize("name", ["ward.csv", "ward.parquet"])
@pytest.mark.parametrize(
    "bad",
    [
        {"age": {13: "old"}},
        {"age": {12: "", 19: ""}},
        {"sex": {18: "x"}},
        {"until": {22: "soon"}},
        {"MRN": {21: ""}},
        {"outcome": {3: "left", 20: "moved"}},
        {"age": dict.fromkeys(range(1, 15), "2000")},
    ],
)
def test_parts_are_refused_in_the_same_words(
    name: str, bad: dict[str, dict[int, str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, said = written(tmp_path, name, ward(**bad)), []
    for fixture in ("", "in_parts"):
        if fixture:
            request.getfixturevalue(fixture)
        with pytest.raises(ConfigError) as caught:
            read_table(path, MAPPING, TASK)
        said.append(str(caught.value))
    assert said[0] == said[1]
    first = min(next(iter(bad.values())))
    if len(bad.get("age", {})) < 10 and "outcome" not in bad:
        assert f"data row {first}" in said[0]


def test_a_parquet_table_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, names = 8_000, [f"x{i}" for i in range(10)]
    values = np.random.default_rng(1).uniform(0, 1, (rows, len(names)))
    table = {name: values[:, i] for i, name in enumerate(names)}
    table |= {"MRN": np.arange(rows), "y": np.arange(rows) % 2}
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table(table), path, row_group_size=500)
    task = TaskPlan("y", features=tuple(FeaturePlan(n, minimum=0, maximum=1) for n in names))
    monkeypatch.setattr(Spool.__init__, "__defaults__", (0,))
    peaks = []
    for at_once in (4_000, 1 << 19):
        monkeypatch.setattr(columns, "AT_ONCE", at_once)
        tracemalloc.start()
        read_table(path, TableMapping(patient="MRN"), task)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What stays is what is needed of each row: whose it is, and its label.
    assert peaks[0] < peaks[1] / 3


def test_a_row_costs_numbers_and_a_patient_a_name(tmp_path: Path) -> None:
    """Measured: 92 bytes a row; with an array a patient 152, with labels read as a whole 121."""
    task = TaskPlan("y", features=(FeaturePlan("x", minimum=0, maximum=1),))
    most = []
    for rows in (1_000, 5_000, 15_000):
        path = tmp_path / f"{rows}.csv"
        lines = [f"{row // 2},0.5,{['seen at home', 'seen here'][row % 2]}" for row in range(rows)]
        path.write_text("\n".join(["MRN,x,y", *lines]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(columns, "AT_ONCE", 400)
            patch.setattr(Spool.__init__, "__defaults__", (0,))
            tracemalloc.start()
            data = read_table(
                path, TableMapping(patient="MRN"), replace(task, positive="seen here")
            ).data
            assert len(data.records_of[0]) == 2
            data.select(np.arange(data.patient_count // 2))
            most.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert (most[2] - most[1]) / 10_000 < 106


NUMBERS = (FeaturePlan("a", minimum=-5, maximum=5), FeaturePlan("n", minimum=0, maximum=9))


def stored(folder: Path, changes: dict[str, list[object]]) -> tuple[Path, Path]:
    """Columns of numbers as Parquet stores them, and the same as texts."""
    random = np.random.default_rng(1)
    table: dict[str, list[object]] = {
        "MRN": [f"P-{n // 2}" for n in range(ROWS)],
        "a": random.normal(size=ROWS).astype(np.float32).astype(float).tolist(),
        "n": random.integers(0, 10, ROWS).tolist(),
        "y": [n % 2 for n in range(ROWS)],
    }
    table |= {name: [*cells, *table[name][len(cells) :]] for name, cells in changes.items()}
    types = {"MRN": pa.string(), "a": pa.float32(), "n": pa.int16(), "y": pa.int64()}
    arrays = {name: pa.array(cells, types[name]) for name, cells in table.items()}
    pq.write_table(pa.table(arrays), folder / "numbers.parquet")
    texts = {name: [columns._text(v) for v in array.to_pylist()] for name, array in arrays.items()}
    pq.write_table(pa.table(texts), folder / "texts.parquet")
    return folder / "numbers.parquet", folder / "texts.parquet"


@pytest.mark.parametrize(
    ("changes", "mapping"),
    [
        ({}, {}),
        ({"a": [None, 1.0, float("nan")], "n": [3, None]}, {}),
        ({"a": [None, float("nan")]}, {"missing": ("", "NA")}),  # "nan" is no number there
        ({"a": [None, 4.0]}, {"missing": ("nan",)}),
        ({"a": [2.0, float("inf")]}, {}),
        ({"n": [7, 8, 7]}, {"columns": (ColumnMapping("n", missing=("7",)),)}),
        ({"n": [7, 8]}, {"columns": (ColumnMapping("n", values=(("8.0", "1"),)),)}),
        ({"a": [2.0]}, {"columns": (ColumnMapping("a", "n", factor=0.5, offset=1),)}),
    ],
)
@pytest.mark.usefixtures("in_parts")
def test_numbers_that_stay_numbers_mean_what_their_texts_do(
    changes: dict[str, list[object]], mapping: dict[str, Any], tmp_path: Path
) -> None:
    task = TaskPlan("y", features=tuple(replace(f, missing="indicator") for f in NUMBERS))
    said = []
    for path in stored(tmp_path, changes):
        try:
            said.append(read_table(path, TableMapping(patient="MRN", **mapping), task))
        except ConfigError as error:
            said.append(str(error).replace(path.name, ""))
    if isinstance(said[0], str):
        assert said[0] == said[1]
        assert "data row" in said[0]
    else:
        same(*said)
    assert isinstance(said[0], str) == (
        mapping.get("missing") is not None or changes.get("a") == [2.0, float("inf")]
    )


def test_a_column_of_numbers_takes_no_text(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, {})
    part = next(columns.read_parts(path, ["MRN", "a", "n"], numbers=("a", "MRN")))
    assert (set(part.texts), set(part.numbers), part.rows) == ({"MRN", "n"}, {"a"}, ROWS)


@pytest.mark.parametrize("name", ["ward.csv", "ward.parquet"])
def test_parts_that_end_with_the_file_and_a_file_without_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, name, ward())
    monkeypatch.setattr(columns, "AT_ONCE", ROWS)
    whole = columns.read_columns(path, ["MRN", "age"])
    assert [part.rows for part in columns.read_parts(path, ["MRN"])] == [ROWS]
    monkeypatch.setattr(columns, "AT_ONCE", 1)
    assert [part.rows for part in columns.read_parts(path, ["MRN", "age"])] == [1] * ROWS
    assert columns.read_columns(path, ["MRN", "age"]) == whole
    read_table(path, MAPPING, TASK)
    empty = written(tmp_path, name, {column: [] for column in ward()})
    with pytest.raises(ConfigError, match="has no data rows"):
        read_table(empty, MAPPING, TASK)
    with pytest.raises(ConfigError, match="has no data rows"):
        list(read_inputs(empty, MAPPING, TASK))


def test_identifiers_leave_the_header_of_a_prepared_file_short(tmp_path: Path) -> None:
    """Safetensors reads no header above 100 MB."""
    ids = tuple(f"{n:036}" for n in range(1_000))
    data = PatientDataset(
        np.zeros((1_000, 1), np.float32), np.zeros(1_000, np.int64), np.arange(1_000), ids
    )
    path = tmp_path / "train.safetensors"
    write_prepared(data, path)
    assert int.from_bytes(path.read_bytes()[:8], "little") < 1_000
    assert read_prepared(path).patient_ids == ids


def test_one_row_group_as_large_as_the_file_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pandas writes up to a million rows."""
    names = [f"x{i}" for i in range(8)]
    values = np.random.default_rng(1).uniform(0, 1, (len(names), 100_000))
    path = tmp_path / "one.parquet"
    table = pa.table(dict(zip(names, values, strict=True)))
    pq.write_table(table, path, use_dictionary=False, data_page_size=1 << 14)
    assert pq.ParquetFile(path).num_row_groups == 1
    del table
    monkeypatch.setattr(columns, "AT_ONCE", 20_000)
    before, held = pa.total_allocated_bytes(), 0
    for _ in columns.read_parts(path, names):
        held = max(held, pa.total_allocated_bytes() - before)
    assert held < path.stat().st_size / 3
