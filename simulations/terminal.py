"""What a run shows in a terminal: a line that keeps up with the rounds, and a table at the end.

On a terminal the line is rewritten in place; into a file or a pipe plain lines are written, a few
for the whole study. No colour and no other control code is written anywhere but the rewriting.
"""

from __future__ import annotations

import textwrap
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from server import facts
from server.facts import Results, amount, number, spent_amount, text
from shared.markup import clean

WIDTH = 80
PLAIN_LINES = 20  # over a whole study, notes not counted
PLAIN_S = 60.0  # but one at least so often
MOST_NOTES = 10  # of dropouts; a flaky study must not bury its progress
MOST_SITES = 16
_REWRITE_S = 0.1


class Progress:
    """The progress of a study's rounds, one line at a time.

    Use it as a context manager, so that an error's message starts on a line of its own.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        width: int = WIDTH,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write nothing yet; `begin` starts the clock.

        Args:
            stream: Where to write.
            width: Columns of the terminal; a line never wraps.
            clock: Seconds since any fixed moment.
        """
        self._stream, self._rounds = stream, 1
        self._target: float | None = None
        self._width, self._clock = max(width, 20), clock
        self._live = stream.isatty()
        self._started = self._last_write = clock()
        self._open = ""  # the rewritten line that is on the screen, if any
        self._latest = ""  # what it should be by now
        self._shown = self._notes = self._lost = 0
        self._tested = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, rounds: int, target_epsilon: float | None) -> None:
        """Start the clock of the time left.

        Args:
            rounds: Rounds that the plan asks for, >= 1.
            target_epsilon: The promise; None where privacy is off.
        """
        self._rounds, self._target = max(rounds, 1), target_epsilon
        self._started = self._last_write = self._clock()

    def update(
        self,
        done: int,
        *,
        metrics: Mapping[str, Any] | None = None,
        epsilon: float | None = None,
        dropped: Sequence[str] = (),
        aborted: bool = False,
    ) -> None:
        """Show that `done` rounds are finished.

        Args:
            done: Finished rounds, aborted ones not counted.
            metrics: Of the model now, where it was tested.
            epsilon: Spent so far, the largest over the sites.
            dropped: Sites that were lost in this round.
            aborted: Whether this round ended without a sum.
        """
        self._lost += len(dropped)
        if aborted:
            self._event(f"after round {done}: a round was aborted, too few hospitals answered")
        elif dropped:
            self._event(f"round {done}: without {facts.listing(list(dropped), 4)}")
        line = self._line(done, metrics or {}, epsilon)
        if self._live:
            self._rewrite(line, force=done >= self._rounds)
        elif self._is_due(done):
            self._write(line + "\n")
            self._shown, self._last_write = done, self._clock()

    def _is_due(self, done: int) -> bool:
        """Whether a plain line is due: the first round, every twentieth part, every minute."""
        if done <= self._shown:
            return False
        parts = (n * PLAIN_LINES // self._rounds for n in (self._shown, done))
        late = self._clock() - self._last_write >= PLAIN_S
        return self._shown == 0 or late or len(set(parts)) == 2

    def _event(self, message: str) -> None:
        self._notes += 1
        if self._notes <= MOST_NOTES:
            self.note(message)
        if self._notes == MOST_NOTES:
            self.note("further dropouts are counted, and listed in the report")

    def note(self, message: str) -> None:
        """Write a line that stays, above the one that is rewritten."""
        again = self._open
        self._clear()
        self._write(_fit(_tidy(message), self._width) + "\n")
        if again:
            self._rewrite(self._latest, force=True)

    def close(self) -> None:
        """End the line that is being rewritten."""
        if self._open:
            self._rewrite(self._latest, force=True)
            self._write("\n")
            self._open = ""

    def _line(self, done: int, metrics: Mapping[str, Any], epsilon: float | None) -> str:
        parts = [f"round {done:>{len(str(self._rounds))}}/{self._rounds}"]
        for name in ("accuracy", "r2", "c_index", "auroc"):
            if (value := number(metrics, name)) is not None:
                self._tested = f"{facts.METRICS[name][0]} {value:.3f}"
        if self._tested:
            parts.append(self._tested)
        if self._target is None:
            parts.append("NO PRIVACY")
        elif epsilon is not None:
            parts.append(f"epsilon {spent_amount(epsilon)} of {amount(self._target)}")
        if self._lost:
            parts.append(facts.plural(self._lost, "dropout"))
        elapsed = self._clock() - self._started
        if 0 < done < self._rounds:
            left = elapsed / done * (self._rounds - done)
            parts.append(f"{_brief(left)} left")
        elif done >= self._rounds:
            parts.append(f"done in {_brief(elapsed)}")
        return _fit("  ".join(parts), self._width - 1)

    def _rewrite(self, line: str, *, force: bool) -> None:
        now, self._latest = self._clock(), line
        if self._open and not force and now - self._last_write < _REWRITE_S:
            return
        self._last_write = now
        # Spaces erase what a longer line left: no escape code, so any terminal will do.
        self._write("\r" + line.ljust(len(self._open)))
        self._open = line

    def _clear(self) -> None:
        if self._open:
            self._write("\r" + " " * len(self._open) + "\r")
            self._open = ""

    def _write(self, piece: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(piece.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _brief(seconds: float) -> str:
    """Time left needs no tenths."""
    return f"{seconds:.0f} s" if seconds < 100 else facts.duration(seconds)


def final_table(results: Results) -> str:
    """A run's outcome as plain text, 80 columns wide, without colours.

    Args:
        results: A record as `server.results` describes it; missing keys are tolerated.
    """
    shown = _statistics(results) if facts.features(results) else _models(results)
    blocks = [_head(results), shown, _sites(results), _record(results)]
    blocks.append("\n".join(_wrap(f"! {w}", "  ") for w in facts.warnings(results)))
    return "\n\n".join(b for b in blocks if b) + "\n"


def _head(results: Results) -> str:
    title = text(results, "title", default=text(results, "scenario", default="Study"))
    lines = [_fit(_tidy(title), WIDTH), "=" * min(WIDTH, _columns(_tidy(title)))]
    if not facts.is_private(results):
        return "\n".join([*lines, "NO PRIVACY: simulation only"])
    spent, promised = facts.spent_epsilon(results), number(results, "privacy", "target_epsilon")
    delta = facts.delta_text(number(results, "privacy", "delta"))
    said = (
        f"epsilon {spent_amount(spent)} of {amount(promised)} promised at delta {delta}, for a "
        f"patient of one hospital ({text(results, 'privacy', 'relation')}; "
        f"sampling: {text(results, 'privacy', 'sampling')}; "
        f"{text(results, 'privacy', 'accountant')})"
    )
    branded = facts.get(results, "insecure_reproducible") is True
    brand = ["INSECURE, REPRODUCIBLE: noise follows from the seed"] if branded else []
    return "\n".join([*lines, *brand, _wrap(said), *_tested_at(results)])


def _tested_at(results: Results) -> list[str]:
    """What noisy metrics cost the test patients."""
    sites = facts.mapping(facts.get(results, "privacy", "sites")).values()
    spent = [e for s in sites if (e := number(s, "evaluation", "epsilon")) is not None]
    if not spent:
        return []
    promised = number(results, "privacy", "evaluation", "target_epsilon")
    said = (
        f"test patients: epsilon {spent_amount(max(spent))} of {amount(promised)} for the metrics"
    )
    return [_wrap(said)]


_SHOWN = {
    "auroc": "AUROC",
    "accuracy": "acc.",
    "balanced_accuracy": "bal.acc.",
    "recall": "recall",
    "f1": "F1",
    "brier": "Brier",
    "c_index": "C-index",
    "integrated_brier": "int.Brier",
    "r2": "R2",
    "mse": "MSE",
    "mae": "MAE",
}


def _models(results: Results) -> str:
    models = facts.compared_models(results)
    columns = [m for m in _SHOWN if any(number(x.metrics, m) is not None for x in models)]
    if not columns:
        return "No test metrics were recorded."
    rows = [[m.name, *(amount(number(m.metrics, c), 3) for c in columns)] for m in models]
    ends = {c: facts.interval(results, c) for c in columns}
    if any(ends.values()):
        for name, end in (("  at least (95 %)", 0), ("  at most (95 %)", 1)):
            cells = (amount(e[end], 3) if (e := ends[c]) else "-" for c in columns)
            rows.insert(1 + end, [name, *cells])
        exact = facts.get(results, "final", "exact_metrics")
        if exact:
            cells = (amount(number(exact, c), 3) for c in columns)
            rows.insert(3, ["  exact (simulation only)", *cells])
    return _table(["final model", *(_SHOWN[c] for c in columns)], rows)


def _statistics(results: Results) -> str:
    exact = {text(f, "name"): f for f in facts.features(results, "exact")}
    rows = []
    for feature in facts.features(results):
        name = text(feature, "name")
        ends = facts.numbers(feature, "mean_interval")
        rows.append(
            [
                name,
                facts.whole(number(feature, "present")),
                facts.whole(number(feature, "missing")),
                facts.significant(number(feature, "mean")),
                " to ".join(map(facts.significant, ends)) or "-",
                facts.significant(number(feature, "standard_deviation")),
                facts.significant(number(exact.get(name), "mean")),
            ]
        )
    return _table(["feature", "patients", "missing", "mean", "95 %", "sd", "exact mean"], rows)


def _sites(results: Results) -> str:
    sites, rounds = facts.site_names(results), facts.rounds(results)
    entries = [facts.get(results, "final", "per_site", site) for site in sites]
    shown = [m for m in _SHOWN if any(number(e, m) is not None for e in entries)][:2]
    rows = []
    for site in sites:
        spent = number(results, "privacy", "sites", site, "epsilon")
        entry = facts.get(results, "final", "per_site", site)
        given = sum(site in facts.names(r, "contributors") for r in rounds)
        rows.append(
            [
                site,
                facts.whole(number(entry, "train_patients")),
                facts.whole(number(entry, "test_patients")),
                *(amount(number(entry, name), 3) for name in shown),
                spent_amount(spent) if facts.is_private(results) else "none",
                f"{given}/{len(rounds)}",
            ]
        )
    heads = ["hospital", "train", "test", *(_SHOWN[name] for name in shown), "epsilon", "rounds"]
    if facts.features(results):
        heads, rows = ["hospital", "patients", "epsilon"], _counted_sites(results, sites)
    table = _table(heads, rows[:MOST_SITES])
    if len(rows) > MOST_SITES:
        table += f"\n... and {len(rows) - MOST_SITES} more hospitals, in the report"
    metric = facts.main_metric(results)
    better = facts.better_alone(results, metric) if metric else None
    if better:
        named = facts.listing([b.site for b in better], 4)
        table += "\n" + _wrap(f"Better alone, without privacy: {_tidy(named)}.")
    return table if rows else ""


def _counted_sites(results: Results, sites: list[str]) -> list[list[str]]:
    table = facts.mapping(facts.get(results, "privacy", "sites"))
    return [
        [
            site,
            facts.whole(number(table, site, "patients")),
            spent_amount(number(table, site, "epsilon")) if facts.is_private(results) else "none",
        ]
        for site in sites
    ]


def _record(results: Results) -> str:
    rounds = facts.rounds(results)
    gone, lost = facts.dropouts(results), sum(facts.aborted(r) for r in rounds)
    up = number(results, "wire", "bytes_up")
    down = number(results, "wire", "bytes_down")
    dropped = sum(len(names) for _, names in gone)
    lines = [
        f"{facts.plural(len(rounds), 'round')}, {lost} aborted, {facts.plural(dropped, 'dropout')}",
        f"sent {facts.size(up)} up, {facts.size(down)} down; the server saw sums only",
    ]
    train, secagg = (sum(number(r, k) or 0 for r in rounds) for k in ("train_s", "secagg_s"))
    wall = facts.duration(number(results, "wall_s"))
    lines.append(
        f"time {wall}: training {facts.duration(train)}, secure sum {facts.duration(secagg)}"
    )
    return "\n".join(_wrap(line) for line in lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns set flush right, the first flush left and cut so that a line fits."""
    rows = [[_tidy(cell) for cell in row] for row in rows]
    others = [max(map(_columns, c)) for c in zip(heads[1:], *(r[1:] for r in rows), strict=True)]
    first = max(_columns(r[0]) for r in (heads, *rows))
    first = min(first, WIDTH - sum(w + 2 for w in others))

    def line(cells: Sequence[str]) -> str:
        start = _fit(cells[0], first)
        rest = (" " * (w + 2 - _columns(c)) + c for c, w in zip(cells[1:], others, strict=True))
        return start + " " * (first - _columns(start)) + "".join(rest)

    rule = "-" * (first + sum(w + 2 for w in others))
    return "\n".join([line(heads), rule, *(line(r) for r in rows)])


def _wrap(sentence: str, indent: str = "") -> str:
    return textwrap.fill(_tidy(sentence), WIDTH, subsequent_indent=indent)


def _tidy(line: str) -> str:
    """One line without control characters: a name cannot move the cursor or set a colour."""
    return " ".join(clean(line).replace("\ufffd", "?").split()).translate(_PLAIN)


_PLAIN = str.maketrans({"−": "-", "–": "-", "ε": "eps", "δ": "delta"})


def _columns(line: str) -> int:
    """Columns on the screen; wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(unicodedata.combining(c) > 0 for c in line)


def _fit(line: str, width: int) -> str:
    """The line, cut to a width."""
    if _columns(line) <= width:
        return line
    while line and _columns(line) > width - 1:
        line = line[:-1]
    return line + "~"
