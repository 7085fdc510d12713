"""Pretended hospitals on disk: each gets the folder that a real one has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from client.config import SiteFolder
from client.data.prepared import write_prepared
from client.noise import simulation_key
from client.people import people_of
from client.policy import DAYS, FILE_NAME, SCHEMA
from shared.identity import Identity, fingerprint
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import costs_of, count_promise_of, epsilon_of
from simulations.hospitals import Hospital


def write_sites(
    base: Path,
    plan: StudyPlan,
    hospitals: Sequence[Hospital],
    *,
    seed: int | None,
    device: str,
    identities: Mapping[str, Identity] | None = None,
) -> dict[str, bytes]:
    """Write one folder for each hospital under `base`, with a policy and the plan approved.

    Args:
        base: Holds patients' data while the simulation runs; remove it afterwards.
        plan: What every site approves.
        hospitals: Their data, one for each site of the plan.
        seed: Of the sites' noise and draws, see `noise_seed`; None for the operating system's.
        device: auto, cpu or cuda.
        identities: By site; new ones where left out.

    Returns:
        The roster: public identity of each site.
    """
    identities = identities or {h.name: Identity.generate() for h in hospitals}
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
        (folder / FILE_NAME).write_text(_policy(plan, roster), encoding="utf-8")
        (folder / FILE_NAME).chmod(0o600)
        approve(SiteFolder(folder), plan)
    return roster


def noise_seed(plan: StudyPlan, seed: int, *, insecure_reproducible: bool) -> int | None:
    """The seed that a simulation's noise, draws and order of records follow from; None for none.

    Under differential privacy they are secrets and come from the operating system, in a simulation
    as at a hospital, unless the operator asks for a run that repeats. Without privacy there is
    nothing to keep: the order of the records follows from the seed.
    """
    return seed if insecure_reproducible or plan.privacy.mode == "none" else None


def approve(folder: SiteFolder, plan: StudyPlan) -> None:
    """The officer's part: the budget and the policy decide as at a real site."""
    config = folder.config()
    with closing(folder.books(config, folder.identity())) as books:
        books.approve(plan, people_of(folder, config, books, plan))


def _policy(plan: StudyPlan, roster: Mapping[str, bytes]) -> str:
    """A policy that allows this plan and nothing beyond."""
    epsilon, delta = plan.privacy.budget if costs_of(plan) else (1e-3, 1e-9)
    if counted := count_promise_of(plan):
        epsilon, delta = max(epsilon, counted[0]), max(delta, counted[1])
    own = alone_multipliers(plan)
    alone = [epsilon_of(own[u], e.sample_rate, e.steps, delta) for u, e in costs_of(plan).items()]
    cohort = plan.cohort
    noise = min((e.noise_multiplier for e in costs_of(plan).values()), default=1.0)
    settings: dict[str, object] = {
        "name": "default",
        "max_epsilon": epsilon,
        "max_epsilon_alone": max([epsilon, *alone]),
        "max_delta": delta,
        "composition": "filter",
        "min_noise_multiplier": noise,
        "max_clip_norm": plan.privacy.largest_clip_norm or 1e-3,
        "modes": [plan.privacy.mode],
        "min_sites": cohort.threshold,
        "min_honest": cohort.threshold - cohort.colluders,
        "roster": [fingerprint(roster[name]) for name in cohort.names],
        "models": [plan.model.name],
        "tasks": [plan.task.kind],
        "evaluation": [plan.evaluation.release],
        "hours": ["00:00-24:00"],
        "days": list(DAYS),
        "rows_are_patients": False,
    }
    # JSON's numbers, texts, lists and truth values are TOML's, too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([f'schema = "{SCHEMA}"', "[[dataset]]", *lines, ""])


def _settings(name: str, seed: int | None, device: str) -> str:
    key = "" if seed is None else f'random_key = "{simulation_key(seed, name).hex()}"\n'
    return (
        f'name = "{name}"\n'
        f'device = "{device}"\n'
        "simulation = true\n"
        f"{key}"
        "[data]\n"
        'train = "train.safetensors"\n'
        'test = "test.safetensors"\n'
        "[log]\n"
        "journal = false\n"
    )
