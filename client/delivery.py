"""A site's reply reaches the server whole, whatever was lost or repeated on its way.

Flower's SuperNode announces a reply, is told which parts of it are missing and in which session to
push them, and pushes them one by one. Neither step may happen twice: a second announcement ends the
first one's session, and a part whose acknowledgement was lost is refused when it is pushed again.
The SuperNode then throws the whole reply away. Here it is announced anew instead, and only the
parts that the server still misses are pushed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

TRIES, WAIT_S = 5, 0.5
ANY_SESSION = ""
"""Lets Flower 1.41 find the session that waits for a part; the announced one may be over."""

_LOG = logging.getLogger("flwr.fedward")


class Delivery:
    """Stands between Flower's loop and its connection, for one reply after the other.

    Args:
        send: Announces a reply: (message, its parts' tree, seconds) -> (missing parts, session).
        push: Pushes a part: (run, session, part, content); raises ObjectPushError where the server
            does not take it.
        wait: Called with seconds before another try.
    """

    def __init__(
        self,
        send: Callable[[Any, Any, float], tuple[set[str], str]],
        push: Callable[[int, str, str, bytes], None],
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._send, self._push, self._wait = send, push, wait
        self._announce: Callable[[], tuple[set[str], str]] | None = None
        self._one = threading.Lock()

    def send(self, message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        """Announce a reply; what is missing of it, and the session to push that in."""
        self._announce = partial(self._send, message, tree, seconds)
        return self._announce()

    def push(self, run_id: int, session: str, part: str, content: bytes) -> None:
        """Push a part of the reply that was announced last, until the server has it.

        Flower pushes several parts at a time, from threads.

        Raises:
            ObjectPushError: the server does not take it, however often it is announced.
        """
        try:
            self._push(run_id, session, part, content)
        except ObjectPushError:
            if self._announce is None:
                raise
            with self._one:
                self._again(self._announce, run_id, part, content)

    def _again(
        self, announce: Callable[[], tuple[set[str], str]], run_id: int, part: str, content: bytes
    ) -> None:
        for attempt in range(TRIES):
            missing, session = announce()
            if part not in missing:
                return  # it had arrived, and its acknowledgement was lost
            _LOG.warning("the server did not take a part of a reply; announced anew")
            for where in (session, ANY_SESSION):
                try:
                    self._push(run_id, where, part, content)
                except ObjectPushError:
                    continue
                return
            self._wait(WAIT_S * (attempt + 1))
        raise ObjectPushError(part, run_id, ANY_SESSION)
