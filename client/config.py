"""A site's folder: its settings, its identity, the roster that it pinned, its books.

site.toml          settings, see SiteConfig
identity.pem       the site's Ed25519 key, readable by its owner alone
node_key, .pub     Flower's node key, OpenSSH; likewise
coordinator.json   the coordinator's identity, pinned at enrolment
kit.json           signed by the coordinator: this site's keys are admitted
tls/ca.crt         the project's CA; no other one is trusted for its server
roster.json        site name -> public key in hex, pinned by this site
policy.toml        what this site allows; without it nothing runs
ledger.db          which plans it approved, and what its patients have spent
journal.db         everything that happened here, signed, and nothing about any patient
logs/              of the processes
opt-out.json       patients who do not take part, as keyed hashes
prepared/          the hospital's files as a plan's task wants them
patients.key       turns patients' identifiers into the ledger's hashes
runs/RUN/          state of one run, and its log
own-models/KEY/    this site's own version of a released model
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.consent import Books, SiteFacts
from client.data.site_config import SourceConfig
from client.journal import Journal, LogConfig
from shared.config import parse, read_toml, require
from shared.errors import ConfigError
from shared.files import read_bytes, replace_file
from shared.identity import PUBLIC_BYTES, Identity
from shared.kit import KIT, Kit
from shared.plan import StudyPlan
from shared.signed import unseal

Part = Literal["train", "test"]


@dataclass(frozen=True)
class PreparedData:
    """Records already as arrays: two safetensors files, beside site.toml or absolute."""

    train: str
    test: str


@dataclass(frozen=True)
class NetworkConfig:
    """How this hospital lets connections out; [network] of site.toml.

    Attributes:
        proxy: URL of the forward proxy, such as "http://proxy:3128". Empty takes HTTPS_PROXY of
            the environment, and without that goes out directly.
        ca_bundle: PEM file, beside site.toml or absolute, of the hospital's own CA, where its
            firewall opens TLS. What is sent is signed and encrypted beneath TLS in any case.
    """

    proxy: str = ""
    ca_bundle: str = ""

    def __post_init__(self) -> None:
        require(
            not self.proxy or self.proxy.startswith(("http://", "https://")),
            f"proxy is {self.proxy!r}; give a URL such as http://proxy:3128",
        )


@dataclass(frozen=True)
class Coordinator:
    """coordinator.json: whom this site pinned, and the latest roster that it trusted."""

    project: str
    identity: str
    roster_serial: int

    @property
    def public(self) -> bytes:
        """The coordinator's identity, 32 bytes."""
        return bytes.fromhex(self.identity)


@dataclass(frozen=True)
class SiteConfig:
    """`site.toml`: what this site is and where its data lie.

    `source` says where the hospital's own files are and how they answer a plan; `data` names files
    that are already prepared. `dataset` names the [[dataset]] of policy.toml whose limits hold for
    these data.
    `simulation` marks a pretended hospital. Only such a site trains without privacy, releases
    exact evaluation counts, takes its randomness from `random_key`, and skips waiting for the
    disk at every write.
    """

    name: str
    data: PreparedData | None = None
    source: SourceConfig | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    log: LogConfig = field(default_factory=LogConfig)
    dataset: str = "default"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_physical_records: int | None = None
    simulation: bool = False
    random_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(
            self.random_key is None or self.simulation,
            "random_key is for simulations; a hospital's noise comes from the operating system",
        )
        require(
            self.log.journal or self.simulation,
            "log: journal = false is for simulations; a hospital keeps its journal",
        )


