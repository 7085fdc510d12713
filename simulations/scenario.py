"""A scenario: one TOML file with the simulation's own settings and the study plan.

[simulation] says where the patients come from and how they are dealt out to hospitals; [plan]
is a study plan as in shared/plan.py, and could be given to real hospitals as it stands.
[distributed] and [none], if present, hold the values of the plan that differ in that privacy mode.
With `base = "NAME"` at its top a file holds only what differs from another scenario.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from client.data.images import ImageMapping
from client.data.mapping import TableMapping
from shared.config import parse, read_toml, require
from shared.errors import ConfigError
from shared.plan import StudyPlan

BUNDLED = Path(__file__).parent / "scenarios"
_ROW_PER_PATIENT = TableMapping(one_row_per_patient=True)


@dataclass(frozen=True)
class SimulationConfig:
    """Where the patients come from, and how they are dealt out to the plan's sites.

    Attributes:
        title: One line for `fedward-sim list`.
        source: See simulations/hospitals.py.
        folder: Where the data lies, for sources that are not built in.
        file: The file in `folder`, for sources "npz" and "table".
        site_column: For source "table": the column that says which hospital a row is of.
        site_values: Pairs [text in that column, site of the plan].
        seed: Of the split, of drawn data, and of the simulated hospitals' randomness.
        split: "official" keeps a source's published train and test parts; "random" draws them
            anew from the seed.
        test_fraction: Share of each hospital's patients kept for testing in a random split.
        site_sizes: Patients of each site in the plan's order: how many are drawn ("nodules"), or
            in which proportion one source is dealt out ("breast-cancer", "diabetes", "npz").
        skew: How unlike the hospitals are where one source is dealt out: 0 alike, 1 sorted.
        table: Mapping of the hospitals' files, for sources "csv" and "table".
        images: Mapping of the hospitals' folders, for source "image-folder".
    """

    title: str
    source: Literal[
        "breast-cancer",
        "diabetes",
        "nodules",
        "heart",
        "tcga-brca",
        "npz",
        "table",
        "csv",
        "image-folder",
    ]
    folder: str = ""
    file: str = ""
    site_column: str = ""
    site_values: tuple[tuple[str, ...], ...] = ()
    seed: int = 1
    split: Literal["official", "random"] = "random"
    test_fraction: float = 0.25
    site_sizes: tuple[int, ...] = ()
    skew: float = 0.5
    table: TableMapping = _ROW_PER_PATIENT
    images: ImageMapping = field(default_factory=ImageMapping)

    def __post_init__(self) -> None:
        require(bool(self.title) and "\n" not in self.title, "title must be one line")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; valid: 0 to 2^63 - 1")
        require(
            0 < self.test_fraction < 1,
            f"test_fraction is {self.test_fraction:g}; valid: between 0 and 1",
        )
        require(0 <= self.skew <= 1, f"skew is {self.skew:g}; valid: 0 to 1")
        require(all(s >= 1 for s in self.site_sizes), "site_sizes must be 1 or more each")


@dataclass(frozen=True)
class Scenario:
    """One simulated study.

    Attributes:
        name: The file's name without .toml.
        simulation: Where the patients come from.
        plan: The study.
        open_plan: The same with privacy.mode=none, for baselines without privacy; None where the
            file has no [none], and so no settings of its own for that.
    """

    name: str
    simulation: SimulationConfig
    plan: StudyPlan
    open_plan: StudyPlan | None = None


def load_scenario(name_or_path: str, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario and change some of its values.

    Args:
        name_or_path: A bundled scenario's name (`list_scenarios`), or the path of a TOML file.
        overrides: Texts "key.key=value" in TOML syntax, such as "simulation.seed=7" or
            "plan.privacy.epsilon=2"; "plan." may be left out, quotes around a text too. A number
            as a key counts list entries from 0.

    Raises:
        ConfigError: no such scenario, an unknown key, or a value that does not fit; the message
            names the key.
    """
    path = _find(name_or_path)
    read = _read(path)
    table = _with_overrides(copy.deepcopy(read), overrides)
    odd = sorted(set(table) - {"simulation", "plan"})
    require(not odd, f"{path}: unknown table {', '.join(odd)}. Valid: [simulation] and [plan].")
    for name in ("simulation", "plan"):
        require(isinstance(table.get(name), dict), f"{path}: the table [{name}] is missing.")
    simulation = parse(SimulationConfig, table["simulation"], f"{path} [simulation]")
    plan = parse(StudyPlan, table["plan"], f"{path} [plan]")
    open_plan = None
    if "none" in read:
        table = _with_overrides(read, [*overrides, "privacy.mode=none"])
        open_plan = parse(StudyPlan, table["plan"], f"{path} [plan] with [none]")
    sites, sizes = len(plan.cohort.sites), len(simulation.site_sizes)
    require(
        sizes in (0, sites),
        f"{path} [simulation]: site_sizes has {sizes} entries for {sites} sites. Give one each.",
    )
    folder = str(Path(simulation.folder).expanduser()) if simulation.folder else ""
    return Scenario(path.stem, replace(simulation, folder=folder), plan, open_plan)


