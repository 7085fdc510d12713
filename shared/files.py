"""Files that must be there whole or not at all, and private ones that nobody else may read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shared.errors import ConfigError


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a new file, on disk when this returns.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists, and is never overwritten.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path, *, mode: int = 0o600) -> Iterator[IO[str]]:
    """A file to write text to, line ends as they are, which takes its name when all is written.

    Raises:
        ConfigError: it cannot be written, or the path is a device or a folder.
    """
    _require_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                yield file
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Put a file in the place of an older one at once: a reader sees the old or the new.

    Raises:
        ConfigError: it cannot be written, or the path is a device or a folder.
    """
    _require_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.unlink()
    write_new(temporary, data, mode=mode)
    try:
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def _require_replaceable(path: Path) -> None:
    """A device such as /dev/null would be gone: an ordinary file takes its name."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no ordinary file and is not replaced. Name a file.")


def read_bytes(path: Path, what: str) -> bytes:
    """Read a file; ConfigError names it as `what`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}.") from None


def make_folder(path: Path, *, mode: int = 0o700) -> None:
    """Make a folder and its parents, unless it is there; ConfigError where that fails."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}.") from None
