"""DEPLOY.md, followed to the letter: three sites from nothing to a finished study.

The server listens on 127.0.0.2, which is no name that children keep from a proxy: west goes out
through the hospital's forward proxy, south through a firewall that opens TLS.

Every block marked `sh` or `toml` is run or applied in the order of the page. People are played:
files are mailed from folder to folder, and a question about a fingerprint is answered with what the
other side's own folder says.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tls_cases import forward_proxy, opening_proxy, write_authority, write_certificate

from client.cli import main as site_main
from client.config import SiteFolder
from server.cli import main as server_main
from server.project import Project
from shared.supervise import read_health
from simulations.deployment import ROOT, Process, command, free_port, wait_for

GUIDE = ROOT / "DEPLOY.md"
NAMES = ("north", "south", "west")
HOST = "127.0.0.2"
BLOCK = re.compile(r"^```(\w+) ([^\n]+)\n(.*?)^```$", re.M | re.S)
MODULES = {"fedward-server": "server.cli", "fedward-site": "client.cli"}


class Guide:
    """The people who follow the page, each in a folder of his own."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.monkeypatch = base, monkeypatch
        self.desk = base / "coordinator"
        self.places = {name: base / name for name in NAMES}
        for place in (self.desk, *self.places.values()):
            place.mkdir()
        self.address = f"{HOST}:{free_port()}"
        self.networks: dict[str, str] = {}
        self.processes: list[Process] = []
        self.counted: Counter[str] = Counter()
        self.looked: list[int] = []
        self.looks: list[str] = []
        self.rosters: dict[str, str] = {}

    @property
    def project(self) -> Project:
        return Project(self.base / "coordinator" / "ward")

    def site(self, name: str) -> SiteFolder:
        return SiteFolder(self.places[name] / "fedward-site")

    def follow(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Do what the page says, block by block."""
        self.monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        self.monkeypatch.setattr("builtins.input", self.answer)
        page = GUIDE.read_text(encoding="utf-8").replace("fl.example.org:8443", self.address)
        page = page.replace("0.0.0.0:8443", self.address)
        for language, title, text in BLOCK.findall(page):
            if language == "toml":
                self.write(title, text)
                continue
            assert language == "sh", language
            for line in text.strip().splitlines():
                self.do(title, line, capsys)
            self.mail()

    def do(self, title: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        if title == "site look":
            self.looks.append(line)
        elif title == "coordinator":
            self.at_the_desk(line)
        elif title == "coordinator each":
            for name in NAMES:
                self.at_the_desk(line.replace("SITE", name))
        else:
            assert title == "site", title
            for name in NAMES:
                self.counted[name] += 1
                self.at_a_site(name, line.replace("SITE", name), capsys)

    def at_the_desk(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] == "cd":
            self.desk = self.desk / words[1]
            return
        assert words[0] == "fedward-server"
        if words[1] == "up":
            self.start("server", self.desk, words)
            wait_for("the server", lambda: self.online() == set(NAMES), 600)
        elif words[1] == "run":
            for name in NAMES:
                for look in self.looks:
                    self.looked.append(self.ran(name, look))
            process = self.start("run", self.desk, words)
            assert process.popen.wait(300) == 0, process.text
            self.processes.remove(process)
        else:
            self.monkeypatch.chdir(self.desk)
            assert server_main(words[1:]) == 0, line

    def at_a_site(self, name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        words = shlex.split(line)
        assert words[0] == "fedward-site"
        if words[1] == "up":
            self.start(name, self.places[name], words, FEDWARD_SITE=str(self.site(name).path))
            return
        capsys.readouterr()
        assert self.ran(name, line) == 0, (name, line, capsys.readouterr().err)
        found = re.search(r"^\s*(roster = \[.*\])$", capsys.readouterr().out, re.M)
        if found:
            self.rosters[name] = found[1]

    def ran(self, name: str, line: str) -> int:
        self.monkeypatch.chdir(self.places[name])
        self.monkeypatch.setenv("FEDWARD_SITE", str(self.site(name).path))
        return site_main(shlex.split(line)[1:])

    def start(self, log: str, cwd: Path, words: list[str], **env: str) -> Process:
        process = command(self.base / f"{log}.out", MODULES[words[0]], *words[1:], cwd=cwd, env=env)
        self.processes.append(process)
        return process

    def online(self) -> set[str]:
        ended = [p.log.name for p in self.processes if p.popen.poll() is not None]
        assert not ended
        health = read_health(self.project.path / "health.json") or {"sites": {}}
        return {name for name, site in health["sites"].items() if site["status"] == "online"}

    def write(self, title: str, text: str) -> None:
        """What people put into a file."""
        if title == "plan.toml":
            for place in (self.desk, *self.places.values()):
                (place / title).write_text(text)
            return
        for name in NAMES:
            file = self.site(name).path / title
            if title == "site.toml":
                file.write_text(file.read_text() + text + self.networks.get(name, ""))
                write_ward(self.site(name).path / "ward.csv", NAMES.index(name))
                continue
            assert title == "policy.toml"
            for line in (*text.strip().splitlines(), self.rosters[name]):
                key = line.split(" = ")[0]
                pattern = re.compile(rf"^{key} = .*$", re.M)
                assert len(pattern.findall(file.read_text())) == 1, key
                file.write_text(pattern.sub(lambda _, line=line: line, file.read_text()))

    def mail(self) -> None:
        """What was written for the others reaches them."""
        for place in self.places.values():
            for pattern in ("*.invitation.json", "*.kit.json"):
                for file in self.desk.glob(pattern):
                    (place / file.name).write_bytes(file.read_bytes())
            for file in place.glob("*.request.json"):
                (self.desk / file.name).write_bytes(file.read_bytes())

    def answer(self, prompt: str) -> str:
        """What is heard on the telephone, from whoever is called; or what is typed to agree."""
        if agreed := re.search(r"Type (\w+) to approve", prompt):
            return agreed[1]
        called = re.match(r"Call (?:site )?([\w ]+)\.", prompt)
        assert called, prompt
        if called[1] == "the coordinator":
            return self.project.identity().fingerprint[-4:]
        return self.site(called[1]).identity().fingerprint[-4:]

    def end(self) -> None:
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self.processes:
            process.popen.wait(120)

    def words(self) -> str:
        files = [*self.base.glob("*.out"), *self.base.rglob("logs/*.log")]
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-2000:]}" for f in files)


def write_ward(path: Path, seed: int) -> None:
    """A hospital's export: one row for each of 240 patients, two of some."""
    random = np.random.default_rng(seed)
    rows = ["MRN,age,systolic,outcome"]
    for number in [*range(240), *range(40)]:
        age, systolic = random.integers(20, 95), random.integers(80, 200)
        dead = random.random() < 1 / (1 + np.exp(-(age - 70) / 8))
        rows.append(f"{seed}-{number:04},{age},{systolic},{'dead' if dead else 'alive'}")
    path.write_text("\n".join(rows))


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guide]:
    made = Guide(tmp_path, monkeypatch)
    try:
        yield made
    finally:
        made.end()
        sys.stdout.write(made.words())  # seen where the test failed


