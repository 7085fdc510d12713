"""CSV and Parquet files as columns of text; what the texts mean is the caller's affair."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import require
from shared.errors import ConfigError

Texts = list[str]
"""One column as stripped text, one entry per data row."""


def read_columns(
    path: Path, wanted: Sequence[str], *, header: Sequence[str] = (), delimiter: str = ","
) -> dict[str, Texts]:
    """The wanted columns of a file as stripped text; a Parquet null becomes an empty text.

    Args:
        path: A .parquet file, or any other name for UTF-8 text.
        wanted: Column names; no other column is kept.
        header: Column names of a text file that has no header row.
        delimiter: Between the cells of a text file.

    Raises:
        ConfigError: the file is missing or malformed, or a column is absent or there twice.
    """
    require(path.exists(), f"{path} does not exist. Check the path.")
    require(path.is_file(), f"{path} is not a file. Give the CSV or Parquet file itself.")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, wanted)
    return _read_csv(path, wanted, header, delimiter)


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


def _read_csv(
    path: Path, wanted: Sequence[str], header: Sequence[str], delimiter: str
) -> dict[str, Texts]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = list(header) or [c.strip() for c in next(reader, [])]
            positions = {name: _position(path, header, name) for name in wanted}
            columns: dict[str, Texts] = {name: [] for name in wanted}
            for row, cells in enumerate((r for r in reader if r), start=1):
                if len(cells) != len(header):
                    raise ConfigError(
                        f"{path}: data row {row} has {len(cells)} cells, the header has "
                        f"{len(header)}. Check the delimiter ({delimiter!r}) and quoting."
                    )
                for name, position in positions.items():
                    columns[name].append(cells[position].strip())
            return columns
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Export it as UTF-8.") from None
    except (OSError, csv.Error):
        raise ConfigError(
            f"{path} cannot be read as text separated by {delimiter!r}. Check the "
            "file's permissions, quoting and delimiter."
        ) from None


def _read_parquet(path: Path, wanted: Sequence[str]) -> dict[str, Texts]:
    try:
        header = pq.read_schema(path).names
        for name in wanted:
            _position(path, header, name)
        table = pq.read_table(path, columns=sorted(set(wanted)))
    except (OSError, pa.ArrowException):
        raise ConfigError(
            f"{path} is not a readable Parquet file. Export it again, or give a CSV."
        ) from None
    return {name: [_text(v) for v in table.column(name).to_pylist()] for name in wanted}


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
