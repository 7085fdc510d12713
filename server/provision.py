"""What the coordinator decides: who is invited, admitted, renewed and kept out.

A site's private keys never come here. What arrives is a request with public keys, and it is
believed once three things hold: it carries the one-time token of a live invitation, it is signed by
the identity in it, and that identity's fingerprint was read over the telephone.
"""

from __future__ import annotations

import datetime
import hmac
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from server.authority import create_authority, issue_server_certificate
from server.project import Project, ProjectSettings, Revocation
from shared.config import canonical_json, require
from shared.errors import ConfigError, PolicyError, ProtocolError
from shared.files import make_folder, read_bytes, replace_file, write_new
from shared.identity import Identity
from shared.kit import (
    INVITATION,
    KIT,
    REQUEST,
    ROSTER,
    SECONDS_A_DAY,
    Invitation,
    Kit,
    Member,
    Roster,
    SiteRequest,
    refuse_expired,
)
from shared.messages import PROTOCOL_VERSION
from shared.signed import seal, unseal
from shared.version import require_version

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def init(folder: Path, settings: ProjectSettings, now: float) -> Project:
    """Begin a project: its settings, CA, TLS certificate, identity and secret.

    Raises:
        ConfigError: the folder has a project already, or the project would end in the past.
    """
    project = Project(folder)
    require(
        not (folder / "project.toml").exists(),
        f"{folder / 'project.toml'} exists. Choose another folder; a project is never overwritten.",
    )
    begins = _utc(now)
    require(settings.last_day > begins, f"the project would end on {settings.expires}, in the past")
    for name in ("ca", "server", "sites", "former", "plans", "runs", "logs"):
        make_folder(folder / name)
    key, certificate = create_authority(settings.name, begins=begins, ends=settings.last_day)
    write_new(project.ca_key, key)
    write_new(project.ca_certificate, certificate, mode=0o644)
    Identity.generate().save(folder / "server" / "identity.pem")
    write_new(project.superexec_secret, secrets.token_hex(32).encode())
    write_new(folder / "project.toml", _toml(settings).encode(), mode=0o644)
    renew_server_certificate(project, now)
    write_roster(project, now)
    return project


def renew_server_certificate(project: Project, now: float) -> datetime.datetime:
    """Give the server a new TLS key and certificate under the same CA; until when they hold."""
    settings = project.settings()
    begins = _utc(now)
    ends = min(begins + datetime.timedelta(days=settings.tls_days), settings.last_day)
    key, certificate = issue_server_certificate(
        read_bytes(project.ca_key, "CA key"),
        read_bytes(project.ca_certificate, "CA certificate"),
        [project.advertise.host, *LOOPBACK],
        begins=begins,
        ends=ends,
    )
    replace_file(project.tls_key, key)
    replace_file(project.tls_certificate, certificate, mode=0o644)
    return ends


def invite(project: Project, site: str, now: float) -> bytes:
    """Write an invitation with a fresh token; a new one makes an unused older one worthless.

    Raises:
        ConfigError: not a site's name.
        PolicyError: the site is admitted already.
    """
    settings, identity = project.settings(), project.identity()
    if project.kit(site) is not None:
        raise PolicyError(
            f"site {site!r} is admitted already. It renews with `fedward-site renew`. If it lost "
            f"its key, revoke it first (fedward-server project revoke {site}), then invite again."
        )
    _refuse_ended(settings, now)
    invitation = Invitation(
        project=settings.name,
        site=site,
        server=settings.advertise,
        ca_certificate=read_bytes(project.ca_certificate, "CA certificate").decode(),
        token=os.urandom(16).hex(),
        expires=_expiry(settings, now, settings.invitation_days),
        requires_fedward=settings.requires_fedward,
    )
    data = seal(identity, INVITATION, invitation)
    folder = project.site_folder(site)
    make_folder(folder)
    replace_file(folder / "invitation.json", data)
    return data


