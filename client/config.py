"""A site's folder: its settings, its identity, the roster that it pinned, its books.

site.toml          settings, see SiteConfig
identity.pem       the site's Ed25519 key, readable by its owner alone
roster.json        site name -> public key in hex, pinned by this site
policy.toml        what this site allows; without it nothing runs
ledger.db          which plans it approved, and what its patients have spent
patients.key       turns patients' identifiers into the ledger's hashes
runs/RUN/          state of one run, and its log
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.consent import Books, SiteFacts
from shared.config import parse, read_toml, require
from shared.errors import ConfigError
from shared.identity import PUBLIC_BYTES, Identity


@dataclass(frozen=True)
class PreparedData:
    """Records already as arrays: two safetensors files, beside site.toml or absolute."""

    train: str
    test: str


@dataclass(frozen=True)
class SiteConfig:
    """`site.toml`: what this site is and where its data lie.

    `dataset` names the [[dataset]] of policy.toml whose limits hold for these data.
    `simulation` marks a pretended hospital. Only such a site trains without privacy, releases
    exact evaluation counts, takes its randomness from `random_key`, and skips waiting for the
    disk at every write.
    """

    name: str
    data: PreparedData
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


@dataclass(frozen=True)
class SiteFolder:
    """The folder of one site."""

    path: Path

    def config(self) -> SiteConfig:
        """Read site.toml; ConfigError names file and key."""
        file = self.path / "site.toml"
        return parse(SiteConfig, read_toml(file), str(file))

    def identity(self) -> Identity:
        """Read the site's key; ConfigError when missing or readable by others."""
        return Identity.load(self.path / "identity.pem")

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
            raise ConfigError(f"{file} is missing or not a table of names and hex keys") from None
        require(
            all(len(public) == PUBLIC_BYTES for public in roster.values()),
            f"{file}: every public key must have {PUBLIC_BYTES} bytes (64 hex digits)",
        )
        return roster

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
