"""What every command line of Fedward does alike: exit codes, errors, a bug's last words."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from shared.errors import ConfigError, FedwardError, ProtocolError

EXIT_CODES = """\
exit codes: 0 done; 2 usage or configuration; 3 refused by policy or budget; 4 protocol failure;
5 audit failed; 1 anything else (please report it)
"""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Say = Callable[[str], None]
Ended = Callable[[argparse.Namespace, int, str], None]


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    say: Say,
    ended: Ended = lambda arguments, code, error: None,
) -> int:
    """Parse, run `arguments.command(arguments)`, and turn errors into exit codes.

    Args:
        parser: Its commands set `command`; it has --debug.
        argv: The words; None takes the process's own.
        say: Writes a line for the user to stderr.
        ended: Told how a command ended: its code, and the class of its error.
    """
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="opacus")
    try:
        try:
            code = int(arguments.command(arguments))
        except FedwardError as error:
            ended(arguments, error.exit_code, type(error).__name__)
            raise
        ended(arguments, code, "")
        return code
    except FedwardError as error:
        _trace(arguments)
        say(f"{parser.prog}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"\n{parser.prog}: stopped.")
        return 130
    except BrokenPipeError:
        # The reader went away, as `| head` does; say nothing more, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        _trace(arguments)
        say(
            f"{parser.prog}: this is a bug: {type(error).__name__}: {error}. "
            "Run again with --debug and report the traceback."
        )
        return 1


def _trace(arguments: argparse.Namespace) -> None:
    if arguments.debug:
        traceback.print_exc()


def new_parser(
    prog: str, description: str, epilog: str
) -> tuple[argparse.ArgumentParser, Commands]:
    """A command line with --debug, to which each file of commands adds its own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser, parser.add_subparsers(required=True, metavar="COMMAND")


def folder_option(parser: argparse.ArgumentParser, flag: str, default: Path, what: str) -> None:
    """Let `flag DIR` stand before the command or after it, on every command of `parser`."""
    parser.add_argument(
        flag, type=Path, default=default, metavar="DIR", help=f"{what} (default: {default})"
    )
    for inner in _leaves(parser):
        inner.add_argument(
            flag, type=Path, default=argparse.SUPPRESS, metavar="DIR", help=argparse.SUPPRESS
        )


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Every command that does something by itself, however deep."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    inner = [choice for group in groups for choice in group.choices.values()]
    mine = [choice for choice in inner if choice.get_default("command") or not _leaves(choice)]
    return mine + [leaf for choice in inner for leaf in _leaves(choice)]


def heard(fingerprint: str, whose: str, given: str | None) -> None:
    """Make sure that a fingerprint was compared outside before it is relied upon.

    Args:
        fingerprint: Of the key in the file.
        whose: Who reads his own fingerprint over the telephone.
        given: The whole fingerprint as it was heard, from the command line; None asks for its last
            four characters.

    Raises:
        ProtocolError: what was heard is another one.
        ConfigError: nobody is there to ask.
    """
    if given is not None:
        if given.strip().lower() != fingerprint:
            raise ProtocolError(
                f"the file holds {fingerprint} for {whose}, and --fingerprint says {given}. If "
                f"{whose} read that to you over the telephone, the file was swapped on its way: "
                "do not use it."
            )
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            f"nobody is there to compare fingerprints. Call {whose}, and give what is read to you: "
            "--fingerprint F."
        )
    question = f"Call {whose}. Last four characters of the fingerprint that is read to you: "
    if input(question).strip().lower() != fingerprint[-4:]:
        raise ProtocolError(
            f"the fingerprints differ: the file does not come from {whose}. Nothing was changed."
        )
