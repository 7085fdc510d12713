"""A site's folder: its settings, its identity, the roster that it pinned, the plans it approved.

site.toml          settings, see SiteConfig
identity.pem       the site's Ed25519 key, readable by its owner alone
roster.json        site name -> public key in hex, pinned by this site
approved/SHA256    one empty file for each plan that this site approved
ledger.db          what its patients have spent
runs/RUN/          state of one run, and its log
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.config import parse, read_toml, require
from shared.errors import ConfigError, PolicyError
from shared.identity import PUBLIC_BYTES, Identity
from shared.plan import StudyPlan


@dataclass(frozen=True)
class PreparedData:
    """Records already as arrays: two safetensors files, beside site.toml or absolute."""

    train: str
    test: str


@dataclass(frozen=True)
class SiteConfig:
    """`site.toml`: what this site is and where its data lie.

    `simulation` marks a pretended hospital. Only such a site trains without privacy, releases
    exact evaluation counts, takes its randomness from `random_key`, and skips waiting for the
    disk at every write.
    """

    name: str
    data: PreparedData
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

    def approve(self, plan: StudyPlan) -> None:
        """Note that this site agrees to run exactly this plan."""
        folder = self.path / "approved"
        folder.mkdir(exist_ok=True)
        (folder / plan.sha256).touch()

    def require_approved(self, plan: StudyPlan) -> None:
        """Raise PolicyError unless this very plan was approved here."""
        if not (self.path / "approved" / plan.sha256).exists():
            raise PolicyError(
                f"plan {plan.name!r} with sha256 {plan.sha256} is not approved at this site; "
                "a changed byte needs a new approval."
            )
