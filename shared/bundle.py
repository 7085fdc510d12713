"""The Flower app bundle (FAB) of the installed version: the same bytes on every machine.

Flower hands a study's code from the SuperLink to every SuperNode as a zip file. A site runs the
Fedward that it installed itself, so the bundle only has to prove that both sides mean the same
code: each side builds it from its own installation, and a site refuses any other.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

PACKAGES = ("client", "server", "shared")
RUN_FOLDER = "run-folder"
"""The one key of the run config: the coordinator's folder of this run."""

_HEAD = "pyproject.toml"
_DATE = (1980, 1, 1, 0, 0, 0)
_PROJECT = """\
[project]
name = "fedward"
version = "{version}"
description = "Privacy-preserving federated learning for hospitals"
license = "Apache-2.0"
dependencies = ["flwr~=1.41.0"]

[tool.flwr.app]
publisher = "fedward"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{run_folder} = ""
"""


@functools.cache
def build_bundle() -> bytes:
    """The bundle of the installed packages; a zip file without compression.

    Deflate's output differs between zlib and its faster replacements, a stored zip's does not.

    Source: what `flwr.cli.build.build_fab_from_files` of Flower 1.41 writes, a test compares.
    """
    version = importlib.metadata.version("fedward")
    project = _PROJECT.format(version=version, run_folder=RUN_FOLDER)
    content: dict[str, bytes] = {_HEAD: project.encode()}
    for package in PACKAGES:
        content |= _sources(files(package), package)
    return pack(content)


def pack(content: Mapping[str, bytes]) -> bytes:
    """A bundle of these files, pyproject.toml among them, by path."""
    order = sorted(content, key=lambda name: (name != _HEAD, name))
    listing = "\n".join(
        f"{name},{hashlib.sha256(content[name]).hexdigest()},{8 * len(content[name])}"
        for name in order
    )
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as bundle:
        for name in order:
            bundle.writestr(_entry(name), content[name])
        bundle.writestr(_entry(".info/CONTENT"), listing)
    return target.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system = 3
    return entry


@functools.cache
def bundle_sha256() -> str:
    """What a site compares: 64 hex digits of the bundle's SHA-256."""
    return hashlib.sha256(build_bundle()).hexdigest()


def _sources(folder: Traversable, path: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if entry.is_dir() and entry.name != "__pycache__":
            found |= _sources(entry, name)
        elif entry.name.endswith(".py"):
            found[name] = entry.read_bytes()
    return found
