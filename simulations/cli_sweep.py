"""fedward-sim sweep: its arguments, its progress in the terminal, and the table at the end."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shared.config import require

if TYPE_CHECKING:
    from simulations.sweep import Cell, Record, Sweep, SweepOptions

_DESCRIPTION = """\
What accuracy would a study reach, at which epsilon, in which privacy mode? Runs every mode at every
epsilon under several seeds, beside the baselines, and writes sweep.json and sweep.html.
Interrupt it at any time: finished runs are kept, and the same command goes on from there."""

INSECURE_HELP = (
    "let noise follow from the seed, so that a run repeats to the bit: whoever knows the seed can "
    "subtract it, and results and report say so"
)


def add_sweep(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], default_scenario: str
) -> None:
    """Add the subcommand `sweep`."""
    sweep = commands.add_parser(
        "sweep",
        help="run a scenario at several epsilons, in both privacy modes",
        description=_DESCRIPTION,
    )
    sweep.add_argument(
        "scenario",
        nargs="?",
        default=default_scenario,
        help="a name from `fedward-sim list`, or a TOML file (default: %(default)s)",
    )
    sweep.add_argument("--data", metavar="FOLDER", help="where the scenario's data files lie")
    sweep.add_argument(
        "--epsilons", type=float, nargs="+", metavar="E", help="promises (default: 1 2 4 8)"
    )
    sweep.add_argument(
        "--modes", nargs="+", metavar="MODE", help="local, distributed (default: both)"
    )
    sweep.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="seeds of each run (default: %(default)s)"
    )
    sweep.add_argument(
        "--first-seed", type=int, default=1, metavar="N", help="the first (default: %(default)s)"
    )
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a value of the scenario in all runs, or in those of one mode: "
        "local.training.rounds=40; may be repeated",
    )
    sweep.add_argument(
        "--out", type=Path, metavar="DIR", help="the sweep's folder (default: runs/sweep-SCENARIO)"
    )
    sweep.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    sweep.add_argument("--insecure-reproducible", action="store_true", help=INSECURE_HELP)
    sweep.add_argument("--quiet", action="store_true", help="print the final table alone")
    sweep.add_argument("--debug", action="store_true", help="show tracebacks")
    sweep.set_defaults(command=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from simulations.sweep import prepare_sweep, run_sweep  # noqa: PLC0415  # takes seconds

    sweep = prepare_sweep(_options(arguments))
    width = shutil.get_terminal_size().columns
    progress = SweepProgress(None if arguments.quiet else sys.stderr, width=width)
    stopped = False
    try:
        run_sweep(sweep, progress)
    except KeyboardInterrupt:
        stopped = True
    finally:
        progress.close()
        table = write_sweep(sweep)
    out = sweep.options.out
    if table is not None:
        print(sweep_text(table))
        print(f"figures: {(out / 'sweep.json').resolve()}")
        print(f"page:    {(out / 'sweep.html').resolve()}")
    if stopped:
        count = 0 if table is None else len(table["runs"])
        print(
            f"\nfedward-sim: stopped; {count} of {len(sweep.scenarios)} runs are kept in "
            f"{out / 'runs'}. The same command goes on from there.",
            file=sys.stderr,
        )
    return 130 if stopped else 0


def _options(arguments: argparse.Namespace) -> SweepOptions:
    from simulations.sweep import EPSILONS, MODES, SweepOptions  # noqa: PLC0415

    overrides = list(arguments.overrides)
    if arguments.data is not None:
        folder = Path(arguments.data).expanduser().resolve()
        overrides.append(f'simulation.folder="{folder}"')
    seeds, first = arguments.seeds, arguments.first_seed
    require(1 <= seeds <= 1000, f"--seeds is {seeds}; it is how many: 1 to 1000.")
    require(0 <= first < 2**62, f"--first-seed is {first}; it must be 0 or more.")
    name = Path(arguments.scenario).stem.replace("-", "_")
    return SweepOptions(
        scenario=arguments.scenario,
        out=arguments.out or Path("runs") / f"sweep-{name}",
        overrides=tuple(overrides),
        modes=tuple(arguments.modes or MODES),
        epsilons=tuple(sorted(arguments.epsilons or EPSILONS)),
        seeds=tuple(range(first, first + seeds)),
        device=arguments.device,
        insecure_reproducible=arguments.insecure_reproducible,
    )


def write_sweep(sweep: Sweep) -> dict[str, Any] | None:
    """Write sweep.json and sweep.html from the runs that are kept; None where there are none."""
    from server.results import write_text  # noqa: PLC0415
    from simulations.sweep_page import render  # noqa: PLC0415
    from simulations.sweep_summary import sweep_table  # noqa: PLC0415

    records = sweep.kept()
    if not records:
        return None
    table = sweep_table(sweep, records, datetime.datetime.now(datetime.UTC))
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(text + "\n", sweep.options.out / "sweep.json")
    write_text(render(table), sweep.options.out / "sweep.html")
    return table


class SweepProgress:
    """One line for each finished run; on a terminal also one that keeps up with the rounds.

    Args:
        stream: Where to write; None writes nothing.
        clock: Seconds since any fixed moment.
        width: Columns of the terminal.
    """

    def __init__(
        self,
        stream: TextIO | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        width: int = 80,
    ) -> None:
        self._stream, self._clock, self._width = stream, clock, width
        self._live = stream is not None and stream.isatty()
        self._waiting: list[Cell] = []
        self._total = self._drawn = 0
        self._seconds: dict[str, list[float]] = {}
        self._started = clock()

    def begin(self, cells: Sequence[Cell], kept: Mapping[Cell, Record]) -> None:
        """Take the measure of the work that is left."""
        self._total = len(cells)
        self._waiting = [cell for cell in cells if cell not in kept]
        for cell, record in kept.items():
            self._seconds.setdefault(cell.mode, []).append(record["wall_s"])
        if kept:
            self._write(f"{len(kept)} of {self._total} runs are finished already\n")
        self._started = self._clock()

    def round(self, cell: Cell, done: int, rounds: int) -> None:
        """Rewrite the line of the run that is on."""
        if not self._live:
            return
        part = self._clock() - self._started
        line = f"{self._name(cell)}  round {done}/{rounds}{self._left(part)}"
        self._write("\r" + line[: self._width - 1].ljust(self._drawn))
        self._drawn = len(line)

    def finished(self, cell: Cell, record: Record) -> None:
        """Write the line of a finished run, with the time left for the others."""
        metrics = record["metrics"]["study"]
        name = self._name(cell)
        self._waiting.remove(cell)
        self._seconds.setdefault(cell.mode, []).append(self._clock() - self._started)
        self._started = self._clock()
        shown = "".join(
            f"  {title} {metrics[key]:.3f}"
            for key, title in (("auroc", "AUROC"), ("accuracy", "acc."))
            if key in metrics
        )
        line = f"{name}{shown}{self._left(0.0)}"
        self.close()
        self._write((line[: self._width - 1] if self._live else line) + "\n")

    def close(self) -> None:
        """Erase the line that is being rewritten."""
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _name(self, cell: Cell) -> str:
        number = self._total - len(self._waiting) + 1
        place = f"run {number:>{len(str(self._total))}}/{self._total}"
        return f"{place}  {cell.mode:<11}  epsilon {cell.epsilon:g}  seed {cell.seed}"

    def _left(self, part: float) -> str:
        """The time that the waiting runs take, judged by finished ones of their mode."""
        from server.facts import duration  # noqa: PLC0415  # keeps --help instant

        known = [s for seconds in self._seconds.values() for s in seconds]
        if not known:
            return ""
        if not self._waiting:
            return "  done"
        left = -part
        for cell in self._waiting:
            same = self._seconds.get(cell.mode, known)
            left += sum(same) / len(same)
        seconds = max(round(left), 1)
        return f"  {f'{seconds} s' if seconds < 100 else duration(seconds)} left"

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


_COLUMNS = (
    # heading, mode, method
    ("distributed", "distributed", "study"),
    ("pooled DP", "distributed", "pooled_dp"),
    ("local", "local", "study"),
    ("pooled DP*", "local", "pooled_dp"),
)


def sweep_text(table: Mapping[str, Any]) -> str:
    """The means of a sweep as plain text, at most 80 columns wide."""
    from server.facts import INSECURE  # noqa: PLC0415
    from shared.markup import clean  # noqa: PLC0415

    blocks = [clean(f"Accuracy against epsilon: scenario {table['scenario']}")]
    if table["insecure_reproducible"]:
        blocks.append(textwrap.fill(INSECURE, 80))
    summary = {(r["mode"], r["epsilon"], r["method"]): r["metrics"] for r in table["summary"]}
    columns = [c for c in _COLUMNS if c[1] in table["modes"]]
    for metric, title in (("auroc", "AUROC"), ("accuracy", "accuracy")):
        lines = [f"{title:<12}" + "".join(f"{c[0]:>16}" for c in columns)]
        for epsilon in table["epsilons"]:
            cells = [summary.get((mode, epsilon, method), {}) for _, mode, method in columns]
            shown = "".join(f"{_mean(c.get(metric)):>16}" for c in cells)
            lines.append(f"epsilon {epsilon:<4g}{shown}")
        for method, name in (("pooled", "pooled, no privacy"), ("local", "alone, no privacy")):
            for mode in table["modes"]:
                found = (summary.get((mode, e, method)) for e in table["epsilons"])
                cell: Mapping[str, Any] = next((f for f in found if f), {})
                lines.append(f"{name} (like {mode}, or by [none]): {_mean(cell.get(metric))}")
        blocks.append("\n".join(lines))
    notes = "mean +- sd over seeds"
    if "local" in table["modes"]:
        notes += "; * with the settings of mode local"
    return "\n\n".join([*blocks, notes])


def _mean(cell: Mapping[str, float | None] | None) -> str:
    if not cell:
        return "-"
    spread = "" if cell["sd"] is None else f" +- {cell['sd']:.3f}"
    return f"{cell['mean']:.3f}{spread}"
