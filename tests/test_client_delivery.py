"""A reply arrives whole whatever is lost or repeated on its way, at Flower's own server state."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from flwr.app import Message, Metadata
from flwr.app.message import make_message
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    push_object_contents_from_iterable,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.federation.noop_federation_manager import NOOP_FEDERATION_ID

from client.delivery import TRIES, Delivery
from shared.flower import content

Network = Callable[[Callable[[], Any]], Any]
"""Lets a request reach the server, once or more often, and gives one of its answers."""


class Server:
    """Flower's SuperLink and a study that waits for a reply: its own state, in a database.

    Args:
        network: What lies between.
        eager: The study begins to fetch a reply as soon as it is announced.
    """

    def __init__(self, network: Network, *, eager: bool = False) -> None:
        store = SqlObjectStore(":memory:")
        store.initialize()
        self._state = SqlLinkState(":memory:", NoOpFederationManager(), store)
        self._state.initialize()
        self._node = self._state.create_node("site", "site", b"key", 60.0)
        self._state.activate_node(self._node, 60.0)
        self.run = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, "aid", TaskType.SERVER_APP
        )
        self._network, self._eager, self._one = network, eager, threading.Lock()

    def asks(self, seed: int = 0) -> Message:
        """Send the site a message; its reply, of several parts."""
        asked = self._message("", random.Random(seed).randbytes(10), 1, self._node)
        assert self._state.store_message_ins(asked) == asked.object_id
        body = random.Random(seed).randbytes(5000)
        return self._message(asked.object_id, body, self._node, 1)

    def _message(self, reply_to: str, body: bytes, source: int, target: int) -> Message:
        metadata = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=source,
            dst_node_id=target,
            reply_to_message_id=reply_to,
            group_id="round",
            created_at=time.time(),
            ttl=50.0 if reply_to else 60.0,
            message_type="train.round",
        )
        message = make_message(metadata=metadata, content=content(body))
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def _carry(self, request: Callable[[], Any]) -> Any:
        with self._one:  # a database in memory has one connection
            return self._network(request)

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        """What `push_messages` of flwr.superlink.servicer.fleet does with a reply."""

        def announce() -> tuple[set[str], str]:
            session = self._state.start_session(self.run)
            _, missing = self._state.store_message_and_object_tree(message, tree, session)
            if self._eager:  # what `pull_messages` of flwr.superlink.servicer.runtime does
                asked = message.metadata.reply_to_message_id
                self._state.get_message_res({asked}, self.run)
                self._state.delete_messages({asked})
            return set(missing), session

        answer: tuple[set[str], str] = self._carry(announce)
        return answer

    def push(self, run_id: int, session: str, part: str, body: bytes) -> None:
        """What `push_object` of the SuperNode's connection does."""
        if not self._carry(partial(self._state.store_object, run_id, session, part, body)):
            raise ObjectPushError(part, run_id, session)

    def has(self, message: Message) -> bool:
        """Whether all of a reply has arrived."""
        parts = iterate_object_tree(get_object_tree(message))
        with self._one:  # parts may still be on their way: Flower does not wait when it gives up
            return all(self._state.get_object(self.run, part.object_id) for part in parts)


def deliver(way: Server | Delivery, message: Message) -> None:
    """What `_push_messages` of the SuperNode does with a reply."""
    parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    missing, session = way.send(message, get_object_tree(message), 1.0)
    push_object_contents_from_iterable(
        ((part, body) for part, body in parts.items() if part in missing),
        partial(way.push, message.metadata.run_id, session),
    )


def twice(answer: int) -> Network:
    """Every request arrives twice, as when a gateway sends it again."""
    return lambda request: (request(), request())[answer]


def at_random(seed: int) -> Network:
    """Any request may arrive several times, and any of its answers may be the one that is seen."""
    chance = random.Random(seed)

    def carry(request: Callable[[], Any]) -> Any:
        return chance.choice([request() for _ in range(chance.choice((1, 1, 2, 3)))])

    return carry


NETWORKS = {"first answer": twice(0), "last answer": twice(-1)} | {
    f"seed {seed}": at_random(seed) for seed in range(5)
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_reply_arrives_whatever_arrives_twice(name: str, eager: bool) -> None:
    server = Server(NETWORKS[name], eager=eager)
    message = server.asks()
    deliver(Delivery(server.send, server.push, lambda seconds: None), message)
    assert server.has(message)


@pytest.mark.parametrize(
    ("name", "eager", "raises"),
    [("first answer", False, True), ("last answer", False, True), ("last answer", True, False)],
)
def test_without_the_delivery_flower_loses_it(name: str, eager: bool, raises: bool) -> None:
    """The control, raising or silently; should Flower mend it, client/delivery.py can go."""
    server = Server(NETWORKS[name], eager=eager)
    message = server.asks()
    with pytest.raises(ObjectPushError) if raises else nullcontext():
        deliver(server, message)
    assert not server.has(message)


def test_where_nothing_is_lost_nothing_is_sent_twice() -> None:
    asked: list[Any] = []

    def counting(request: Callable[[], Any]) -> Any:
        asked.append(request)
        return request()

    server = Server(counting)
    delivery = Delivery(server.send, server.push)
    messages = [server.asks(seed) for seed in range(2)]
    for message in messages:
        deliver(delivery, message)
    assert all(map(server.has, messages))
    assert len(asked) == sum(1 + len(get_all_nested_objects(m)) for m in messages)


def test_a_server_that_takes_nothing_is_given_up() -> None:
    waits: list[float] = []

    def refuse(run_id: int, session: str, part: str, body: bytes) -> None:
        raise ObjectPushError(part, run_id, session)

    tree = get_object_tree(Server(twice(0)).asks())
    delivery = Delivery(lambda *_: ({tree.object_id}, "session"), refuse, waits.append)
    delivery.send(None, tree, 0.0)
    with pytest.raises(ObjectPushError):
        delivery.push(1, "session", tree.object_id, b"")
    assert len(waits) == TRIES
