"""predict: a released model on this hospital's own patients."""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from client.config import SiteFolder
from shared.command import Commands
from shared.config import require
from shared.files import whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from client.data.unlabelled import Unlabelled
    from shared.released import ReleasedModel


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    predict = commands.add_parser(
        "predict",
        help="use a released model on this hospital's patients",
        description="Reads a table by the mapping in site.toml, or images or scans, no label "
        "needed, and writes what the model says of each row or record. Nothing leaves this "
        "machine, and nothing is charged: a model is used here, not trained. It supports a "
        "decision and makes none.",
    )
    model_arguments(predict)
    predict.add_argument("file", type=Path, help="a table, an image, a scan or a folder of them")
    predict.add_argument("--out", type=Path, help="a CSV file (default: standard output)")
    predict.set_defaults(command=_predict, recorded="predict")


def model_arguments(command: argparse.ArgumentParser) -> None:
    """A command's model, as `model_of` reads it."""
    command.add_argument("model", type=Path, help="the folder with model.safetensors")
    command.add_argument(
        "--as-released", action="store_true", help="even where this site has its own version"
    )


def model_of(arguments: argparse.Namespace) -> tuple[ReleasedModel, bool]:
    """The model to ask, and whether it is this site's own; the journal gets its plan's hash.

    Raises:
        ConfigError: there is none to ask, or the file of --out exists already.
    """
    from client.own_model import usable  # noqa: PLC0415  # torch takes seconds
    from shared.released import read_model  # noqa: PLC0415

    model, out = read_model(arguments.model), arguments.out
    arguments.plan_sha256 = model.plan.sha256
    require(not out or not out.exists(), f"{out} exists already. Give another file with --out.")
    return usable(SiteFolder(arguments.site), model, as_released=arguments.as_released)


def new_records(folder: SiteFolder, model: ReleasedModel, file: Path) -> Unlabelled:
    """What a command was given to ask the model about; what was left out is said on stderr."""
    from client.data.unlabelled import read_unlabelled  # noqa: PLC0415

    found = read_unlabelled(file, folder.config().source, model.plan.task)
    for line in found.notes.lines()[1:]:
        print(f"{file}: {line}", file=sys.stderr)
    return found


def _predict(arguments: argparse.Namespace) -> int:
    from client.data.unlabelled import read_rows  # noqa: PLC0415
    from client.prediction import outputs_in_pieces  # noqa: PLC0415
    from shared.answers import answer_names  # noqa: PLC0415
    from shared.released import answers  # noqa: PLC0415

    asked, own = model_of(arguments)
    if own:
        print("By this site's own version of the model (--as-released: not).", file=sys.stderr)
    folder, task = SiteFolder(arguments.site), asked.plan.task
    if task.image is None:
        pieces = read_rows(arguments.file, folder.config().source, task)
    else:
        pieces = new_records(folder, asked, arguments.file).pieces()
    said = outputs_in_pieces(asked, pieces)
    lines = ((names, answers(task, outputs)) for outputs, names in said)
    # Whatever stops the reading stops it before a line is seen.
    if arguments.out is None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
            _write(file, answer_names(task), lines)
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout)
        return 0
    with whole_file(arguments.out) as file:
        count = _write(file, answer_names(task), lines)
    print(f"{count} rows written to {arguments.out}; it names patients, keep it here.")
    return 0


def _write(
    file: IO[str],
    names: Sequence[str],
    said: Iterable[tuple[Sequence[str], Mapping[str, NDArray[np.float64]]]],
) -> int:
    """Write a line a record, piece by piece; return how many."""
    writer, count = csv.writer(file), 0
    writer.writerow(["patient", *names])
    for patients, columns in said:
        rows = zip(patients, *columns.values(), strict=True)
        writer.writerows([name, *(f"{value:.6g}" for value in values)] for name, *values in rows)
        count += len(patients)
    return count
