"""evidence: hand an auditor what this site saw of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from client.config import SiteFolder
from client.evidence import export_run
from shared.command import Commands


def add_commands(commands: Commands) -> None:
    """Add this file's command to fedward-site."""
    evidence = commands.add_parser(
        "evidence",
        help="export this site's record of a run, for an auditor",
        description="Write what this site saw of a run, signed by it: the rounds with everyone's "
        "signatures, the plan and the ledger. It holds no patient, no vector and no key. The "
        "auditor checks it with fedward-audit verify, alone or beside the others' in "
        "RUN/evidence/sites/NAME.",
    )
    evidence.add_argument("run", help="the run's id; see fedward-site spent")
    evidence.add_argument("folder", type=Path, help="a new folder")
    evidence.set_defaults(command=_export, recorded="evidence")


def _export(arguments: argparse.Namespace) -> int:
    count = export_run(SiteFolder(arguments.site), arguments.run, arguments.folder)
    print(f"{count} records written to {arguments.folder}")
    return 0
