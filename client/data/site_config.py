"""The [source] table of site.toml: where this hospital's data lies and how it answers the plan.

It is written by the hospital's engineer, read on the site only, and never sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from client.data.images import ImageMapping
from client.data.mapping import TableMapping
from client.data.scans import ScanMapping
from shared.config import require
from shared.task_plan import TaskPlan

if TYPE_CHECKING:
    from client.data.table import Reading


@dataclass(frozen=True)
class SourceConfig:
    """Where this hospital's own files lie, and how they answer a plan.

    Attributes:
        kind: "table" (CSV or Parquet), "image-folder", "dicom", "nifti" or "npz".
        path: The file or folder; relative to site.toml.
        test_fraction: Share of the patients kept out of training, to test on; on average, since
            each patient's keyed hash decides, and stays where it is as the file grows.
        test_seed: Which patients those are.
        table: Required for a table, valid there only.
        images: For an image folder, valid there only.
        scans: For DICOM and NIfTI, valid there only.
    """

    kind: Literal["table", "image-folder", "dicom", "nifti", "npz"]
    path: str
    test_fraction: float = 0.2
    test_seed: int = 0
    table: TableMapping | None = None
    images: ImageMapping = field(default_factory=ImageMapping)
    scans: ScanMapping = field(default_factory=ScanMapping)

    def __post_init__(self) -> None:
        require(bool(self.path), "path is empty; name the file or folder with the data")
        require(
            0 < self.test_fraction < 1,
            f"test_fraction is {self.test_fraction:g}; valid: between 0 and 1",
        )
        require(self.test_seed >= 0, "test_seed must be 0 or more")
        require(
            (self.kind == "table") == (self.table is not None),
            "kind 'table' needs a [source.table] that names the patient column, and only it",
        )
        require(
            self.kind == "image-folder" or self.images == ImageMapping(),
            f"[source.images] is for kind 'image-folder', and this one is {self.kind!r}",
        )
        require(
            self.kind in ("dicom", "nifti") or self.scans == ScanMapping(),
            f"[source.scans] is for kinds 'dicom' and 'nifti', and this one is {self.kind!r}",
        )

    @property
    def names_patients(self) -> bool:
        """Whether the mapping says which patient a record is of; else each record is its own."""
        if self.table is not None:
            return not self.table.one_row_per_patient
        if self.kind == "image-folder":
            return not self.images.one_image_per_patient
        return self.kind != "npz"


def read_source(config: SourceConfig, folder: Path, task: TaskPlan) -> Reading:
    """Read all records as the plan's inputs and labels.

    Args:
        config: From site.toml.
        folder: Of site.toml, where a relative path begins.
        task: Of the plan.

    Raises:
        ConfigError: the data does not fit the mapping or the plan.
    """
    # The readers' packages take time to import, and most commands read no data.
    path = folder / Path(config.path).expanduser()
    if config.table is not None:
        from client.data.table import read_table  # noqa: PLC0415

        return read_table(path, config.table, task)
    if config.kind == "image-folder":
        from client.data.images import read_image_folder  # noqa: PLC0415

        return read_image_folder(path, config.images, task)
    if config.kind == "dicom":
        from client.data.dicom import read_dicom_folder  # noqa: PLC0415

        return read_dicom_folder(path, config.scans, task)
    if config.kind == "nifti":
        from client.data.nifti import read_nifti_folder  # noqa: PLC0415

        return read_nifti_folder(path, config.scans, task)
    from client.data.npz import read_npz  # noqa: PLC0415

    return read_npz(path, task)
