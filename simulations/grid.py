"""Flower's Grid in this process: the real ServerApp and ClientApp, without Ray or a network.

Each pushed message runs the ClientApp at once, on copies, so that neither side can reach into
the other's memory. A fault hook may drop, delay, repeat or alter any message or reply, as a bad
network, a crashed site or a lying server would.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import cast

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from shared.flower import body_of, content

SUPERLINK_NODE_ID = 1
"""Flower's own source id of error replies that no node sent."""

NODE_UNAVAILABLE = 5
"""Flower's error code for a node that does not answer."""

CLIENT_APP_RAISED = 2
"""Flower's error code for a ClientApp that raised."""


class Direction(Enum):
    """Which way a message travels."""

    TO_SITE = "to-site"
    TO_SERVER = "to-server"


@dataclass(frozen=True)
class Delivery:
    """What the fault hook lets happen to one message.

    Attributes:
        bodies: The byte strings to deliver, in order; none means that the message is lost.
        delay_pulls: How many later pulls of the server must pass before a reply shows.
    """

    bodies: tuple[bytes, ...]
    delay_pulls: int = 0


FaultHook = Callable[[str, str, Direction, bytes], Delivery]
"""(site, message type, direction, body) -> Delivery."""


def no_faults(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
    """Deliver everything, once, unchanged."""
    del site, action, direction
    return Delivery((body,))


@dataclass
class _Pending:
    reply: Message
    pulls_left: int


class InProcessGrid(Grid):
    """A Grid whose nodes are ClientApp calls in this process.

    Args:
        client_app: The ClientApp that every node runs.
        contexts: Flower Context of each node by site name; kept between messages.
        faults: Fault hook, see `FaultHook`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        contexts: Mapping[str, Context],
        faults: FaultHook = no_faults,
    ) -> None:
        self._app = client_app
        self._contexts = {c.node_id: c for c in contexts.values()}
        self._site_of = {c.node_id: name for name, c in contexts.items()}
        self._faults = faults
        self._pending: dict[str, _Pending] = {}
        run_id = next(iter(self._contexts.values())).run_id
        self._run = Run.create_empty(run_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1

    def set_run(self, run: Run) -> None:
        """Use Flower's record of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's record of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes, by id alone."""
        return [NodeInfo(node_id=node_id) for node_id in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the ClientApp on each message at once; replies wait to be pulled."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages that have arrived by now."""
        arrived = []
        for message_id in message_ids:
            pending = self._pending.get(message_id)
            if pending is None:
                continue
            if pending.pulls_left > 0:
                pending.pulls_left -= 1
                continue
            arrived.append(self._pending.pop(message_id).reply)
        return arrived

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull what has arrived; nothing arrives later in this process."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _push(self, message: Message) -> str:
        message_id = uuid.uuid4().hex
        node, action = message.metadata.dst_node_id, message.metadata.message_type
        site = self._site_of[node]
        delivery = self._faults(site, action, Direction.TO_SITE, body_of(message))
        reply: Message | None = None
        for body in delivery.bodies:
            received = _stamped(message, message_id, body)
            reply = self._call(received, node)
        if reply is None:
            self._pending[message_id] = _Pending(_lost(message, message_id), 0)
            return message_id
        if reply.has_error():
            self._pending[message_id] = _Pending(reply, delivery.delay_pulls)
            return message_id
        back = self._faults(site, action, Direction.TO_SERVER, body_of(reply))
        answer = (
            Message(content(back.bodies[-1]), reply_to=received)
            if back.bodies
            else _lost(message, message_id)
        )
        self._pending[message_id] = _Pending(answer, delivery.delay_pulls + back.delay_pulls)
        return message_id

    def _call(self, message: Message, node: int) -> Message:
        try:
            return self._app(message, self._contexts[node])
        except Exception as error:  # Flower turns any exception of a ClientApp into an Error
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=CLIENT_APP_RAISED, reason=reason), reply_to=message)


def _stamped(message: Message, message_id: str, body: bytes) -> Message:
    """A copy of a message with the id that a SuperLink would give it, and its own records."""
    m = message.metadata
    metadata = Metadata(
        run_id=m.run_id,
        message_id=message_id,
        src_node_id=m.src_node_id,
        dst_node_id=m.dst_node_id,
        reply_to_message_id=m.reply_to_message_id,
        group_id=m.group_id,
        created_at=m.created_at,
        ttl=m.ttl,
        message_type=m.message_type,
    )
    build = cast(Callable[..., Message], Message)
    return build(metadata=metadata, content=content(body))


def _lost(message: Message, message_id: str) -> Message:
    """The error reply that Flower's SuperLink makes for a node that does not answer."""
    m = message.metadata
    metadata = Metadata(
        run_id=m.run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=m.src_node_id,
        reply_to_message_id=message_id,
        group_id=m.group_id,
        created_at=m.created_at,
        ttl=m.ttl,
        message_type=m.message_type,
    )
    build = cast(Callable[..., Message], Message)
    return build(metadata=metadata, error=Error(code=NODE_UNAVAILABLE, reason="Node unavailable"))
