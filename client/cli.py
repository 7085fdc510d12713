"""fedward-site: what this hospital allows, what it agrees to, what its patients have spent."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from client import commands_ledger, commands_study
from shared.errors import FedwardError

_EPILOG = """\
examples:
  fedward-site policy init                 write the strict default, then edit policy.toml
  fedward-site policy check plan.toml      would this plan be allowed?
  fedward-site approve plan.toml           what it would cost, then agree to it
  fedward-site spent                       what the patients have spent so far, by study
  fedward-site ledger verify               was the ledger changed?

exit codes: 0 done; 2 usage or configuration; 3 refused by policy or budget; 4 protocol failure;
5 audit failed; 1 anything else (please report it)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="opacus")
    try:
        return int(arguments.command(arguments))
    except FedwardError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"fedward-site: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nfedward-site: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(
            f"fedward-site: this is a bug: {type(error).__name__}: {error}. "
            "Run again with --debug and report the traceback.",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedward-site",
        description="The hospital's side: its policy, its consent, its privacy ledger. Nothing "
        "here talks to a server, and no server can change any of it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--site",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the site's folder, with site.toml (default: here)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands_study.add_commands(commands)
    commands_ledger.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
