"""fedward-audit: why is the claimed epsilon to be believed, and what happens to who attacks?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shared.command import new_parser, run_command
from simulations.audits import commands_log, commands_probe, commands_report, commands_verify

_EPILOG = """\
examples:
  fedward-audit verify RUN --plan plan.toml --roster roster.json
  fedward-audit report RUN --quick              verify and attack; writes audit.json and audit.html
  fedward-audit show RUN/audit.json --auditor KEY
  fedward-audit implementation breast_cancer    one family of probes, on a scenario or a plan
  fedward-audit log prove RUN 17 proof.json     show one round without the others

An audit can refute a claim, never prove it: verdicts are "violated", "not refuted" and
"not testable".

exit codes: 0 nothing was refuted; 2 usage or configuration; 5 a claim did not hold; 1 a bug
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), argv, lambda line: print(line, file=sys.stderr))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top, commands = new_parser(
        "fedward-audit",
        "Verify offline what left each hospital and what it cost; attack the system, "
        "and show what the attacks reach.",
        _EPILOG,
    )
    commands_verify.add_commands(commands)
    commands_report.add_commands(commands)
    commands_probe.add_commands(commands)
    commands_log.add_commands(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
