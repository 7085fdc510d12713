"""How a hospital joins a project: its keys are made here and stay here.

enrol   an invitation in; the site's own keys, and a request with the public ones, out
join    the coordinator's kit in, once it answers exactly these keys
trust   the other sites' identities in, once people compared their fingerprints
renew   a request for a longer admission, signed by the same identity
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.config import Coordinator, SiteFolder
from client.policy import FILE_NAME as POLICY_FILE
from client.policy import default_policy
from shared.config import canonical_json, require
from shared.errors import ConfigError, FedwardError, ProtocolError
from shared.files import make_folder, read_bytes, replace_file, write_new
from shared.identity import Identity
from shared.kit import (
    INVITATION,
    KIT,
    REQUEST,
    ROSTER,
    Invitation,
    Kit,
    Member,
    Roster,
    SiteRequest,
    proof_payload,
    refuse_expired,
)
from shared.messages import PROTOCOL_VERSION
from shared.signed import Opened, seal, unseal
from shared.version import fedward_version, require_version

ASK = "Ask the coordinator for a new one."


@dataclass(frozen=True)
class Changes:
    """What a roster would change in what this site pinned.

    Attributes:
        added: Sites that are not pinned; each fingerprint has to be compared.
        changed: Sites pinned under another identity; likewise, and ask why.
        removed: Names that would be pinned no more.
        kept: Names pinned already, with the same identity.
    """

    added: tuple[Member, ...]
    changed: tuple[Member, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def to_compare(self) -> tuple[Member, ...]:
        """Whose fingerprints have to be compared before anything is pinned."""
        return (*self.added, *self.changed)


def read_invitation(data: bytes, now: float) -> Opened[Invitation]:
    """Check an invitation, all but the coordinator's fingerprint that only people can compare.

    Raises:
        ProtocolError: changed, or expired.
        ConfigError: the project takes other versions of fedward.
    """
    opened = unseal(data, Invitation, INVITATION, signer=None, where="the invitation")
    invitation = opened.record
    refuse_expired(invitation.expires, now, "the invitation", ASK)
    require_version(
        invitation.requires_fedward, fedward_version(), f"project {invitation.project!r}"
    )
    return opened


def enrol(folder: SiteFolder, data: bytes, now: float) -> bytes:
    """Make the site's folder and keys, pin the coordinator, and sign the request.

    Args:
        folder: New, or without an identity.
        data: An invitation whose signer's fingerprint was compared.
        now: Unix seconds.

    Returns:
        The request, to be sent to the coordinator; also written as request.json.

    Raises:
        ConfigError: the folder has an identity already.
    """
    opened = read_invitation(data, now)
    invitation = opened.record
    require(
        not folder.identity_file.exists(),
        f"{folder.path} is enrolled already. To be admitted for longer: fedward-site renew. After "
        "a lost or stolen key: fedward-site recover --help.",
    )
    make_folder(folder.path)
    make_folder(folder.path / "tls")
    make_folder(folder.path / "logs")
    make_node_key(folder.node_key)
    coordinator = Coordinator(invitation.project, opened.signer.hex(), 0)
    replace_file(folder.coordinator_file, canonical_json(coordinator), mode=0o644)
    replace_file(folder.ca_certificate, invitation.ca_certificate.encode(), mode=0o644)
    _write_settings(folder, invitation.site)
    # The identity comes last: with it the folder counts as enrolled.
    identity = Identity.generate()
    request = _request(
        identity,
        folder.node_key,
        project=invitation.project,
        site=invitation.site,
        token=invitation.token,
        now=now,
    )
    identity.save(folder.identity_file)
    replace_file(folder.request_file, request)
    return request


def join(folder: SiteFolder, data: bytes, now: float) -> Kit:
    """Take a kit that admits exactly this site's keys; pins no other site.

    Raises:
        ProtocolError: changed, by another coordinator, for another site or other keys, expired,
            or older than the one at hand.
        ConfigError: the project takes other versions of fedward.
    """
    kit = open_kit(folder, data)
    refuse_expired(kit.expires, now, "the kit", ASK)
    require_version(kit.requires_fedward, fedward_version(), f"project {kit.project!r}")
    if kit.issued < _issued(folder):
        raise ProtocolError("the kit is older than the one that this site has. Keep that one.")
    _take_next_node_key(folder, kit.node_key)
    replace_file(folder.ca_certificate, kit.ca_certificate.encode(), mode=0o644)
    replace_file(folder.kit_file, data, mode=0o644)
    return kit


def _issued(folder: SiteFolder) -> int:
    """When the kit at hand was made; 0 where there is none, or a damaged one."""
    try:
        return folder.kit().issued
    except FedwardError:
        return 0


def open_kit(folder: SiteFolder, data: bytes) -> Kit:
    """Check whose kit this is and whose keys it admits.

    Raises:
        ProtocolError: changed, by another coordinator, for another site or other keys.
    """
    coordinator = folder.coordinator()
    kit = unseal(data, Kit, KIT, signer=coordinator.public, where="the kit").record
    identity, config = folder.identity(), folder.config()
    if (kit.project, kit.site) != (coordinator.project, config.name):
        raise ProtocolError(
            f"the kit is for site {kit.site!r} of project {kit.project!r}; this is "
            f"{config.name!r} of {coordinator.project!r}. {ASK}"
        )
    if kit.identity != identity.public.hex() or kit.node_key not in _node_keys(folder):
        raise ProtocolError(
            "the kit admits other keys than this site's: the request was swapped on its way, or "
            "the kit answers an older one. Compare fingerprints with the coordinator by telephone."
        )
    return kit


def read_roster(folder: SiteFolder, data: bytes) -> Roster:
    """Check a roster's signature and age; whom it names is for people to confirm.

    Raises:
        ProtocolError: changed, by another coordinator, of another project, or older than one that
            this site has trusted: a revoked site could come back that way.
    """
    coordinator = folder.coordinator()
    roster = unseal(data, Roster, ROSTER, signer=coordinator.public, where="the roster").record
    if roster.project != coordinator.project:
        raise ProtocolError(f"the roster is of project {roster.project!r}. {ASK}")
    _refuse_older(roster.serial, coordinator)
    return roster


def changes(folder: SiteFolder, members: tuple[Member, ...]) -> Changes:
    """What pinning these sites would change.

    Raises:
        ProtocolError: this very site is missing, or named with another identity.
    """
    me, config = folder.identity().public, folder.config()
    offered = {m.name: m for m in members}
    mine = offered.pop(config.name, None)
    if mine is None or mine.public != me:
        raise ProtocolError(
            f"the roster does not name this site, {config.name!r}, with its own identity. {ASK}"
        )
    pinned = folder.roster() if folder.roster_file.exists() else {}
    pinned.pop(config.name, None)
    return Changes(
        added=tuple(m for n, m in sorted(offered.items()) if n not in pinned),
        changed=tuple(m for n, m in sorted(offered.items()) if pinned.get(n, m.public) != m.public),
        removed=tuple(sorted(set(pinned) - set(offered))),
        kept=tuple(sorted(n for n, m in offered.items() if pinned.get(n) == m.public)),
    )


def pin(folder: SiteFolder, members: tuple[Member, ...], serial: int) -> None:
    """Trust these identities from now on; the caller has made sure that people compared them.

    Raises:
        ProtocolError: see `changes`; or the serial is older than one trusted before.
    """
    changes(folder, members)
    coordinator = folder.coordinator()
    _refuse_older(serial, coordinator)
    table = {m.name: m.identity for m in members}
    replace_file(folder.roster_file, canonical_json(table), mode=0o644)
    later = Coordinator(coordinator.project, coordinator.identity, serial)
    replace_file(folder.coordinator_file, canonical_json(later), mode=0o644)


def renew(folder: SiteFolder, now: float, *, new_node_key: bool) -> bytes:
    """A request to be admitted for longer, under the same identity; also in renewal.json.

    With `new_node_key` the site goes on with the old node key until the new kit has come.
    """
    coordinator, identity, config = folder.coordinator(), folder.identity(), folder.config()
    key_file = folder.node_key
    if new_node_key:
        key_file = _next(folder.node_key)
        make_node_key(key_file)
    request = _request(
        identity, key_file, project=coordinator.project, site=config.name, token="", now=now
    )
    replace_file(folder.path / "renewal.json", request)
    return request


def make_node_key(path: Path) -> None:
    """Flower's node key, on the curve that Flower itself uses; its public part in `path`.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    replace_file(path, private)
    replace_file(path.with_name(f"{path.name}.pub"), public, mode=0o644)


