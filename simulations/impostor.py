"""Somebody who stands where the sites think the server is, with a certificate that is not right."""

from __future__ import annotations

import datetime
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.authority import create_authority, issue_server_certificate
from server.project import Project

LOOPBACK = "127.0.0.1"
DAY = datetime.timedelta(days=1)


@dataclass
class Impostor:
    """What came of those who called.

    Attributes:
        refused: They did not accept the certificate, and said nothing.
        fooled: They accepted it and began to speak.
    """

    refused: int = 0
    fooled: int = 0


@contextmanager
def impostor(port: int, certificate: Path, key: Path) -> Iterator[Impostor]:
    """Listen on a port of loopback within the block."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    found = Impostor()
    counting = threading.Lock()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            fooled = _speaks(context, self.request)
            with counting:
                found.fooled += fooled
                found.refused += not fooled

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server((LOOPBACK, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def _speaks(context: ssl.SSLContext, raw: socket.socket) -> bool:
    """Whether a caller accepts the certificate and sends something."""
    raw.settimeout(10)
    try:
        with context.wrap_socket(raw, server_side=True) as stream:
            return bool(stream.recv(1))
    except OSError:
        return False


def wrong_certificate(project: Project, folder: Path, now: datetime.datetime) -> tuple[Path, Path]:
    """Certificate and key for the server's address, by a CA of the same name that is another."""
    authority = create_authority(project.settings().name, begins=now - DAY, ends=now + DAY)
    return _issue(authority, folder, now - DAY, now + DAY)


def expired_certificate(
    project: Project, folder: Path, now: datetime.datetime
) -> tuple[Path, Path]:
    """Certificate and key for the server's address, by the project's CA, until yesterday."""
    authority = (project.ca_key.read_bytes(), project.ca_certificate.read_bytes())
    return _issue(authority, folder, now - 30 * DAY, now - DAY)


def _issue(
    authority: tuple[bytes, bytes],
    folder: Path,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> tuple[Path, Path]:
    key, certificate = issue_server_certificate(*authority, [LOOPBACK], begins=begins, ends=ends)
    folder.mkdir(parents=True)
    (folder / "tls.key").write_bytes(key)
    (folder / "tls.crt").write_bytes(certificate)
    return folder / "tls.crt", folder / "tls.key"