def examine(project: Project, data: bytes, now: float) -> SiteRequest:
    """Check a request, all but the fingerprint that only people can compare.

    Raises:
        ProtocolError: changed, not signed by the identity in it, without the token of a live
            invitation, or with keys that are another site's.
        PolicyError: the identity was revoked.
        ConfigError: the site runs another version than the project takes.
    """
    request = _signed_request(project, data)
    invitation = project.invitation(request.site)
    if invitation is None:
        raise ProtocolError(f"nobody invited a site {request.site!r}. Invite it first.")
    if project.kit(request.site) is not None:
        raise ProtocolError(
            f"site {request.site!r} is admitted already, and its invitation is used up. If this is "
            "a second request of that site, ask by telephone who sent it."
        )
    if not hmac.compare_digest(request.token, invitation.token):
        raise ProtocolError(
            f"the request of {request.site!r} does not carry the token of its latest invitation. "
            "Send that one again, or invite again."
        )
    refuse_expired(
        invitation.expires,
        now,
        f"the invitation of {request.site!r}",
        f"Invite again: fedward-server project invite {request.site}.",
    )
    _refuse_keys_of_others(project, request, now)
    return request


def approve(project: Project, data: bytes, now: float) -> Kit:
    """Admit a site whose request was examined and whose fingerprint was compared.

    Raises:
        As `examine`.
    """
    request = examine(project, data, now)
    folder = project.site_folder(request.site)
    replace_file(folder / "request.json", data)
    issue_kit(project, request, _expiry(project.settings(), now, project.settings().kit_days), now)
    write_roster(project, now)
    return refresh_kit(project, request.site, now)


def renew(project: Project, data: bytes, now: float) -> Kit:
    """Admit a site for longer: its request is signed by the very identity that is admitted.

    Raises:
        ProtocolError: the site is not admitted, or the request is by another identity.
    """
    request = _signed_request(project, data)
    kit = project.kit(request.site)
    if kit is None or kit.identity != request.identity:
        raise ProtocolError(
            f"the renewal of {request.site!r} is not signed by the identity that was admitted. "
            "After a lost key the site is revoked, invited and enrolled anew."
        )
    require(not request.token, "this is a first request; use `project approve`")
    if request.created < kit.issued:
        raise ProtocolError(
            f"the renewal of {request.site!r} is older than its kit. Ask for a new one."
        )
    _refuse_keys_of_others(project, request, now)
    _refuse_ended(project.settings(), now)
    replace_file(project.site_folder(request.site) / "request.json", data)
    issue_kit(project, request, _expiry(project.settings(), now, project.settings().kit_days), now)
    write_roster(project, now)
    return refresh_kit(project, request.site, now)


def refresh_kit(project: Project, site: str, now: float) -> Kit:
    """Write a site's kit again with the sites that are admitted by now; the expiry stays.

    Raises:
        ConfigError: the site is not admitted.
    """
    project.settings()
    kit = project.kit(site)
    if kit is None:
        raise ConfigError(
            f"site {site!r} is not admitted yet: fedward-server project approve REQUEST."
        )
    data = read_bytes(project.site_folder(site) / "request.json", "request")
    return issue_kit(project, _signed_request(project, data), kit.expires, now)


def issue_kit(project: Project, request: SiteRequest, expires: int, now: float) -> Kit:
    """Sign and write the kit of a request that was admitted."""
    settings, identity = project.settings(), project.identity()
    kit = Kit(
        project=settings.name,
        site=request.site,
        identity=request.identity,
        node_key=request.node_key,
        server=settings.advertise,
        ca_certificate=read_bytes(project.ca_certificate, "CA certificate").decode(),
        issued=int(now),
        expires=expires,
        requires_fedward=settings.requires_fedward,
        roster=_members(project, now),
        roster_serial=read_roster(project).serial,
    )
    file = project.site_folder(request.site) / "kit.json"
    replace_file(file, seal(identity, KIT, kit), mode=0o644)
    return kit


