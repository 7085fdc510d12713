"""How a hospital's columns and texts answer the plan's; written on the site, read there only."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import Texts
from shared.config import require
from shared.errors import ConfigError


@dataclass(frozen=True)
class ColumnMapping:
    """How one column of the plan is found and read in this hospital's file.

    Attributes:
        name: The plan's name of the feature or label.
        column: The file's name of it; empty where it is the same.
        missing: Texts that mean "missing" in this column, besides the table's own.
        values: Pairs [text in the file, text in the plan], for categories and labels.
        factor: From the file's unit to the plan's, such as 88.4 from mg/dL to micromol/L:
        offset: the plan's value is the file's times `factor` plus `offset`.
        since: Another column. Both hold dates, and the value is the years from that one to this
            one, such as an age at admission since birth.
        date_format: How both are written, in the letters of Python's strptime.
    """

    name: str
    column: str = ""
    missing: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    factor: float = 1.0
    offset: float = 0.0
    since: str = ""
    date_format: str = "%Y-%m-%d"

    def __post_init__(self) -> None:
        for i, pair in enumerate(self.values):
            require(
                len(pair) == 2,
                f"column {self.name!r}: values[{i}] must be a pair [text in file, text in plan]",
            )
        require(
            self.factor != 0, f"column {self.name!r}: factor is 0, which makes all values alike"
        )
        known = [pair[0] for pair in self.values]
        require(len(set(known)) == len(known), f"column {self.name!r}: values has a text twice")


@dataclass(frozen=True)
class TableMapping:
    """How this hospital's table answers the plan.

    Attributes:
        patient: The column with the patient's identifier. Privacy is counted by it.
        one_row_per_patient: Instead of `patient`: the hospital vouches that no patient has two.
        columns: Only the columns that need translation.
        header: Column names, for a file that has no header row.
        missing: Texts that mean "missing" in every column.
        drop_incomplete: Leave out rows with a missing label or a missing value that the plan
            refuses, instead of stopping.
        allow_one_class: Accept a file in which all patients have the same label.
    """

    patient: str = ""
    one_row_per_patient: bool = False
    columns: tuple[ColumnMapping, ...] = ()
    header: tuple[str, ...] = ()
    missing: tuple[str, ...] = ("", "NA", "NaN", "nan")
    delimiter: str = ","
    drop_incomplete: bool = False
    allow_one_class: bool = False

    def __post_init__(self) -> None:
        require(
            bool(self.patient) != self.one_row_per_patient,
            "name the patient column (patient = ...), or vouch with one_row_per_patient = true "
            "that no patient has two rows; not both",
        )
        require(len(self.delimiter) == 1, "delimiter must be one character")
        names = [c.name for c in self.columns]
        require(len(set(names)) == len(names), "columns has two entries with the same name")

    def of(self, name: str) -> ColumnMapping:
        """The mapping of the plan's column `name`; the identity where none is written."""
        return next((c for c in self.columns if c.name == name), ColumnMapping(name))


def translate(texts: Texts, column: ColumnMapping, missing: tuple[str, ...]) -> list[str | None]:
    """Each text in the plan's words, or None where it means "missing"."""
    pairs: dict[str, str | None] = dict.fromkeys((*missing, *column.missing))
    pairs |= {pair[0]: pair[1] for pair in column.values}
    if not any(plain(text).lstrip("-").isdigit() for text in pairs):
        return [pairs.get(text, text) for text in texts]
    return [pairs[t] if t in pairs else pairs.get(plain(t), t) for t in texts]


def leaves_numbers(column: ColumnMapping, missing: tuple[str, ...]) -> bool:
    """Whether a column stored as numbers may be read as such, for its texts mean nothing else."""
    pairs: dict[str, str | None] = dict.fromkeys((*missing, *column.missing))
    pairs |= {pair[0]: pair[1] for pair in column.values}
    absent = {text for text, meaning in pairs.items() if meaning is None}
    return {"", "nan"} <= absent and not any(_means_number(text) for text in pairs)


def _means_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def numbers_of(
    path: Path, texts: Sequence[str | None], column: str, first: int = 1
) -> NDArray[np.float64]:
    """Texts as numbers, NaN where missing; they begin at data row `first`.

    Raises:
        ConfigError: a text is no number; names file, column and data row.
    """
    values = np.array([math.nan if text is None else _number(text) for text in texts])
    refuse_infinite(path, values, column, first)
    return values


def refuse_infinite(path: Path, values: NDArray[np.float64], column: str, first: int) -> None:
    """ConfigError at the first value that stands for a text that is no number."""
    odd = np.isinf(values)
    require(
        not odd.any(),
        f"{path}: column {column!r} must hold numbers, but data row "
        f"{int(np.argmax(odd)) + first} has "
        "another text. Correct it (decimal point, no unit, no thousands separator), or name that "
        "text under missing in the mapping.",
    )


def _number(text: str) -> float:
    """The number that a text says, infinity where it says none."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(value) or "_" in text else value


def years_between(
    path: Path,
    begins: Texts,
    ends: Sequence[str | None],
    column: ColumnMapping,
    missing: set[str],
    *,
    start: int = 1,
) -> NDArray[np.float64]:
    """Years from one column of dates to another, NaN where either is missing.

    They begin at data row `start`.

    Raises:
        ConfigError: a text is no date in `column.date_format`; names file and data row.
    """
    years = []
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True), start=start):
        if end is None or begin in missing:
            years.append(math.nan)
            continue
        try:
            first, last = (datetime.datetime.strptime(t, column.date_format) for t in (begin, end))
        except ValueError:
            raise ConfigError(
                f"{path}: columns {column.since!r} and {column.column or column.name!r} must hold "
                f"dates written as {column.date_format!r}, but data row {row} has another text. "
                "Correct date_format in the mapping, or name that text under missing."
            ) from None
        years.append((last - first).days / 365.2425)
    return np.array(years)


def plain(text: str) -> str:
    """One spelling of a whole number: "1.0" and "01" become "1"; other texts stay."""
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() else text
