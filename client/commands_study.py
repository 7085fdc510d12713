"""approve, withdraw, spent: the officer's view of studies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from client.budget import Commitment, by_study, commitments, histories
from client.config import SiteConfig, SiteFolder
from client.consent import Books
from client.consent_sheet import sheet
from client.people import people_of
from client.policy import DatasetPolicy
from client.prepare import ensure_prepared
from shared import plan as plans
from shared.command import Commands
from shared.errors import ConfigError, PolicyError
from shared.plan import StudyPlan
from shared.privacy import epsilon_of_events, filtered_epsilon


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    approve = commands.add_parser(
        "approve",
        help="show what a plan would cost the patients, and agree to it",
        description="Shows what would be learnt, by whom, and epsilon after the study on top of "
        "what is spent; then asks. An approval reserves the whole cost and serves one run.",
    )
    approve.add_argument("plan", type=Path, help="the study plan, a TOML file")
    answer = approve.add_mutually_exclusive_group()
    answer.add_argument("--yes", action="store_true", help="agree without being asked")
    answer.add_argument("--show", action="store_true", help="show only; nothing is approved")
    approve.add_argument(
        "--no-guard", action="store_true", help="with --show: skip the sensitivity measurement"
    )
    approve.add_argument(
        "--leave-out-spent",
        action="store_true",
        help="let it run without patients whom it would bring beyond the cap",
    )
    approve.set_defaults(command=_approve, recorded="approve")

    withdraw = commands.add_parser("withdraw", help="take back every approval of a plan")
    withdraw.add_argument("plan", type=Path, help="the study plan, a TOML file")
    withdraw.set_defaults(command=_withdraw, recorded="withdraw")

    spent = commands.add_parser("spent", help="epsilon so far, by study, and what remains")
    spent.add_argument("dataset", nargs="?", help="as in policy.toml (default: the site's)")
    spent.set_defaults(command=_spent)


@contextmanager
def open_books(arguments: argparse.Namespace) -> Iterator[tuple[SiteFolder, SiteConfig, Books]]:
    """The books of the site that the command line names."""
    folder = SiteFolder(arguments.site)
    config = folder.config()
    with closing(folder.books(config, folder.identity())) as books:
        yield folder, config, books


def _approve(arguments: argparse.Namespace) -> int:
    plan = plans.load(arguments.plan)
    with open_books(arguments) as (folder, config, books):
        # The policy speaks before the data are opened; of these only identifiers are read.
        books.allow(plan)
        prepared = ensure_prepared(folder, config, plan, books.key)
        if prepared is not None:
            print("\n".join([*prepared.lines(), ""]))
        people = people_of(folder, config, books, plan)
        gone = 0
        if arguments.leave_out_spent:
            people, gone = books.without_spent(plan, people)
        cost = books.consider(plan, people)
        measured = None if arguments.show and arguments.no_guard else _sensitivity(plan, config)
        print(sheet(plan, books.limits, cost, books.facts, measured))
        if gone:
            print(f"\n{gone} patient(s) have spent their budget and are left out of this study.")
            print("That number is about patients: it stays here.")
        if arguments.show:
            return 0
        if not arguments.yes:
            _ask(plan)
        books.approve(plan, people, left_out=gone > 0)
    print(f"\nApproved for one run, and reserved: {plan.sha256}")
    return 0


def _sensitivity(plan: StudyPlan, config: SiteConfig) -> float | None:
    from client.guard import check_sensitivity  # noqa: PLC0415  # torch takes seconds

    if plan.privacy.mode == "none" or not plan.learns:
        return None
    return check_sensitivity(plan, config.device).sensitivity


def _ask(plan: StudyPlan) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask. Use --yes to approve, or --show to look only.")
    word = plan.sha256[:6]
    if input(f"\nType {word} to approve, anything else to leave it: ").strip() != word:
        raise PolicyError("not approved; nothing was changed.")


def _withdraw(arguments: argparse.Namespace) -> int:
    plan = plans.load(arguments.plan)
    with open_books(arguments) as (_, _, books):
        count = books.withdraw(plan)
    print(f"{count} approval(s) of plan {plan.name!r} withdrawn. What was trained stays spent.")
    return 0


def _spent(arguments: argparse.Namespace) -> int:
    with open_books(arguments) as (_, config, books):
        dataset = arguments.dataset or config.dataset
        print(_spent_table(books, books.policy.read().of(dataset)))
    return 0


def _spent_table(books: Books, limits: DatasetPolicy) -> str:
    ledger, delta, cap = books.ledger, limits.max_delta, limits.max_epsilon
    names = [e["digest"] for e in ledger.events("population") if e["dataset"] == limits.name]
    everyone = [ledger.members(digest) for digest in names]
    patients = np.unique(np.concatenate(everyone)) if everyone else np.empty(0, dtype=np.uint64)
    past = histories(patients, commitments(ledger), ledger.members)
    touching = {c for history in past for c in history}
    known = [c for c in commitments(ledger) if c in touching]
    lines = [f"Dataset {limits.name}: epsilon at delta {delta:g}, each study alone", ""]
    lines.append(f"  {'study':<28} {'run':<20} {'spent':>9} {'reserved':>9}")
    lines += [_study_line(study, delta) for study in by_study(known).values()]
    events = [[c.event for c in history] for history in past]
    spent = [[c.event for c in history if c.spent] for history in past]
    now = max(epsilon_of_events(e, delta) for e in spent)
    reserved = max(epsilon_of_events(e, delta) for e in events)
    lines += ["", "The worst patient, all studies together:"]
    lines += [
        f"  spent                     {now:9.3f}",
        f"  spent and reserved        {reserved:9.3f}",
    ]
    held = reserved
    if limits.composition == "filter":
        held = max(filtered_epsilon(e, cap, delta) for e in events)
        lines.append(f"  as the filter counts it   {held:9.3f}")
    lines.append(f"  allowed by policy.toml    {cap:9.3f}")
    lines.append(
        f"  remains for new studies   {cap - held:9.3f}"
        if held < cap
        else "  Nothing remains for new studies on these patients."
    )
    return "\n".join(lines)


def _study_line(study: tuple[Commitment, ...], delta: float) -> str:
    def alone(spent: bool) -> float:
        return epsilon_of_events([c.event for c in study if c.spent is spent], delta)

    run = study[0].run or "(not begun)"
    return f"  {study[0].study:<28.28} {run:<20.20} {alone(True):9.3f} {alone(False):9.3f}"
