"""What the outside reaches of the SuperLink: ten paths, by POST, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from flwr.superlink.main import create_app

from server import proxy
from server.proxy import ALLOWED, FleetProxy


class Upstream(httpx.AsyncBaseTransport):
    """A SuperLink that notes what reaches it."""

    def __init__(self) -> None:
        self.seen: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.seen.append(request)
        headers = {"content-type": "application/protobuf", "x-secret": "inside", "server": "x"}
        return httpx.Response(200, headers=headers, content=b"answer")


@pytest.fixture
def upstream() -> Upstream:
    """See `Upstream`."""
    return Upstream()


@pytest.fixture
def app(upstream: Upstream) -> FleetProxy:
    """The proxy before it."""
    fleet = FleetProxy("https://127.0.0.1:1", verify=False)
    fleet._client = httpx.AsyncClient(transport=upstream)
    return fleet


def ask(app: FleetProxy, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request from outside."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="https://fl") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(send())


def superlink_paths() -> set[str]:
    """Every path that Flower's SuperLink serves."""
    return {context.path for context in iter_route_contexts(create_app().routes)}


def test_the_superlink_has_dangerous_paths_to_hide() -> None:
    paths = superlink_paths()
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"} <= paths
    assert paths > ALLOWED  # each allowed path exists


def test_every_other_path_of_the_superlink_is_refused(app: FleetProxy, upstream: Upstream) -> None:
    hidden = superlink_paths() - ALLOWED
    assert len(hidden) > 50
    for path in hidden:
        for method in ("POST", "GET"):
            assert ask(app, method, path).status_code == 404, path
    assert upstream.seen == []


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/fleet/",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "//v1/fleet/pull-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/pull%2Dmessages",
        "/v1/fleet/pull-messages%00",
        "/V1/fleet/pull-messages",
    ],
)
def test_paths_that_resemble_an_allowed_one_are_refused(
    app: FleetProxy, upstream: Upstream, path: str
) -> None:
    assert ask(app, "POST", path).status_code == 404
    assert upstream.seen == []


def test_an_allowed_request_passes_with_the_headers_of_node_authentication_alone(
    app: FleetProxy, upstream: Upstream
) -> None:
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": "k",
        "flwr-timestamp": "t",
        "flwr-signature": "s",
        "flwr-task-token": "stolen",
        "flwr-superexec-signature": "stolen",
        "authorization": "stolen",
        "x-forwarded-for": "127.0.0.1",
        "cookie": "c",
    }
    answer = ask(app, "POST", "/v1/fleet/pull-messages", headers=headers, content=b"body")
    assert (answer.status_code, answer.content) == (200, b"answer")
    assert set(answer.headers) == {"content-type", "content-length"}
    (request,) = upstream.seen
    assert request.content == b"body"
    assert str(request.url) == "https://127.0.0.1:1/v1/fleet/pull-messages"
    kept = {"content-type", "flwr-public-key", "flwr-timestamp", "flwr-signature"}
    assert {k for k in headers if k in request.headers} - {"accept"} == kept


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_are_refused(app: FleetProxy, upstream: Upstream, method: str) -> None:
    assert ask(app, method, "/v1/fleet/pull-messages").status_code == 405
    assert upstream.seen == []


def test_a_body_that_is_too_long_is_refused(
    app: FleetProxy, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LARGEST_BODY", 10)
    path = "/v1/fleet/push-object"
    assert ask(app, "POST", path, content=b"x" * 11).status_code == 413
    assert upstream.seen == []
    assert ask(app, "POST", path, content=b"x" * 10).status_code == 200


def _raw(app: FleetProxy, messages: list[MutableMapping[str, Any]]) -> list[int]:
    """Statuses sent to a caller whose request arrives as these messages, and then nothing."""
    sent: list[int] = []

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    path = "/v1/fleet/push-object"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(app(scope, receive, send))
    return sent


PART = {"type": "http.request", "body": b"half", "more_body": True}


def test_a_caller_that_hangs_up_in_its_request_sends_nothing_on(
    app: FleetProxy, upstream: Upstream
) -> None:
    assert _raw(app, [dict(PART), {"type": "http.disconnect"}]) == []
    assert upstream.seen == []


def test_a_caller_that_is_too_slow_is_cut_off(
    app: FleetProxy, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "BODY_S", 0.05)
    assert _raw(app, [dict(PART)]) == [408]
    assert upstream.seen == []


def test_a_superlink_that_is_down_is_an_answer_after_which_sites_try_again(
    app: FleetProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("down")

    monkeypatch.setattr(app, "_client", httpx.AsyncClient(transport=httpx.MockTransport(refuse)))
    assert ask(app, "POST", "/v1/fleet/pull-messages").status_code == 503
