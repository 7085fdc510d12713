"""The process that answers a site's messages: it stays, with PyTorch loaded and the site open.

Flower starts a new process for every message, unpacks the server's bundle in it and imports
everything anew. This worker takes Flower's place: it asks the SuperNode on this machine for a
task, lets the *installed* ClientApp answer it, and asks again. What must outlive it is in the
site's folder, so it may be killed at any time: the SuperNode then reports an error for the one
message that it held, and the supervisor starts another.

It uses inner parts of Flower 1.41 (named in the imports below); client/hooks.py refuses another
Flower, and tests/test_deployment_core.py runs the worker against this one.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from client.app import app as client_app
from client.app import forget_sites
from client.bell import Bell
from client.site_metrics import Tally
from shared.supervise import log_to_terminal

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
INPUT_S = 300.0
HEARTBEAT_S = 15.0
"""Flower gives a task up after 60 s without one."""
ASK_S = 2.5
"""How often it asks the SuperNode beside it where no bell rings; see client/bell.py."""
AGAIN_S = 0.5
"""After a SuperNode that does not answer."""

_LOG = logging.getLogger("fedward.worker")


def serve(address: str, secret: bytes, tally: Tally, stop: threading.Event, bell: Bell) -> None:
    """Answer the SuperNode's tasks until `stop` is set.

    Args:
        address: host:port of the SuperNode's Runtime API, on this machine's loopback.
        secret: Shared with that SuperNode; a process without it gets no task.
        tally: Counts the messages.
        stop: Checked between two messages.
        bell: Rings when the SuperNode has a message.
    """
    with _client(address, SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({ACQUIRE})
    )) as client:  # fmt: skip
        while not stop.is_set():
            token = _acquire(client)
            if token:
                _answer(address, token, tally)
            else:
                bell.wait(ASK_S)


def _acquire(client: RuntimeHttpClient) -> str:
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    try:
        return str(client.AcquireTask(request).token)
    except httpx.HTTPError as error:
        _LOG.info("the SuperNode does not answer yet (%s)", type(error).__name__)
        time.sleep(AGAIN_S)
        return ""


@contextmanager
def _client(
    address: str, proof: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor
) -> Iterator[RuntimeHttpClient]:
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), proof],
    )
    try:
        yield client
    finally:
        client.close()


def _answer(address: str, token: str, tally: Tally) -> None:
    """Answer one message; if that cannot be said to the SuperNode, the task just runs out."""
    started = time.monotonic()
    with _client(address, RuntimeTokenHttpInterceptor(token)) as client, _heartbeats(client):
        try:
            # The bundle comes along, was checked by the SuperNode, and is not looked at.
            with _limited(INPUT_S):
                message, context, _, _ = pull_task_input(client)
            kind = message.metadata.message_type
            if kind.endswith(".join"):
                forget_sites()  # a new run begins with what the officer wrote by now
            push_message(client, _reply(message, context), context)
            output = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
            client.PushTaskOutput(output)
        except (httpx.HTTPError, RuntimeError, ObjectPullError) as error:
            _LOG.warning("a message went unanswered (%s)", type(error).__name__)
            return
    seconds = time.monotonic() - started
    tally.add(kind.partition(".")[2], seconds, time.time())
    _LOG.info("%s answered in %.2f s", kind, seconds)
    if kind.endswith(".finish"):
        forget_sites()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End this process if the block lasts longer; the supervisor starts another.

    A run that is stopped while its message arrives leaves a task whose message never comes.
    """
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reply(message: Message, context: Context) -> Message:
    try:
        return client_app(message=message, context=context)
    except Exception:
        # Nothing of the exception may leave: its text could hold a path or a value.
        _LOG.exception("the ClientApp failed")
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="refused")
        return Message(error, reply_to=message)


@contextmanager
def _heartbeats(client: RuntimeHttpClient) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _warm_up() -> None:
    """Import what the first round needs, before it comes."""
    importlib.import_module("client.clipping")  # Opacus
    importlib.import_module("client.run")
    importlib.import_module("dp_accounting.pld")
    importlib.import_module("dp_accounting.rdp")


def main() -> None:
    """`worker ADDRESS SECRET_FILE TALLY_FILE`, started by `fedward-site up`."""
    log_to_terminal()
    address, secret_file, tally_file = sys.argv[1:4]
    _warm_up()
    _LOG.info("ready")
    tally = Tally(Path(tally_file))
    bell = Bell.inherited(os.environ) or Bell.new()
    serve(address, Path(secret_file).read_bytes(), tally, threading.Event(), bell)
