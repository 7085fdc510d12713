"""The coordinator's folder of one project: its settings, keys, and the sites that it admitted.

project.toml           settings, see ProjectSettings
ca/ca.key, ca/ca.crt   the project's CA; the key never leaves this machine
server/identity.pem    the coordinator's Ed25519 identity, which signs invitations and kits
server/tls.key, .crt   TLS of the advertised address (and of loopback)
server/superexec.secret  shared by Flower's own processes on this machine
sites/NAME/            invitation.json, request.json and kit.json of a site
former/NAME-TIME/      the same of a site that was revoked
roster.json            signed: the sites by now, and the revoked ones
revoked.json           who was revoked, when and why
plans/, runs/, logs/   studies
link.db                Flower's database
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.config import parse, read_toml, require
from shared.errors import ConfigError
from shared.files import read_bytes
from shared.identity import Identity
from shared.kit import INVITATION, KIT, Address, Invitation, Kit, Member, address
from shared.model_plan import NAME
from shared.signed import unseal

State = Literal["invited", "active", "expired", "revoked"]


@dataclass(frozen=True)
class ProjectSettings:
    """`project.toml`.

    Attributes:
        name: The project's name.
        advertise: host:port by which sites reach the server, through whatever NAT there is.
        bind: host:port on which it listens.
        expires: The project's last day, such as "2027-11-30".
        kit_days: For how long a site is admitted before it must renew.
        invitation_days: For how long an invitation may be used.
        tls_days: For how long a server certificate holds.
        requires_fedward: Versions of fedward that sites may run.
    """

    schema: Literal["fedward-project/1"]
    name: str
    advertise: str
    bind: str
    expires: str
    requires_fedward: str
    kit_days: int = 365
    invitation_days: int = 14
    tls_days: int = 365

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name {self.name!r}: use a-z, 0-9, hyphens")
        address(self.advertise)
        address(self.bind)
        self.last_day  # noqa: B018  # checked when it is read
        for name in ("kit_days", "invitation_days", "tls_days"):
            value = getattr(self, name)
            require(1 <= value <= 3650, f"{name} is {value}; valid: 1 to 3650")

    @property
    def last_day(self) -> datetime.datetime:
        """The end of `expires`, in UTC."""
        try:
            date = datetime.date.fromisoformat(self.expires)
        except ValueError:
            raise ConfigError(
                f"expires is {self.expires!r}; give a date such as 2027-11-30"
            ) from None
        return datetime.datetime.combine(date, datetime.time(23, 59, 59), datetime.UTC)


@dataclass(frozen=True)
class Revocation:
    """A line of revoked.json."""

    name: str
    identity: str
    node_key: str
    when: int
    reason: str


@dataclass(frozen=True)
class Revocations:
    """revoked.json, whole."""

    revoked: tuple[Revocation, ...] = ()


@dataclass(frozen=True)
class ProjectSite:
    """What the coordinator knows of a site.

    Attributes:
        name: In plans and roster.
        state: "active" is the only state in which a site is in a cohort.
        identity: Ed25519 public key, 32 bytes; empty while it is only invited.
        node_key: Public key for Flower's node authentication, OpenSSH text; likewise.
        expires: Unix seconds: of the kit, or of the invitation.
    """

    name: str
    state: State
    identity: bytes
    node_key: str
    expires: int

    @property
    def member(self) -> Member:
        """As kits and rosters name it."""
        return Member(self.name, self.identity.hex())


@dataclass(frozen=True)
class Project:
    """One project's folder. Reading decides nothing; server/provision.py does."""

    path: Path

    def settings(self) -> ProjectSettings:
        """Read project.toml; ConfigError names file and key."""
        file = self.path / "project.toml"
        if not file.exists():
            raise ConfigError(
                f"{file} does not exist. Name the project's folder with --project, or begin one: "
                "fedward-server project init DIR --name NAME --advertise HOST:PORT."
            )
        return parse(ProjectSettings, read_toml(file), str(file))

    def identity(self) -> Identity:
        """The coordinator's identity; ConfigError when missing or readable by others."""
        return Identity.load(self.path / "server" / "identity.pem")

    @property
    def bind(self) -> Address:
        """Where the server listens."""
        return address(self.settings().bind)

    @property
    def advertise(self) -> Address:
        """How sites reach it."""
        return address(self.settings().advertise)

    @property
    def ca_certificate(self) -> Path:
        """PEM of the project's CA."""
        return self.path / "ca" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """PEM of the CA's private key."""
        return self.path / "ca" / "ca.key"

    @property
    def tls_certificate(self) -> Path:
        """PEM of the server's certificate."""
        return self.path / "server" / "tls.crt"

    @property
    def tls_key(self) -> Path:
        """PEM of the server's private key."""
        return self.path / "server" / "tls.key"

    @property
    def superexec_secret(self) -> Path:
        """The secret that Flower's own processes on this machine share."""
        return self.path / "server" / "superexec.secret"

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.path / "link.db"

    @property
    def health_file(self) -> Path:
        """There while `fedward-server up` runs."""
        return self.path / "health.json"

    @property
    def roster_file(self) -> Path:
        """The signed roster."""
        return self.path / "roster.json"

    def site_folder(self, name: str) -> Path:
        """The folder of one site's files; ConfigError where that is no site's name."""
        require(bool(NAME.fullmatch(name)), f"site name {name!r}: use a-z, 0-9 and hyphens")
        return self.path / "sites" / name

    def revocations(self) -> tuple[Revocation, ...]:
        """Who was revoked, oldest first."""
        file = self.path / "revoked.json"
        if not file.exists():
            return ()
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"{file} is damaged; restore it: it says who is kept out.") from None
        require(isinstance(table, dict), f"{file} is damaged; restore it.")
        return parse(Revocations, table, str(file)).revoked

    def invitation(self, name: str) -> Invitation | None:
        """The invitation that a site was sent."""
        file = self.site_folder(name) / "invitation.json"
        if not file.exists():
            return None
        data = read_bytes(file, "invitation")
        signer = self.identity().public
        return unseal(data, Invitation, INVITATION, signer=signer, where=str(file)).record

    def kit(self, name: str) -> Kit | None:
        """The kit that a site was given."""
        file = self.site_folder(name) / "kit.json"
        if not file.exists():
            return None
        data = read_bytes(file, "kit")
        return unseal(data, Kit, KIT, signer=self.identity().public, where=str(file)).record

    def sites(self, now: float) -> tuple[ProjectSite, ...]:
        """Every site by name, the revoked ones last."""
        folder = self.path / "sites"
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        found = [site for name in names if (site := self._site(name, now)) is not None]
        return (*found, *(_revoked(r) for r in self.revocations()))

    def active(self, now: float) -> dict[str, ProjectSite]:
        """The sites that may be in a cohort now: admitted, neither expired nor revoked."""
        return {s.name: s for s in self.sites(now) if s.state == "active"}

    def _site(self, name: str, now: float) -> ProjectSite | None:
        kit = self.kit(name)
        if kit is not None:
            gone = {r.identity for r in self.revocations()}
            state: State = "active" if now < kit.expires else "expired"
            state = "revoked" if kit.identity in gone else state
            return ProjectSite(name, state, bytes.fromhex(kit.identity), kit.node_key, kit.expires)
        invitation = self.invitation(name)
        if invitation is None:
            return None
        state = "invited" if now < invitation.expires else "expired"
        return ProjectSite(name, state, b"", "", invitation.expires)


def _revoked(entry: Revocation) -> ProjectSite:
    return ProjectSite(
        entry.name, "revoked", bytes.fromhex(entry.identity), entry.node_key, entry.when
    )
