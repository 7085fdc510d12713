"""A site's reply reaches the server whole, whatever was lost or repeated on its way.

Flower's SuperNode announces a reply, is told which parts of it are missing and in which session to
push them, and pushes them one by one. Neither step may happen twice, as it does where an answer is
lost and the request sent again:

- a second announcement ends the first one's session, and parts pushed in that are refused;
- once the study has begun to fetch the reply, a second announcement is told that nothing is
  missing, and the parts are never pushed: the study waits for them in vain;
- a part that has arrived is refused when it is pushed again.

Flower 1.41 then throws the whole reply away. Here whatever may be missing is pushed, in whichever
session waits for it, and a part that no session waits for has arrived.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

TRIES, WAIT_S = 5, 0.5
ANY_SESSION = ""
"""Lets Flower 1.41 find the session that waits for a part; the announced one may be over."""

_LOG = logging.getLogger("flwr.fedward")
Announced = tuple[set[str], str]


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
        send: Callable[[Any, Any, float], Announced],
        push: Callable[[int, str, str, bytes], None],
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._send, self._push, self._wait = send, push, wait
        self._announce: Callable[[], Announced] | None = None
        self._one = threading.Lock()

    def send(self, message: Any, tree: Any, seconds: float) -> Announced:
        """Announce a reply; what to push of it, and in which session."""
        self._announce = partial(self._send, message, tree, seconds)
        missing, session = self._announce()
        if tree.object_id in missing:
            return missing, session
        # No other reply has this root: an earlier announcement arrived, and its answer was lost.
        return {part.object_id for part in iterate_object_tree(tree)}, ANY_SESSION

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
        self, announce: Callable[[], Announced], run_id: int, part: str, content: bytes
    ) -> None:
        for attempt in range(TRIES):
            try:
                self._push(run_id, ANY_SESSION, part, content)
            except ObjectPushError:
                missing, _ = announce()
                if part not in missing:
                    return  # it has arrived, or nobody waits for this reply any more
                _LOG.warning("the server did not take a part of a reply; announced anew")
                self._wait(WAIT_S * attempt)
            else:
                return
        raise ObjectPushError(part, run_id, ANY_SESSION)
