"""fedward-site: what this hospital allows, what it agrees to, what its patients have spent."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from client import (
    commands_check,
    commands_data,
    commands_enrol,
    commands_evidence,
    commands_explain,
    commands_export,
    commands_finetune,
    commands_ledger,
    commands_log,
    commands_model,
    commands_recover,
    commands_run,
    commands_study,
)
from shared.command import EXIT_CODES, folder_option, new_parser, run_command

_EPILOG = f"""\
from nothing to ready:
  fedward-site enrol city.invitation.json  make this site's keys, and a request to send
  fedward-site join city.kit.json          take the answer, and pin the other sites
  fedward-site check plan.toml             is everything ready? red lines say what to do
  fedward-site approve plan.toml           what a study would cost, then agree to it
  fedward-site up                          take part

at any time:
  fedward-site status                      does it run, and what was refused lately?
  fedward-site policy check plan.toml      would this plan be allowed?
  fedward-site finetune RUN --epsilon 1    let a released model learn from this site's patients
  fedward-site spent                       what the patients have spent so far, by study
  fedward-site ledger verify               was the ledger changed?
  fedward-site log --follow                what the server asks, what leaves, what it costs
  fedward-site evidence RUN FOLDER         this site's record of a run, for an auditor

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    return run_command(_parser(), argv, say, commands_log.record)


def _parser() -> argparse.ArgumentParser:
    parser, commands = new_parser(
        "fedward-site",
        "The hospital's side: its keys, its policy, its consent, its privacy ledger. "
        "No server can change any of it.",
        _EPILOG,
    )
    commands_enrol.add_commands(commands)
    commands_check.add_commands(commands)
    commands_data.add_commands(commands)
    commands_study.add_commands(commands)
    commands_ledger.add_commands(commands)
    commands_log.add_commands(commands)
    commands_evidence.add_commands(commands)
    commands_recover.add_commands(commands)
    commands_model.add_commands(commands)
    commands_finetune.add_commands(commands)
    commands_explain.add_commands(commands)
    commands_export.add_commands(commands)
    commands_run.add_commands(commands)
    default = Path(os.environ.get("FEDWARD_SITE", "~/fedward-site")).expanduser()
    folder_option(parser, "--site", default, "the site's folder, with site.toml")
    return parser


if __name__ == "__main__":
    sys.exit(main())
