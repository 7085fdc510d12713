"""Tables larger than memory: read in parts, the same records, patients and refusals."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_client_data_table import TASK as WHOLE

from client.data import columns
from client.data.mapped import Spool
from client.data.mapping import ColumnMapping, TableMapping
from client.data.prepared import read_prepared, write_prepared
from client.data.table import Reading, read_table
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
