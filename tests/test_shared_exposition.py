"""Metrics: the text that Prometheus reads, on loopback, and nothing about patients."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import httpx
import pytest
from site_cases import make_site

from client.cli import main as site_main
from client.config import SiteFolder
from client.site_metrics import Tally, site_metrics, tally_file
from server.project import Project
from server.project_metrics import project_metrics
from server.run_folder import RunFolder
from shared.errors import ConfigError
from shared.exposition import Metric, exposition, metrics_address, serve_metrics
from shared.kit import Address

PAIR = r'[a-z]+="([^"\\\n]|\\["\\n])*"'
LINE = re.compile(rf"[a-z_]+(\{{{PAIR}(,{PAIR})*\}})? -?\d+(\.\d+)?(e[+-]?\d+)?")
HEALTH = {
    "processes": {
        "worker": {"pid": 12, "running_s": 3.5, "restarts": 2, "last_exit": -9},
        "supernode": {"pid": None, "running_s": 0.0, "restarts": 0, "last_exit": None},
    },
    "sites": {"city": {"status": "online", "since": ""}, "rural": {"status": "offline"}},
}


def samples(text: str) -> dict[str, float]:
    """Name and labels to value, after every line was checked against the format."""
    found = {}
    for line in text.splitlines():
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ (gauge|counter))", line)
            continue
        assert LINE.fullmatch(line), line
        name, _, value = line.rpartition(" ")
        found[name] = float(value)
    return found


def test_metrics_of_one_name_stand_together_under_one_type() -> None:
    metrics = [
        Metric("a", "first", 1, labels={"x": "1"}),
        Metric("b", "second", 2, "counter"),
        Metric("a", "first", 3, labels={"x": "2"}),
    ]
    lines = exposition(metrics).splitlines()
    assert lines[:4] == ["# HELP a first", "# TYPE a gauge", 'a{x="1"} 1.0', 'a{x="2"} 3.0']


def test_a_label_cannot_break_out_of_its_quotes() -> None:
    text = exposition([Metric("a", "h\nB 1", 1, labels={"x": 'q"\n\\evil 9'})])
    assert list(samples(text).values()) == [1.0]


def test_a_port_alone_means_loopback() -> None:
    assert metrics_address("9464") == Address("127.0.0.1", 9464)
    assert metrics_address("10.0.0.1:9464") == Address("10.0.0.1", 9464)
    with pytest.raises(ConfigError):
        metrics_address("elsewhere")


def _free() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1])


def test_it_answers_one_path_and_nothing_after_the_block() -> None:
    where = _free()
    with serve_metrics(where, lambda: [Metric("up", "Runs.", 1)]):
        answer = httpx.get(f"http://{where}/metrics")
        assert samples(answer.text) == {"up": 1.0}
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert httpx.get(f"http://{where}/other").status_code == 404
        assert httpx.post(f"http://{where}/metrics").status_code == 501
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{where}/metrics")


def test_an_address_that_is_taken_is_said() -> None:
    where = _free()
    with (
        serve_metrics(where, list),
        pytest.raises(ConfigError, match=str(where.port)),
        serve_metrics(where, list),
    ):
        pass


def test_a_wrong_address_on_the_command_line_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site_main(["--site", str(tmp_path), "up", "--metrics", "nowhere"]) == 2
    assert "host:port" in capsys.readouterr().err


def test_a_site_shows_processes_messages_and_refusals_and_no_patient(tmp_path: Path) -> None:
    folder = SiteFolder(make_site(tmp_path / "site-0"))
    (folder.path / "flower").mkdir()
    tally = Tally(tally_file(folder))
    for seconds in (1.5, 0.5):
        tally.add("round", seconds, 1000.0)
    (folder.path / "refusals.log").write_text("join: PolicyError: patient p-17\n")
    text = exposition(site_metrics(folder, HEALTH))
    found = samples(text)
    assert found['fedward_process_up{process="worker"}'] == 1
    assert found['fedward_process_up{process="supernode"}'] == 0
    assert found['fedward_process_restarts_total{process="worker"}'] == 2
    assert found['fedward_messages_total{action="round"}'] == 2
    assert found['fedward_message_seconds_total{action="round"}'] == 2
    assert found["fedward_refusals_total"] == 1
    assert "p-17" not in text


def test_a_project_shows_sites_and_the_latest_run(tmp_path: Path) -> None:
    project = Project(tmp_path)
    run = RunFolder(tmp_path / "runs" / "trial")
    run.path.mkdir(parents=True)
    record = {"schema": "fedward-run/1", "run_id": "trial", "created": "x", "wait_s": 1.0}
    (run.path / "run.json").write_text(json.dumps(record | {"sites": []}))
    run.tell("waiting", absent=["rural"], round=1, rounds=3)
    ended = {"aborted": "", "wall_s": 2.5, "ended": 7.0, "contributors": ["a", "b", "c"]}
    (run.path / "rounds.jsonl").write_text(json.dumps(ended) + "\n")
    found = samples(exposition(project_metrics(project, HEALTH)))
    assert found['fedward_site_online{site="city"}'] == 1
    assert found['fedward_site_online{site="rural"}'] == 0
    assert found['fedward_run_state{run="trial",state="waiting"}'] == 1
    assert found['fedward_run_state{run="trial",state="running"}'] == 0
    assert found['fedward_run_absent_sites{run="trial"}'] == 1
    assert found['fedward_round_seconds{run="trial"}'] == 2.5
    assert found['fedward_round_contributors{run="trial"}'] == 3
