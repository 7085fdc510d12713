"""Pretended hospitals on disk: each gets the folder that a real one has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from client.config import SiteFolder
from client.data.prepared import write_prepared
from client.noise import simulation_key
from shared.identity import Identity
from shared.plan import StudyPlan
from simulations.hospitals import Hospital


def write_sites(
    base: Path, plan: StudyPlan, hospitals: Sequence[Hospital], *, seed: int, device: str
) -> dict[str, bytes]:
    """Write one folder for each hospital under `base`, with the plan approved.

    Args:
        base: Holds patients' data while the simulation runs; remove it afterwards.
        plan: What every site approves.
        hospitals: Their data, one for each site of the plan.
        seed: Of the sites' randomness: a simulation may be repeated, a study never.
        device: auto, cpu or cuda.

    Returns:
        The roster: public identity of each site.
    """
    identities = {h.name: Identity.generate() for h in hospitals}
    roster = {name: identity.public for name, identity in identities.items()}
    for hospital in hospitals:
        folder = base / hospital.name
        folder.mkdir(parents=True)
        identities[hospital.name].save(folder / "identity.pem")
        write_prepared(hospital.train, folder / "train.safetensors")
        write_prepared(hospital.test, folder / "test.safetensors")
        pinned = {name: public.hex() for name, public in roster.items()}
        (folder / "roster.json").write_text(json.dumps(pinned, indent=2), encoding="utf-8")
        (folder / "site.toml").write_text(_settings(hospital.name, seed, device), encoding="utf-8")
        SiteFolder(folder).approve(plan)
    return roster


def _settings(name: str, seed: int, device: str) -> str:
    return (
        f'name = "{name}"\n'
        f'device = "{device}"\n'
        "simulation = true\n"
        f'random_key = "{simulation_key(seed, name).hex()}"\n'
        "[data]\n"
        'train = "train.safetensors"\n'
        'test = "test.safetensors"\n'
    )
