"""fedward-audit log: the rounds' log (RFC 9162), without trust in who keeps it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.command import Commands
from shared.errors import AuditError, ConfigError, FedwardError, ProtocolError
from simulations.audits.commands_verify import (
    add_expected,
    expected_fingerprints,
)


def add_commands(commands: Commands) -> None:
    """Add log with its actions."""
    log = commands.add_parser(
        "log",
        help="the log of rounds: show it, prove one round, compare two copies",
        description="The rounds of a run form a Merkle log (RFC 9162). Every site signs its root "
        "in its receipt; k receipts over one root are a checkpoint with k co-signatures, so a log "
        "that was cut, or shown in two versions, is found.",
    )
    actions = log.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="rounds, root and who signed it")
    show.add_argument("path", type=Path, help="a run directory or a site's export")
    show.set_defaults(command=_show)
    prove = actions.add_parser("prove", help="write the proof that a round is in the log")
    prove.add_argument("path", type=Path, help="a run directory or a site's export")
    prove.add_argument("round", type=int, help="the round's number")
    prove.add_argument("file", type=Path, help="a new file, JSON")
    prove.set_defaults(command=_prove)
    check = actions.add_parser("check", help="check such a proof, with the proof alone")
    check.add_argument("file", type=Path, help="what `log prove` wrote")
    check.add_argument(
        "--cosigners", type=int, default=2, metavar="K", help="sites that must have signed (2)"
    )
    add_expected(check)
    check.set_defaults(command=_check)
    compare = actions.add_parser("compare", help="is the older copy the beginning of the newer?")
    compare.add_argument("old", type=Path, help="a run directory or export, kept earlier")
    compare.add_argument("new", type=Path, help="the same run, later")
    compare.set_defaults(command=_compare)


def _show(arguments: argparse.Namespace) -> int:
    from simulations.audits.roundlog import read_log  # noqa: PLC0415  # numpy and messages

    log = read_log(arguments.path)
    for number, text in log.rounds:
        print(f"  {number:>5}  {text}")
    print(f"{len(log.rounds)} rounds, root {log.root.hex()}")
    signers = ", ".join(sorted(log.cosigners)) or "nobody yet: the run is not over"
    print(f"signed in the receipts of: {signers}")
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    from simulations.audits.roundlog import prove, read_log  # noqa: PLC0415

    proof = prove(read_log(arguments.path), arguments.round)
    try:
        with arguments.file.open("x", encoding="utf-8") as file:
            file.write(json.dumps(proof, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{arguments.file}: {error.strerror}. Give a new file.") from None
    print(f"{arguments.file} shows round {arguments.round} alone, with its co-signatures")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from simulations.audits.roundlog import check_proof  # noqa: PLC0415

    known = expected_fingerprints(arguments)
    if not known:
        raise ConfigError("give --roster or --fingerprint: a proof is worth what its signers are.")
    try:
        proof: Any = json.loads(arguments.file.read_text(encoding="utf-8"))
        found = check_proof(proof, known, arguments.cosigners)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{arguments.file} is not a proof ({error}).") from None
    except ProtocolError as error:
        raise AuditError(str(error)) from None
    print(found)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from simulations.audits.roundlog import check_grown, read_log  # noqa: PLC0415

    try:
        print(check_grown(read_log(arguments.old), read_log(arguments.new)))
    except FedwardError as error:
        raise AuditError(str(error)) from None
    return 0
