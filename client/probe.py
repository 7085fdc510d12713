"""Tries the way to the server as a study will take it: name, proxy, TLS, and the time there.

A real handshake against the project's own CA. Nothing is sent but one empty request for `/`.
"""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from shared.errors import ProtocolError
from shared.kit import Address

_EXPIRED, _NOT_YET, _HOST, _IP = 10, 9, 62, 64  # X509_V_ERR_* of OpenSSL
_UNKNOWN_CA = (2, 18, 19, 20, 21)
_MOST_HEADERS = 1 << 16


@dataclass(frozen=True)
class Peer:
    """What a handshake found.

    Attributes:
        tls: Version, such as "TLSv1.3".
        certificate: The server's.
        time: By the Date header of its answer; None without one.
    """

    tls: str
    certificate: x509.Certificate
    time: datetime.datetime | None


class ProbeError(ProtocolError):
    """A try that failed: the fact, and the remedy beside it."""

    def __init__(self, fact: str, remedy: str) -> None:
        super().__init__(f"{fact}. {remedy}")
        self.fact, self.remedy = fact, remedy


def resolve(host: str) -> str:
    """The first address of a host name; ProbeError where it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise ProbeError(
            f"{host} cannot be resolved",
            "Check the name in the kit with the coordinator; ask IT whether this machine's "
            "resolver knows outside names.",
        ) from None


def reach(address: Address, timeout_s: float) -> None:
    """Open and close a TCP connection; ProbeError where that fails."""
    with _connected(address, timeout_s):
        pass


def handshake(server: Address, roots: Path, proxy: Address | None, timeout_s: float) -> Peer:
    """Connect, through the proxy if there is one, and check the server's certificate.

    Args:
        server: As the kit advertises it.
        roots: PEM file with all that this site trusts for it.
        proxy: A forward proxy that takes CONNECT.
        timeout_s: For each step.

    Raises:
        ProbeError: which step failed, and what to do about it.
    """
    try:
        context = ssl.create_default_context(cafile=roots)
    except (OSError, ssl.SSLError):
        raise ProbeError(
            f"{roots} holds no usable CA certificate", "Join again with the kit: fedward-site join."
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _connected(proxy or server, timeout_s) as raw:
        if proxy is not None:
            _connect_through(raw, server, proxy)
        try:
            with context.wrap_socket(raw, server_hostname=server.host) as stream:
                certificate = x509.load_der_x509_certificate(stream.getpeercert(True) or b"")
                tls = stream.version() or "?"
                return Peer(tls, certificate, _date(stream, server))
        except ssl.SSLCertVerificationError as error:
            raise _refused(error, server, proxy) from None
        except (OSError, ssl.SSLError) as error:
            raise ProbeError(
                f"{server} accepted the connection, but no TLS came about ({_words(error)})",
                "Ask whether a firewall on the way breaks TLS, and whether it is the right port.",
            ) from None


@contextmanager
def _connected(address: Address, timeout_s: float) -> Iterator[socket.socket]:
    resolve(address.host)
    try:
        connection = socket.create_connection((address.host, address.port), timeout_s)
    except TimeoutError:
        raise ProbeError(
            f"{address} does not answer within {timeout_s:g} s",
            "A firewall drops it: show IT the sheet, fedward-site it-sheet.",
        ) from None
    except OSError as error:
        raise ProbeError(
            f"{address} refuses the connection ({_words(error)})",
            "Nothing listens there, or a firewall rejects it: ask the coordinator whether the "
            "server runs, then show IT the sheet, fedward-site it-sheet.",
        ) from None
    with connection:
        yield connection


def _connect_through(raw: socket.socket, server: Address, proxy: Address) -> None:
    try:
        raw.sendall(f"CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n\r\n".encode())
        status = _headers(raw).split(b"\r\n")[0].decode("latin-1")
    except OSError:
        status = ""
    if " 200" not in status[:16]:
        raise ProbeError(
            f"the proxy {proxy} does not let through to {server} ({status or 'no answer'})",
            f"Ask IT to allow CONNECT to {server} there, without a password.",
        )


def _date(stream: ssl.SSLSocket, server: Address) -> datetime.datetime | None:
    try:
        request = f"GET / HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n"
        stream.sendall(request.encode())
        for line in _headers(stream).split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"date":
                return parsedate_to_datetime(value.decode("latin-1").strip())
    except (OSError, ValueError):
        pass
    return None


def _headers(stream: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < _MOST_HEADERS:
        piece = stream.recv(4096)
        if not piece:
            break
        data += piece
    return data


def _refused(
    error: ssl.SSLCertVerificationError, server: Address, proxy: Address | None
) -> ProbeError:
    code = error.verify_code
    if code == _EXPIRED:
        return ProbeError(
            f"the certificate of {server} has expired, by this machine's clock",
            "Check the clock first; else the coordinator gives the server a new one: "
            "fedward-server project renew.",
        )
    if code == _NOT_YET:
        return ProbeError(
            f"the certificate of {server} is not valid yet, by this machine's clock",
            "This machine's clock is behind: let it follow a time server.",
        )
    if code in (_HOST, _IP):
        return ProbeError(
            f"the certificate there is for another name than {server.host}",
            "Check the address in the kit with the coordinator: it must be the advertised one.",
        )
    if code in _UNKNOWN_CA:
        between = " or the proxy" if proxy else ""
        return ProbeError(
            f"the certificate of {server} is not by the project's CA",
            f"If the hospital's firewall{between} opens TLS, put its CA into site.toml ([network] "
            "ca_bundle). If not, somebody answers in the server's place: call the coordinator.",
        )
    return ProbeError(
        f"the certificate of {server} is refused ({error.verify_message})",
        "Show that to the coordinator.",
    )


def _words(error: OSError) -> str:
    return error.strerror or type(error).__name__
