"""Flower's private hooks in the SuperNode: which code may run, how often it asks, what it sends.

Flower would run whatever bundle the SuperLink offers. Here a bundle is refused unless its SHA-256
is that of the installed version's own (shared/bundle.py), and even then nothing is unpacked: the
worker (client/worker.py) runs the installed package. A reply is announced anew where a part of it
was not taken (client/delivery.py), and a message of which nothing more comes is given up. The hooks
belong to Flower 1.41; client/hooks.py refuses to start on a Flower where they are not what they
were. Once a message is there, the worker is told (client/bell.py).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException

from client.bell import Bell
from client.delivery import Delivery
from client.hooks import check_hooks
from client.pace import Pace
from shared.bundle import bundle_sha256

SHORTEST_S, LONGEST_S = 0.25, 10.0
"""How often the SuperNode asks the server; see client/pace.py."""
PARTS_S = 20.0
"""For how long no part of a message may come; the server takes one from its own machine."""

_FLOWER_IDLE_S = 3.0
_LOG = logging.getLogger("flwr.fedward")

_INTERNAL = "flwr.supernode.start_client_internal"


def install_hooks(expected_sha256: str, bell: Bell | None = None) -> None:
    """Let Flower's SuperNode in this process accept one bundle alone, ask more often, and deliver.

    Args:
        expected_sha256: 64 hex digits of the only bundle that may run.
        bell: Rung once a message is there for the worker.

    Raises:
        ConfigError: see `check_hooks`.
    """
    check_hooks()
    internal: Any = importlib.import_module(_INTERNAL)
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
        if run_id is not None:
            asked.answered()
            if bell is not None:
                bell.ring()
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
        self._pace = Pace(SHORTEST_S, LONGEST_S)

    def answered(self) -> None:
        self._pace.answered()

    def sleep(self, seconds: float) -> None:
        """Wait for the next message, or 0.5 s in Flower for the worker's answer."""
        if seconds < _FLOWER_IDLE_S:
            time.sleep(0.05)
            return
        time.sleep(self._pace.pause_s())


def supernode() -> None:
    """`flower-supernode` with the hooks; a process of its own."""
    install_hooks(bundle_sha256(), Bell.inherited(os.environ))
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415  # after the hooks

    flower_supernode()
