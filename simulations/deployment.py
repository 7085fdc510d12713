"""A project with pretended hospitals on this machine, as the real processes of a deployment.

Used by the benchmark of the deployment engine, the fault matrix and tests. Every process is started
by the product's own commands in folders of its own, on free ports of loopback, and ended by its
process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from client import enrolment
from client.config import SiteFolder
from server import provision
from server.project import Project, ProjectSettings
from server.runs import all_runs
from shared.errors import FedwardError
from shared.plan import StudyPlan
from shared.supervise import environment, free_port, read_health
from shared.version import fedward_version
from simulations.hospitals import Hospital, load_hospitals
from simulations.scenario import Scenario, load_scenario, plan_toml
from simulations.sites import approve, write_sites

ROOT = Path(__file__).resolve().parent.parent
NODE_FILES = ("node_key", "node_key.pub", "kit.json", "coordinator.json", "request.json")


def wait_for(
    what: str, check: Callable[[], Any], timeout_s: float = 180.0, every_s: float = 0.2
) -> Any:
    """What `check` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(every_s)
    raise FedwardError(f"waited {timeout_s:.0f} s for {what}")


def breast_cancer(rounds: int, timeout_s: float = 90.0, **training: Any) -> Scenario:
    """The default scenario of four sites, with few rounds, and counts as real sites give them."""
    scenario = load_scenario("breast_cancer")
    changed = replace(scenario.plan.training, rounds=rounds, round_timeout_s=timeout_s, **training)
    noised = replace(scenario.plan.evaluation, release="noised", bins=16, epsilon=1.0)
    return replace(scenario, plan=replace(scenario.plan, training=changed, evaluation=noised))


@dataclass
class Process:
    """A command that a test started, and all that it printed."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.popen.poll() is not None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, wait, and return its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(30)


def command(log: Path, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Process:
    """Start `python -m ...`."""
    inherited = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as target:
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.STDOUT,
            env=inherited | dict(env or {}),
        )
    return Process(popen, log)


@dataclass
class Deployment:
    """A project with its sites enrolled; nothing runs yet."""

    base: Path
    scenario: Scenario
    hospitals: tuple[Hospital, ...]
    project: Project
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def plan(self) -> StudyPlan:
        """The study's plan."""
        return self.scenario.plan

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return self.plan.cohort.names

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.base / "sites" / name

    def start_server(self) -> Process:
        """`fedward-server up`, until its SuperLink answers."""
        process = command(
            self.base / "server.out",
            *("server.cli", "up", "--project", str(self.project.path)),
            cwd=self.base,
        )
        self.processes["server"] = process
        wait_for("the SuperLink", self._link_answers)
        return process

    def _link_answers(self) -> bool:
        health = self.health()
        if self.processes["server"].popen.poll() is not None:
            raise FedwardError(self.processes["server"].text)
        return health is not None and health["problem"] == ""

    def health(self) -> dict[str, Any] | None:
        """The server's health file."""
        return read_health(self.project.path / "health.json")

    def start_site(
        self, name: str, env: Mapping[str, str] | None = None, *, stock: bool = False
    ) -> Process:
        """`fedward-site up`, or Flower's own command, as it comes, for comparison."""
        arguments = ["client.cli", "--site", str(self.site(name)), "up"]
        if stock:
            arguments = ["shared.child", *self._stock(name)]
            env = environment(self.site(name) / "flower") | dict(env or {})
        process = command(self.base / f"{name}.out", *arguments, cwd=self.base, env=env)
        self.processes[name] = process
        return process

    def _stock(self, name: str) -> Iterator[str]:
        folder = SiteFolder(self.site(name))
        yield "flwr.supernode.cli:flower_supernode"
        yield from ("--superlink", folder.kit().server)
        yield from ("--root-certificates", str(folder.ca_certificate))
        yield from ("--auth-supernode-private-key", str(folder.node_key))
        yield from ("--host", "127.0.0.1", "--port", str(free_port()))
        yield from ("--node-config", f"state-dir={json.dumps(str(folder.path))}")

    def online(self) -> set[str]:
        """The sites that the SuperLink calls online."""
        health = self.health() or {"sites": {}}
        return {name for name, site in health["sites"].items() if site["status"] == "online"}

    def start_all(self) -> None:
        """The server and all sites, until all are online."""
        self.start_server()
        for name in self.names:
            self.start_site(name)
        wait_for("all sites", lambda: self.online() == set(self.names), 600)

    def run(self, *arguments: str) -> Process:
        """`fedward-server run ...`, in the background, until it has named the run's folder."""
        process = command(
            self.base / f"run-{len(self.processes)}.out",
            *("server.cli", "run", *arguments, "--project", str(self.project.path)),
            cwd=self.base,
        )
        self.processes[f"run-{len(self.processes)}"] = process
        wait_for("the run's folder", lambda: "Run " in process.text or process.ended)
        return process

    @property
    def plan_file(self) -> Path:
        """The plan as a file."""
        return self.base / "plan.toml"

    def latest_run(self) -> Path:
        """The folder of the latest run."""
        return all_runs(self.project)[-1].path

    def approve(self) -> None:
        """What `fedward-site approve` does, at every site: one run each."""
        for hospital in self.hospitals:
            approve(SiteFolder(self.site(hospital.name)), self.plan)

    def rounds(self) -> list[dict[str, Any]]:
        """rounds.jsonl of the latest run."""
        file = self.latest_run() / "rounds.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [dict(json.loads(line)) for line in lines]

    def status(self) -> dict[str, Any]:
        """status.json of the latest run."""
        file = self.latest_run() / "status.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def site_pid(self, name: str, process: str) -> int:
        """The process id of a site's supernode or worker."""
        return _pid(read_health(self.site(name) / "health.json"), process)

    def server_pid(self, process: str) -> int:
        """The process id of one of the server's processes."""
        return _pid(self.health(), process)

    def end_all(self) -> None:
        """End every command that was started, sites first."""
        for process in reversed(self.processes.values()):
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self.processes.values():
            try:
                process.popen.wait(40)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()

    def words(self) -> str:
        """Everything that was logged, for a failed test's message."""
        files = [*self.base.glob("*.out"), *self.base.glob("*/logs/*.log")]
        files += self.base.glob("sites/*/logs/*.log")
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


