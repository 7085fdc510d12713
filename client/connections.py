"""Every connection of a site, in one table: `fedward-site it-sheet` prints it, `check` tries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from client.config import NetworkConfig
from shared.kit import Address

Probe = Literal["proxy", "name", "server", "clock"]
AHEAD_S, BEHIND_S = 5, 240
"""How far a site's clock may be off: Flower's server refuses what is signed 5 s in its future or
305 s in its past."""


@dataclass(frozen=True)
class Connection:
    """One row of the table.

    Attributes:
        name: Also the name of the line with which `check` tries it.
        direction: From the hospital's view; "local" never leaves the machine.
        destination: Host name, or in words.
        port: None where there is none, or where the hospital decides.
        protocol: Transport and what runs on it.
        need: "yes", "no", or when.
        purpose: For whoever opens the firewall.
        probe: How `check` tries it; None where it cannot.
    """

    name: str
    direction: Literal["out", "in", "local"]
    destination: str
    port: int | None
    protocol: str
    need: str
    purpose: str
    probe: Probe | None = None


def proxy_of(network: NetworkConfig, environment: Mapping[str, str], host: str) -> Address | None:
    """The forward proxy that connections to `host` take: of site.toml, else of the environment.

    NO_PROXY of the environment is honoured for exact names, and for domains with a leading dot.
    """
    lower = {name.lower(): value for name, value in environment.items()}
    url = network.proxy or lower.get("https_proxy", "") or lower.get("all_proxy", "")
    excepted = [part.strip() for part in lower.get("no_proxy", "").split(",") if part.strip()]
    if not url or any(p == "*" or host == p.lstrip(".") or host.endswith(p) for p in excepted):
        return None
    parts = urlsplit(url)
    return Address(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def connections(server: Address, proxy: Address | None) -> tuple[Connection, ...]:
    """All connections of a site.

    Args:
        server: As the kit advertises it.
        proxy: From `proxy_of`.
    """
    rows = [
        Connection(
            "server",
            "out",
            server.host,
            server.port,
            "TCP; HTTPS (TLS 1.2 or 1.3), by the project's own CA",
            "yes",
            "the study: short requests that this site begins; encrypted beneath TLS as well"
            + (", through the proxy (CONNECT)" if proxy else ""),
            "server",
        )
    ]
    if proxy is not None:
        rows.append(
            Connection(
                "proxy",
                "out",
                proxy.host,
                proxy.port,
                "TCP; HTTP CONNECT",
                "yes",
                f"the hospital's forward proxy; it must allow CONNECT to {server}",
                "proxy",
            )
        )
    elif not _is_ip(server.host):
        rows.append(
            Connection(
                "name",
                "out",
                "the hospital's DNS resolver",
                53,
                "UDP and TCP; DNS",
                "yes",
                f"finds the address of {server.host}",
                "name",
            )
        )
    rows += [
        Connection(
            "clock",
            "out",
            "the hospital's time server",
            123,
            "UDP; NTP",
            "yes, or another way to keep time",
            f"requests are signed with the time: at most {AHEAD_S} s ahead, {BEHIND_S // 60} min "
            "behind",
            "clock",
        ),
        Connection(
            "software",
            "out",
            "the hospital's package mirror",
            443,
            "TCP; HTTPS",
            "only to install and update",
            "fedward and its packages; or carry wheels in by hand",
        ),
        Connection(
            "inbound",
            "in",
            "nothing listens for others",
            None,
            "-",
            "no",
            "no port of this site has to be opened from outside",
        ),
        Connection(
            "syslog",
            "local",
            "the machine's syslog",
            None,
            "socket, or UDP to a collector",
            "no",
            "the site's journal, where site.toml asks for it",
        ),
        Connection(
            "metrics",
            "local",
            "this machine's monitoring",
            None,
            "TCP on loopback; HTTP GET /metrics",
            "no",
            "numbers for Prometheus, only with `fedward-site up --metrics`",
        ),
    ]
    return tuple(rows)


def sheet(site: str, project: str, rows: tuple[Connection, ...]) -> str:
    """The table for the hospital's IT, as plain text."""
    lines = [
        f"Network sheet of site {site}, project {project}",
        "",
        "This site begins every connection itself. Nothing from outside has to reach it.",
        "",
        f"  {'name':<9} {'direction':<10} {'destination':<32} {'port':<6} mandatory",
    ]
    for row in rows:
        port = str(row.port) if row.port is not None else "-"
        lines.append(
            f"  {row.name:<9} {row.direction:<10} {row.destination:<32} {port:<6} {row.need}"
        )
        lines.append(f"  {'':<9} {row.protocol}")
        lines.append(f"  {'':<9} {row.purpose}")
    lines += [
        "",
        "TLS inspection: possible where it cannot be avoided. Put the hospital's CA into",
        'site.toml ([network] ca_bundle = "..."); what is inside stays encrypted and signed.',
        "Idle connections must be allowed for 60 s, and single requests of 5 MB.",
        "Try it: fedward-site check",
    ]
    return "\n".join(lines)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
