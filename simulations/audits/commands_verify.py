"""fedward-audit verify."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from shared.command import Commands
from shared.errors import AuditError, ConfigError
from shared.identity import fingerprint

AUDIT_FAILED = AuditError.exit_code

PROVES = """\
Proves, if plan and fingerprints are the right ones: which rounds there were, and that each sum is
over a set that at least the threshold of sites signed; that the published sums give the model; what
each site charged its patients, and that independent accountants price it alike; that server and
sites tell one history. Cannot prove: that a site's data and machine were sound, that noise was
really drawn (probes test that on the installed code), or the times and sizes in results.json."""


def add_commands(commands: Commands) -> None:
    """Add verify."""
    verify = commands.add_parser(
        "verify",
        help="check a run directory, or one site's export, offline",
        description="Check every hash, signature, threshold and charge of a run, from the files "
        "alone. Any altered byte is found, and its file named.",
        epilog=PROVES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("path", type=Path, help="a run directory, or a folder that a site exported")
    add_expected(verify)
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify.set_defaults(command=_verify)


def add_expected(command: argparse.ArgumentParser) -> None:
    """The options that say what the auditor knows from elsewhere."""
    known = command.add_argument_group(
        "what you know from elsewhere", "without it the records are checked against themselves"
    )
    known.add_argument("--plan", type=Path, metavar="FILE", help="the plan that was approved, TOML")
    known.add_argument("--plan-sha256", metavar="HEX", help="or its hash")
    known.add_argument(
        "--roster", type=Path, metavar="FILE", help="a roster.json that you trust: names and keys"
    )
    known.add_argument(
        "--fingerprint",
        action="append",
        default=[],
        metavar="SITE=FINGERPRINT",
        help="a site's fingerprint, as it was read over the telephone; may be repeated",
    )
    known.add_argument(
        "--coordinator", default="", metavar="FINGERPRINT", help="the coordinator's, likewise"
    )


def expected_fingerprints(arguments: argparse.Namespace) -> dict[str, str]:
    """Site name -> fingerprint, from the command line."""
    known: dict[str, str] = {}
    if arguments.roster is not None:
        known |= _roster(arguments.roster)
    for text in arguments.fingerprint:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--fingerprint {text!r} is not SITE=FINGERPRINT.")
        known[name] = value
    return known


def _roster(path: Path) -> Mapping[str, str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): fingerprint(bytes.fromhex(key)) for name, key in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        raise ConfigError(f"{path} is missing or not a table of names and hex keys.") from None


def _verify(arguments: argparse.Namespace) -> int:
    from simulations.audits.shown import as_json, print_findings, summary  # noqa: PLC0415
    from simulations.audits.steps import Steps  # noqa: PLC0415
    from simulations.audits.verify import read_expected, verify  # noqa: PLC0415  # torch: seconds

    known = expected_fingerprints(arguments)
    expected = read_expected(arguments.plan, known, arguments.plan_sha256, arguments.coordinator)
    steps = Steps(sys.stderr)
    found = verify(arguments.path, expected, steps.say)
    steps.finish()
    if arguments.json:
        print(as_json(found.findings, path=str(arguments.path), unsigned=found.unsigned))
    else:
        print_findings(found.findings)
        print(f"\n{summary(found.findings)}\n\n{PROVES}")
    return AUDIT_FAILED if found.violated else 0
