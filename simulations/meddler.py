"""A man in the middle of a deployment: sees what lies behind the TLS, and meddles with it.

It stands where the sites think the server is, with the server's own certificate, and passes their
requests on to the real proxy. A rule decides what becomes of each request, as a bad network would;
everything that passes can be written down, as an operator of the server could.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn

from server.proxy import FleetProxy


@dataclass(frozen=True)
class Treatment:
    """What becomes of one request.

    Attributes:
        delay_s: Held back this long on its way to the server.
        lose_request: Never reaches the server; the site is told 503, as by a broken gateway.
        lose_reply: Reaches the server; the site is told the same.
        copies: How often it reaches the server.
        answer: Which copy's answer the site is given.
    """

    delay_s: float = 0.0
    lose_request: bool = False
    lose_reply: bool = False
    copies: int = 1
    answer: int = 0


Rule = Callable[[str, str], Treatment]
"""(public node key in base64, path) -> Treatment."""


def pass_on(key: str, path: str) -> Treatment:
    """Meddle with nothing."""
    del key, path
    return Treatment()


@dataclass
class Meddler:
    """The rule that holds now, and what was seen.

    Args:
        port: Of loopback, where it stands.
        upstream: "https://host:port" of the real proxy.
        authority: PEM of the project's CA.
        files: Certificate and key of the server, PEM.
    """

    port: int = 0
    upstream: str = ""
    authority: Path = Path()
    files: tuple[Path, ...] = ()
    rule: Rule = pass_on
    recording: list[bytes] | None = None
    treated: list[Treatment] = field(default_factory=list)

    def record(self, body: bytes) -> None:
        """Keep a body that passed, while recording."""
        if self.recording is not None:
            self.recording.append(body)

    def start(self) -> None:
        """Listen, and pass requests on."""
        certificate, key = self.files
        config = uvicorn.Config(
            _App(self.upstream, ssl.create_default_context(cafile=str(self.authority)), self),
            host="127.0.0.1",
            port=self.port,
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            log_level="error",
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.should_exit = True
        self._thread.join()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Somebody else may stand there within the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()


class _App(FleetProxy):
    """A FleetProxy in the middle."""

    def __init__(self, upstream: str, verify: ssl.SSLContext, meddler: Meddler) -> None:
        super().__init__(upstream, verify)
        self._meddler = meddler
        send = self._client.post

        async def post(url: str, **request: object) -> httpx.Response:
            headers = dict(request["headers"])  # type: ignore[call-overload]
            key = headers.get(b"flwr-public-key", b"").decode()
            treatment = meddler.rule(key, url.removeprefix(upstream))
            if treatment != Treatment():
                meddler.treated.append(treatment)
            await asyncio.sleep(treatment.delay_s)
            if treatment.lose_request:
                raise httpx.ConnectError("lost on the way there")
            meddler.record(bytes(request["content"]))  # type: ignore[call-overload]
            answers = [await send(url, **request) for _ in range(treatment.copies)]  # type: ignore[arg-type]
            answer = answers[treatment.answer]
            meddler.record(answer.content)
            if treatment.lose_reply:
                raise httpx.ConnectError("lost on the way back")
            return answer

        self._client.post = post  # type: ignore[method-assign, assignment]


@contextmanager
def meddling(port: int, upstream: str, authority: Path, *files: Path) -> Iterator[Meddler]:
    """A meddler that stands on a port of loopback within the block; see `Meddler`."""
    meddler = Meddler(port, upstream, authority, files)
    meddler.start()
    try:
        yield meddler
    finally:
        meddler.stop()
