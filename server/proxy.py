"""The only thing that the outside reaches: a TLS reverse proxy to ten paths of the SuperLink.

Flower serves three interfaces on one port: Fleet (the sites'), Runtime (the ServerApp's) and
Control (start, stop, register), the last without any authentication. The SuperLink therefore
listens on loopback, and this proxy passes on the Fleet requests of registered SuperNodes alone.
Every other path, method or header ends here, and so does whatever is too long or too slow.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from shared.supervise import log_to_terminal

FLEET = "/v1/fleet/"
ALLOWED = frozenset(
    FLEET + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "confirm-message-received",
        "get-run",
        "get-fab",
        "pull-object",
        "push-object",
    )
)
"""What a registered SuperNode needs; not `register-node`: the coordinator registers sites."""

REQUEST_HEADERS = frozenset(
    (
        *(b"content-type", b"accept"),
        *(b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"),
        *(b"flwr-package-name", b"flwr-package-version", b"flwr-component-name"),
    )
)
RESPONSE_HEADERS = frozenset((b"content-type", b"flwr-version-incompatibility-message"))
LARGEST_BODY = 16 << 20
"""Flower sends chunks of 5 MB."""
BODY_S, UPSTREAM_S, IDLE_S = 60.0, 60.0, 75
CONNECTIONS = 512

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOG = logging.getLogger("fedward.proxy")


class FleetProxy:
    """An ASGI application; buffers each request, so that a slow site holds nothing upstream.

    Args:
        upstream: "https://127.0.0.1:PORT" of the SuperLink.
        verify: Trusts the project's own CA alone.
    """

    def __init__(self, upstream: str, verify: ssl.SSLContext | bool) -> None:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=32)
        self._upstream = upstream
        self._client = httpx.AsyncClient(
            verify=verify, limits=limits, timeout=UPSTREAM_S, trust_env=False
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or ASGI's start and end."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        path, raw = scope["path"], scope.get("raw_path", b"")
        if path not in ALLOWED or raw != path.encode() or scope.get("query_string"):
            await _refuse(send, 404)
        elif scope["method"] != "POST":
            await _refuse(send, 405)
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_read(receive), BODY_S)
        except TimeoutError:
            await _refuse(send, 408)
            return
        except _HungUpError:
            return
        if body is None:
            await _refuse(send, 413)
            return
        headers = [(k, v) for k, v in scope["headers"] if k in REQUEST_HEADERS]
        url = self._upstream + scope["path"]
        try:
            answer = await self._client.post(url, content=body, headers=headers)
        except httpx.HTTPError as error:
            _LOG.warning("the SuperLink does not answer (%s)", type(error).__name__)
            await _refuse(send, 503)
            return
        kept = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() in RESPONSE_HEADERS]
        await _respond(send, answer.status_code, kept, answer.content)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._client.aclose()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


class _HungUpError(Exception):
    """The caller went away in the middle of its request."""


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None where it is too long."""
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUpError
        part = message.get("body", b"")
        length += len(part)
        if length > LARGEST_BODY:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _refuse(send: Send, status: int) -> None:
    await _respond(send, status, [], b"")


async def _respond(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """`proxy HOST PORT UPSTREAM CA CERTIFICATE KEY`, started by `fedward-server up`."""
    host, port, upstream, authority, certificate, key = sys.argv[1:7]
    log_to_terminal()
    verify = ssl.create_default_context(cafile=Path(authority))
    config = uvicorn.Config(
        FleetProxy(upstream, verify),
        host=host,
        port=int(port),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        lifespan="on",
        ws="none",
    )
    uvicorn.Server(config).run()
