"""The app bundle: all of the installed code, the same bytes each time, and what Flower accepts."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.config import get_fab_config

from shared.bundle import PACKAGES, RUN_FOLDER, build_bundle, bundle_sha256

ROOT = Path(__file__).resolve().parent.parent


def _content(fab: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(fab)) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist()}


def test_it_holds_every_source_file_and_nothing_else() -> None:
    sources = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    content = _content(build_bundle())
    assert content.keys() - sources.keys() == {"pyproject.toml", ".info/CONTENT"}
    assert {name: content[name] for name in sources} == sources


def test_another_process_builds_the_same_bytes() -> None:
    code = "from shared.bundle import bundle_sha256; print(bundle_sha256())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.strip() == bundle_sha256()


def test_nothing_is_compressed_since_compressors_differ() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as bundle:
        assert {entry.compress_type for entry in bundle.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_what_flower_itself_would_build() -> None:
    ours = _content(build_bundle())
    theirs = _content(build_fab_from_files({k: v for k, v in ours.items() if k[0] != "."})[0])
    listings = [set(bundle.pop(".info/CONTENT").split(b"\n")) for bundle in (ours, theirs)]
    heads = [tomllib.loads(bundle.pop("pyproject.toml").decode()) for bundle in (ours, theirs)]
    assert ours == theirs
    assert heads[0] == heads[1]
    changed = {line for line in listings[0] ^ listings[1] if b"pyproject.toml" not in line}
    assert changed == set()


def test_flower_reads_the_apps_and_the_run_config() -> None:
    app = get_fab_config(build_bundle())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == {RUN_FOLDER: ""}
    assert get_fab_metadata(build_bundle())[0] == "fedward/fedward"
