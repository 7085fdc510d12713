"""Which fedward this is, and whether a project or a plan takes it."""

from __future__ import annotations

import functools
from importlib import metadata

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from shared.errors import ConfigError


@functools.cache
def fedward_version() -> str:
    """The installed version of fedward; ConfigError where it runs without being installed."""
    try:
        return metadata.version("fedward")
    except metadata.PackageNotFoundError:
        raise ConfigError("fedward is not installed here; install it with pip.") from None


def specifier(text: str, where: str) -> SpecifierSet:
    """Read versions such as ">=0.1,<0.2"; ConfigError where they are none."""
    try:
        return SpecifierSet(text, prereleases=True)
    except InvalidSpecifier:
        raise ConfigError(
            f"{where} is {text!r}; give versions such as '>=0.1,<0.2' or '==0.1.3'."
        ) from None


def require_version(text: str, version: str, what: str) -> None:
    """Raise ConfigError unless `version` is among the versions that `what` asks for.

    Args:
        text: Versions as in `specifier`; empty takes every one.
        version: Of the fedward that is meant.
        what: Who asks, such as "plan 'heart'".
    """
    if text and not specifier(text, what).contains(version):
        raise ConfigError(
            f"{what} needs fedward {text}, and this is {version}. "
            f"Install one that fits: pip install 'fedward{text}'."
        )
