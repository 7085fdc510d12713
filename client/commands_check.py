"""check, it-sheet: is this site ready, and what its IT has to allow."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path

from client import preflight
from client.config import SiteFolder
from client.connections import connections, proxy_of, sheet
from client.preflight import Line, Surroundings
from shared import plan as plans
from shared.command import Commands
from shared.kit import address

_COLOURS = {"green": "\x1b[32m", "red": "\x1b[1;31m", "skipped": "\x1b[2m"}


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    check = commands.add_parser(
        "check",
        help="is this site ready? one line each, green or red with the remedy",
        description="Looks at keys, kit, versions, the way to the server, clock, GPU, disk, data, "
        "policy and budget. Counts of patients are shown on this terminal and nowhere else. Ends "
        "with 0 if nothing is red, else with the exit code of the first red line.",
    )
    check.add_argument("plan", type=Path, nargs="?", help="hold data and budget against this plan")
    check.add_argument("--json", action="store_true", help="for programs; without any count")
    check.add_argument("--timeout", type=float, default=10.0, metavar="S", help="default: 10")
    check.set_defaults(command=_check)
    it_sheet = commands.add_parser(
        "it-sheet", help="what the hospital's IT has to allow, to print or mail"
    )
    it_sheet.set_defaults(command=_it_sheet)


def _check(arguments: argparse.Namespace) -> int:
    plan = plans.load(arguments.plan) if arguments.plan else None
    around = Surroundings(time.time, dict(os.environ), arguments.timeout, _has_gpu)
    lines = []
    for line in preflight.check(SiteFolder(arguments.site), plan, around):
        lines.append(line)
        if not arguments.json:
            print(_text(line, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if arguments.json:
        keys = ("name", "state", "fact", "remedy")
        rows = [{key: getattr(line, key) for key in keys} for line in lines]
        ready = not preflight.exit_code(lines)
        print(json.dumps({"schema": "fedward-check/1", "ready": ready, "lines": rows}, indent=2))
    return preflight.exit_code(lines)


def _text(line: Line, *, colour: bool) -> str:
    word = f"{preflight.WORDS[line.state]:<4}"
    if colour:
        word = f"{_COLOURS[line.state]}{word}\x1b[0m"
    text = f"{word} {line.name:<9} {line.fact}"
    for extra in (line.private, f"-> {line.remedy}" if line.remedy else ""):
        text += "".join(f"\n{'':<15}{part}" for part in textwrap.wrap(extra, 84))
    return text


def _has_gpu() -> bool:
    import torch  # noqa: PLC0415  # takes seconds

    return torch.cuda.is_available()


def _it_sheet(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    config, kit = folder.config(), folder.kit()
    server = address(kit.server)
    rows = connections(server, proxy_of(config.network, dict(os.environ), server.host))
    print(sheet(config.name, kit.project, rows))
    return 0
