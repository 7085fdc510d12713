"""fedward-server: the coordinator's side of a project."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from server import commands_project, commands_run
from shared.command import EXIT_CODES, folder_option, new_parser, run_command

_EPILOG = f"""\
examples:
  fedward-server project init heart --advertise fl.example.org:8443
  fedward-server project invite city-hospital      a file to send to the site
  fedward-server project approve request.json      once its fingerprint was read to you
  fedward-server project kit city-hospital         what to send back
  fedward-server project list                      who is in, until when
  fedward-server up                                run the server until Ctrl-C
  fedward-server run plan.toml                     a study, shown as it goes
  fedward-server run --resume                      go on after a crash
  fedward-server status                            processes, connected sites, runs

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(_parser(), argv, lambda line: print(line, file=sys.stderr))


def _parser() -> argparse.ArgumentParser:
    parser, commands = new_parser(
        "fedward-server",
        "The coordinator's side: who takes part, and the studies that they run. The "
        "server sees no update of any site; it cannot change what a site allows.",
        _EPILOG,
    )
    commands_project.add_commands(commands)
    commands_run.add_commands(commands)
    default = Path(os.environ.get("FEDWARD_PROJECT", "."))
    folder_option(parser, "--project", default, "the project's folder, with project.toml")
    return parser


if __name__ == "__main__":
    sys.exit(main())
