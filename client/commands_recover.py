"""recover: after a lost or stolen key, and after a restored snapshot."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from client import enrolment, recovery
from client.config import SiteFolder
from client.ledger_export import own_receipt
from shared import plan as plans
from shared.command import Commands, heard
from shared.files import read_bytes, replace_file
from shared.identity import fingerprint


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    recover = commands.add_parser(
        "recover",
        help="after a lost or stolen key, or a machine restored from a snapshot",
        description="What this site's patients have spent is never forgotten: a new identity goes "
        "on with the old ledger, and after a snapshot all that was open counts as spent.",
    )
    actions = recover.add_subparsers(required=True, metavar="ACTION")
    identity = actions.add_parser(
        "new-identity",
        help="enrol again under a new identity, with the old ledger",
        description="First the coordinator: fedward-server project revoke SITE, then project "
        "invite SITE. The other sites pin the new identity with roster trust.",
    )
    identity.add_argument("invitation", type=Path, help="the new one")
    identity.add_argument("--fingerprint", metavar="F", help="the coordinator's, as it was read")
    identity.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.request.json")
    identity.set_defaults(command=_new_identity, recorded="recover new-identity")
    snapshot = actions.add_parser(
        "snapshot",
        help="this machine was restored from an older copy",
        description="Every approved study that was not over counts as spent in full, and its runs "
        "do not go on: the same mask keys must never be used twice. Give receipts that others "
        "kept, so that studies after the snapshot are noticed.",
    )
    snapshot.add_argument(
        "--receipts",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="receipts.json of a past run, as another party kept it; may be repeated",
    )
    snapshot.add_argument(
        "--plan",
        action="append",
        default=[],
        type=Path,
        metavar="PLAN",
        help="a plan that was approved after the snapshot; may be repeated",
    )
    snapshot.set_defaults(command=_snapshot, recorded="recover snapshot")


def _new_identity(arguments: argparse.Namespace) -> int:
    folder, now = SiteFolder(arguments.site), time.time()
    data = read_bytes(arguments.invitation, "invitation")
    shown = fingerprint(enrolment.read_invitation(data, now).signer)
    print(f"Coordinator  {shown}\n")
    heard(shown, "the coordinator", arguments.fingerprint)
    aside = recovery.new_identity(folder, data, now)
    out = arguments.out or Path(f"{folder.config().name}.request.json")
    replace_file(out, read_bytes(folder.request_file, "request"), mode=0o644)
    print(
        f"The old identity and its runs are in {aside}; the ledger goes on under the new one.\n\n"
        f"Send {out} to the coordinator, and read this by telephone, to the other "
        f"hospitals as well:\n\n  {folder.identity().fingerprint}\n\n"
        "Put it into the roster of every hospital's policy.toml.\nNext: fedward-site join KIT"
    )
    return 0


def _snapshot(arguments: argparse.Namespace) -> int:
    folder, now = SiteFolder(arguments.site), time.time()
    config, public = folder.config(), folder.identity().public
    receipts = [own_receipt(file, config.name, public) for file in arguments.receipts]
    given = [plans.load(file) for file in arguments.plan]
    done = recovery.write_off(folder, config, receipts, given, now)
    for name, use, steps in done.steps:
        print(f"{name:<28} {steps} step(s) of {use} count as spent")
    if not done.steps:
        print("No study was open, so nothing was added to the ledger.")
    print(
        f"Runs that were open do not go on; their state is in {done.aside}.\n"
        "Compare what others hold: fedward-site ledger verify --receipts FILE\n"
        "Next: approve again what should still run."
    )
    return 0
