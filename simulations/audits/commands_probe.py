"""fedward-audit implementation, neighbour, one-run, ...: one family of probes each."""

from __future__ import annotations

import argparse
import sys

from shared.command import Commands
from simulations.audits.commands_verify import AUDIT_FAILED
from simulations.audits.family_names import families


def add_commands(commands: Commands) -> None:
    """Add one command a family."""
    for name, question in families().items():
        command = commands.add_parser(
            name.replace("_", "-"),
            help=question,
            description=question[:1].upper() + question[1:],
        )
        command.add_argument("target", help="a run directory, a plan (TOML), or a scenario's name")
        command.add_argument("--data", metavar="FOLDER", help="where the scenario's data files lie")
        add_options(command)
        command.add_argument("--json", action="store_true", help="print the findings as JSON")
        command.set_defaults(command=_run, family=name)


def add_options(command: argparse.ArgumentParser) -> None:
    """How the probes run."""
    command.add_argument("--quick", action="store_true", help="fewer repetitions")
    command.add_argument(
        "--seed", type=int, metavar="N", help="repeat an audit (default: the system's randomness)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from simulations.audits.families import attack, target_of  # noqa: PLC0415  # torch: seconds
    from simulations.audits.finding import AuditOptions, violated  # noqa: PLC0415
    from simulations.audits.shown import as_json, print_findings, summary  # noqa: PLC0415
    from simulations.audits.steps import Steps  # noqa: PLC0415
    from simulations.run import fit_threads  # noqa: PLC0415

    target = target_of(arguments.target, arguments.data)
    fit_threads(target.plan)
    steps = Steps(sys.stderr)
    options = AuditOptions(arguments.seed, arguments.quick, steps.say)
    findings = attack(arguments.family, target, options)
    steps.finish()
    if arguments.json:
        print(as_json(findings, plan_sha256=target.plan.sha256))
    else:
        print_findings(findings)
        print(f"\n{summary(findings)}")
    return AUDIT_FAILED if violated(findings) else 0
