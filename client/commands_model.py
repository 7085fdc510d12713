"""predict: a released model on this hospital's own patients."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import IO

from client.config import SiteFolder
from client.data.table import read_inputs
from client.own_model import usable
from client.prediction import outputs_of
from shared.command import Commands
from shared.config import require
from shared.errors import ConfigError
from shared.released import answers, read_model


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    predict = commands.add_parser(
        "predict",
        help="use a released model on this hospital's patients",
        description="Reads a table by the mapping in site.toml, no label needed, and writes what "
        "the model says of each row. Nothing leaves this machine, and nothing is charged: a model "
        "is used here, not trained. It supports a decision and makes none.",
    )
    predict.add_argument("model", type=Path, help="the folder with model.safetensors")
    predict.add_argument("file", type=Path, help="a CSV or Parquet file")
    predict.add_argument("--out", type=Path, help="a CSV file (default: standard output)")
    predict.add_argument(
        "--as-released", action="store_true", help="even where this site has its own version"
    )
    predict.set_defaults(command=_predict, recorded="predict")


def _predict(arguments: argparse.Namespace) -> int:
    model = read_model(arguments.model)
    arguments.plan_sha256 = model.plan.sha256
    folder = SiteFolder(arguments.site)
    asked, own = usable(folder, model, as_released=arguments.as_released)
    if own:
        print("By this site's own version of the model (--as-released: not).", file=sys.stderr)
    source = folder.config().source
    require(
        not arguments.out or not arguments.out.exists(),
        f"{arguments.out} exists already. Give another file with --out.",
    )
    if source is None or source.table is None:
        raise ConfigError(
            "site.toml maps no table. Propose the lines with: fedward-site data map PLAN FILE."
        )
    inputs, patients = read_inputs(arguments.file, source.table, model.plan.task)
    columns = answers(model.plan.task, outputs_of(asked, inputs))
    rows = zip(patients, *columns.values(), strict=True)
    lines = [[name, *(f"{value:.6g}" for value in values)] for name, *values in rows]
    if arguments.out is None:
        _write(sys.stdout, ["patient", *columns], lines)
        return 0
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        arguments.out.chmod(0o600)
        _write(file, ["patient", *columns], lines)
    print(f"{len(lines)} rows written to {arguments.out}; it names patients, keep it here.")
    return 0


def _write(file: IO[str], head: list[str], lines: list[list[str]]) -> None:
    writer = csv.writer(file)
    writer.writerow(head)
    writer.writerows(lines)
