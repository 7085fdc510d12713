"""Following a run: its rounds, its waits, its end, and a ServerApp that died."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server.commands_run import describe
from server.project import Project
from server.run_folder import RunFolder
from server.runs import find_run, follow, rounds_of
from server.spool import DurableSpool
from shared.errors import ConfigError, FedwardError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was begun."""
    folder = tmp_path / "runs" / "trial"
    folder.mkdir(parents=True)
    record = {"schema": "fedward-run/1", "run_id": "trial", "created": "2026", "wait_s": 60.0}
    (folder / "run.json").write_text(json.dumps(record | {"sites": []}))
    return RunFolder(folder)


def ended(number: int, **facts: Any) -> dict[str, Any]:
    """A line of rounds.jsonl."""
    plain = {
        "round": number,
        "model_round": number - 1,
        "trained": True,
        "cohort": ["a", "b", "c"],
        "contributors": ["a", "b"],
        "dropped": ["c"],
        "aborted": "",
        "wall_s": 1.5,
        "ended": 0.0,
    }
    return plain | facts


class Script:
    """What happens to the run between two looks."""

    def __init__(self, *steps: Any) -> None:
        self._steps = list(steps)
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        """The next step happens."""
        self.now += seconds
        if self._steps:
            self._steps.pop(0)()


def add(run: RunFolder, line: dict[str, Any], *, whole: bool = True) -> None:
    """A round ends."""
    with (run.path / "rounds.jsonl").open("a") as file:
        text = json.dumps(line)
        file.write(text + "\n" if whole else text[:10])


def test_rounds_and_states_come_once_each_in_order(run: RunFolder) -> None:
    script = Script(
        lambda: run.tell("set-up"),
        lambda: add(run, ended(1)),
        lambda: run.tell("waiting", absent=["c"], wait_s=60.0),
        lambda: run.tell("waiting", absent=["c"], wait_s=60.0),
        lambda: add(run, ended(2), whole=False),
        lambda: run.tell("finished", sha256="ab" * 32),
    )
    steps = list(follow(run, lambda: "running", script.sleep, lambda: script.now))
    assert [s.kind for s in steps] == ["starting", "set-up", "round", "waiting", "finished"]
    assert describe(steps[-1].kind, steps[-1].facts) == "finished; model " + "ab" * 8
    assert describe("waiting", steps[3].facts) == "waiting for c; stops after 60 s"


def test_a_serverapp_that_died_is_noticed_with_the_way_on(run: RunFolder) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.tell("running")
    status = json.loads((run.path / "status.json").read_text()) | {"pid": gone.pid}
    (run.path / "status.json").write_text(json.dumps(status))
    with pytest.raises(FedwardError, match=r"died.*run --resume trial"):
        list(follow(run, lambda: "running", lambda s: None))


def test_a_serverapp_that_never_begins_is_noticed(run: RunFolder) -> None:
    script = Script()
    with pytest.raises(FedwardError, match="no ServerApp began"):
        list(follow(run, lambda: "pending", script.sleep, lambda: script.now))
    assert script.now >= 120
    with pytest.raises(FedwardError, match="no ServerApp began"):
        list(follow(run, lambda: "finished:failed", script.sleep))


def test_a_round_in_words() -> None:
    facts = ended(3, rounds=20)
    assert (
        describe("round", facts) == "round   3  model      3/20     1.5 s  2 of 3 sites, without c"
    )
    facts = ended(3, rounds=20, aborted="too few sites")
    assert describe("round", facts).endswith("aborted: too few sites")
    assert "evaluation" in describe("round", ended(3, rounds=20, trained=False))


def test_the_latest_run_is_found_or_the_one_that_is_named(run: RunFolder, tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert find_run(project, None) == run
    assert find_run(project, "trial") == run
    with pytest.raises(ConfigError, match="no run 'other'"):
        find_run(project, "other")
    assert rounds_of(run) == []


def test_one_serverapp_alone_works_on_a_run(run: RunFolder) -> None:
    with run.lock(), pytest.raises(ConfigError, match="another ServerApp"), run.lock():
        pass
    with run.lock():
        pass


def test_evidence_survives_a_kill_and_a_half_written_record_is_cut_off(tmp_path: Path) -> None:
    spool = DurableSpool(tmp_path)
    for record in (b"one", b"two", b"one"):
        spool.keep(record)
    spool.close()
    log = tmp_path / "records.bin"
    whole = log.read_bytes()
    log.write_bytes(whole + b"\x09\x00\x00\x00half")
    again = DurableSpool(tmp_path)
    assert again.records == (b"one", b"two")
    assert log.read_bytes() == whole
    again.keep(b"three")
    again.close()
    with closing(DurableSpool(tmp_path)) as last:
        assert last.records == (b"one", b"two", b"three")
