"""ledger and policy: looking after the two files that decide."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from client.commands_study import open_books
from client.config import SiteFolder
from client.ledger_export import check_export, export, heads_in_receipts
from client.policy import FILE_NAME, default_policy
from shared import plan as plans
from shared.command import Commands
from shared.errors import ConfigError, PolicyError


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    ledger = commands.add_parser("ledger", help="check or export the privacy ledger")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="was it changed?",
        description="Checks every line and signature. A ledger that was replaced by an older copy "
        "of itself is noticed only against what others hold: give receipts of past runs.",
    )
    verify.add_argument(
        "file", nargs="?", type=Path, help="an exported ledger (default: the site's own)"
    )
    verify.add_argument(
        "--fingerprint", metavar="F", help="of the site that exported (default: this site's)"
    )
    verify.add_argument(
        "--receipts",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="receipts.json of a past run, as another party kept it; may be repeated",
    )
    verify.add_argument(
        "--head", action="append", default=[], metavar="HEX", help="a head that was noted down"
    )
    verify.set_defaults(command=_verify)
    write = actions.add_parser("export", help="write it as text, without patients, for an auditor")
    write.add_argument("file", type=Path, help="a new file")
    write.set_defaults(command=_export, recorded="ledger export")

    policy = commands.add_parser("policy", help="begin or check policy.toml")
    actions = policy.add_subparsers(required=True, metavar="ACTION")
    begin = actions.add_parser("init", help="write the strict default; never over a file")
    begin.set_defaults(command=_policy_init, recorded="policy init")
    check = actions.add_parser("check", help="is it readable, and would a plan be allowed?")
    check.add_argument("plan", nargs="?", type=Path, help="a study plan, a TOML file")
    check.set_defaults(command=_policy_check)


def _verify(arguments: argparse.Namespace) -> int:
    heads = {f"the note {text}": _head(text) for text in arguments.head}
    if arguments.file is not None:
        return _verify_export(arguments, heads)
    with open_books(arguments) as (folder, config, books):
        public = folder.identity().public
        for file in arguments.receipts:
            for run, head in heads_in_receipts(file, config.name, public).items():
                heads[f"the receipt of run {run}"] = head
        count = books.ledger.verify()
        for holder, head in heads.items():
            books.ledger.require_head(head, holder)
        last = books.ledger.head
    _report(count, len(heads), last)
    return 0


def _verify_export(arguments: argparse.Namespace, heads: dict[str, bytes]) -> int:
    if arguments.receipts:
        raise ConfigError("--receipts is for the site's own ledger; give --head for an export.")
    expected = arguments.fingerprint or SiteFolder(arguments.site).identity().fingerprint
    count, known = check_export(arguments.file, expected)
    for holder, head in heads.items():
        if head not in known:
            raise PolicyError(f"the exported ledger lacks the state that {holder} names.")
    _report(count, len(heads), None)
    return 0


def _report(count: int, heads: int, last: bytes | None) -> None:
    print(f"{count} events, each chained to the one before and signed by this site.")
    print(
        f"{heads} head(s) held elsewhere are in the chain."
        if heads
        else "Not checked against any head held elsewhere: an older copy of the whole ledger "
        "would look the same. Give --receipts of past runs."
    )
    if last is not None:
        print(f"head {last.hex()}")


def _head(text: str) -> bytes:
    try:
        head = bytes.fromhex(text)
    except ValueError:
        head = b""
    if len(head) != 32:
        raise ConfigError(f"--head {text!r} is not 64 hex digits.")
    return head


def _export(arguments: argparse.Namespace) -> int:
    with open_books(arguments) as (folder, config, books):
        public = folder.identity().public
        count = export(books.ledger, arguments.file, site=config.name, public=public)
    print(f"{count} events written to {arguments.file}")
    return 0


def _policy_init(arguments: argparse.Namespace) -> int:
    path = arguments.site / FILE_NAME
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a policy is never overwritten.") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(default_policy())
    print(f"{path} allows nothing yet: put the sites' fingerprints into roster.")
    return 0


def _policy_check(arguments: argparse.Namespace) -> int:
    with open_books(arguments) as (_, _, books):
        limits = books.limits
        print(
            f"policy.toml is usable. Dataset {limits.name}: epsilon up to {limits.max_epsilon:g} "
            f"at delta {limits.max_delta:g}, {len(limits.roster)} sites in roster."
        )
        if arguments.plan is not None:
            plan = plans.load(arguments.plan)
            books.allow(plan)
            print(
                f"Plan {plan.name!r} is within every limit but the budget, which `approve` checks."
            )
    return 0
