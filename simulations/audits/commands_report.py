"""fedward-audit report, show, release."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shared.command import Commands
from shared.errors import ConfigError, ProtocolError
from simulations.audits.commands_probe import add_options
from simulations.audits.commands_verify import (
    AUDIT_FAILED,
    add_expected,
    expected_fingerprints,
)
from simulations.audits.family_names import families

if TYPE_CHECKING:
    from simulations.audits.finding import Finding
    from simulations.audits.steps import Steps


def add_commands(commands: Commands) -> None:
    """Add report, show and release."""
    report = commands.add_parser(
        "report",
        help="verify a run, attack its plan, write audit.json (signed) and audit.html",
        description="Verify a run's evidence, run every family of probes on its plan, and write "
        "the result: audit.json, signed, and audit.html, which opens from disk.",
    )
    report.add_argument("run", type=Path, help="a run directory")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the run)")
    report.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help=f"the auditor's private key, PEM (default: {default_key()}, made at first use)",
    )
    report.add_argument(
        "--only",
        action="append",
        choices=[name.replace("_", "-") for name in families()],
        metavar="FAMILY",
        help="run these families alone; may be repeated",
    )
    add_options(report)
    add_expected(report)
    report.set_defaults(command=_report)

    show = commands.add_parser(
        "show",
        help="check an audit.json's signature, and print what it says",
        description="Check the signature of an audit.json under the auditor's key.",
    )
    show.add_argument("file", type=Path, help="an audit.json")
    show.add_argument("--auditor", required=True, metavar="KEY", help="public key, 64 hex digits")
    show.add_argument("--json", action="store_true", help="print the whole statement")
    show.set_defaults(command=_show)

    release = commands.add_parser(
        "release",
        help="export the model of a run whose plan asks for an audit first",
        description="Write model.safetensors and model.json of a run whose plan has [audit] gate "
        "= true, if its audit.json is signed by the plan's auditor, is of this very run, and "
        "nothing in it is violated.",
    )
    release.add_argument("run", type=Path, help="a run directory")
    release.set_defaults(command=_release)


def default_key() -> str:
    """Where the auditor's key lies unless --key says otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return f"{base}/fedward/auditor.pem"


def _report(arguments: argparse.Namespace) -> int:
    from server.results import write_text  # noqa: PLC0415  # torch and Flower take seconds
    from shared.statement import auditor_key, sign_statement  # noqa: PLC0415
    from simulations.audits import page  # noqa: PLC0415
    from simulations.audits.report import (  # noqa: PLC0415
        AUDIT_FILE,
        PAGE_FILE,
        Audit,
        audit_statement,
    )
    from simulations.audits.shown import print_findings, summary  # noqa: PLC0415
    from simulations.audits.steps import Steps  # noqa: PLC0415
    from simulations.audits.verify import read_expected, verify  # noqa: PLC0415

    if not (arguments.run / "evidence").is_dir():
        raise ConfigError(f"{arguments.run} is not a run directory: it has no evidence/.")
    key_file = (arguments.key or Path(default_key())).expanduser()
    auditor = auditor_key(key_file)
    expected = read_expected(
        arguments.plan,
        expected_fingerprints(arguments),
        arguments.plan_sha256,
        arguments.coordinator,
    )
    steps, started = Steps(sys.stderr), time.monotonic()
    verified = verify(arguments.run, expected, steps.within("evidence"))
    seconds = {"verify": time.monotonic() - started}
    findings = _attack(arguments, steps, seconds)
    steps.finish()
    extent = "partial" if arguments.only else "quick" if arguments.quick else "full"
    audit = Audit(arguments.run, verified, tuple(findings), extent, arguments.seed, seconds)
    statement = audit_statement(audit, datetime.datetime.now(datetime.UTC))
    out = arguments.out or arguments.run
    out.mkdir(parents=True, exist_ok=True)
    write_text(sign_statement(statement, key_file), out / AUDIT_FILE)
    write_text(page.render(statement), out / PAGE_FILE)
    print_findings(audit.all_findings)
    print(f"\n{summary(audit.all_findings)}")
    print(f"report:  {(out / PAGE_FILE).resolve()}")
    print(f"signed:  {(out / AUDIT_FILE).resolve()}")
    print(f"         by {auditor.public.hex()} ({auditor.fingerprint})")
    return AUDIT_FAILED if audit.verdict == "violated" else 0


def _attack(
    arguments: argparse.Namespace, steps: Steps, seconds: dict[str, float]
) -> list[Finding]:
    from simulations.audits.families import attack, target_of  # noqa: PLC0415
    from simulations.audits.finding import AuditOptions  # noqa: PLC0415
    from simulations.run import fit_threads  # noqa: PLC0415

    chosen = [name.replace("-", "_") for name in arguments.only or families()]
    findings: list[Finding] = []
    target = target_of(str(arguments.run))
    if target.plan.privacy.mode == "none":
        return findings
    fit_threads(target.plan)
    for place, name in enumerate(chosen):
        started = time.monotonic()

        def say(step: str, share: float, place: int = place, name: str = name) -> None:
            steps.say(f"{name.replace('_', '-')}: {step}", (place + share) / len(chosen))

        findings += attack(name, target, AuditOptions(arguments.seed, arguments.quick, say))
        seconds[name] = time.monotonic() - started
    return findings


def _show(arguments: argparse.Namespace) -> int:
    import json  # noqa: PLC0415

    from shared.statement import open_statement  # noqa: PLC0415

    try:
        text = arguments.file.read_text(encoding="utf-8")
        public = bytes.fromhex(arguments.auditor)
        record = open_statement(text, public)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{arguments.file} or --auditor is not readable ({error}).") from None
    except ProtocolError as error:
        print(f"fedward-audit: {arguments.file}: {error}", file=sys.stderr)
        return AUDIT_FAILED
    if arguments.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    found = record["predicate"]
    print(f"{found['verdict'].capitalize()}: plan {found.get('plan', {}).get('name', '?')}, "
          f"{found['extent']} audit of {found['time']} by {found['tool']['name']} "
          f"{found['tool']['version']}; the signature holds.")  # fmt: skip
    for family in found["families"]:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in family["counts"].items() if n)
        print(f"  {family['name']:<16} {counts}")
    return AUDIT_FAILED if found["verdict"] == "violated" else 0


def _release(arguments: argparse.Namespace) -> int:
    from server.gate import release_model  # noqa: PLC0415

    release_model(arguments.run)
    print(f"model:   {(arguments.run / 'model.safetensors').resolve()}")
    return 0
