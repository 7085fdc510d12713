"""The fault matrix itself: it can fail, it finds what it looks for, and its page is its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from client.config import SiteFolder
from client.ledger import Charge
from simulations import fault_matrix, fault_page
from simulations.fault_list import FAULTS
from simulations.fault_matrix import check, read_results
from simulations.fault_page import BEGIN, END, PAGE, table, write_page
from simulations.fault_plain import places
from simulations.fault_play import VICTIM, Fault, NotHeldError, Play
from simulations.meddler import Meddler

NAMES = ("city", VICTIM, "university")


def line(number: int, *contributors: str, aborted: str = "") -> dict[str, Any]:
    """A line of rounds.jsonl."""
    return {
        "round": number,
        "trained": True,
        "contributors": list(contributors),
        "aborted": aborted,
    }


def charge(number: int) -> Charge:
    """A charge of one round."""
    return Charge("run", "p", number, "d", 1.0, 1.0, 0.5, 1, "pop")


class Books:
    """Of a site whose ledger holds these charges."""

    def __init__(self, charges: tuple[Charge, ...]) -> None:
        self.ledger = SimpleNamespace(verify=lambda: 1, charges=lambda run: charges)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """A study of two rounds that ended well, of which tests then change something."""
    live: Any = SimpleNamespace(
        names=NAMES,
        charges={name: (charge(1), charge(2)) for name in NAMES},
        lines=[line(1, *NAMES), line(2, "city", "university")],
        state={"state": "finished", "sha256": "aa"},
        site=lambda name: name,
        latest_run=lambda: SimpleNamespace(name="run"),
    )
    live.status, live.rounds = (lambda: live.state), (lambda: live.lines)
    monkeypatch.setattr(SiteFolder, "config", lambda folder: None)
    monkeypatch.setattr(SiteFolder, "identity", lambda folder: None)
    monkeypatch.setattr(
        SiteFolder, "books", lambda folder, config, identity: Books(live.charges[folder.path])
    )
    monkeypatch.setattr(fault_matrix, "in_process", lambda live, run: "aa")
    return Play(live, Meddler())


FAULT = Fault("x", "x", lambda play: None)


def test_a_study_that_ended_well_holds(play: Play) -> None:
    assert check(FAULT, play) == f"{VICTIM} not in 1 round"
    assert check(replace(FAULT, drops=True), play)


def _another_model(live: Any) -> None:
    live.state["sha256"] = "bb"


def _failed(live: Any) -> None:
    live.state = {"state": "failed", "error": "no"}


def _charged_twice(live: Any) -> None:
    live.charges["city"] = (charge(1), charge(1), charge(2))


def _charged_too_little(live: Any) -> None:
    live.charges["city"] = (charge(1),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_another_model, "not that of one process"),
        (_failed, "the study is failed"),
        (_charged_twice, "charged a round twice"),
        (_charged_too_little, r"rounds \[2\] without a charge"),
    ],
)
def test_a_study_that_ended_badly_does_not_hold(
    play: Play, change: Callable[[Any], None], words: str
) -> None:
    change(play.live)
    with pytest.raises(NotHeldError, match=words):
        check(FAULT, play)


def test_a_fault_that_did_not_take_place_does_not_hold(play: Play) -> None:
    play.live.lines[1] = line(2, *NAMES)  # type: ignore[attr-defined]
    with pytest.raises(NotHeldError, match="nothing shows"):
        check(replace(FAULT, drops=True), play)


def test_an_update_is_found_wherever_it_lies_and_nowhere_else() -> None:
    update = bytes((7 * i + i * i) % 251 for i in range(200))
    masked = bytes(b ^ (91 + 5 * i) % 256 for i, b in enumerate(update))
    known = {"city": (update,)}
    seen = {"wire": [b"before" + update + b"after"], "database": [masked, bytes(500)]}
    assert places(known, seen) == {"wire"}
    assert places(known, {"wire": [masked]}) == set()
    with pytest.raises(NotHeldError, match="no update"):
        places({"city": (bytes(200),)}, seen)


def test_every_fault_has_a_name_of_its_own_and_only_such_are_recorded() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert set(read_results()) <= set(names)


def test_the_page_says_what_the_record_says() -> None:
    _, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    written, _ = rest.split(END)
    assert written.strip() == table(read_results())


def test_a_fault_that_did_not_hold_stands_out(tmp_path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nbefore it\n{END}\nbelow\n")
    result = {"held": False, "found": "a | b", "date": "2026-11-25"}
    write_page({FAULTS[0].name: result}, page)
    text = page.read_text()
    assert f"| {FAULTS[0].what} | 2026-11-25 | **no** | a / b |" in text
    assert f"| {FAULTS[1].what} | not yet | | |" in text
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "before it" not in text
    assert fault_page.PAGE == PAGE
