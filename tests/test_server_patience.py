"""A reply whose parts do not come keeps nobody waiting past the exchange's own limit."""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid
from flwr.superlink.grid.http_grid import HttpGrid

from server.patience import at_most, install
from server.transport import GridTransport
from shared.errors import ConfigError
from shared.flower import body_of, content

RUN = 11
MUCH_S = 60.0
"""More than a busy machine takes; Flower's own limit is 180 s."""


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook, put back after the test."""
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    install()


class Link:
    """Flower's Runtime interface with two replies: of `half` no part has arrived."""

    def __init__(self, half: Message, whole: Message) -> None:
        self._replies = [half, whole]
        self._parts = {k: p.deflate() for k, p in get_all_nested_objects(whole).items()}

    def PullMessages(self, request: Any) -> Any:
        replies, self._replies = self._replies, []
        return SimpleNamespace(
            messages_list=[message_to_proto(remove_content_from_message(r)) for r in replies],
            message_object_trees=[get_object_tree(r) for r in replies],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        found = self._parts.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=True, object_available=bool(found), object_content=found
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        pass


def reply(to: str, body: bytes) -> Message:
    metadata = Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=7,
        dst_node_id=1,
        reply_to_message_id=to,
        group_id="round",
        created_at=1.0,
        ttl=60.0,
        message_type="train.round",
    )
    message = make_message(metadata=metadata, content=content(body))
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@pytest.fixture
def link() -> Link:
    return Link(reply("first", b"half"), reply("second", b"whole"))


@pytest.fixture
def grid(link: Link, monkeypatch: pytest.MonkeyPatch) -> HttpGrid:
    monkeypatch.setattr(HttpGrid, "_runtime_client", link)
    monkeypatch.setattr(HttpGrid, "__del__", lambda grid: None, raising=False)
    grid = HttpGrid.__new__(HttpGrid)
    grid._run = SimpleNamespace(run_id=RUN)  # type: ignore[assignment]
    grid.node = Node(node_id=1)
    return grid


def test_a_whole_reply_is_read_though_another_never_becomes_whole(
    grid: HttpGrid, link: Link
) -> None:
    started = time.monotonic()
    with at_most(0.3):
        half, whole = grid.pull_messages(["first", "second"])
    assert 0.3 <= time.monotonic() - started < MUCH_S  # it did wait, and not as long as Flower
    assert half.has_error()
    assert half.metadata.reply_to_message_id == "first"
    assert body_of(whole) == b"whole"


def test_after_the_limit_what_is_whole_is_still_read(grid: HttpGrid, link: Link) -> None:
    with at_most(-1.0):
        _, whole = grid.pull_messages(["first", "second"])
    assert body_of(whole) == b"whole"


def test_an_exchange_waits_no_longer_than_its_own_limit(
    grid: HttpGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = iter((5, 6))
    monkeypatch.setattr(GridTransport, "_push", lambda *_: [{5: "first", 6: "second"}[next(nodes)]])
    transport = GridTransport(grid, ("north", "south"), poll_s=0.05)
    transport._node_of = {"north": 5, "south": 6}
    started = time.monotonic()
    found = transport.exchange("round", {"north": b"", "south": b""}, 0.5)
    assert found == {"south": b"whole"}
    assert time.monotonic() - started < MUCH_S


def test_elsewhere_flowers_own_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    @functools.wraps(pull_objects)
    def seen(**named: Any) -> dict[str, bytes]:
        asked.append(named)
        return {}

    monkeypatch.setattr(http_grid, "pull_objects", seen)
    install()
    http_grid.pull_objects(object_ids=[])  # type: ignore[call-arg]
    with at_most(5.0):
        http_grid.pull_objects(object_ids=[])  # type: ignore[call-arg]
    assert asked[0] == {"object_ids": []}
    assert 4.0 < asked[1]["max_time"] <= 5.0


def test_a_flower_that_fetches_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_grid, "pull_objects", lambda object_ids, pull_object_fn: {})
    with pytest.raises(ConfigError, match=r"1\.41"):
        install()
