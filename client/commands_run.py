"""up, status: a site's processes."""

from __future__ import annotations

import argparse
from typing import Any

from client.config import SiteFolder
from client.up import health_file, up
from shared.exposition import metrics_address
from shared.supervise import log_to_terminal, read_health

Commands = argparse._SubParsersAction  # argparse gives it no public name


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add this file's commands to fedward-site."""
    up = commands.add_parser(
        "up",
        help="take part until Ctrl-C or SIGTERM",
        description="Connects to the project's server, outwards only, and answers what the policy "
        "and the approvals allow. Whatever ends is started again.",
    )
    up.add_argument(
        "--metrics",
        metavar="PORT",
        help="answer GET /metrics for Prometheus there, on loopback (or HOST:PORT)",
    )
    up.set_defaults(command=_up)
    status = commands.add_parser("status", help="processes, and what was refused lately")
    status.set_defaults(command=_status)


def _up(arguments: argparse.Namespace) -> int:
    metrics = metrics_address(arguments.metrics) if arguments.metrics else None
    folder = SiteFolder(arguments.site)
    log_to_terminal()
    kit = folder.kit()
    print(
        f"Site {kit.site} of project {kit.project}: connecting to {kit.server}. "
        f"Logs in {folder.path / 'logs'}. Ctrl-C ends everything.",
        flush=True,
    )
    up(folder, metrics)
    print("Stopped; nothing is left running.")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    config = folder.config()
    health = read_health(health_file(folder))
    print(f"Site {config.name} in {folder.path.resolve()}")
    if health is None:
        print("It is not running. Start it: fedward-site up")
        return 0
    for name, process in health["processes"].items():
        print(f"{name:<12} {_process(process)}")
    refusals = folder.path / "refusals.log"
    if refusals.exists():
        print("\nRefused lately:")
        for line in refusals.read_text(encoding="utf-8").splitlines()[-5:]:
            print(f"  {line}")
    return 0


def _process(process: dict[str, Any]) -> str:
    state = f"running {process['running_s']:.0f} s" if process["pid"] else "not running"
    again = process["restarts"]
    return state + (f", started again {again} times" if again else "")
