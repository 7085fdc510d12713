"""fedward-server up: the coordinator's processes, kept running; see server/link.py.

PROJECT/flower/       Flower's own files
PROJECT/logs/         superlink.log, serverapp.log, proxy.log
PROJECT/health.json   what runs, since when, and which sites are connected; only while `up` runs
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.link import Link, children, connect, node_key_bytes
from server.project import Project
from server.project_metrics import project_metrics
from shared.errors import ConfigError, FedwardError
from shared.exposition import serve_metrics
from shared.kit import Address
from shared.supervise import Supervisor, alone, environment, free_port, read_health

LOOK_S = 5.0


def up(project: Project, metrics: Address | None = None) -> None:
    """Run the project's server until SIGTERM or Ctrl-C; its processes end with it.

    Args:
        project: The coordinator's folder.
        metrics: Where to answer GET /metrics, or nowhere.

    Raises:
        ConfigError: a file is missing or wrong, or the project runs already.
    """
    _check(project)
    with alone(project.path, "fedward-server up"):
        port = free_port()
        gate = _Gate(project, port)
        supervisor = Supervisor(
            children(project, port),
            logs=project.path / "logs",
            health=project.health_file,
            env=environment(project.path / "flower"),
            facts=gate.facts,
        )
        collect = lambda: project_metrics(project, supervisor.health())  # noqa: E731
        with gate.watching(), serve_metrics(metrics, collect):
            supervisor.run()


@contextmanager
def running_link(project: Project) -> Iterator[Link]:
    """The SuperLink of the `up` that runs now.

    Raises:
        ConfigError: none runs.
    """
    health = read_health(project.health_file)
    if health is None:
        raise ConfigError(
            f"the project's server is not running. Start it: fedward-server up {project.path}"
        )
    with connect(project, int(health["link_port"])) as link:
        yield link


class _Gate:
    """Registers the project's active sites with the SuperLink, and removes all others."""

    def __init__(self, project: Project, port: int) -> None:
        self._project, self._port = project, port
        self._stop = threading.Event()
        self._sites: dict[str, dict[str, Any]] = {}
        self._problem = "the SuperLink is starting"

    def facts(self) -> dict[str, Any]:
        """For the health file."""
        return {"link_port": self._port, "sites": self._sites, "problem": self._problem}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look every few seconds, in a thread: sites come and are revoked while the server runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                with connect(self._project, self._port) as link:
                    while not self._stop.is_set():
                        self._look(link)
                        self._problem = ""
                        self._stop.wait(LOOK_S)
            except FedwardError as error:
                self._problem = str(error)
                self._stop.wait(1.0)

    def _look(self, link: Link) -> None:
        active = self._project.active(time.time())
        keys = {name: node_key_bytes(site.node_key) for name, site in active.items()}
        nodes = link.admit(keys)
        names = {public: name for name, public in keys.items()}
        self._sites = {
            names[node.public_key]: {"status": node.status, "since": node.since}
            for node in nodes
            if node.public_key in names
        }


def _check(project: Project) -> None:
    project.settings()
    files = (
        *(project.ca_certificate, project.tls_certificate, project.tls_key),
        project.superexec_secret,
    )
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"{file} does not exist. Begin a project: fedward-server project init"
            )
