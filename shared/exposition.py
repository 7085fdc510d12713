"""Numbers for the operators' monitoring, in Prometheus' text format, on loopback unless asked.

A dozen gauges need no client library: a line is a name, labels and a number.

Source: Prometheus, "Exposition formats", text format version 0.0.4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from shared.errors import ConfigError
from shared.kit import Address, address

LOOPBACK = "127.0.0.1"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """One number; several with one name differ in their labels and share help and kind."""

    name: str
    help: str
    value: float
    kind: Literal["gauge", "counter"] = "gauge"
    labels: Mapping[str, str] = field(default_factory=dict)


def exposition(metrics: Iterable[Metric]) -> str:
    """The text that Prometheus reads.

    >>> print(exposition([Metric("up", "Runs.", 1.0, labels={"site": "a"})]), end="")
    # HELP up Runs.
    # TYPE up gauge
    up{site="a"} 1.0
    """
    lines: list[str] = []
    by_name: dict[str, list[Metric]] = {}
    for metric in metrics:
        by_name.setdefault(metric.name, []).append(metric)
    for name, same in by_name.items():
        lines += [f"# HELP {name} {_escaped(same[0].help)}", f"# TYPE {name} {same[0].kind}"]
        lines += [f"{name}{_labels(m.labels)} {float(m.value)!r}" for m in same]
    return "".join(f"{line}\n" for line in lines)


def metrics_address(text: str) -> Address:
    """Read PORT, which means loopback, or HOST:PORT.

    >>> str(metrics_address("9464"))
    '127.0.0.1:9464'
    """
    return address(f"{LOOPBACK}:{text}" if text.isdigit() else text)


@contextmanager
def serve_metrics(where: Address | None, collect: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """Answer GET /metrics in a thread, within the block; without an address do nothing.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    if where is None:
        yield
        return
    try:
        server = ThreadingHTTPServer((where.host, where.port), _handler(collect))
    except OSError as error:
        raise ConfigError(f"--metrics {where}: {error.strerror}. Choose another.") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def process_metrics(health: Mapping[str, Any]) -> Iterator[Metric]:
    """Of the processes that a supervisor keeps running; see shared/supervise.py."""
    for name, process in health["processes"].items():
        labels = {"process": name}
        running = float(process["pid"] is not None)
        yield Metric("fedward_process_up", "1 while it runs.", running, labels=labels)
        seconds = float(process["running_s"])
        yield Metric("fedward_process_seconds", "Since it started.", seconds, labels=labels)
        yield Metric(
            "fedward_process_restarts_total",
            "How often it ended and was started again.",
            float(process["restarts"]),
            "counter",
            labels,
        )


def _handler(collect: Callable[[], Iterable[Metric]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = exposition(collect()).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Every scrape in the log would hide the rest."""

        def version_string(self) -> str:
            return "fedward"

    return Handler


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_quoted(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
