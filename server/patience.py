"""How long Flower waits for the parts of a reply: no longer than the exchange that asked for it.

A reply is announced before its parts arrive. Where a site dies or loses its network in between,
Flower's `pull_messages` waits for the rest, and keeps all other sites waiting: 180 s, until the
SuperLink gives the parts up, whatever the exchange's own limit. It also looks ever more rarely, up
to every 10 s. The hook belongs to Flower 1.41 and is refused on one where it would change nothing.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from shared.errors import ConfigError

FIRST_LOOK_S, SELDOM_S = 0.1, 1.0
_UNTIL: ContextVar[float | None] = ContextVar("until", default=None)
_NEEDED = ("max_time", "max_tries_per_object", "initial_backoff", "backoff_cap")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within the block Flower waits so long for parts that have not arrived; at least one look."""
    token = _UNTIL.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _UNTIL.reset(token)


def install() -> None:
    """Let `at_most` hold for Flower's HttpGrid in this process.

    Raises:
        ConfigError: another Flower.
    """
    from flwr.superlink.grid import http_grid  # noqa: PLC0415  # of deployments alone

    pull: Callable[..., Any] | None = getattr(http_grid, "pull_objects", None)
    if pull is None or not set(_NEEDED) <= set(inspect.signature(pull).parameters):
        raise ConfigError(
            "this Flower fetches replies in another way than 1.41. Install the Flower that Fedward "
            "pins."
        )

    def patient(*arguments: Any, **named: Any) -> Any:
        until = _UNTIL.get()
        if until is not None:
            left = max(0.0, until - time.monotonic())
            named |= dict(zip(_NEEDED, (left, None, FIRST_LOOK_S, SELDOM_S), strict=True))
        return pull(*arguments, **named)

    http_grid.pull_objects = patient  # type: ignore[attr-defined]
