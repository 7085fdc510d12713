"""TCGA-BRCA: overall survival with breast cancer in six regions, as FLamby prepared it.

Files: brca.csv (pid, 39 features, E = death seen, T = days) and sites.csv (pid, site, split).

Sources: The Cancer Genome Atlas Research Network; Liu et al., Cell 173, 2018; Ogier du Terrail et
al., "FLamby", NeurIPS 2022 Datasets and Benchmarks, appendix on Fed-TCGA-BRCA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.columns import read_columns
from client.data.dataset import PatientDataset
from client.data.mapping import ColumnMapping, TableMapping
from client.data.table import read_table
from shared.config import require
from shared.plan import StudyPlan

_MAPPING = TableMapping(
    patient="pid",
    columns=(ColumnMapping("E", values=(("1.0", "1"), ("0.0", "0"))),),
    allow_one_class=True,
)


def read_regions(
    folder: Path, plan: StudyPlan
) -> Iterator[tuple[str, PatientDataset, NDArray[np.bool_]]]:
    """Each site of the plan: its patients, and which of them FLamby tests on.

    Raises:
        ConfigError: the folder lacks a file, or knows no such region.
    """
    absent = [name for name in ("brca.csv", "sites.csv") if not (folder / name).is_file()]
    require(
        not absent,
        f"source 'tcga-brca' needs a folder with brca.csv and sites.csv; {', '.join(absent)} "
        f"is not in {folder}. Give it with --data FOLDER.",
    )
    whole = read_table(folder / "brca.csv", _MAPPING, plan.task).data
    table = read_columns(folder / "sites.csv", ["pid", "site", "split"])
    region = dict(zip(table["pid"], table["site"], strict=True))
    tested = dict(zip(table["pid"], table["split"], strict=True))
    for site in plan.cohort.sites:
        own = [i for i, pid in enumerate(whole.patient_ids) if _is(region.get(pid), site.name)]
        require(bool(own), f"{folder}/sites.csv knows no region {site.name!r}")
        data = whole.select(np.array(own))
        yield site.name, data, np.array([tested[pid] == "test" for pid in data.patient_ids])


def _is(region: str | None, site: str) -> bool:
    return region is not None and region.lower() == site