def revoke(project: Project, site: str, reason: str, now: float) -> Revocation:
    """Keep a site out: of the roster, of the next cohort, and at the server's door.

    Raises:
        ConfigError: the site was never admitted.
    """
    kit = project.kit(site)
    if kit is None:
        raise ConfigError(f"site {site!r} is not admitted, so there is nothing to revoke.")
    entry = Revocation(site, kit.identity, kit.node_key, int(now), reason)
    known = project.revocations()
    if kit.identity not in {r.identity for r in known}:
        table = {"revoked": [asdict(r) for r in (*known, entry)]}
        replace_file(project.path / "revoked.json", canonical_json(table), mode=0o644)
    project.site_folder(site).rename(project.path / "former" / f"{site}-{int(now)}")
    write_roster(project, now)
    return entry


def read_roster(project: Project) -> Roster:
    """The signed roster as it was last written."""
    data = read_bytes(project.roster_file, "roster")
    signer = project.identity().public
    return unseal(data, Roster, ROSTER, signer=signer, where=str(project.roster_file)).record


def write_roster(project: Project, now: float) -> Roster:
    """Sign who takes part by now, under the next serial number; unchanged, it stays as it is."""
    sites = _members(project, now)
    revoked = tuple(Member(r.name, r.identity) for r in project.revocations())
    before = read_roster(project) if project.roster_file.exists() else None
    if before is not None and (before.sites, before.revoked) == (sites, revoked):
        return before
    serial = before.serial + 1 if before else 1
    roster = Roster(project.settings().name, serial, int(now), sites, revoked)
    replace_file(project.roster_file, seal(project.identity(), ROSTER, roster), mode=0o644)
    return roster


def _members(project: Project, now: float) -> tuple[Member, ...]:
    return tuple(site.member for site in project.active(now).values())


def _signed_request(project: Project, data: bytes) -> SiteRequest:
    opened = unseal(data, SiteRequest, REQUEST, signer=None, where="the request")
    request, settings = opened.record, project.settings()
    if opened.signer.hex() != request.identity:
        raise ProtocolError("the request is not signed by the identity in it: it was put together.")
    if request.project != settings.name:
        raise ProtocolError(
            f"the request is for project {request.project!r}; this is {settings.name!r}"
        )
    require_version(
        settings.requires_fedward,
        request.fedward,
        f"project {settings.name!r} (site {request.site!r} asks to take part; it)",
    )
    if request.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"site {request.site!r} speaks protocol {request.protocol}; this is {PROTOCOL_VERSION}"
        )
    return request


def _refuse_keys_of_others(project: Project, request: SiteRequest, now: float) -> None:
    for site in project.sites(now):
        same = request.identity == site.identity.hex() or request.node_key == site.node_key
        if site.state == "revoked" and same:
            raise PolicyError(
                f"the request of {request.site!r} carries a key that was revoked. The site must "
                "make new ones: a new folder, and `fedward-site enrol`."
            )
        if site.name != request.site and same:
            raise ProtocolError(
                f"the request of {request.site!r} carries a key of site {site.name!r}"
            )


def _refuse_ended(settings: ProjectSettings, now: float) -> None:
    if _utc(now) > settings.last_day:
        raise PolicyError(
            f"project {settings.name!r} ended on {settings.expires}. A project's CA ends with it: "
            "begin a new project."
        )


def _expiry(settings: ProjectSettings, now: float, days: int) -> int:
    return min(int(now) + days * SECONDS_A_DAY, int(settings.last_day.timestamp()))


def _utc(now: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now, datetime.UTC).replace(microsecond=0)


def _toml(settings: ProjectSettings) -> str:
    notes = {
        "advertise": "by which sites reach the server",
        "bind": "on which it listens",
        "expires": "the project's last day; its CA ends with it",
        "requires_fedward": "versions that sites may run",
        "kit_days": "a site renews after these",
        "invitation_days": "an invitation is worthless after these",
        "tls_days": "`fedward-server project renew` gives a new certificate",
    }
    lines = []
    for name, value in asdict(settings).items():
        text = f'"{value}"' if isinstance(value, str) else str(value)
        note = f"  # {notes[name]}" if name in notes else ""
        lines.append(f"{name} = {text}{note}")
    return "\n".join(lines) + "\n"
