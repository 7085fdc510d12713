"""The fault matrix itself: it can fail, it finds what it looks for, and its page is its record."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest

from client.config import SiteFolder
from client.ledger import Charge
from server.authority import create_authority
from shared.errors import FedwardError
from shared.privacy import Use
from shared.supervise import free_port
from simulations import fault_page
from simulations.deployment import breast_cancer, wait_for
from simulations.fault_list import FAULTS
from simulations.fault_matrix import check, read_results
from simulations.fault_page import BEGIN, END, PAGE, table, write_page
from simulations.fault_plain import PAGE as PIECE
from simulations.fault_plain import WINDOW, DatabaseWatch, places
from simulations.fault_play import VICTIM, Fault, NotHeldError, Play
from simulations.impostor import DAY, expired_certificate, impostor, wrong_certificate
from simulations.meddler import Meddler
from simulations.replay import Replay

NAMES = ("city", VICTIM, "university")


def line(number: int, *contributors: str, aborted: str = "") -> dict[str, Any]:
    """A line of rounds.jsonl."""
    return {
        "round": number,
        "model_round": number - 1,
        "trained": True,
        "contributors": list(contributors),
        "aborted": aborted,
    }


def charges(*numbers: int) -> tuple[Charge, ...]:
    """What these rounds cost a site, each once for training and once for counts."""
    return tuple(
        Charge("run", "p", number, "d", 1.0, 1.0, 0.5, 1, "pop", use)
        for number in numbers
        for use in get_args(Use)[:2]
    )


class Books:
    """Of a site whose ledger holds these charges."""

    def __init__(self, charges: tuple[Charge, ...]) -> None:
        self.ledger = SimpleNamespace(verify=lambda: 1, charges=lambda run: charges)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """A study of two rounds that ended well, of which tests then change something."""
    live: Any = SimpleNamespace(
        names=NAMES,
        plan=breast_cancer(2).plan,
        charges={name: charges(1, 2) for name in NAMES},
        lines=[line(1, *NAMES), line(2, "city", "university")],
        state={"state": "finished", "sha256": "aa"},
        site=lambda name: name,
        latest_run=lambda: SimpleNamespace(name="run"),
        project=SimpleNamespace(database=tmp_path / "link.db"),
    )
    live.status, live.rounds = (lambda: live.state), (lambda: live.lines)
    monkeypatch.setattr(SiteFolder, "config", lambda folder: None)
    monkeypatch.setattr(SiteFolder, "identity", lambda folder: None)
    monkeypatch.setattr(
        SiteFolder, "books", lambda folder, config, identity: Books(live.charges[folder.path])
    )
    play = Play(live, Meddler())
    monkeypatch.setattr(Play, "replayed", lambda play: Replay("aa", {"city": (UPDATE,)}))
    with play.watching():
        play.meddler.record(MASKED)
    return play


UPDATE = bytes((7 * i + i * i) % 251 for i in range(200))
MASKED = bytes(b ^ (91 + 5 * i) % 256 for i, b in enumerate(UPDATE))
FAULT = Fault("x", "x", lambda play: None)


def test_a_study_that_ended_well_holds(play: Play) -> None:
    assert check(FAULT, play) == f"{VICTIM} not in 1 round"
    assert check(replace(FAULT, drops=True), play)


def _another_model(live: Any) -> None:
    live.state["sha256"] = "bb"


def _failed(live: Any) -> None:
    live.state = {"state": "failed", "error": "no"}


def _charged_twice(live: Any) -> None:
    live.charges["city"] = charges(1, 1, 2)


def _charged_too_little(live: Any) -> None:
    live.charges["city"] = charges(1)


def _counted_for_nothing(live: Any) -> None:
    live.charges["city"] = tuple(c for c in charges(1, 2) if c.used_for == "training")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_another_model, "not that of one process"),
        (_failed, "the study is failed"),
        (_charged_twice, "charged a round twice"),
        (_charged_too_little, r"rounds \[2\] without a charge"),
        (_counted_for_nothing, "without a charge"),
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


def test_an_update_that_lay_open_does_not_hold(play: Play) -> None:
    play._wire.append(b"before" + UPDATE)
    with pytest.raises(NotHeldError, match="lay open in: wire"):
        check(FAULT, play)
    play.forget()
    assert check(FAULT, play)


def test_a_study_that_could_not_begin_is_charged_to_nobody(play: Play) -> None:
    _failed(play.live)
    fault = replace(FAULT, ends="failed")
    with pytest.raises(NotHeldError, match="was charged"):
        check(fault, play)
    play.live.charges = dict.fromkeys(NAMES, ())  # type: ignore[attr-defined]
    play.live.lines = []  # type: ignore[attr-defined]
    assert check(fault, play) == "stops and says: no"


def test_the_watch_keeps_what_a_database_held_and_has_lost(tmp_path: Path) -> None:
    """Also across the borders of what it keeps, and in the log beside the database."""
    file = tmp_path / "link.db"
    watch = DatabaseWatch(file)
    with watch.watching():
        file.write_bytes(bytes(PIECE - 100) + UPDATE + bytes(PIECE))
        watch.look()
        file.write_bytes(bytes(10))
        (tmp_path / "link.db-wal").write_bytes(MASKED)
    for written in (UPDATE, MASKED):
        assert places({"city": (written,)}, {"database": watch.pieces})
    assert not places({"city": (bytes(b ^ 85 for b in UPDATE),)}, {"database": watch.pieces})


def test_the_impostor_counts_those_who_believe_it_and_those_who_do_not(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    settings: Any = SimpleNamespace(name="trial")
    key, certificate = create_authority("trial", begins=now - DAY, ends=now + DAY)
    (tmp_path / "ca.key").write_bytes(key)
    (tmp_path / "ca.crt").write_bytes(certificate)
    project: Any = SimpleNamespace(
        settings=lambda: settings, ca_key=tmp_path / "ca.key", ca_certificate=tmp_path / "ca.crt"
    )
    trusts = ssl.create_default_context(cafile=str(project.ca_certificate))
    port = free_port()

    def call(verify: ssl.SSLContext | bool) -> None:
        with suppress(httpx.HTTPError), httpx.Client(verify=verify, timeout=60) as client:
            client.post(f"https://127.0.0.1:{port}/", content=b"secret")

    for certify in (wrong_certificate, expired_certificate):
        files = certify(project, tmp_path / certify.__name__, now)
        with impostor(port, *files) as found:
            call(trusts)
            wait_for("the first", lambda: found.refused + found.fooled == 1, 60, every_s=0.01)
            assert found.refused == 1
            call(False)  # the control: who checks nothing is fooled
            wait_for("the second", lambda: found.refused + found.fooled == 2, 60, every_s=0.01)
            assert found.fooled == 1


def test_an_update_is_found_wherever_it_lies_and_nowhere_else() -> None:
    known = {"city": (UPDATE,)}
    seen = {"wire": [b"before" + UPDATE + b"after"], "database": [MASKED, bytes(500)]}
    assert places(known, seen) == {"wire"}
    assert places(known, {"wire": [MASKED]}) == set()
    for before in range(4):
        piece = bytes(before) + UPDATE[:WINDOW]
        assert places(known, {"wire": [b"", piece + b"after"], "end": [piece]}) == {"wire", "end"}
        assert places(known, {"wire": [piece[:-1], piece[:-1] + b"after"]}) == set()
    with pytest.raises(FedwardError, match="no update"):
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
