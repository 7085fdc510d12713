"""The engines that carry a simulated study: this process, or Flower's on Ray."""

from __future__ import annotations

import functools
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import ServerApp

from client.app import make_client_app
from shared.errors import FedwardError
from simulations.grid import FaultHook, InProcessGrid, no_faults

ENGINES = ("in-process", "ray")


def run_in_process(
    server_app: ServerApp, folders: dict[str, Path], faults: FaultHook = no_faults
) -> None:
    """Run both apps in this process, one message after another.

    Args:
        server_app: The study's ServerApp.
        folders: Folder of each site by name.
        faults: What goes wrong on the way; see `simulations.grid`.
    """
    run_id = secrets.randbits(63)
    contexts = {
        name: Context(
            run_id=run_id,
            node_id=number,
            node_config={"state-dir": str(folder)},
            state=RecordDict(),
            run_config={},
        )
        for number, (name, folder) in enumerate(sorted(folders.items()), start=2)
    }
    grid = InProcessGrid(make_client_app(), contexts, faults)
    server = Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config={})
    server_app(grid, server)


def run_on_ray(server_app: ServerApp, folders: dict[str, Path]) -> None:
    """Run both apps on Flower's simulation engine; Ray listens on all network interfaces.

    Raises:
        FedwardError: the engine failed; an error of the study itself comes through as it is.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415  # Ray takes seconds to import

    names = sorted(folders)
    paths = [str(folders[name].resolve()) for name in names]
    client_app = make_client_app(functools.partial(_folder_of_partition, paths))
    cpus = max(1, (os.cpu_count() or 1) // len(names))
    backend: BackendConfig = {
        "init_args": {"include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
    }
    with _quiet_flower():
        try:
            run_simulation(server_app, client_app, len(names), backend_config=backend)
        except RuntimeError as error:
            raise FedwardError(
                f"Flower's Ray engine failed: {error} Use --engine in-process."
            ) from error


def _folder_of_partition(paths: list[str], context: Context) -> Path:
    return Path(paths[int(context.node_config["partition-id"])])


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs every message; a study has its own progress line."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