@pytest.mark.slow
def test_three_sites_get_from_nothing_to_a_finished_study(
    guide: Guide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    firewall = write_authority(tmp_path / "firewall", "hospital")
    forged = write_certificate(tmp_path / "forged", firewall, host=HOST)
    with (
        forward_proxy() as (proxy, asked),
        opening_proxy(forged, guide.project.ca_certificate) as (opener, read),
    ):
        guide.networks = {
            "west": f'\n[network]\nproxy = "{proxy}"\n',
            "south": f'\n[network]\nproxy = "{opener}"\nca_bundle = "{firewall[1]}"\n',
        }
        guide.follow(capsys)
        finished(guide)
        assert set(asked) == {guide.address}
        assert any(b"/v1/fleet/push" in data for data in read)
        revoked(guide)


def finished(guide: Guide) -> None:
    """Everybody holds what the page promises."""
    assert guide.counted == dict.fromkeys(NAMES, 4)
    assert guide.looked == [0] * len(NAMES)  # `check`, with the server up: nothing is red
    runs = list((guide.project.path / "runs").iterdir())
    assert len(runs) == 1
    assert (runs[0] / "report.html").exists()
    results = json.loads((runs[0] / "results.json").read_text())
    assert results["engine"] == "deployment"
    for name in NAMES:
        assert guide.ran(name, "fedward-site log verify") == 0
        folder = guide.site(name)
        journal = folder.journal(folder.config(), folder.identity())
        assert journal is not None
        lines = list(journal.lines())
        commands = [line["command"] for line in lines if line["kind"] == "command"]
        assert commands == ["enrol", "join", "approve"]
        actions = {line["action"] for line in lines if line["kind"] == "message"}
        assert {"join", "round", "finish"} <= actions
        steps = sum(c["steps"] for line in lines for c in line.get("cost", ()))
        assert steps == 8, name  # four rounds of two steps, each charged once


def revoked(guide: Guide) -> None:
    """Section 9: a site that is revoked is out of the running server and of the next study."""
    guide.at_the_desk("fedward-server project revoke west --reason test")
    wait_for("west to be refused", lambda: guide.online() == {"north", "south"}, 300)
    log = guide.site("west").path / "logs" / "supernode.log"
    wait_for("west to notice", lambda: "Failed to initialize" in log.read_text(), 300)
    again = guide.start("again", guide.desk, ["fedward-server", "run", "plan.toml"])
    assert again.popen.wait(300) == 2
    assert "west" in again.text
    guide.processes.remove(again)


def test_the_guide_names_only_commands_and_files_that_exist() -> None:
    """Commands in the text, not only in the blocks that are run."""
    text = GUIDE.read_text(encoding="utf-8")
    for program, main in (("fedward-server", server_main), ("fedward-site", site_main)):
        for found in set(re.findall(rf"{program} ((?:[a-z][a-z-]+ ?)+)", text)):
            words = found.split()
            while words:  # the longest beginning that is a command has help
                with pytest.raises(SystemExit) as ended:
                    main([*words, "--help"])
                if ended.value.code == 0:
                    break
                words = words[:-1]
            assert words, f"{program} {found}"