def _pid(health: dict[str, Any] | None, process: str) -> int:
    if health is None:
        raise FedwardError(f"{process} does not run")
    return int(health["processes"][process]["pid"])


def build(base: Path, scenario: Scenario, *, behind: int | None = None) -> Deployment:
    """Enrol every site of a scenario in a new project, with policy, data and approval.

    Args:
        base: A new folder.
        scenario: Hospitals and plan.
        behind: A port of loopback where the sites think the server is.
    """
    plan, now = scenario.plan, time.time()
    address = f"127.0.0.1:{free_port()}"
    advertised = address if behind is None else f"127.0.0.1:{behind}"
    settings = ProjectSettings(
        schema="fedward-project/1",
        name="trial",
        advertise=advertised,
        bind=address,
        expires="2099-12-31",
        requires_fedward=f"=={fedward_version()}",
    )
    project = provision.init(base / "project", settings, now)
    enrolled = {}
    for name in plan.cohort.names:
        folder = SiteFolder(base / "enrolled" / name)
        invitation = provision.invite(project, name, now)
        request = enrolment.enrol(folder, invitation, now)
        provision.approve(project, request, now)
        enrolment.join(folder, (project.site_folder(name) / "kit.json").read_bytes(), now)
        enrolled[name] = folder
    hospitals = load_hospitals(scenario.simulation, plan)
    identities = {name: folder.identity() for name, folder in enrolled.items()}
    write_sites(
        base / "sites",
        plan,
        hospitals,
        seed=scenario.simulation.seed,
        device="cpu",
        identities=identities,
    )
    for name, folder in enrolled.items():
        target = base / "sites" / name
        (folder.path / "tls").rename(target / "tls")
        for file in NODE_FILES:
            (folder.path / file).rename(target / file)
        _raise_cap(target / "policy.toml")
    (base / "plan.toml").write_text(plan_toml(plan), encoding="utf-8")
    return Deployment(base, scenario, hospitals, project)


def _raise_cap(policy: Path) -> None:
    """Let one site take part in several studies, one after another."""
    lines = policy.read_text().splitlines()
    raised = ("max_epsilon", "max_epsilon_alone")
    kept = [line for line in lines if line.split(" = ")[0] not in raised]
    caps = [f"{name} = 1000.0" for name in raised]
    policy.write_text("\n".join([*kept, *caps, ""]), encoding="utf-8")


@contextmanager
def deployed(base: Path, scenario: Scenario, *, behind: int | None = None) -> Iterator[Deployment]:
    """A new deployment whose processes all end with the block."""
    with _ending(build(base, scenario, behind=behind)) as deployment:
        yield deployment


@contextmanager
def reopened(base: Path, scenario: Scenario) -> Iterator[Deployment]:
    """One that `build` has made before, of the same scenario."""
    hospitals = load_hospitals(scenario.simulation, scenario.plan)
    with _ending(Deployment(base, scenario, hospitals, Project(base / "project"))) as deployment:
        yield deployment


@contextmanager
def _ending(deployment: Deployment) -> Iterator[Deployment]:
    try:
        yield deployment
    except BaseException:
        print(deployment.words())
        raise
    finally:
        deployment.end_all()
