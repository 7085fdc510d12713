"""Typed records from TOML or JSON tables: an unknown key or a wrong type fails at load.

Every configuration of Fedward (plan, scenario, site, policy) is a frozen dataclass. `parse` turns
a plain mapping into one, checks every key and type, and names the key when something is off.
Ranges are checked by the dataclasses themselves in `__post_init__`, through `require`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from shared.errors import ConfigError

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a plain mapping.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML; the message names file and line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Correct that line.") from None


def later(default: Any) -> Any:
    """The default of a key that a signed record did not have from the first.

    While it has its default it is left out of the canonical form, so that records from before the
    key keep their bytes and hashes, and programs from before it still read records without it.
    """
    return dataclasses.field(default=default, metadata={"later": True})


def canonical_json(record: object) -> bytes:
    """One byte string for one value: sorted keys, no spaces, UTF-8, no NaN or infinity.

    A dataclass is written with all its defaults but those of keys that came `later`.
    """
    text = json.dumps(
        _plain(record), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(part)
            for field in dataclasses.fields(value)
            for part in [getattr(value, field.name)]
            if not (field.metadata.get("later") and part == field.default)
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def parse(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from a mapping, checking every key and type.

    Args:
        cls: A frozen dataclass; nested dataclasses, tuples, optionals and Literals are followed.
        table: Keys as in the file; a hyphen counts as an underscore.
        where: How to name the table in messages, such as a file name or "plan.toml [privacy]".

    Raises:
        ConfigError: an unknown, missing or wrongly typed key; the message names it and what fits.
    """
    hints = _hints(cast(Any, cls))
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(_unknown_key(where, key, list(fields)))
        if name in values:
            raise ConfigError(f"{where}: {key!r} is given twice. Keep one.")
        values[name] = _convert(hints[name], value, f"{where}: {key}")
    for name, field in fields.items():
        no_default = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if no_default and name not in values:
            raise ConfigError(f"{where}: {name!r} is missing. Add it ({_describe(hints[name])}).")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields; a plan has hundreds of features of one class."""
    return typing.get_type_hints(cls)


def _unknown_key(where: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{where}: unknown key {key!r}. {hint}Valid keys: {', '.join(known)}."


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}; valid: {', '.join(map(repr, choices))}.")
        return value
    if origin in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list ({_describe(hint)}).")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table.")
        return parse(cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{where} is larger than any number that fits.") from None
    if type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}; it must be {_describe(hint)}.")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number.")
    return value


_PLAIN = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin is tuple:
        return f"a list, each {_describe(typing.get_args(hint)[0])}"
    if origin in (types.UnionType, typing.Union):
        return _describe(typing.get_args(hint)[0])
    return _PLAIN.get(hint, "a table")
