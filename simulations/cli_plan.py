"""fedward-sim plan: the researcher's consent sheet, for all sites at once."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.config import require

_DESCRIPTION = """\
What would a study mean, before anyone signs anything: what is learnt, what each site's patients
would pay, which site's policy would refuse it and why, and, with --simulate, how good the model
would become. Nothing is approved and nothing is sent."""
WIDTH = 80


def add_plan(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], default_scenario: str
) -> None:
    """Add the subcommand `plan`."""
    plan = commands.add_parser(
        "plan", help="what a study would cost and reach, for all sites", description=_DESCRIPTION
    )
    plan.add_argument(
        "scenario",
        nargs="?",
        default=default_scenario,
        help="a name from `fedward-sim list`, or a TOML file (default: %(default)s)",
    )
    plan.add_argument("--data", metavar="FOLDER", help="where the scenario's data files lie")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a value of the scenario, such as privacy.epsilon=2; may be repeated",
    )
    plan.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="SITE=FILE",
        help="policy.toml of a site, to see whether it would refuse; may be repeated",
    )
    plan.add_argument(
        "--simulate",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="SEEDS",
        help="also simulate the study, once or under several seeds",
    )
    plan.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--debug", action="store_true", help="show tracebacks")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from simulations.planning import planned  # noqa: PLC0415  # torch and Flower take seconds
    from simulations.scenario import load_scenario  # noqa: PLC0415

    require(arguments.simulate >= 0, f"--simulate is {arguments.simulate}; 1 or more")
    overrides = list(arguments.overrides)
    if arguments.data is not None:
        overrides.append(f'simulation.folder="{Path(arguments.data).expanduser().resolve()}"')
    scenario = load_scenario(arguments.scenario, overrides)
    found = planned(
        scenario,
        dict(map(_named, arguments.policy)),
        device=arguments.device,
        seeds=range(1, arguments.simulate + 1),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else sheet(found))
    refused = any(site["allowed"] is False for site in found["sites"].values())
    return 3 if refused else 0


def _named(text: str) -> tuple[str, Path]:
    site, equals, file = text.partition("=")
    require(bool(equals and site and file), f"--policy {text!r} is not SITE=FILE.")
    return site, Path(file).expanduser()


def sheet(found: Mapping[str, Any]) -> str:
    """What `planned` found, for a terminal, 80 columns wide."""
    blocks = [
        [f"Plan {found['plan']}", f"sha256 {found['plan_sha256']}"],
        ["What is learnt", *_learnt(found["learnt"])],
        ["Who takes part", *_cohort(found["cohort"])],
        ["What it costs a patient of one site, at every site alike", *_costs(found)],
        ["What the sites' policies say", *_policies(found["sites"])],
        ["How good the model would be", *_quality(found)],
    ]
    return "\n\n".join("\n  ".join(block) for block in blocks)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 2)


def _learnt(learnt: Mapping[str, Any]) -> list[str]:
    image = learnt["image"]
    inputs = f"{len(learnt['features'])} features: {', '.join(learnt['features'])}"
    if image:
        inputs = "images of " + " x ".join(map(str, image))
    size = f"{learnt['round_bytes_up']:,} bytes up from each site in a round"
    if learnt["kind"] == "statistics":
        return [*_wrapped(f"nothing is learnt; counted are {inputs}"), size]
    rounds = f"{learnt['rounds']} rounds of {learnt['local_steps']} local steps"
    if learnt["spare_rounds"]:
        rounds += f", and up to {learnt['spare_rounds']} repeated"
    return [
        *_wrapped(f"{learnt['label']!r} ({learnt['kind']}) from {inputs}"),
        f"model {learnt['model']}, {learnt['parameters']:,} parameters, {learnt['optimizer']}",
        rounds,
        size,
    ]


def _cohort(cohort: Mapping[str, Any]) -> list[str]:
    return _wrapped(
        f"{cohort['sites']} sites. A sum is opened over at least {cohort['threshold']} of them; "
        f"{cohort['tolerated_dropouts']} may vanish in a round, and {cohort['colluders']} may "
        "side with the server."
    )


def _costs(found: Mapping[str, Any]) -> list[str]:
    privacy = found["privacy"]
    if privacy["mode"] == "none":
        return ["No privacy: every real site refuses this plan."]
    heads = f"{'epsilon of':<12}{'planned':>9}{'worst':>9}{'if alone':>10}{'noise':>9}{'steps':>7}"
    rows = [
        f"{use:<12}{cost['epsilon']:9.3f}{cost['epsilon_worst']:9.3f}{cost['epsilon_alone']:10.3f}"
        f"{cost['noise_multiplier']:9.3f}{cost['steps']:7d}   at delta {cost['delta']:g}"
        for use, cost in privacy["uses"].items()
    ]
    note = (
        f"Mode {privacy['mode']}. 'worst': every spare round runs. 'if alone': in the worst case, "
        "if every other site sides with the server. Each row is paid by patients of its own; what "
        "they have spent in other studies comes on top, and is known to their site alone."
    )
    lines = [heads, *rows, *_wrapped(note)]
    if "counts" in privacy:
        counts = privacy["counts"]
        lines += _wrapped(
            f"Each of the {counts['cells']} released counts carries a noise of "
            f"{counts['spread_patients']:.1f} patients (standard deviation, all sites)."
        )
    if "sensitivity" in found:
        lines += _wrapped(
            "Measured on made-up patients: removing one moves the sum before noise by at most "
            f"{found['sensitivity']['measured']:.4f} clip norms (1 is promised)."
        )
    return lines


def _policies(sites: Mapping[str, Any]) -> list[str]:
    lines = []
    words = {None: "policy not given", True: "would allow it", False: "WOULD REFUSE IT"}
    for name, site in sites.items():
        lines.append(f"{name:<20} {words[site['allowed']]}")
        for reason in site["refusals"]:
            lines += textwrap.wrap(
                f"- {reason}", WIDTH - 2, initial_indent="    ", subsequent_indent="      "
            )
    if any(site["allowed"] for site in sites.values()):
        lines += _wrapped("Not held against what only the sites have: rosters, hours, ledgers.")
    return lines


def _quality(found: Mapping[str, Any]) -> list[str]:
    if found["learnt"]["kind"] == "statistics":
        return ["There is no model."]
    simulated = found.get("simulated")
    if simulated is None:
        return ["Not simulated: add --simulate, or --simulate 5 for five seeds."]
    spread = simulated["standard_deviation"]
    shown = [
        f"{name.replace('_', ' '):<18}{value:6.3f}"
        + (f"  (standard deviation {spread[name]:.3f})" if name in spread else "")
        for name, value in simulated["mean"].items()
    ]
    runs = len(simulated["seeds"])
    return [*shown, f"on simulated patients, {runs} run(s), without noise on these figures"]