@dataclass(frozen=True)
class SiteFolder:
    """The folder of one site."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """site.toml."""
        return self.path / "site.toml"

    @property
    def identity_file(self) -> Path:
        """The private identity."""
        return self.path / "identity.pem"

    @property
    def node_key(self) -> Path:
        """The private node key, for flower-supernode."""
        return self.path / "node_key"

    @property
    def node_key_public(self) -> Path:
        """The public node key, OpenSSH text."""
        return self.path / "node_key.pub"

    @property
    def ca_certificate(self) -> Path:
        """PEM of the project's CA."""
        return self.path / "tls" / "ca.crt"

    @property
    def kit_file(self) -> Path:
        """The coordinator's signed kit."""
        return self.path / "kit.json"

    @property
    def request_file(self) -> Path:
        """The request that this site sent."""
        return self.path / "request.json"

    @property
    def coordinator_file(self) -> Path:
        """Whom this site pinned as the coordinator."""
        return self.path / "coordinator.json"

    @property
    def roster_file(self) -> Path:
        """The identities that this site pinned."""
        return self.path / "roster.json"

    def config(self) -> SiteConfig:
        """Read site.toml; ConfigError names file and key."""
        file = self.settings_file
        require(
            file.exists(),
            f"{file} does not exist. Name the site's folder with --site, or begin one: "
            "fedward-site enrol INVITATION.",
        )
        return parse(SiteConfig, read_toml(file), str(file))

    def identity(self) -> Identity:
        """Read the site's key; ConfigError when missing or readable by others."""
        return Identity.load(self.identity_file)

    def coordinator(self) -> Coordinator:
        """Whom this site pinned; ConfigError before enrolment."""
        file = self.coordinator_file
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{file} is missing or damaged. Enrol first: fedward-site enrol INVITATION."
            ) from None
        return parse(Coordinator, table, str(file))

    def kit(self) -> Kit:
        """The kit, checked against the pinned coordinator and this site's own keys.

        Raises:
            ConfigError: there is none yet.
            ProtocolError: it was changed.
        """
        require(
            self.kit_file.exists(),
            f"{self.kit_file} does not exist: the coordinator has not admitted this site yet. "
            "Send SITE.request.json, and then: fedward-site join KIT.",
        )
        data, signer = read_bytes(self.kit_file, "kit"), self.coordinator().public
        return unseal(data, Kit, KIT, signer=signer, where=str(self.kit_file)).record

    def root_certificates(self, config: SiteConfig) -> Path:
        """PEM file of all that this site trusts for the project's server.

        The project's CA alone, or with the hospital's own where its firewall opens TLS; then the
        file is written anew.
        """
        if not config.network.ca_bundle:
            return self.ca_certificate
        bundle = self.path / config.network.ca_bundle
        roots = read_bytes(self.ca_certificate, "CA certificate")
        combined = self.path / "tls" / "roots.crt"
        replace_file(combined, roots + b"\n" + read_bytes(bundle, "ca_bundle"), mode=0o644)
        return combined

    def network_environment(self, config: SiteConfig) -> dict[str, str]:
        """What site.toml adds to the environment of processes that connect to the server."""
        proxy = config.network.proxy
        return {"HTTPS_PROXY": proxy, "https_proxy": proxy} if proxy else {}

    def roster(self) -> dict[str, bytes]:
        """Site name to pinned public key, 32 bytes each.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        file = self.path / "roster.json"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            roster = {str(name): bytes.fromhex(public) for name, public in table.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            raise ConfigError(
                f"{file} is missing or not a table of names and hex keys. Compare the sites' "
                "fingerprints and pin them: fedward-site roster trust ROSTER."
            ) from None
        require(
            all(len(public) == PUBLIC_BYTES for public in roster.values()),
            f"{file}: every public key must have {PUBLIC_BYTES} bytes (64 hex digits)",
        )
        return roster

    def data_file(
        self, config: SiteConfig, plan: StudyPlan, part: Literal["train", "test"]
    ) -> Path:
        """The prepared records of one part: as site.toml names them, or prepared for this task."""
        if config.data is not None:
            return self.path / str(getattr(config.data, part))
        return self.path / "prepared" / plan.task_sha256[:16] / f"{part}.safetensors"

    def journal(self, config: SiteConfig, identity: Identity) -> Journal | None:
        """The site's journal; None at a pretended hospital that keeps none.

        Raises:
            ConfigError: it cannot be opened.
        """
        return Journal(self.path, identity, config.log) if config.log.journal else None

    def project(self) -> str:
        """The project that this site is enrolled in; empty without one."""
        return self.coordinator().project if self.coordinator_file.exists() else ""

    def books(self, config: SiteConfig, identity: Identity) -> Books:
        """Policy, ledger and patients' key.

        Raises:
            PolicyError: a file that holds the site's past is gone.
            ConfigError: the roster is missing or malformed.
        """
        facts = SiteFacts(
            name=config.name,
            dataset=config.dataset,
            simulation=config.simulation,
            roster=self.roster(),
        )
        return Books(self.path, identity, facts)
