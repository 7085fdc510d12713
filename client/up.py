"""fedward-site up: the two processes of a site, kept running.

supernode  Flower's SuperNode behind our hooks (client/bundle.py): the only one that speaks to the
           outside, and only outwards
worker     answers messages with the installed ClientApp (client/worker.py)

SITE/flower/       Flower's own files
SITE/logs/         supernode.log, worker.log
SITE/health.json   what runs, since when; there only while `up` runs
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import closing
from pathlib import Path

from client.bell import Bell
from client.config import SiteFolder
from client.hooks import check_hooks
from client.site_metrics import site_metrics, tally_file
from shared.errors import ConfigError
from shared.exposition import serve_metrics
from shared.kit import Address
from shared.supervise import LOOPBACK, Child, Supervisor, alone, environment, free_port


def health_file(folder: SiteFolder) -> Path:
    """There while `up` runs."""
    return folder.path / "health.json"


def children(folder: SiteFolder, port: int, bell: Bell) -> tuple[Child, ...]:
    """The processes of `fedward-site up`.

    Args:
        folder: The site's.
        port: Where the SuperNode listens for the worker, on loopback.
        bell: From the SuperNode to the worker.
    """
    config = folder.config()
    path, secret = folder.path.resolve(), str(_secret_file(folder).resolve())
    authority = str(folder.root_certificates(config).resolve())
    supernode = Child(
        "supernode",
        "client.bundle:supernode",
        (
            *("--superlink", folder.kit().server, "--root-certificates", authority),
            *("--auth-supernode-private-key", str(folder.node_key.resolve())),
            *("--host", LOOPBACK, "--port", str(port)),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            *("--node-config", f"state-dir={json.dumps(str(path))}"),
        ),
        env=folder.network_environment(config) | bell.environment,
        descriptors=bell.descriptors,
    )
    tally = str(tally_file(folder).resolve())
    worker = Child(
        "worker",
        "client.worker:main",
        (f"{LOOPBACK}:{port}", secret, tally),
        env=bell.environment,
        descriptors=bell.descriptors,
    )
    return supernode, worker


def up(folder: SiteFolder, metrics: Address | None = None) -> None:
    """Run the site until SIGTERM or Ctrl-C; both processes have ended when this returns.

    Args:
        folder: The site's.
        metrics: Where to answer GET /metrics, or nowhere.

    Raises:
        ConfigError: a file is missing or wrong, Flower is another, or the site runs already.
        PolicyError: policy.toml is missing or unusable.
    """
    _check(folder)
    with alone(folder.path, "fedward-site up"), closing(Bell.new()) as bell:
        env = environment(folder.path / "flower")
        _write_secret(_secret_file(folder))
        supervisor = Supervisor(
            children(folder, free_port(), bell),
            logs=folder.path / "logs",
            health=health_file(folder),
            env=env,
        )
        with serve_metrics(metrics, lambda: site_metrics(folder, supervisor.health())):
            supervisor.run()


def _check(folder: SiteFolder) -> None:
    """Whatever the processes would stumble over again and again is said once, here."""
    config = folder.config()
    books = folder.books(config, folder.identity())
    try:
        books.policy.read()
    finally:
        books.close()
    for file, remedy in (
        (folder.node_key, "enrol the site: fedward-site enrol"),
        (folder.ca_certificate, "join the project with its kit: fedward-site join"),
    ):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; {remedy}.")
    check_hooks()


def _secret_file(folder: SiteFolder) -> Path:
    """What the SuperNode and the worker share; made anew at each start."""
    return folder.path / "flower" / "worker.secret"


def _write_secret(file: Path) -> None:
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as target:
        target.write(secrets.token_hex(32))
