"""The terminal: one line that keeps up, and a table that fits."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from example_results import example_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulations.terminal import MOST_NOTES, PLAIN_LINES, Progress, final_table


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and shows what would be on it."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """Lines after all carriage returns were obeyed."""
        lines = []
        for raw in self.getvalue().split("\n"):
            shown = ""
            for piece in raw.split("\r"):
                shown = piece + shown[len(piece) :]
            lines.append(shown.rstrip())
        return lines


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(stream: io.StringIO, rounds: int, seconds: float = 1.0, **update: Any) -> None:
    clock = Clock()
    with Progress(stream, clock=clock) as progress:
        progress.begin(rounds, 4.0)
        for done in range(1, rounds + 1):
            clock.now += seconds
            metrics = {"auroc": 0.5 + done / rounds / 2}
            progress.update(done, metrics=metrics, epsilon=4.0 * done / rounds, **update)


def test_a_terminal_sees_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    run(stream, 200)
    assert stream.screen == [
        "round 200/200  AUROC 1.000  epsilon 4.00 of 4.00  done in 3 min 20 s",
        "",
    ]
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_a_pipe_sees_a_few_plain_lines() -> None:
    stream = io.StringIO()
    run(stream, 1000)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert len(lines) <= PLAIN_LINES + 20
    assert lines[0].startswith("round    1/1000  AUROC 0.500")
    assert lines[-1].startswith("round 1000/1000")


def test_a_slow_study_speaks_every_minute() -> None:
    stream = io.StringIO()
    run(stream, 200, seconds=61.0)
    assert len(stream.getvalue().splitlines()) == 200


def test_time_left_follows_the_rounds_so_far() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    clock.now += 1000  # reading data does not count
    progress.begin(10, None)
    clock.now += 6.0
    progress.update(1)
    assert "54 s left" in stream.getvalue()
    clock.now += 100
    progress.update(2)
    assert "7 min 04 s left" in stream.getvalue()


def test_no_privacy_stands_on_every_line() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin(3, None)
        for done in (1, 2, 3):
            progress.update(done, metrics={"accuracy": 0.9})
    assert all("NO PRIVACY" in line for line in stream.getvalue().splitlines())
    assert "epsilon" not in stream.getvalue()


def test_the_last_known_metric_stays() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin(2, 4.0)
        progress.update(1, metrics={"auroc": 0.75, "accuracy": 0.5})
        progress.update(2)
    assert [("AUROC 0.750" in line) for line in stream.getvalue().splitlines()] == [True, True]


def test_dropouts_keep_a_line_above_the_progress() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin(10, 4.0)
        progress.update(1, metrics={"auroc": 0.8})
        progress.update(2, dropped=["north", "east"])
        progress.update(2, aborted=True, dropped=["south"])
        progress.update(3)
    assert stream.screen[0] == "round 2: without north and east"
    assert stream.screen[1] == "after round 2: a round was aborted, too few hospitals answered"
    assert "3 dropouts" in stream.screen[2]
    assert len(stream.screen) == 4


def test_a_flaky_study_does_not_bury_its_progress() -> None:
    stream = io.StringIO()
    run(stream, 1000, dropped=["north"])
    notes = [x for x in stream.getvalue().splitlines() if "without" in x]
    assert len(notes) == MOST_NOTES
    assert "1,000 dropouts" in stream.getvalue()


@given(st.integers(20, 120), st.lists(st.text(max_size=80), max_size=5))
def test_no_line_passes_the_width_or_moves_the_cursor(width: int, texts: list[str]) -> None:
    stream = Terminal()
    with Progress(stream, width=width, clock=Clock()) as progress:
        progress.begin(100_000, 3.5)
        for text in texts:
            progress.update(7, metrics={"auroc": 0.5}, epsilon=1e9, dropped=[text])
    written = stream.getvalue()
    assert all(len(line) <= width for line in re.split("[\r\n]", written))
    assert not set(written) & set("\x1b\x07\x08\x9b\u202e")


def test_a_stream_that_cannot_write_a_letter_gets_another() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with Progress(stream) as progress:
        progress.note("Zürich")
    assert raw.getvalue() == b"Z?rich\n"


def test_an_error_starts_on_its_own_line() -> None:
    stream = Terminal()

    def broken() -> None:
        with Progress(stream) as progress:
            progress.begin(3, 4.0)
            progress.update(1)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        broken()
    assert stream.getvalue().endswith("\n")


VARIANTS = {
    "private": example_results(),
    "no privacy": example_results(1, private=False),
    "dropouts": example_results(2, sites=20, rounds=30, dropouts=True),
    "hundred sites": example_results(3, sites=100, rounds=4),
    "untested": example_results(5, tested=False, baselines=False),
    "empty": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_fits_eighty_columns_without_colours(name: str) -> None:
    table = final_table(VARIANTS[name])
    assert max(map(len, table.splitlines())) <= 80
    assert len(table.splitlines()) < 60
    assert table.isascii()
    assert table.endswith("\n")
    assert not set(table) & set("\x1b\r\t")


def test_long_and_hostile_names_are_cut_and_cleaned() -> None:
    record = example_results(rounds=3)
    name = "a" * 63
    record["cohort"]["sites"] = [name, "\x1b[31mred\x07"]
    record["title"] = "\x1b]0;title\x07" + "病" * 90
    table = final_table(record)
    lines = table.splitlines()
    assert sum(2 if c == "病" else 1 for c in lines[0]) <= 80
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in table
    assert "\x07" not in table


def test_the_table_holds_the_record() -> None:
    record = VARIANTS["private"]
    table = final_table(record)
    assert "epsilon 3.98 of 4.00 promised at delta 1e-5" in table
    assert "add or remove one patient" in " ".join(table.split())
    for name, site in record["final"]["per_site"].items():
        row = next(x for x in table.splitlines() if x.startswith(name))
        assert f"{site['auroc']:.3f}" in row
        assert "40/40" in row
    study = next(x for x in table.splitlines() if x.startswith("This study"))
    assert f"{record['final']['metrics']['auroc']:.3f}" in study


def test_no_privacy_is_the_second_thing_said() -> None:
    lines = final_table(VARIANTS["no privacy"]).splitlines()
    assert lines[2] == "NO PRIVACY: simulation only"
    assert "promised at delta" not in "\n".join(lines)


def test_better_alone_is_said() -> None:
    record = example_results(rounds=3)
    for name in ("north", "south", "east", "west"):
        record["final"]["per_site"][name]["auroc"] = 0.9
        record["baselines"]["local"]["per_site"][name]["auroc"] = 0.8
    assert "Better alone" not in final_table(record)
    record["baselines"]["local"]["per_site"]["west"]["auroc"] = 0.95
    assert "Better alone, without privacy: west." in final_table(record)


JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, "x", [], {}, True, -1, 1e300, 10**400, float("nan"), ["a", None]]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_record_still_gives_a_table(data: st.DataObject) -> None:
    record = example_results(7, rounds=4, dropouts=True)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(record)))
        table: Any = record
        while isinstance(table[key], dict) and table[key] and data.draw(st.booleans()):
            table = table[key]
            key = data.draw(st.sampled_from(sorted(table)))
        table[key] = data.draw(JUNK)
    assert max(map(len, final_table(record).splitlines())) <= 80
