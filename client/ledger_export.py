"""The ledger as a text file for an officer or auditor, checked without the site's folder.

One JSON object a line: a header, then each event as it was signed. It holds no patient, no count
of patients and no keyed hash of one; populations appear by their digest alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from client.chain import check_exported, export_rows
from client.ledger import CHAIN, Ledger
from shared.errors import ConfigError, ProtocolError
from shared.identity import verify
from shared.messages import decode
from shared.study import Receipt

SCHEMA = "fedward-ledger-export/1"


def export(ledger: Ledger, path: Path, *, site: str, public: bytes) -> int:
    """Write the whole ledger to a new file; returns the number of events.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    return export_rows(ledger.lines(), path, schema=SCHEMA, site=site, public=public)


def check_export(path: Path, expected_fingerprint: str) -> tuple[int, frozenset[bytes]]:
    """Check an exported ledger; see `check_exported`.

    Raises:
        ConfigError: not such a file.
        PolicyError: another site's, or a line was changed, removed, added or moved.
    """
    return check_exported(path, CHAIN, expected_fingerprint, schema=SCHEMA)


def heads_in_receipts(path: Path, site: str, public: bytes) -> dict[str, bytes]:
    """Run id to ledger head, from this site's own signed receipt in a run's receipts.json.

    Raises:
        ConfigError: not such a file.
        ProtocolError: a receipt is not signed by this site.
    """
    receipt = own_receipt(path, site, public)
    return {receipt.run_id: receipt.ledger_head}


def own_receipt(path: Path, site: str, public: bytes) -> Receipt:
    """This site's own signed receipt in a run's receipts.json.

    Raises:
        ConfigError: not such a file.
        ProtocolError: the receipt is not signed by this site.
    """
    try:
        signed = json.loads(path.read_text(encoding="utf-8"))["receipts"].get(site)
        if signed is None:
            raise ConfigError(f"{path} holds no receipt of site {site!r}.")
        body, signature = bytes.fromhex(signed["receipt"]), bytes.fromhex(signed["signature"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a receipts.json ({type(error).__name__}).") from None
    verify(public, "receipt", body, signature, who=site)
    receipt = decode(Receipt, body)
    if receipt.site != site:
        raise ProtocolError(f"{path}: the receipt under {site!r} is of {receipt.site!r}")
    return receipt
