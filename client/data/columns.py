"""CSV and Parquet files as columns of text; what the texts mean is the caller's affair.

Columns that a Parquet file stores as numbers may stay numbers: a text takes a microsecond a cell.

A file may be larger than memory: `read_parts` hands it over in runs of rows.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.config import require
from shared.errors import ConfigError

Texts = list[str]
"""One column as stripped text, one entry per data row."""


AT_ONCE = 1 << 19
"""Cells of a part that are in memory at once; a text is about 60 bytes, a number 8."""

BUFFER = 1 << 16
"""Bytes of each Parquet column that are fetched at once."""


@dataclass(frozen=True)
class Part:
    """A run of rows.

    Attributes:
        rows: How many.
        texts: Columns as text.
        numbers: Columns as float64, NaN where null or no number, for those that may be and that
            the file stores so. Such a column is not among the texts.
    """

    rows: int
    texts: Mapping[str, Texts]
    numbers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


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
        for name, texts in part.texts.items():
            columns[name] += texts
    return columns


def read_parts(
    path: Path,
    wanted: Sequence[str],
    *,
    header: Sequence[str] = (),
    delimiter: str = ",",
    beside: Sequence[str] = (),
    numbers: Collection[str] = (),
) -> Iterator[Part]:
    """The same as `read_columns` in runs of rows, of `AT_ONCE` cells each; none is empty.

    Args:
        numbers: Wanted columns that may come as numbers.
    """
    require(path.exists(), f"{path} does not exist. Check the path.")
    require(path.is_file(), f"{path} is not a file. Give the CSV or Parquet file itself.")
    names = list(dict.fromkeys(wanted))
    rows = max(1, AT_ONCE // max(1, len(names)))
    if path.suffix.lower() == ".parquet":
        return _parquet_parts(path, names, beside, rows, numbers)
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
) -> Iterator[Part]:
    row = 0
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
                    yield Part(rows, columns)
                    columns = {name: [] for name in wanted}
            if row % rows:
                yield Part(row % rows, columns)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Export it as UTF-8.") from None
    except (OSError, csv.Error):
        raise ConfigError(
            f"{path} cannot be read as text separated by {delimiter!r}. Check the "
            "file's permissions, quoting and delimiter."
        ) from None


def _parquet_parts(
    path: Path, wanted: Sequence[str], beside: Sequence[str], rows: int, numbers: Collection[str]
) -> Iterator[Part]:
    try:
        # Arrow fetches a whole row group otherwise, which may be the whole file.
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            for name in (*wanted, *beside):
                _position(path, file.schema_arrow.names, name)
            stored = {name for name in wanted if name in numbers and _is_number(file, name)}
            for batch in file.iter_batches(rows, columns=list(wanted)):
                found = {name: batch.column(name) for name in wanted}
                yield Part(
                    batch.num_rows,
                    {
                        name: [_text(v) for v in column.to_pylist()]
                        for name, column in found.items()
                        if name not in stored
                    },
                    {
                        name: found[name].to_numpy(zero_copy_only=False).astype(np.float64)
                        for name in stored
                    },
                )
    except (OSError, pa.ArrowException):
        raise ConfigError(
            f"{path} is not a readable Parquet file. Export it again, or give a CSV."
        ) from None


def _is_number(file: pq.ParquetFile, name: str) -> bool:
    kind = file.schema_arrow.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


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
