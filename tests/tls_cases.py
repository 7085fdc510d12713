"""A TLS server and a forward proxy on loopback, for what a site sees on its way out."""

from __future__ import annotations

import datetime
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import format_datetime
from pathlib import Path

from server.authority import create_authority, issue_server_certificate
from shared.kit import Address

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def write_authority(folder: Path, name: str = "heart") -> tuple[Path, Path]:
    """Key and certificate of a CA, valid from two years ago for four years."""
    key, certificate = create_authority(name, begins=NOW - 730 * DAY, ends=NOW + 730 * DAY)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.key").write_bytes(key)
    (folder / "ca.crt").write_bytes(certificate)
    return folder / "ca.key", folder / "ca.crt"


def write_certificate(
    folder: Path,
    authority: tuple[Path, Path],
    *,
    host: str = "localhost",
    begins: datetime.datetime = NOW - 30 * DAY,
    ends: datetime.datetime = NOW + 300 * DAY,
) -> tuple[Path, Path]:
    """Certificate and key of a server."""
    key, certificate = issue_server_certificate(
        authority[0].read_bytes(), authority[1].read_bytes(), [host], begins=begins, ends=ends
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tls.key").write_bytes(key)
    (folder / "tls.crt").write_bytes(certificate)
    return folder / "tls.crt", folder / "tls.key"


@contextmanager
def tls_server(certificate: tuple[Path, Path], *, tells_time: bool = True) -> Iterator[Address]:
    """A server that answers every request with 404, with the time unless told otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def answer(raw: socket.socket) -> None:
        with context.wrap_socket(raw, server_side=True) as stream:
            stream.recv(4096)
            now = format_datetime(datetime.datetime.now(datetime.UTC), usegmt=True)
            date = f"Date: {now}\r\n" if tells_time else ""
            reply = f"HTTP/1.1 404 Not Found\r\n{date}Content-Length: 0\r\n\r\n"
            stream.sendall(reply.encode())

    with _serving(answer) as port:
        yield Address("localhost", port)


@contextmanager
def forward_proxy(*, allows: bool = True) -> Iterator[tuple[str, list[str]]]:
    """A proxy that takes CONNECT; its URL, and what it was asked for."""
    asked: list[str] = []

    def answer(raw: socket.socket) -> None:
        words = raw.recv(4096).decode().split()
        if not words:
            return  # somebody looked whether anybody listens
        asked.append(words[1])
        if not allows:
            raw.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        host, _, port = words[1].rpartition(":")
        with socket.create_connection((host, int(port)), 60) as onward:
            raw.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            raw.settimeout(None)
            onward.settimeout(None)
            back = threading.Thread(target=_pump, args=(onward, raw), daemon=True)
            back.start()
            _pump(raw, onward)
            back.join(60)

    with _serving(answer) as port:
        yield f"http://127.0.0.1:{port}", asked


@contextmanager
def opening_proxy(
    certificate: tuple[Path, Path], trusts: Path
) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that opens TLS, as some firewalls do; its URL, and the requests that it read.

    Args:
        certificate: Its own, for the host that sites ask for.
        trusts: PEM of the CA of the server behind it.
    """
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(*certificate)
    read: list[bytes] = []

    def answer(raw: socket.socket) -> None:
        words = raw.recv(4096).decode().split()
        if not words:
            return
        host, _, port = words[1].rpartition(":")
        raw.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        raw.settimeout(None)
        outside = ssl.create_default_context(cafile=trusts)
        with (
            inside.wrap_socket(raw, server_side=True) as site,
            socket.create_connection((host, int(port)), 60) as onward,
            outside.wrap_socket(onward, server_hostname=host) as server,
        ):
            server.settimeout(None)
            _relay(site, server, read)

    with _serving(answer) as port:
        yield f"http://127.0.0.1:{port}", read


def _relay(site: ssl.SSLSocket, server: ssl.SSLSocket, read: list[bytes]) -> None:
    """Pass bytes both ways in one thread, until one side ends."""
    other = {site: server, server: site}
    while True:
        waiting = [s for s in other if s.pending()]
        ready = waiting or select.select(list(other), [], [])[0]
        for source in ready:
            source.settimeout(0)  # what is there may be half a record, or a ticket of TLS 1.3
            try:
                data = source.recv(65536)
            except ssl.SSLWantReadError:
                continue
            finally:
                source.settimeout(None)
            if not data:
                return
            if source is site:
                read.append(data)
            other[source].sendall(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def _serving(answer) -> Iterator[int]:  # type: ignore[no-untyped-def]
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(60)
            with suppress(OSError):
                answer(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of loopback that nobody listens on, and that nobody else can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])