def _request(
    identity: Identity, key_file: Path, *, project: str, site: str, token: str, now: float
) -> bytes:
    key = serialization.load_ssh_private_key(read_bytes(key_file, "node key"), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key_file} is not a key on a NIST elliptic curve.")
    public = identity.public.hex()
    proof = key.sign(proof_payload(project, site, public, token), ec.ECDSA(hashes.SHA256()))
    request = SiteRequest(
        project=project,
        site=site,
        identity=public,
        node_key=read_bytes(key_file.with_name(f"{key_file.name}.pub"), "node key").decode(),
        node_proof=proof.hex(),
        token=token,
        created=int(now),
        fedward=fedward_version(),
        protocol=PROTOCOL_VERSION,
    )
    return seal(identity, REQUEST, request)


def _take_next_node_key(folder: SiteFolder, admitted: str) -> None:
    """Begin to use the node key that a renewal asked for, once the kit admits it."""
    following = _next(folder.node_key)
    public = following.with_name(f"{following.name}.pub")
    if public.exists() and public.read_text(encoding="utf-8") == admitted:
        following.replace(folder.node_key)
        public.replace(folder.node_key_public)


def _node_keys(folder: SiteFolder) -> set[str]:
    """The public node key in use, and the one that a renewal asked for."""
    following = _next(folder.node_key)
    files = (folder.node_key_public, following.with_name(f"{following.name}.pub"))
    return {file.read_text(encoding="utf-8") for file in files if file.exists()}


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}.next")


def _write_settings(folder: SiteFolder, site: str) -> None:
    if not folder.settings_file.exists():
        text = (resources.files("client") / "site.toml.default").read_text(encoding="utf-8")
        text = text.replace("SITE-NAME", site)
        write_new(folder.settings_file, text.encode(), mode=0o644)
    found = folder.config().name
    require(
        found == site,
        f"{folder.settings_file} names the site {found!r}, and the invitation {site!r}. Correct "
        "the name there, or ask for another invitation.",
    )
    policy = folder.path / POLICY_FILE
    if not policy.exists():
        write_new(policy, default_policy().encode())


def _refuse_older(serial: int, coordinator: Coordinator) -> None:
    if serial < coordinator.roster_serial:
        raise ProtocolError(
            f"the roster is number {serial}, and this site has trusted number "
            f"{coordinator.roster_serial}: an older one may name a site that was revoked. {ASK}"
        )
