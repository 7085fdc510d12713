"""Flower's server processes: their command lines, and the calls that start and list runs.

superlink  Flower's SuperLink on loopback: TLS, SuperNode authentication, a database; it hands
           the ServerApp's task only to a process that knows the secret
serverapp  Flower's SuperExec, which starts the ServerApp of each run
proxy      the outside's only way in, see server/proxy.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.project import Project
from shared.bundle import RUN_FOLDER, build_bundle
from shared.errors import FedwardError
from shared.kit import load_node_key
from shared.supervise import LOOPBACK, Child

SERVERAPP_POLL_S = "0.5"


def children(project: Project, link_port: int) -> tuple[Child, ...]:
    """The processes of `fedward-server up`, in the order in which they start.

    Args:
        project: The coordinator's folder.
        link_port: Where the SuperLink listens, on loopback.
    """
    link = f"{LOOPBACK}:{link_port}"
    files = (project.ca_certificate, project.tls_certificate, project.tls_key)
    authority, certificate, key = (str(file.resolve()) for file in files)
    secret = str(project.superexec_secret.resolve())
    superlink = Child(
        "superlink",
        "flwr.superlink.cli:flower_superlink",
        (
            *("--host", LOOPBACK, "--port", str(link_port)),
            *("--ssl-ca-certfile", authority),
            *("--ssl-certfile", certificate, "--ssl-keyfile", key),
            "--enable-supernode-auth",
            *("--database", str(project.database.resolve())),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            "--disable-runtime-dependency-installation",
        ),
        unlogged="[uvicorn.access]",
    )
    serverapp = Child(
        "serverapp",
        "flwr.supercore.cli:flower_superexec",
        (
            *("--root-certificates", authority, "--runtime-api-address", link),
            *("--superexec-auth-secret-file", secret),
        ),
        env={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": SERVERAPP_POLL_S},
    )
    bind = project.bind
    outside = (bind.host, str(bind.port), f"https://{link}", authority, certificate, key)
    return superlink, serverapp, Child("proxy", "server.proxy:main", outside)


@dataclass(frozen=True)
class LinkNode:
    """A SuperNode as the SuperLink knows it.

    Attributes:
        public_key: Bytes in Flower's own form; see `node_key_bytes`.
        status: registered, online, offline or unregistered.
        since: When it last came online, ISO 8601, or "".
    """

    node_id: int
    public_key: bytes
    status: str
    since: str


def node_key_bytes(openssh: str) -> bytes:
    """A site's node key, from a kit's text to the form in which the SuperLink knows it."""
    return public_key_to_bytes(load_node_key(openssh))


class Link:
    """The running SuperLink's Control interface, on this machine's loopback."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> tuple[LinkNode, ...]:
        """Every SuperNode that is registered."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return tuple(
            LinkNode(n.node_id, bytes(n.public_key), n.status, n.last_activated_at)
            for n in found
            if n.status != "unregistered"
        )

    def admit(self, keys: Mapping[str, bytes]) -> tuple[LinkNode, ...]:
        """Register these SuperNodes and no others: name to public key in the link's form.

        Returns:
            Those that it found; one that it registered just now is among them the next time.
        """
        nodes = self.nodes()
        known = {node.public_key: node.node_id for node in nodes}
        for public, node_id in known.items():
            if public not in keys.values():
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        for name, public in keys.items():
            if public not in known:
                self._client.RegisterNode(RegisterNodeRequest(public_key=public, name=name))
        return nodes

    def start(self, run_folder: Path) -> int:
        """Start a Flower run of the installed apps on a run's folder; its Flower run id."""
        fab = build_bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
            override_config=user_config_to_proto({RUN_FOLDER: str(run_folder.resolve())}),
        )
        answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FedwardError("the SuperLink did not start the run; logs/superlink.log says why")
        return int(answer.run_id)

    def stop(self, flower_run: int) -> None:
        """Stop a Flower run."""
        self._client.StopRun(StopRunRequest(run_id=flower_run))

    def run_status(self, flower_run: int) -> str:
        """Such as "running" or "finished:completed"; "" for a run that the SuperLink lacks."""
        runs = self._client.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict
        if flower_run not in runs:
            return ""
        status = runs[flower_run].status
        return f"{status.status}:{status.sub_status}".rstrip(":")


@contextmanager
def connect(project: Project, link_port: int) -> Iterator[Link]:
    """The SuperLink that `fedward-server up` runs.

    Raises:
        FedwardError: it does not answer.
    """
    client = ControlHttpClient.from_server_address(
        server_address=f"{LOOPBACK}:{link_port}",
        insecure=False,
        root_certificates=project.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Link(client)
    except httpx.HTTPStatusError as error:
        raise FedwardError(
            f"the SuperLink refused ({error.response.status_code}); logs/superlink.log says why"
        ) from error
    except httpx.HTTPError as error:
        raise FedwardError(
            f"the SuperLink does not answer ({type(error).__name__}). Is fedward-server up running?"
        ) from error
    finally:
        client.close()
