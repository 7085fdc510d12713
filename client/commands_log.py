"""log: what happened on this site, for its own people and for an auditor."""

from __future__ import annotations

import argparse
import datetime
import getpass
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from client.config import SiteFolder
from client.journal import Journal, check_export
from shared import plan as plans
from shared.command import Commands
from shared.errors import AuditError, ConfigError, FedwardError

POLL_S = 0.5


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    log = commands.add_parser(
        "log",
        help="what was asked, answered and refused here, what left, what it cost",
        description="Shows the site's journal: one line for each message of the server and each "
        "command that changed something. It holds nothing about any patient.",
    )
    log.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
    log.add_argument("--last", type=int, default=50, metavar="N", help="lines to show first (50)")
    log.add_argument("--json", action="store_true", help="one JSON object a line")
    log.set_defaults(command=_show)
    actions = log.add_subparsers(metavar="ACTION")
    verify = actions.add_parser("verify", help="was it changed?")
    verify.add_argument("file", nargs="?", type=Path, help="an exported journal (default: own)")
    verify.add_argument(
        "--fingerprint", metavar="F", help="of the site that exported (default: this site's)"
    )
    verify.add_argument(
        "--head", action="append", default=[], metavar="HEX", help="a head that was noted down"
    )
    verify.set_defaults(command=_verify)
    export = actions.add_parser("export", help="write it as text, for an auditor")
    export.add_argument("file", type=Path, help="a new file")
    export.set_defaults(command=_export, recorded="log export")


def record(arguments: argparse.Namespace, code: int, error: str) -> None:
    """Note in the journal how a command ended that changes something; never its words."""
    name = getattr(arguments, "recorded", "")
    if not name or not SiteFolder(arguments.site).identity_file.exists():
        return
    with _journal(arguments) as journal:
        if journal is not None:
            user, plan = getpass.getuser(), _plan(arguments)
            journal.command(name, user=user, plan=plan, exit_code=code, error=error)


def _plan(arguments: argparse.Namespace) -> str:
    """Hash of the plan that a command was about: its own, or that of the model it used."""
    if known := getattr(arguments, "plan_sha256", ""):
        return str(known)
    file = getattr(arguments, "plan", None)
    try:
        return plans.load(file).sha256 if file is not None else ""
    except FedwardError:
        return ""


@contextmanager
def _journal(arguments: argparse.Namespace) -> Iterator[Journal | None]:
    folder = SiteFolder(arguments.site)
    journal = folder.journal(folder.config(), folder.identity())
    if journal is None:
        yield None
        return
    with closing(journal):
        yield journal


@contextmanager
def _kept(arguments: argparse.Namespace) -> Iterator[Journal]:
    with _journal(arguments) as journal:
        if journal is None:
            raise ConfigError("this pretended hospital keeps no journal (site.toml: log).")
        yield journal


def _show(arguments: argparse.Namespace) -> int:
    with _kept(arguments) as journal:
        lines = list(journal.lines())
        seen = lines[-1]["number"] if lines else 0
        for line in lines[-max(0, arguments.last) :] if arguments.last > 0 else []:
            print(_text(line, arguments.json), flush=True)
        while arguments.follow:
            time.sleep(POLL_S)
            for line in journal.lines(seen):
                seen = line["number"]
                print(_text(line, arguments.json), flush=True)
    return 0


def _text(line: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(line, sort_keys=True)
    when = datetime.datetime.fromtimestamp(line["time"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"{when}  {_fields(line)}"


def _fields(line: dict[str, Any]) -> str:
    if line["kind"] == "message":
        what = f"{line['action']:<8} {line['run'] or '-':<28}"
        if line["outcome"] == "refused":
            return f"{what} REFUSED  {line['error']}"
        cost = ", ".join(
            f"{c['steps']} step(s) at noise {c['noise_multiplier']:.3g}" for c in line["cost"]
        )
        sent = f"{_bytes(line['bytes_in'])} in, {_bytes(line['bytes_out'])} out"
        return f"{what} answered {sent}, {line['seconds']:.1f} s{'; charged ' * bool(cost)}{cost}"
    if line["kind"] == "command":
        end = "done" if line["exit_code"] == 0 else f"ended with {line['exit_code']}"
        plan = f" plan {line['plan'][:16]}" if line["plan"] else ""
        return f"{line['user']} ran {line['command']}{plan}: {end} {line['error']}".rstrip()
    return f"policy.toml is now {line['sha256'][:16]}"


def _bytes(count: int) -> str:
    for unit, size in (("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.file is not None:
        expected = arguments.fingerprint or SiteFolder(arguments.site).identity().fingerprint
        count, heads = check_export(arguments.file, expected)
    else:
        with _kept(arguments) as journal:
            count, heads = journal.verify()
            last = [chain for _, _, chain, _ in journal.rows()][-1:]
        for chain in last:
            print(f"head {chain.hex()}")
    for text in arguments.head:
        if text.lower() not in {head.hex() for head in heads}:
            raise AuditError(
                f"the journal lacks the state {text[:16]}: it was replaced by an older copy, or "
                "cut. Compare it with the copy at the hospital's log collector."
            )
    print(f"{count} lines, each chained to the one before and signed by this site.")
    if not arguments.head:
        print("Lines cut off at the end are noticed only against a head that others kept: --head.")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    with _kept(arguments) as journal:
        count = journal.export(arguments.file, folder.config().name)
    print(f"{count} lines written to {arguments.file}")
    return 0
