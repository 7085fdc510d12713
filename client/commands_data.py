"""data, opt-out: this hospital's files, and the patients who do not want to take part."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from client.commands_study import open_books
from client.data.columns import read_header
from client.prepare import prepare, suggest
from shared import plan as plans
from shared.command import Commands
from shared.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    data = commands.add_parser("data", help="map and prepare this hospital's own files")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    mapping = actions.add_parser(
        "map",
        help="propose the lines of site.toml that map a table to a plan",
        description="Compares column names alone; no value is read. Paste the lines into "
        "site.toml, correct what is marked, then: fedward-site data prepare PLAN.",
    )
    mapping.add_argument("plan", type=Path)
    mapping.add_argument("file", type=Path, help="a CSV or Parquet file")
    mapping.add_argument("--delimiter", default=",", help="of a CSV (default: a comma)")
    mapping.set_defaults(command=_map)
    prepared = actions.add_parser(
        "prepare", help="read the files as a plan wants them; again after they changed"
    )
    prepared.add_argument("plan", type=Path)
    prepared.set_defaults(command=_prepare, recorded="data prepare")

    opt_out = commands.add_parser(
        "opt-out",
        help="patients who do not want to take part",
        description="Takes effect from the next round: such a patient is neither trained on nor "
        "counted. The list holds keyed hashes, no identifiers.",
    )
    actions = opt_out.add_subparsers(required=True, metavar="ACTION")
    for name, text in (
        ("add", "from the next round on they are in no sum"),
        ("remove", "they agreed again"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("patient", nargs="*", help="identifiers as in the data")
        action.add_argument(
            "--file", type=Path, help='one identifier a line; "-" reads them from standard input'
        )
        action.set_defaults(command=_change, recorded=f"opt-out {name}", change=name)
    listing = actions.add_parser("list", help="how many, since when; is a patient on it?")
    listing.add_argument("patient", nargs="*", help="say for these whether they are on it")
    listing.set_defaults(command=_list)


def _map(arguments: argparse.Namespace) -> int:
    plan = plans.load(arguments.plan)
    header = read_header(arguments.file, delimiter=arguments.delimiter)
    print(suggest(plan, arguments.file, header))
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    plan = plans.load(arguments.plan)
    with open_books(arguments) as (folder, config, books):
        for line in prepare(folder, config, plan, books.key).lines():
            print(line)
    print(f"\nWritten to {folder.data_file(config, plan, 'train').parent}; it stays here.")
    return 0


def _change(arguments: argparse.Namespace) -> int:
    patients = _patients(arguments)
    with open_books(arguments) as (_, _, books):
        if books.limits.rows_are_patients:
            raise ConfigError(
                "these data have no identifiers (policy.toml: rows_are_patients), so nobody can be "
                "recognised in them. Take the rows out of the source, and prepare it again."
            )
        if arguments.change == "add":
            today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
            count = books.opt_out.add(patients, today)
        else:
            count = books.opt_out.remove(patients)
    print(f"{count} of {len(patients)} changed. It takes effect from the next round.")
    return 0


def _patients(arguments: argparse.Namespace) -> tuple[str, ...]:
    texts = list(arguments.patient)
    if arguments.file is not None:
        try:
            text = sys.stdin.read() if str(arguments.file) == "-" else arguments.file.read_text()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{arguments.file} cannot be read as text.") from None
        texts += text.splitlines()
    patients = tuple(text.strip() for text in texts if text.strip())
    if not patients:
        raise ConfigError("no identifier was given. Name them, or give --file FILE.")
    return patients


def _list(arguments: argparse.Namespace) -> int:
    with open_books(arguments) as (_, _, books):
        entries = books.opt_out.read()
        for number, patient in enumerate(arguments.patient, start=1):
            found = books.opt_out.has(patient)
            print(f"identifier {number}: {'opted out' if found else 'not on the list'}")
    if arguments.patient:
        return 0
    days: dict[str, int] = {}
    for entry in entries:
        days[entry.since] = days.get(entry.since, 0) + 1
    print(f"{len(entries)} patient(s) opted out.")
    for day, count in sorted(days.items()):
        print(f"  {day}  {count}")
    return 0
