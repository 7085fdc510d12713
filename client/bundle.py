"""Flower's private hooks in the SuperNode: which code may run, how often it asks, what it sends.

Flower would run whatever bundle the SuperLink offers. Here a bundle is refused unless its SHA-256
is that of the installed version's own (shared/bundle.py), and even then nothing is unpacked: the
worker (client/worker.py) runs the installed package. A reply is announced anew where a part of it
was not taken (client/delivery.py), and a message of which nothing more comes is given up. The hooks
belong to Flower 1.41; `check_hooks` refuses to start on a Flower where they are not what they were.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flwr
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException

from client.delivery import Delivery
from client.pace import Pace
from shared.bundle import bundle_sha256
from shared.errors import ConfigError

FLOWER = "1.41."
BUSY_S, IDLE_S, LONGEST_S = 0.25, 2.0, 10.0
"""How often the SuperNode asks the server; see client/pace.py. 10 s come after ten minutes."""
PARTS_S = 20.0
"""For how long no part of a message may come; the server takes one from its own machine."""

_FLOWER_IDLE_S = 3.0
_LOG = logging.getLogger("flwr.fedward")

_INTERNAL = "flwr.supernode.start_client_internal"
_SIGNATURES = {
    "_verify_fab": ("fab", "trusted_entities"),
    "_pull_and_store_message": (
        "state",
        "object_store",
        "node_config",
        "receive",
        "get_run",
        "get_fab",
        "pull_object",
        "confirm_message_received",
        "trusted_entities",
    ),
    "_init_connection": (
        "server_address",
        "insecure",
        "root_certificates",
        "authentication_keys",
        "max_retries",
        "max_wait_time",
    ),
    "_push_messages": ("state", "object_store", "send", "push_object"),
}
_SOURCES = {
    "start_client_internal": ("trusted_entities=trusted_entities", "time.sleep(3)"),
    "_pull_and_store_message": (
        'fab.verifications.get("valid_license", "")',
        "_verify_fab(fab, trusted_entities)",
        "FAB_VERIFICATION_ERROR",
        "state.store_fab(fab)",
    ),
    "_push_messages": ("time.sleep(0.5)", "= send(", "partial(push_object, run_id, session_id)"),
}


def check_hooks(version: str = flwr.__version__) -> Any:
    """Flower's module, if everything that this file replaces is as it was in 1.41.

    Raises:
        ConfigError: another Flower; nothing may start, since bundles might not be checked.
    """
    internal = importlib.import_module(_INTERNAL)
    wrong = [] if version.startswith(FLOWER) else [f"version {version}"]
    for name, parameters in _SIGNATURES.items():
        found = getattr(internal, name, None)
        if found is None or tuple(inspect.signature(found).parameters) != parameters:
            wrong.append(name)
    for name, phrases in _SOURCES.items():
        source = inspect.getsource(getattr(internal, name, check_hooks))
        wrong += [name for phrase in phrases if phrase not in source]
    if wrong:
        raise ConfigError(
            f"this Flower differs from {FLOWER}x in {', '.join(sorted(set(wrong)))}, where "
            "Fedward checks the code that a server offers. Install the Flower that it pins."
        )
    return internal


def install_hooks(expected_sha256: str) -> None:
    """Let Flower's SuperNode in this process accept one bundle alone, ask more often, and deliver.

    Args:
        expected_sha256: 64 hex digits of the only bundle that may run.

    Raises:
        ConfigError: see `check_hooks`.
    """
    internal = check_hooks()
    internal._init_connection = _adjusted(internal._init_connection)
    internal._verify_fab = _allow(expected_sha256)
    pull = internal._pull_and_store_message
    asked = _Waiting()

    def pull_checked(**kwargs: Any) -> int | None:
        # Flower checks a bundle only where some entity is trusted; which one plays no part here.
        changed = {
            "trusted_entities": {"fedward": expected_sha256},
            "pull_object": _ends_the_task(_gives_up(kwargs["pull_object"])),
            "confirm_message_received": _ends_the_task(kwargs["confirm_message_received"]),
        }
        run_id: int | None = pull(**kwargs | changed)
        asked.answered(run_id is not None)
        return run_id

    internal._pull_and_store_message = pull_checked
    internal.time = asked


def _ends_the_task(call: Callable[..., Any]) -> Callable[..., Any]:
    """Where a run is over while its message arrives: let Flower drop the message and its task.

    Flower's own exception passes by the place that does so, and a worker would wait for the rest
    of that message for ever.
    """

    def checked(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException as error:
            raise RuntimeError("the run is over") from error

    return checked


def _gives_up(
    pull: Callable[[int, str], bytes], clock: Callable[[], float] = time.monotonic
) -> Callable[[int, str], bytes]:
    """Let Flower drop a message of which no part has come for `PARTS_S`.

    A SuperLink that is killed while it takes a message never gets the rest of it; Flower would ask
    for that until the run's end or for two hours, and for nothing else.
    """
    progress = [clock()]

    def bounded(run_id: int, part: str) -> bytes:
        try:
            found = pull(run_id, part)
        except ObjectUnavailableError:
            if clock() - progress[0] < PARTS_S:
                raise
            raise ObjectPullError(
                part, f"no part of the message came for {PARTS_S:.0f} s"
            ) from None
        progress[0] = clock()
        return found

    return bounded


def _allow(expected_sha256: str) -> Callable[[Any, dict[str, str]], bool]:
    def verify(fab: Any, trusted_entities: dict[str, str]) -> bool:
        del trusted_entities
        found = hashlib.sha256(fab.content).hexdigest()
        if found != expected_sha256:
            _LOG.error(
                "the server offers the bundle %s; the installed version builds %s. Nothing of it "
                "was unpacked. Install the version that the study plan names.",
                found,
                expected_sha256,
            )
        return found == expected_sha256

    return verify


def _adjusted(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Let every bundle reach the check, and every reply the server.

    Flower refuses a bundle without a licence before it looks at its content.
    """

    @contextmanager
    def connection(**kwargs: Any) -> Iterator[tuple[Any, ...]]:
        with connect(**kwargs) as conn:
            node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = conn
            delivery = Delivery(send, push_object)

            def get_marked(fab_hash: str, run_id: int) -> Any:
                fab = get_fab(fab_hash, run_id)
                fab.verifications.clear()
                fab.verifications["valid_license"] = "checked by hash"
                return fab

            yield (
                *(node_id, receive, delivery.send, get_run, get_marked),
                *(pull_object, delivery.push, confirm),
            )

    return connection


class _Waiting:
    """Stands for the module `time` in Flower's loop, of which it uses `sleep` alone."""

    def __init__(self) -> None:
        self._pace = Pace(BUSY_S, IDLE_S, LONGEST_S)

    def answered(self, something: bool) -> None:
        if something:
            self._pace.answered()

    def sleep(self, seconds: float) -> None:
        """Wait for the next message, or 0.5 s in Flower for the worker's answer."""
        if seconds < _FLOWER_IDLE_S:
            time.sleep(0.05)
            return
        time.sleep(self._pace.pause_s())


def supernode() -> None:
    """`flower-supernode` with the hooks; a process of its own."""
    install_hooks(bundle_sha256())
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415  # after the hooks

    flower_supernode()