def _read(path: Path) -> dict[str, Any]:
    """A scenario's table, laid over that of its base."""
    table = read_toml(path)
    if table.get("simulation", {}).get("folder"):
        table["simulation"]["folder"] = str(path.parent / table["simulation"]["folder"])
    base = table.pop("base", None)
    if base is None:
        return table
    require(isinstance(base, str), f"{path}: base must be a scenario's name, such as 'heart'.")
    under = read_toml(_find(base))
    require("base" not in under, f"{path}: its base {base!r} has a base itself. Name that one.")
    _merge(under, table)
    return under


def _with_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply the overrides; [distributed] and [none] hold the plan's values for those modes."""
    others = {mode: table.pop(mode, {}) for mode in ("distributed", "none")}
    changed = copy.deepcopy(table)
    for override in overrides:
        _apply(changed, override)
    other = others.get(changed.get("plan", {}).get("privacy", {}).get("mode"))
    if not other:
        return changed
    _merge(table.setdefault("plan", {}), other)
    for override in overrides:
        _apply(table, override)
    return table


def _merge(table: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def list_scenarios() -> dict[str, str]:
    """Name and title of every bundled scenario, by name."""
    return {
        path.stem: str(read_toml(path).get("simulation", {}).get("title", ""))
        for path in sorted(BUNDLED.glob("*.toml"))
    }


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return Path(name_or_path).expanduser()
    name = name_or_path.replace("-", "_")
    known = list(list_scenarios())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"there is no scenario {name_or_path!r}.{hint} Bundled: {', '.join(known)}; or give "
            "the path of a .toml file."
        )
    return BUNDLED / f"{name}.toml"


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    require(
        bool(equals) and all(parts),
        f"--set {override!r} is not key=value, such as privacy.epsilon=2.",
    )
    if parts[0] not in ("simulation", "plan"):
        plan_keys = [f.name for f in fields(StudyPlan)]
        require(
            parts[0].replace("-", "_") in plan_keys,
            f"--set {override!r}: unknown key {parts[0]!r}. Start with simulation, or with one of "
            f"the plan's: {', '.join(plan_keys)}.",
        )
        parts = ["plan", *parts]
    here: Any = table
    for part in parts[:-1]:
        here = _descend(here, part, override)
    if isinstance(here, list):
        _descend(here, parts[-1], override)
        here[int(parts[-1])] = _value(text, override)
    else:
        here[_spelling(here, parts[-1])] = _value(text, override)


def _descend(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        require(
            part.isdigit() and int(part) < len(here),
            f"--set {override!r}: {part!r} must be a number from 0 to {len(here) - 1} there.",
        )
        return here[int(part)]
    inner = here.setdefault(_spelling(here, part), {})
    require(
        isinstance(inner, dict | list), f"--set {override!r}: {part!r} is a value, not a table."
    )
    return inner


def _spelling(table: dict[str, Any], part: str) -> str:
    """The key as the file spells it: a hyphen counts as an underscore."""
    return next((k for k in table if k.replace("-", "_") == part.replace("-", "_")), part)


def _value(text: str, override: str) -> Any:
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if set(parsed) == {"value"}:
        return parsed["value"]
    require(
        text[:1] not in ("[", "{", '"', "'") and "\n" not in text,
        f"--set {override!r}: the value is not TOML. Quote the whole argument for the shell.",
    )
    return text


def plan_toml(plan: StudyPlan) -> str:
    """A plan as the TOML file that `shared.plan.load` reads."""
    return _toml(json.loads(plan.canonical_bytes), "")


def _toml(table: dict[str, Any], name: str) -> str:
    plain = {k: v for k, v in table.items() if v is not None and not _tables(v)}
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in plain.items())
    for key, value in table.items():
        inner = f"{name}.{key}".lstrip(".")
        for part in _tables(value):
            head = f"[[{inner}]]" if isinstance(value, list) else f"[{inner}]"
            text += f"{head}\n{_toml(part, inner)}"
    return text


def _tables(value: object) -> list[dict[str, Any]]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, dict)]
