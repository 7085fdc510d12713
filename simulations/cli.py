"""fedward-sim: what would this study reach, at which epsilon, before anyone signs anything?"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config import require
from shared.errors import FedwardError
from simulations.cli_plan import add_plan
from simulations.cli_sweep import INSECURE_HELP, add_sweep

if TYPE_CHECKING:
    from server.rounds import Observer, RoundReport
    from shared.plan import StudyPlan
    from simulations.terminal import Progress

DEFAULT_SCENARIO = "breast_cancer"

_EPILOG = """\
examples:
  fedward-sim run                                   the default study, under a minute
  fedward-sim run nodules --baselines               a CNN on drawn images, with baselines
  fedward-sim run heart --data FOLDER --set privacy.epsilon=2
  fedward-sim sweep heart --data FOLDER             accuracy against epsilon, both privacy modes
  fedward-sim plan heart --policy va=policy.toml    what it would cost, and who would refuse
  fedward-sim list

exit codes: 0 done; 2 usage or configuration; 3 refused by policy or budget; 4 protocol failure;
5 audit failed; 1 anything else (please report it)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="opacus")
    try:
        return int(arguments.command(arguments))
    except FedwardError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"fedward-sim: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nfedward-sim: stopped; {arguments.stopped()}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(
            f"fedward-sim: this is a bug: {type(error).__name__}: {error}. "
            "Run again with --debug and report the traceback.",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedward-sim",
        description="Simulate a federated study: hospitals train one model under differential "
        "privacy and send encrypted updates; the result is a report on disk.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(debug=False, stopped=lambda: "nothing was written.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    add_plan(commands, DEFAULT_SCENARIO)
    add_sweep(commands, DEFAULT_SCENARIO)
    listing = commands.add_parser("list", help="list the scenarios that ship with Fedward")
    listing.add_argument("--debug", action="store_true", help="show tracebacks")
    listing.set_defaults(command=_list)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="run a scenario",
        description="Run one scenario and write results.json, report.html, model.safetensors and "
        "the evidence to a run directory.",
    )
    run.add_argument(
        "scenario",
        nargs="?",
        default=DEFAULT_SCENARIO,
        help="a name from `fedward-sim list`, or a TOML file (default: %(default)s)",
    )
    run.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run that was to become RUN and was stopped; takes no other choices",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/...)")
    run.add_argument("--data", metavar="FOLDER", help="where the scenario's data files lie")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a value of the scenario, such as privacy.epsilon=2; may be repeated",
    )
    run.add_argument("--rounds", type=int, metavar="N", help="same as --set training.rounds=N")
    run.add_argument(
        "--seed", type=int, metavar="N", help="seed of split and start; no seed fixes noise"
    )
    run.add_argument(
        "--engine",
        choices=("in-process", "ray"),
        default="in-process",
        help="in-process (default), or Flower's simulation engine on Ray",
    )
    run.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    run.add_argument(
        "--baselines",
        action="store_true",
        help="also train each hospital alone, pooled, and pooled under DP-SGD",
    )
    run.add_argument("--insecure-reproducible", action="store_true", help=INSECURE_HELP)
    run.add_argument("--quiet", action="store_true", help="print the final table alone")
    run.add_argument("--debug", action="store_true", help="show tracebacks")
    run.set_defaults(command=_run)


def _list(arguments: argparse.Namespace) -> int:
    del arguments
    from simulations.scenario import list_scenarios  # noqa: PLC0415  # keeps --help instant

    titles = list_scenarios()
    width = max(map(len, titles))
    for name, title in titles.items():
        print(f"{name:<{width}}  {title}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from simulations import run as runner  # noqa: PLC0415  # torch and Flower take seconds
    from simulations.scenario import load_scenario  # noqa: PLC0415
    from simulations.terminal import Progress, final_table  # noqa: PLC0415
    from simulations.unfinished import Command, Unfinished  # noqa: PLC0415

    out = arguments.resume or arguments.out
    if arguments.resume is not None:
        command = Unfinished.of(out).command()
    else:
        file = Path(arguments.scenario)
        command = Command(
            scenario=str(file.resolve()) if file.is_file() else arguments.scenario,
            overrides=tuple(_overrides(arguments)),
            engine=arguments.engine,
            device=arguments.device,
            baselines=arguments.baselines,
            insecure_reproducible=arguments.insecure_reproducible,
        )
    scenario = load_scenario(command.scenario, list(command.overrides))
    out = out or runner.default_out(scenario)
    unfinished = Unfinished.of(out)
    options = runner.RunOptions(
        out=out,
        engine=command.engine,
        device=command.device,
        baselines=command.baselines,
        insecure_reproducible=command.insecure_reproducible,
        unfinished=unfinished,
    )
    prepared = runner.prepare(scenario, options)
    if arguments.resume is None:
        unfinished.begin(command)
    arguments.stopped = lambda: f"go on with: fedward-sim run --resume {out}"
    plan = prepared.plan
    stream = io.StringIO() if arguments.quiet else sys.stderr
    with Progress(stream) as progress:
        progress.begin(plan.training.rounds, plan.privacy.epsilon)
        try:
            results = runner.execute(prepared, _observer(plan, progress))
        except FedwardError:
            unfinished.remove()  # it would fail again
            raise
    print(final_table(results))
    print(f"report:  {(out / 'report.html').resolve()}")
    return 0


def _observer(plan: StudyPlan, progress: Progress) -> Observer:
    """Feed the progress line; metrics are of the model that a round started from."""
    from server.record import EpsilonSoFar, metrics_by_round  # noqa: PLC0415

    epsilon = EpsilonSoFar(plan)
    attempts = 0

    def observe(report: RoundReport) -> None:
        nonlocal attempts
        attempts += report.trained
        progress.update(
            report.model_round + (1 if report.trained and not report.reason else 0),
            metrics=metrics_by_round(plan, [report]).get(report.model_round),
            epsilon=epsilon.after(attempts),
            dropped=report.dropped,
            aborted=bool(report.reason),
        )

    return observe


def _overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = list(arguments.overrides)
    if arguments.data is not None:
        folder = Path(arguments.data).expanduser().resolve()
        overrides.append(f'simulation.folder="{folder}"')
    if arguments.rounds is not None:
        require(arguments.rounds >= 1, f"--rounds is {arguments.rounds}; it must be 1 or more.")
        overrides.append(f"training.rounds={arguments.rounds}")
    if arguments.seed is not None:
        require(arguments.seed >= 0, f"--seed is {arguments.seed}; it must be 0 or more.")
        overrides += [f"simulation.seed={arguments.seed}", f"model.init_seed={arguments.seed}"]
    return overrides


if __name__ == "__main__":
    sys.exit(main())
