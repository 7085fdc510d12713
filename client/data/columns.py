"""CSV and Parquet files as columns of text; what the texts mean is the caller's affair.

A file may be larger than memory: `read_parts` hands it over in runs of rows.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import require
from shared.errors import ConfigError

Texts = list[str]
"""One column as stripped text, one entry per data row."""


AT_ONCE = 1 << 19
"""Texts of a part that are in memory at once; about 60 bytes each."""

BUFFER = 1 << 16
"""Bytes of each Parquet column that are fetched at once."""


def read_columns(
    path: Path,
    wanted: Sequence[str],
    *,
    header: Sequence[str] = (),
    delimiter: str = ",",
    beside: Sequence[str] = (),
) -> dict[str, Texts]:
    """The wanted columns of a file as stripped text; a Parquet null becomes an empty text.

    Args:
        path: A .parquet file, or any other name for UTF-8 text.
        wanted: Column names; no other column is kept.
        header: Column names of a text file that has no header row.
        delimiter: Between the cells of a text file.
        beside: Columns that must be there, too.

    Raises:
        ConfigError: the file is missing or malformed, or a column is absent or there twice.
    """
    columns: dict[str, Texts] = {name: [] for name in wanted}
    for part in read_parts(path, wanted, header=header, delimiter=delimiter, beside=beside):
        for name, texts in part.items():
            columns[name] += texts
    return columns


def read_parts(
    path: Path,
    wanted: Sequence[str],
    *,
    header: Sequence[str] = (),
    delimiter: str = ",",
    beside: Sequence[str] = (),
) -> Iterator[dict[str, Texts]]:
    """The same as `read_columns` in runs of rows, one after the other, of `AT_ONCE` texts each."""
    require(path.exists(), f"{path} does not exist. Check the path.")
    require(path.is_file(), f"{path} is not a file. Give the CSV or Parquet file itself.")
    names = list(dict.fromkeys(wanted))
    rows = max(1, AT_ONCE // max(1, len(names)))
    if path.suffix.lower() == ".parquet":
        return _parquet_parts(path, names, beside, rows)
    return _csv_parts(path, names, beside, rows, header=header, delimiter=delimiter)


def read_header(path: Path, *, delimiter: str = ",") -> tuple[str, ...]:
    """The column names of a CSV or Parquet file; no value is read.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    require(path.is_file(), f"{path} is not a file. Give the CSV or Parquet file itself.")
    try:
        if path.suffix.lower() == ".parquet":
            return tuple(pq.read_schema(path).names)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return tuple(c.strip() for c in next(csv.reader(stream, delimiter=delimiter), []))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException):
        raise ConfigError(f"{path} is not a readable CSV or Parquet file.") from None


def _csv_parts(
    path: Path,
    wanted: Sequence[str],
    beside: Sequence[str],
    rows: int,
    *,
    header: Sequence[str],
    delimiter: str,
) -> Iterator[dict[str, Texts]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = list(header) or [c.strip() for c in next(reader, [])]
            positions = {name: _position(path, header, name) for name in (*wanted, *beside)}
            columns: dict[str, Texts] = {name: [] for name in wanted}
            for row, cells in enumerate((r for r in reader if r), start=1):
                if len(cells) != len(header):
                    raise ConfigError(
                        f"{path}: data row {row} has {len(cells)} cells, the header has "
                        f"{len(header)}. Check the delimiter ({delimiter!r}) and quoting."
                    )
                for name, column in columns.items():
                    column.append(cells[positions[name]].strip())
                if row % rows == 0:
                    yield columns
                    columns = {name: [] for name in wanted}
            yield columns
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Export it as UTF-8.") from None
    except (OSError, csv.Error):
        raise ConfigError(
            f"{path} cannot be read as text separated by {delimiter!r}. Check the "
            "file's permissions, quoting and delimiter."
        ) from None


def _parquet_parts(
    path: Path, wanted: Sequence[str], beside: Sequence[str], rows: int
) -> Iterator[dict[str, Texts]]:
    try:
        # Arrow fetches a whole row group otherwise, which may be the whole file.
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            for name in (*wanted, *beside):
                _position(path, file.schema_arrow.names, name)
            for batch in file.iter_batches(rows, columns=list(wanted)):
                yield {name: [_text(v) for v in batch.column(name).to_pylist()] for name in wanted}
    except (OSError, pa.ArrowException):
        raise ConfigError(
            f"{path} is not a readable Parquet file. Export it again, or give a CSV."
        ) from None


def _text(value: object) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value).strip()


def _position(path: Path, header: Sequence[str], name: str) -> int:
    found = [i for i, column in enumerate(header) if column == name]
    if not found:
        close = difflib.get_close_matches(name, header, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{path} has no column {name!r}.{hint} Say in the mapping which column it is "
            f"(name = ..., column = ...), or export it."
        )
    require(len(found) == 1, f"{path} has {len(found)} columns named {name!r}. Rename one.")
    return found[0]
