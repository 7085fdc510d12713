"""The list of a run directory's files with their hashes: what notices a byte that changed.

Signed by the coordinator where there is one. It adds little against a forger, who signs a new list
if he can; what the sites signed does not depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.results import write_text
from shared.config import canonical_json
from shared.errors import ProtocolError
from shared.identity import Identity, verify

SCHEMA = "fedward-manifest/1"
MANIFEST_FILE = "manifest.json"
OUTCOME = (
    "model-card.html",
    "model-card.json",
    "model.json",
    "model.safetensors",
    "report.html",
    "results.json",
)
"""Files beside evidence/ that a finished run consists of."""


@dataclass(frozen=True)
class Manifest:
    """A manifest that is whole.

    Attributes:
        files: Path below the run directory -> sha256 in hex.
        signer: Public key that signed it, or empty.
    """

    files: Mapping[str, str]
    signer: bytes

    def check(self, run: Path, file: str, digest: str) -> None:
        """Raise ProtocolError unless the file is there with this hash."""
        path = run / file
        if not path.resolve().is_relative_to(run.resolve()):
            raise ProtocolError(f"the manifest names {file!r}, outside the run directory")
        if not path.is_file():
            raise ProtocolError(f"{file} is missing")
        if _sha256(path) != digest:
            raise ProtocolError(f"{file} was changed since it was written, or its hash was")


def write_manifest(run: Path, identity: Identity | None = None) -> None:
    """List the files of a finished run: all of evidence/, and what it reports.

    Args:
        run: The run directory; whatever else lies in it (logs, checkpoints, audits) is not listed.
        identity: The coordinator's, which signs; None where there is none.
    """
    own = run / "evidence" / MANIFEST_FILE
    outcome = [run / name for name in OUTCOME if (run / name).is_file()]
    found = [p for p in sorted((run / "evidence").rglob("*")) if p.is_file() and p != own]
    files = {str(path.relative_to(run)): _sha256(path) for path in (*found, *outcome)}
    write_text(_text(files, identity), own)


def read_manifest(run: Path) -> Manifest:
    """Read a run directory's manifest.

    Raises:
        ProtocolError: a byte of it was changed, or its signature does not hold.
    """
    text = (run / "evidence" / MANIFEST_FILE).read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    files, signer = table["files"], bytes.fromhex(table["signer"] or "")
    body = canonical_json(files)
    if table["sha256"] != hashlib.sha256(body).hexdigest() or _written(table) != text:
        raise ProtocolError(f"{MANIFEST_FILE} itself was changed since it was written")
    if table["schema"] != SCHEMA or not all(isinstance(v, str) for v in files.values()):
        raise ProtocolError(f"{MANIFEST_FILE} is not a {SCHEMA}")
    if signer:
        signature = bytes.fromhex(table["signature"])
        verify(signer, SCHEMA, body, signature, who="the coordinator")
    elif table["signature"] is not None:
        raise ProtocolError(f"{MANIFEST_FILE} has a signature and no signer")
    return Manifest(files, signer)


def _text(files: Mapping[str, str], identity: Identity | None) -> str:
    body = canonical_json(files)
    return _written(
        {
            "schema": SCHEMA,
            "files": dict(files),
            "sha256": hashlib.sha256(body).hexdigest(),
            "signer": identity.public.hex() if identity else None,
            "signature": identity.sign(SCHEMA, body).hex() if identity else None,
        }
    )


def _written(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
