"""results.json: the record of one run, its structure, and how it is checked, read and written.

The structure is a JSON Schema (draft 2020-12, the few keywords of `_KEYWORDS`), so that anyone
can check a file with a tool of their own. A key that the schema does not name is allowed and
ignored: later versions add keys, they do not change what a key means.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import ConfigError, FedwardError

RESULTS_SCHEMA = "fedward-results/1"

Rule = Mapping[str, Any]

_TEXT: Rule = {"type": "string"}
_COUNT: Rule = {"type": "integer", "minimum": 0}
_POSITIVE: Rule = {"type": "integer", "minimum": 1}
_AMOUNT: Rule = {"type": "number", "minimum": 0}
_SHARE: Rule = {"type": "number", "minimum": 0, "maximum": 1}
_NAMES: Rule = {"type": "array", "items": _TEXT}
_SHA256: Rule = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _or_null(rule: Rule) -> Rule:
    return {**rule, "type": [rule["type"], "null"]}


def _table(required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """An object; an optional key may be missing or null."""
    extra = {key: _or_null(rule) for key, rule in (optional or {}).items()}
    return {"type": "object", "required": list(required), "properties": {**required, **extra}}


def _by_name(rule: Rule) -> Rule:
    return {"type": "object", "additionalProperties": rule}


_METRICS = _table(
    {},
    {
        "auroc": _SHARE,
        "accuracy": _SHARE,
        "balanced_accuracy": _SHARE,
        "recall": _SHARE,
        "specificity": _SHARE,
        "precision": _SHARE,
        "f1": _SHARE,
        "brier": _SHARE,
        "ece": _SHARE,
        "c_index": _SHARE,
        "integrated_brier": _AMOUNT,
        "r2": {"type": "number", "maximum": 1},
        "mse": _AMOUNT,
        "mae": _AMOUNT,
        "patients": _AMOUNT,
        "train_patients": _AMOUNT,
        "test_patients": _AMOUNT,
        "positives": _AMOUNT,
    },
)
_INTERVALS: Rule = {"type": "object", "additionalProperties": {"type": "array", "items": _SHARE}}
_NUMBERS: Rule = {"type": "array", "items": {"type": "number"}}
_FEATURE = _table(
    {"name": _TEXT, "type": _TEXT, "histogram": _NUMBERS, "present": _AMOUNT},
    {
        "missing": _AMOUNT,
        "deviation": _AMOUNT,
        "unit": _TEXT,
        "categories": _NAMES,
        "edges": _NUMBERS,
        "mean": {"type": "number"},
        "mean_interval": _NUMBERS,
        "standard_deviation": _AMOUNT,
        "present_interval": _NUMBERS,
        "missing_interval": _NUMBERS,
    },
)
_ROUND = _table(
    {
        "round": _POSITIVE,
        "cohort": _NAMES,
        "contributors": _NAMES,
        "dropped": _NAMES,
        "wall_s": _AMOUNT,
        "bytes_up": _COUNT,
        "bytes_down": _COUNT,
    },
    {
        "aborted": {"type": "boolean"},
        "train_s": _AMOUNT,
        "secagg_s": _AMOUNT,
        "epsilon": _AMOUNT,
        "metrics": _METRICS,
        "intervals": _INTERVALS,
    },
)
# `metrics` is on all test patients, `per_site` on each hospital's own, as in `final`.
_BASELINE = _table(
    {"metrics": _METRICS},
    {"per_site": _by_name(_METRICS), "epsilon": _AMOUNT},
)
_SITE_EVALUATION = _table(
    {"epsilon": _AMOUNT},
    {"epsilon_alone": _AMOUNT, "noise_multiplier": _AMOUNT, "releases": _COUNT},
)
_SITE_PRIVACY = _table(
    {"epsilon": _AMOUNT},
    {
        "noise_multiplier": _AMOUNT,
        "sample_rate": _SHARE,
        "steps": _COUNT,
        "patients": _COUNT,
        "epsilon_alone": _AMOUNT,
        "releases": _COUNT,
        "evaluation": _SITE_EVALUATION,
    },
)
_PRIVACY = _table(
    {"mode": _TEXT, "sites": _by_name(_SITE_PRIVACY)},
    {
        "delta": _SHARE,
        "target_epsilon": _AMOUNT,
        "clip_norm": _AMOUNT,
        "last_clip_norm": _AMOUNT,
        "accountant": _TEXT,
        "relation": _TEXT,
        "sampling": _TEXT,
        "evaluation": _table({"target_epsilon": _AMOUNT, "delta": _SHARE}, {"level": _SHARE}),
    },
)
_PHASE = _table({}, {"messages": _COUNT, "bytes_up": _COUNT, "bytes_down": _COUNT})

STRUCTURE: Rule = _table(
    {
        "schema": {"type": "string", "enum": [RESULTS_SCHEMA]},
        "version": _TEXT,
        "plan_sha256": _SHA256,
        "scenario": _TEXT,
        "seed": {"type": "integer"},
        "engine": _TEXT,
        "mode": _TEXT,
        "unit": {"type": "string", "enum": ["patient"]},
        "rounds": {"type": "array", "items": _ROUND},
        "final": _table(
            {},
            {
                "metrics": _METRICS,
                # Where metrics carry noise: of each, the interval of its value without noise.
                "intervals": _INTERVALS,
                # Simulations only: the same without noise; what a real study never sees.
                "exact_metrics": _METRICS,
                "exact": {"type": "boolean"},
                "per_site": _by_name(_METRICS),
            },
        ),
        "privacy": _PRIVACY,
    },
    {
        "title": _TEXT,
        "synthetic": {"type": "boolean"},
        # Simulations only: noise and draws follow from the seed, which the operator asked for.
        "insecure_reproducible": {"type": "boolean"},
        "device": _TEXT,
        "started": _TEXT,
        "wall_s": _AMOUNT,
        "data": _table({}, {"source": _TEXT, "description": _TEXT, "licence": _TEXT}),
        "model": _table({}, {"name": _TEXT, "parameters": _COUNT, "sha256": _SHA256}),
        "cohort": _table(
            {"sites": _NAMES},
            {"threshold": _COUNT, "colluders": _COUNT, "tolerated_dropouts": _COUNT},
        ),
        "secure_sum": _table(
            {},
            {"bits": _COUNT, "coordinates": _COUNT, "clip_range": _AMOUNT, "protocol": _TEXT},
        ),
        # Of a study that trains nothing: what it counted.
        "statistics": _table({"features": {"type": "array", "items": _FEATURE}}, {"level": _SHARE}),
        "baselines": _table(
            {},
            {
                "local": _BASELINE,
                "local_dp": _BASELINE,
                "pooled": _BASELINE,
                "pooled_dp": _BASELINE,
            },
        ),
        "wire": _table(
            {},
            {
                "bytes_up": _COUNT,
                "bytes_down": _COUNT,
                "messages": _COUNT,
                "largest_message": _COUNT,
                "by_phase": _by_name(_PHASE),
            },
        ),
        "warnings": _NAMES,
    },
)


def build_results(**fields: Any) -> dict[str, Any]:
    """Put a run's record together: schema, unit and mode are filled in, the rest is checked.

    Raises:
        FedwardError: a key is missing, has the wrong type or contradicts another; it is named.
    """
    results = {"schema": RESULTS_SCHEMA, "unit": "patient"} | fields
    privacy = results.get("privacy")
    if "mode" not in results and isinstance(privacy, Mapping) and "mode" in privacy:
        results["mode"] = privacy["mode"]
    validate(results)
    return results


def validate(results: Mapping[str, Any]) -> None:
    """Check a record of a run against `STRUCTURE`, and its keys against one another.

    Raises:
        FedwardError: a key is missing, has the wrong type, is NaN or infinite, or contradicts
            another key. The message names it, as in `rounds[3].train_s`.
    """
    _check(results, STRUCTURE, "")
    _refuse_non_finite(results, "")
    mode = results["mode"]
    if results["privacy"]["mode"] != mode:
        _refuse("privacy.mode", f"is {results['privacy']['mode']!r}, but mode is {mode!r}")
    if mode != "none":
        for key in ("delta", "target_epsilon"):
            if results["privacy"].get(key) is None:
                _refuse(f"privacy.{key}", f"is missing; mode {mode!r} needs it")
    last = 0
    for i, entry in enumerate(results["rounds"]):
        last = _check_round(entry, f"rounds[{i}]", last)


def _check_round(entry: Mapping[str, Any], where: str, last: int) -> int:
    """Round numbers rise; whoever contributed or dropped out was asked, and did not do both."""
    if entry["round"] <= last:
        _refuse(f"{where}.round", f"is {entry['round']}, but the round before is {last}")
    cohort, contributors, dropped = (
        set(entry[key]) for key in ("cohort", "contributors", "dropped")
    )
    for key, names in (("contributors", contributors), ("dropped", dropped)):
        if strangers := sorted(names - cohort):
            _refuse(f"{where}.{key}", f"names {strangers[0]!r}, which is not in its cohort")
    if both := sorted(contributors & dropped):
        _refuse(f"{where}.dropped", f"names {both[0]!r}, which is also among the contributors")
    number: int = entry["round"]
    return number


def read_results(path: Path) -> dict[str, Any]:
    """Read and check a results.json.

    Raises:
        ConfigError: the file is missing, not JSON (NaN is not), or not a valid record.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Check the path; a run writes it at its end."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. Run the study again.") from None
    try:
        validate(loaded)
    except FedwardError as error:
        raise ConfigError(f"{path}: {error}") from None
    results: dict[str, Any] = loaded
    return results


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Check a record and write it: two spaces, the record's own order, whole or not at all.

    Raises:
        FedwardError: the record is not valid; the file is left as it was.
    """
    validate(results)
    try:
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise FedwardError(
            f"results cannot be written as JSON: {error}. Use plain values."
        ) from None
    write_text(text + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text so that a reader or a crash never meets half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON has no number for")


def _refuse(where: str, fact: str) -> NoReturn:
    name = where or "the record"
    raise FedwardError(f"{name} {fact}. See {RESULTS_SCHEMA} in server/results.py for its shape.")


def _check(value: Any, rule: Rule, where: str) -> None:
    """Check a value against a rule, keyword by keyword; the type comes first."""
    types = rule.get("type", ())
    names = [types] if isinstance(types, str) else list(types)
    if names and not any(_is_type(value, name) for name in names):
        shown = "a table" if isinstance(value, Mapping) else f"{value!r:.60}"
        _refuse(where, f"is {shown}; it must be {' or '.join(_PLAIN[n] for n in names)}")
    if value is None:
        return
    for keyword, limit in rule.items():
        _KEYWORDS[keyword](value, limit, where)


def _check_required(value: Any, keys: list[str], where: str) -> None:
    for key in keys:
        if key not in value:
            _refuse(_join(where, key), "is missing")


def _check_properties(value: Any, rules: Mapping[str, Rule], where: str) -> None:
    for key, rule in rules.items():
        if key in value:
            _check(value[key], rule, _join(where, key))


def _check_values(value: Any, rule: Rule, where: str) -> None:
    for key, item in value.items():
        _check(item, rule, _join(where, key))


def _check_items(value: Any, rule: Rule, where: str) -> None:
    for i, item in enumerate(value):
        _check(item, rule, f"{where}[{i}]")


def _check_enum(value: Any, choices: list[Any], where: str) -> None:
    if value not in choices:
        valid = ", ".join(map(repr, choices))
        _refuse(where, f"is {value!r:.60}; valid: {valid}")


def _check_pattern(value: Any, pattern: str, where: str) -> None:
    if not re.search(pattern, value):
        _refuse(where, f"is {value!r:.80}, which does not match {pattern}")


def _check_minimum(value: Any, least: float, where: str) -> None:
    if value < least:
        _refuse(where, f"is {value!r:.40}, below {least:g}")


def _check_maximum(value: Any, most: float, where: str) -> None:
    if value > most:
        _refuse(where, f"is {value!r:.40}, above {most:g}")


def _refuse_non_finite(value: Any, where: str) -> None:
    """JSON has no NaN; unknown keys are searched, too."""
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(where, f"is {value}; leave the key out where there is no number")
    for key, item in _children(value, where):
        _refuse_non_finite(item, key)


def _children(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                _refuse(where, f"has the key {key!r:.40}, which is not a text")
            yield _join(where, key), item
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield f"{where}[{i}]", item


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):  # Python counts a bool as an int; JSON does not.
        return name == "boolean"
    return isinstance(value, _TYPES[name])


_TYPES: Mapping[str, Any] = {
    "object": Mapping,
    "array": (list, tuple),
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_PLAIN = {
    "object": "a table",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
_KEYWORDS: Mapping[str, Callable[[Any, Any, str], None]] = {
    "type": lambda _value, _limit, _where: None,
    "required": _check_required,
    "properties": _check_properties,
    "additionalProperties": _check_values,
    "items": _check_items,
    "enum": _check_enum,
    "pattern": _check_pattern,
    "minimum": _check_minimum,
    "maximum": _check_maximum,
}
