"""up, run, watch, status: the coordinator's processes and studies."""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.project import Project
from shared import plan as plans
from shared.errors import ConfigError
from shared.exposition import metrics_address
from shared.supervise import log_to_terminal, read_health

if TYPE_CHECKING:
    from server.run_folder import RunFolder

Commands = argparse._SubParsersAction  # argparse gives it no public name


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add this file's commands to fedward-server."""
    up = commands.add_parser(
        "up",
        help="run the server until Ctrl-C or SIGTERM",
        description="Starts Flower's SuperLink on loopback, the ServerApp's starter, and a TLS "
        "proxy, which alone can be reached from outside. Whatever ends is started again.",
    )
    up.add_argument("folder", nargs="?", type=Path, help="the project's folder (or --project)")
    up.add_argument(
        "--metrics",
        metavar="PORT",
        help="answer GET /metrics for Prometheus there, on loopback (or HOST:PORT)",
    )
    up.set_defaults(command=_up)

    run = commands.add_parser(
        "run",
        help="start a study, or go on with one, and follow it",
        description="Starts a run of a plan that the sites approved. Ctrl-C leaves it running; "
        "`watch` shows it again.",
    )
    run.add_argument("plan", nargs="?", type=Path, help="the study plan, a TOML file")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run from its last round (default: the latest run)",
    )
    run.add_argument(
        "--wait", type=float, default=3600.0, metavar="S",
        help="seconds to wait for absent sites before the study stops (default: 3600)",
    )  # fmt: skip
    run.add_argument("--detach", action="store_true", help="start it and return")
    run.set_defaults(command=_run)

    watch = commands.add_parser("watch", help="follow a run")
    watch.add_argument("run", nargs="?", help="its name (default: the latest)")
    watch.set_defaults(command=_watch)

    status = commands.add_parser("status", help="processes, connected sites, runs")
    status.set_defaults(command=_status)


def _project(arguments: argparse.Namespace) -> Project:
    project = Project(arguments.project)
    project.settings()
    return project


def _up(arguments: argparse.Namespace) -> int:
    from server.up import up  # noqa: PLC0415  # Flower takes seconds to import

    metrics = metrics_address(arguments.metrics) if arguments.metrics else None
    project = Project(arguments.folder or arguments.project)
    settings = project.settings()
    log_to_terminal()
    print(
        f"Project {settings.name}: listening on {settings.bind}, reached as "
        f"{settings.advertise}. Logs in {project.path / 'logs'}. Ctrl-C ends everything.",
        flush=True,
    )
    up(project, metrics)
    print("Stopped; nothing is left running.")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from server.runs import find_run, new_run, start  # noqa: PLC0415
    from server.up import running_link  # noqa: PLC0415

    project = _project(arguments)
    if (arguments.plan is None) == (arguments.resume is None):
        raise ConfigError("give either a PLAN to start, or --resume to go on with a run.")
    plan = plans.load(arguments.plan) if arguments.plan is not None else None
    with running_link(project) as link:
        if plan is None:
            run = find_run(project, arguments.resume or None)
        else:
            run = new_run(project, plan, arguments.wait, time.time())
        start(link, run)
    print(f"Run {run.path.name} in {run.path}", flush=True)
    return 0 if arguments.detach else _follow(project, run)


def _watch(arguments: argparse.Namespace) -> int:
    from server.runs import find_run  # noqa: PLC0415

    project = _project(arguments)
    return _follow(project, find_run(project, arguments.run))


def _follow(project: Project, run: RunFolder) -> int:
    from server.runs import flower_run_status, follow  # noqa: PLC0415

    def flower_status() -> str:
        from server.up import running_link  # noqa: PLC0415

        with running_link(project) as link:
            return flower_run_status(link, run)

    code = 0
    try:
        for step in follow(run, flower_status):
            print(describe(step.kind, step.facts), flush=True)
            code = int(step.facts.get("exit_code", 0))
    except KeyboardInterrupt:
        print(f"\nThe study goes on. Follow it again: fedward-server watch {run.path.name}")
        return 0
    if code == 0:
        print(f"Results: {run.path / 'report.html'}")
    return code


def describe(kind: str, facts: dict[str, Any]) -> str:
    """One line about a step of a run.

    >>> describe("waiting", {"absent": ["city"], "wait_s": 60})
    'waiting for city; stops after 60 s'
    """
    if kind == "round":
        what = "aborted: " + facts["aborted"] if facts["aborted"] else _sum_of(facts)
        stage = (
            f"{facts['model_round'] + 1}/{facts['rounds']}" if facts["trained"] else "evaluation"
        )
        return f"round {facts['round']:>3}  model {stage:>9}  {facts['wall_s']:6.1f} s  {what}"
    if kind == "waiting":
        return f"waiting for {', '.join(facts['absent'])}; stops after {facts['wait_s']:.0f} s"
    if kind == "failed":
        return f"failed: {facts['error']}"
    if kind == "finished":
        withheld = f"; {facts['error']}" if "error" in facts else ""
        return f"finished; model {facts['sha256'][:16]}{withheld}"
    return kind


def _sum_of(facts: dict[str, Any]) -> str:
    text = f"{len(facts['contributors'])} of {len(facts['cohort'])} sites"
    return text + (f", without {', '.join(facts['dropped'])}" if facts["dropped"] else "")


def _status(arguments: argparse.Namespace) -> int:
    from server.runs import all_runs  # noqa: PLC0415

    project = _project(arguments)
    health = read_health(project.health_file)
    if health is None:
        print("The server is not running. Start it: fedward-server up")
    else:
        for name, process in health["processes"].items():
            print(f"{name:<12} {_process(process)}")
        print(f"{'problem':<12} {health['problem']}" if health["problem"] else "")
        print(f"{'site':<24} {'status':<12} since")
        for name, site in sorted(health["sites"].items()):
            print(f"{name:<24} {site['status']:<12} {site['since']}")
    print(f"\n{'run':<52} {'state':<10} {'round':>9}  since")
    for run in all_runs(project):
        status = run.status()
        at = f"{status.get('round', 0)}/{status.get('rounds', '?')}"
        since = datetime.fromtimestamp(status["since"]).strftime("%F %T") if status["since"] else ""
        print(f"{run.path.name:<52} {status['state']:<10} {at:>9}  {since}")
    return 0


def _process(process: dict[str, Any]) -> str:
    state = f"running {process['running_s']:.0f} s" if process["pid"] else "not running"
    again = process["restarts"]
    return state + (f", started again {again} times" if again else "")
