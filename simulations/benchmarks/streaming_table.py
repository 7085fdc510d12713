"""The table that the streaming benchmark reads, written by a process of its own.

It imports neither torch nor the client, so that the process starts at once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS, ROW_GROUP = 60, 1 << 20


def write_table(path: Path, names: list[str], records: int, each: int) -> None:
    """Write normal measurements, in row groups as large as pandas makes them.

    Args:
        path: A new Parquet file.
        names: Of the measurements, beside columns `patient` and `y`.
        records: Rows.
        each: Rows a patient.
    """
    random = np.random.default_rng(1)
    schema = pa.schema(
        [("patient", pa.int64()), ("y", pa.int64()), *((name, pa.float64()) for name in names)]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, records, ROW_GROUP):
            rows = np.arange(start, min(start + ROW_GROUP, records))
            columns = [rows // each, rows // each % 2, *random.normal(size=(len(names), len(rows)))]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
