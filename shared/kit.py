"""What coordinator and hospital hand each other before a study: four signed files.

invitation  coordinator -> site   the project, its server and CA, a one-time token
request     site -> coordinator   the site's public keys; the private ones never move
kit         coordinator -> site   the keys are admitted, until when; who else takes part
roster      coordinator -> sites  who takes part by now, and who was revoked

Each is checked by a signature, and the first one by a fingerprint that people read to each other
over the telephone. A kit makes no site trust another: each site pins the others' identities itself.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.config import canonical_json, require
from shared.errors import ConfigError, ProtocolError
from shared.identity import PUBLIC_BYTES
from shared.model_plan import NAME

INVITATION = "fedward-invitation/1"
REQUEST = "fedward-request/1"
KIT = "fedward-kit/1"
ROSTER = "fedward-roster/1"

SECONDS_A_DAY = 24 * 3600
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]{1,253}):(\d{1,5})")
_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Address:
    """Where a server listens, or is reached: a host name or IP address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def address(text: str) -> Address:
    """Read "host:port"; ConfigError where it is none.

    >>> address("fl.example.org:8443")
    Address(host='fl.example.org', port=8443)
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise ConfigError(f"{text!r} is not host:port, such as fl.example.org:8443.")
    return Address(found[1].strip("[]"), int(found[2]))


@dataclass(frozen=True)
class Member:
    """A site of the project and its Ed25519 identity, in hex."""

    name: str
    identity: str

    def __post_init__(self) -> None:
        _check_site(self.name)
        _hex_bytes(self.identity, PUBLIC_BYTES, f"identity of {self.name}")

    @property
    def public(self) -> bytes:
        """The identity, 32 bytes."""
        return bytes.fromhex(self.identity)


@dataclass(frozen=True)
class Invitation:
    """Coordinator to site; signed by the coordinator's identity.

    Attributes:
        project: The project's name.
        site: The name that the site will have in plans and roster.
        server: The advertised host:port.
        ca_certificate: PEM of the project's CA; the site trusts no other one for this server.
        token: 32 hex digits; serves one request.
        expires: Unix seconds.
        requires_fedward: Versions of fedward that the project takes, such as ">=0.1,<0.2".
    """

    project: str
    site: str
    server: str
    ca_certificate: str
    token: str
    expires: int
    requires_fedward: str

    def __post_init__(self) -> None:
        _check_site(self.site)
        address(self.server)
        authority(self.ca_certificate)
        require(bool(_TOKEN.fullmatch(self.token)), "the token is not 32 hex digits")


@dataclass(frozen=True)
class SiteRequest:
    """Site to coordinator; signed by the site's own new identity.

    Attributes:
        project: As in the invitation.
        site: As in the invitation.
        identity: Ed25519 public key in hex, the signer's.
        node_key: Public key of Flower's node authentication, OpenSSH text.
        node_proof: Hex ECDSA signature by the node key over identity and token, so that nobody
            can register a key that is another's.
        token: Of the invitation; empty in a renewal.
        created: Unix seconds.
        fedward: Version of fedward at the site.
        protocol: Version of the wire protocol at the site.
    """

    project: str
    site: str
    identity: str
    node_key: str
    node_proof: str
    token: str
    created: int
    fedward: str
    protocol: int

    def __post_init__(self) -> None:
        _check_site(self.site)
        _hex_bytes(self.identity, PUBLIC_BYTES, "identity")
        require(not self.token or bool(_TOKEN.fullmatch(self.token)), "the token is malformed")
        _check_node_proof(self)


@dataclass(frozen=True)
class Kit:
    """Coordinator to site; signed by the coordinator's identity.

    Attributes:
        project: The project's name.
        site: The site that it admits.
        identity: The identity that it admits, in hex.
        node_key: The node key that the server admits, OpenSSH text.
        server: The advertised host:port.
        ca_certificate: PEM of the project's CA.
        issued: Unix seconds.
        expires: Unix seconds; from then on the site is in no cohort until it renews.
        requires_fedward: As in the invitation.
        roster: The project's sites when the kit was made. Each site pins them itself.
        roster_serial: Of the roster that these sites were taken from.
    """

    project: str
    site: str
    identity: str
    node_key: str
    server: str
    ca_certificate: str
    issued: int
    expires: int
    requires_fedward: str
    roster: tuple[Member, ...]
    roster_serial: int

    def __post_init__(self) -> None:
        _check_site(self.site)
        address(self.server)
        authority(self.ca_certificate)
        _hex_bytes(self.identity, PUBLIC_BYTES, "identity")
        load_node_key(self.node_key)
        _check_members(self.roster)


@dataclass(frozen=True)
class Roster:
    """Coordinator to sites; signed by the coordinator's identity. `serial` grows with each one."""

    project: str
    serial: int
    issued: int
    sites: tuple[Member, ...]
    revoked: tuple[Member, ...]

    def __post_init__(self) -> None:
        _check_members(self.sites)


def proof_payload(project: str, site: str, identity: str, token: str) -> bytes:
    """What the node key signs in a request."""
    return b"fedward-node-proof/1\x00" + canonical_json([project, site, identity, token])


def load_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """Read a public node key in OpenSSH's form.

    Raises:
        ConfigError: not such a key, or not on one of the NIST curves that Flower takes.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, TypeError, UnicodeEncodeError):
        raise ConfigError("the node key is not an OpenSSH public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("the node key is not on a NIST elliptic curve")
    return key


def authority(pem: str) -> x509.Certificate:
    """Read the project's CA certificate; ConfigError where it is none."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        extension = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, x509.ExtensionNotFound):
        raise ConfigError("the CA certificate is not a PEM certificate of an authority") from None
    require(extension.value.ca, "the CA certificate is not one of an authority")
    return certificate


def day(unix_s: float) -> str:
    """A time as a date in UTC, such as 2026-11-25."""
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d")


def refuse_expired(expires: int, now: float, what: str, remedy: str) -> None:
    """Raise ProtocolError where `now` is past `expires`."""
    if now >= expires:
        raise ProtocolError(f"{what} expired on {day(expires)}. {remedy}")


def _check_node_proof(request: SiteRequest) -> None:
    key = load_node_key(request.node_key)
    payload = proof_payload(request.project, request.site, request.identity, request.token)
    try:
        key.verify(bytes.fromhex(request.node_proof), payload, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            "the request does not prove that its sender holds the node key in it"
        ) from None


def _check_members(members: tuple[Member, ...]) -> None:
    names = [m.name for m in members]
    keys = [m.identity for m in members]
    require(len(set(names)) == len(names), "two sites have the same name")
    require(len(set(keys)) == len(keys), "two sites have the same identity")


def _check_site(name: str) -> None:
    require(
        bool(NAME.fullmatch(name)),
        f"site name {name!r}: use 1 to 63 of a-z, 0-9 and hyphens",
    )


def _hex_bytes(text: str, size: int, what: str) -> None:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    require(len(data) == size and data.hex() == text, f"{what} is not {size} bytes in hex")
