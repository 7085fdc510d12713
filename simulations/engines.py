"""The engines that carry a simulated study: this process, or Flower's on Ray."""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
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


@dataclass(frozen=True)
class SiteShare:
    """What one pretended site may use of the machine, where several train at once."""

    cores: int
    gpus: float

    @classmethod
    def of(cls, sites: int, *, cores: int, gpus: int) -> SiteShare:
        """An even share: at least one core, at most one GPU; sites that find no room wait.

        Args:
            sites: How many train at once, 1 or more.
            cores: Of the machine.
            gpus: Of the machine that the sites may use.
        """
        part = min(1.0, math.floor(1000 * gpus / sites) / 1000)
        return cls(cores=max(1, cores // sites), gpus=part)


def run_on_ray(server_app: ServerApp, folders: dict[str, Path], device: str = "cpu") -> None:
    """Run both apps on Flower's simulation engine; Ray listens on all network interfaces.

    Sites train at once, each on its share of the cores and GPUs, with as many torch threads.

    Args:
        server_app: The study's ServerApp.
        folders: Folder of each site by name.
        device: What the sites train on: auto, cpu or cuda.

    Raises:
        FedwardError: the engine failed; an error of the study itself comes through as it is.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415  # Ray takes seconds to import

    names = sorted(folders)
    paths = [str(folders[name].resolve()) for name in names]
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    share = SiteShare.of(len(names), cores=os.cpu_count() or 1, gpus=gpus)
    threads = min(share.cores, torch.get_num_threads())
    client_app = make_client_app(functools.partial(_folder_of_partition, paths, threads))
    backend: BackendConfig = {
        "init_args": {"include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": share.cores, "num_gpus": share.gpus},
    }
    with _quiet_flower():
        try:
            run_simulation(server_app, client_app, len(names), backend_config=backend)
        except RuntimeError as error:
            raise FedwardError(
                f"Flower's Ray engine failed: {error} Use --engine in-process."
            ) from error


def _folder_of_partition(paths: list[str], threads: int, context: Context) -> Path:
    """The site of a message; called in the worker process that will train it."""
    torch.set_num_threads(threads)
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
