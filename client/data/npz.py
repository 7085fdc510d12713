"""MedMNIST files (.npz) to a PatientDataset, without ever unpickling.

Source: Yang et al., "MedMNIST v2", Scientific Data 10:41, 2023: arrays {train,val,test}_images,
(n, [depth,] height, width) or with 3 channels, and {train,val,test}_labels, (n, 1). The files
name no patients, so each image counts as one. Arrays that were saved without compression (np.savez)
are read piece by piece, however large; packed ones must fit into memory.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import PatientDataset
from client.data.labels import class_of, refuse_unusable_labels
from client.data.mapped import IN_MEMORY, Spool, pieces_of, release
from client.data.table import Reading, ReadingNotes
from shared.config import require
from shared.errors import ConfigError
from shared.features import image_inputs
from shared.task_plan import ImagePlan, TaskPlan

Part = Literal["train", "val", "test"]


def read_npz(path: Path, task: TaskPlan, part: Part = "train") -> Reading:
    """Read one part of a MedMNIST file.

    Args:
        path: The .npz file.
        task: The plan's task with an image; `positive` is the number of the positive class.
        part: "train", "val" or "test".

    Raises:
        ConfigError: not such a file, or its arrays do not fit the plan; names file and array.
    """
    if task.image is None:
        raise ConfigError(f"{path} holds images, and the plan's task has a table of features.")
    require(path.is_file(), f"{path} does not exist. Check the path.")
    images = _array(path, f"{part}_images", "uf", (3, 4, 5))
    labels = _array(path, f"{part}_labels", "ui", (1, 2))
    labels = labels.reshape(-1) if labels.shape[1:] in ((), (1,)) else labels
    require(
        labels.ndim == 1 and len(labels) == len(images),
        f"{path}: array '{part}_labels' has shape {labels.shape}, and '{part}_images' has "
        f"{len(images)} images; one label each is needed. Give a file with one binary label.",
    )
    require(len(labels) > 0, f"{path}: part {part!r} has no images. Choose another file.")
    if task.kind == "binary":
        require(
            len(np.unique(labels)) <= 2,
            f"{path}: array '{part}_labels' has {len(np.unique(labels))} classes; the task is "
            "binary. Give a file with two classes, or a task of kind 'multiclass'.",
        )
    require(
        task.kind in ("binary", "multiclass"),
        f"{path} holds classes, and the plan's task is of kind {task.kind!r}.",
    )
    codes = np.array([class_of(task, text) for text in labels.astype(str)], dtype=np.int64)
    refuse_unusable_labels(path, f"{part}_labels", codes, task, allow_one_class=False)
    try:
        inputs = _inputs(task.image, images)
    except ConfigError as error:
        raise ConfigError(f"{path}: array '{part}_images': {error}.") from None
    ids = tuple(f"{part}-{row + 1}" for row in range(len(labels)))
    data = PatientDataset(inputs, codes, np.arange(len(labels)), ids)
    return Reading(data, ReadingNotes(len(labels)))


def _inputs(image: ImagePlan, images: NDArray[np.generic]) -> NDArray[np.float32]:
    spool = Spool()
    for piece in pieces_of(len(images), images.shape[1:]):
        spool.add(image_inputs(image, images[piece]))
        release(images)
    return spool.array()


def _mapped(path: Path, name: str) -> NDArray[np.generic] | None:
    """An array that lies in the file as it is in memory; None where it is packed or small."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size <= IN_MEMORY:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # the local header's lengths of name and extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, by_column, kind = read_header(file)
        if by_column or kind.hasobject:
            return None
        return np.memmap(path, kind, "c", offset=file.tell(), shape=shape)


def _array(path: Path, name: str, kinds: str, dimensions: tuple[int, ...]) -> NDArray[np.generic]:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile
        with np.load(path, allow_pickle=False) as archive:
            require(
                name in archive.files,
                f"{path} has no array {name!r}. Give a MedMNIST file: it holds "
                "{train,val,test}_images and {train,val,test}_labels.",
            )
            mapped = _mapped(path, name)
            array: NDArray[np.generic] = archive[name] if mapped is None else mapped
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        raise ConfigError(
            f"{path} is not an .npz file of plain arrays, or array {name!r} in it is damaged or "
            "holds Python objects, which are never loaded. Fetch the file again."
        ) from None
    require(
        array.dtype.kind in kinds and array.ndim in dimensions,
        f"{path}: array {name!r} has type {array.dtype} and shape {array.shape}; it needs "
        f"{' or '.join(map(str, dimensions))} dimensions of "
        f"{'whole numbers' if 'i' in kinds else 'unsigned or real numbers'}.",
    )
    for piece in pieces_of(len(array), array.shape[1:]) if array.dtype.kind == "f" else ():
        finite = np.isfinite(array[piece]).all(axis=tuple(range(1, array.ndim)))
        require(
            bool(finite.all()),
            f"{path}: array {name!r} holds a value that is not finite in entry "
            f"{piece.start + int(finite.argmin()) + 1}. Leave it out, or export it again.",
        )
        release(array)
    return array
