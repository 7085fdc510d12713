"""A reply arrives whole whatever is lost or repeated on its way, at Flower's own server state."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from flwr.app import Message, Metadata
from flwr.app.message import make_message
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
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

from client.delivery import TRIES, Delivery
from shared.flower import content

RUN, NODE = 11, 7
Network = Callable[[Callable[[], Any]], Any]
"""Lets a request reach the server, once or twice, and gives one of its answers."""


class Server:
    """The part of Flower's SuperLink that takes replies: its own state, in a database."""

    def __init__(self, network: Network) -> None:
        store = SqlObjectStore(":memory:")
        store.initialize()
        self._state = SqlLinkState(":memory:", NoOpFederationManager(), store)
        self._state.initialize()
        self._network, self._one = network, threading.Lock()

    def _carry(self, request: Callable[[], Any]) -> Any:
        with self._one:  # a database in memory has one connection
            return self._network(request)

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        """What `push_messages` of flwr.superlink.servicer.fleet does with a reply."""

        def announce() -> tuple[set[str], str]:
            session = self._state.start_session(RUN)
            return set(self._state.preregister_object_tree(tree, session)), session

        answer: tuple[set[str], str] = self._carry(announce)
        return answer

    def push(self, run_id: int, session: str, part: str, body: bytes) -> None:
        """What `push_object` of the SuperNode's connection does."""
        if not self._carry(partial(self._state.store_object, run_id, session, part, body)):
            raise ObjectPushError(part, run_id, session)

    def has(self, message: Message) -> bool:
        """Whether all of a reply has arrived."""
        parts = iterate_object_tree(get_object_tree(message))
        return all(self._state.get_object(RUN, part.object_id) for part in parts)


def reply(seed: int = 0) -> Message:
    """A message of several parts."""
    metadata = Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=NODE,
        dst_node_id=1,
        reply_to_message_id="asked",
        group_id="round",
        created_at=1.0,
        ttl=60.0,
        message_type="train.round",
    )
    return make_message(metadata=metadata, content=content(random.Random(seed).randbytes(5000)))


def deliver(server: Any, message: Message) -> None:
    """What `_push_messages` of the SuperNode does with a reply."""
    parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    missing, session = server.send(message, get_object_tree(message), 1.0)
    push_object_contents_from_iterable(
        ((part, body) for part, body in parts.items() if part in missing),
        partial(server.push, RUN, session),
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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reply_arrives_whatever_arrives_twice(name: str) -> None:
    server, message = Server(NETWORKS[name]), reply()
    deliver(Delivery(server.send, server.push, lambda seconds: None), message)
    assert server.has(message)


@pytest.mark.parametrize("name", ["first answer", "last answer"])
def test_without_the_delivery_flower_loses_it(name: str) -> None:
    """The control; should Flower mend it, client/delivery.py can go."""
    server, message = Server(NETWORKS[name]), reply()
    with pytest.raises(ObjectPushError):
        deliver(server, message)
    assert not server.has(message) or name == "last answer"


def test_where_nothing_is_lost_nothing_is_announced_anew() -> None:
    asked: list[Any] = []

    def counting(request: Callable[[], Any]) -> Any:
        asked.append(request)
        return request()

    server = Server(counting)
    delivery = Delivery(server.send, server.push)
    messages = [reply(seed) for seed in range(2)]
    for message in messages:
        deliver(delivery, message)
    assert all(map(server.has, messages))
    assert len(asked) == sum(1 + len(get_all_nested_objects(m)) for m in messages)


def test_a_server_that_takes_nothing_is_given_up() -> None:
    waits: list[float] = []

    def refuse(run_id: int, session: str, part: str, body: bytes) -> None:
        raise ObjectPushError(part, run_id, session)

    def missing(message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        return {"part"}, "session"

    delivery = Delivery(missing, refuse, waits.append)
    delivery.send(None, None, 0.0)
    with pytest.raises(ObjectPushError):
        delivery.push(RUN, "session", "part", b"")
    assert len(waits) == TRIES
