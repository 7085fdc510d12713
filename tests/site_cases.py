"""A real site's folder for tests: a policy, pinned identities, two prepared files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from training_cases import make_data, make_plan

from client.config import SiteFolder
from client.consent import Books, People
from client.data.prepared import write_prepared
from client.policy import DAYS, SCHEMA
from shared.identity import Identity, fingerprint
from shared.plan import StudyPlan
from simulations.scenario import plan_toml

NAMES = tuple(f"site-{i}" for i in range(4))
IDENTITIES = {name: Identity.from_bytes(bytes([i] * 32)) for i, name in enumerate(NAMES, 1)}
ROSTER = {name: identity.public for name, identity in IDENTITIES.items()}
SIGMA = 4.0
"""Ten steps at rate 0.5 with this noise cost epsilon 1.6 at delta 1e-5."""

LIMITS: dict[str, Any] = {
    "name": "default",
    "max_epsilon": 4.0,
    "max_epsilon_alone": 4.0,
    "max_delta": 1e-5,
    "composition": "filter",
    "min_noise_multiplier": 0.5,
    "max_clip_norm": 1.0,
    "modes": ["local"],
    "min_sites": 4,
    "min_honest": 3,
    "roster": [fingerprint(public) for public in ROSTER.values()],
    "models": ["logistic"],
    "tasks": ["binary"],
    "evaluation": ["none"],
    "hours": ["00:00-24:00"],
    "days": list(DAYS),
    "rows_are_patients": False,
}


def policy_text(**changes: Any) -> str:
    """`policy.toml` with some of `LIMITS` changed; None leaves a key out."""
    limits: Mapping[str, Any] = LIMITS | changes
    lines = [f"{k} = {json.dumps(v)}" for k, v in limits.items() if v is not None]
    return "\n".join([f'schema = "{SCHEMA}"', "[[dataset]]", *lines, ""])


def write_policy(folder: Path, **changes: Any) -> None:
    """Write `policy.toml`, readable and writable by its owner alone."""
    path = folder / "policy.toml"
    path.write_text(policy_text(**changes))
    path.chmod(0o600)


def study(name: str = "trial", **sections: Any) -> StudyPlan:
    """A study of ten rounds with noise `SIGMA`, that promises what `LIMITS` allow."""
    privacy = {"epsilon": 4.0, "noise_multiplier": SIGMA} | sections.pop("privacy", {})
    return replace(make_plan(privacy=privacy, **sections), name=name)


def make_site(folder: Path, patients: int = 20, **limits: Any) -> Path:
    """Write the folder of site-0, a real one, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    IDENTITIES["site-0"].save(folder / "identity.pem")
    pinned = {name: public.hex() for name, public in ROSTER.items()}
    (folder / "roster.json").write_text(json.dumps(pinned))
    (folder / "site.toml").write_text(
        'name = "site-0"\ndevice = "cpu"\n'
        '[data]\ntrain = "train.safetensors"\ntest = "test.safetensors"\n'
    )
    data = make_data(study(), patients=patients)
    write_prepared(data, folder / "train.safetensors")
    write_prepared(data, folder / "test.safetensors")
    write_policy(folder, **limits)
    return folder


def open_books(folder: Path) -> Books:
    """The books of a folder that `make_site` wrote."""
    site = SiteFolder(folder)
    return site.books(site.config(), site.identity())


def trained(books: Books, ids: Iterable[str]) -> People:
    """These patients, as those that a study trains on."""
    return {"training": books.population(ids)}


def write_plan(plan: StudyPlan, path: Path) -> Path:
    """Write a plan as TOML, and return the path."""
    path.write_text(plan_toml(plan), encoding="utf-8")
    return path
