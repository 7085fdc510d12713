"""The ledger as a text file for an officer or auditor, checked without the site's folder.

One JSON object a line: a header, then each event as it was signed. It holds no patient, no count
of patients and no keyed hash of one; populations appear by their digest alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.ledger import Ledger, check_lines
from shared.errors import ConfigError, PolicyError, ProtocolError
from shared.identity import fingerprint, verify
from shared.messages import decode
from shared.study import Receipt

SCHEMA = "fedward-ledger-export/1"


def export(ledger: Ledger, path: Path, *, site: str, public: bytes) -> int:
    """Write the whole ledger to a new file; returns the number of events.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give a new file.") from None
    count = 0
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        head = {"schema": SCHEMA, "site": site, "public": public.hex()}
        file.write(json.dumps(head) + "\n")
        for number, body, chain, signature in ledger.lines():
            line = {"number": number, "body": body, "chain": chain.hex()}
            file.write(json.dumps(line | {"signature": signature.hex()}) + "\n")
            count += 1
    return count


def check_export(path: Path, expected_fingerprint: str) -> tuple[int, frozenset[bytes]]:
    """Check an exported ledger.

    Args:
        path: A file that `export` wrote.
        expected_fingerprint: Of the site, as it was read over the phone; never from the file.

    Returns:
        How many events it has, and every head that the chain ever had.

    Raises:
        ConfigError: not such a file.
        PolicyError: another site's, or a line was changed, removed, added or moved.
    """
    heads: list[bytes] = []

    def lines() -> Iterator[tuple[int, str, bytes, bytes]]:
        for record in records[1:]:
            heads.append(bytes.fromhex(record["chain"]))
            yield record["number"], record["body"], heads[-1], bytes.fromhex(record["signature"])

    try:
        text = path.read_text(encoding="utf-8")
        records: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        public = bytes.fromhex(records[0]["public"])
        if records[0]["schema"] != SCHEMA:
            raise ValueError(records[0]["schema"])
        if fingerprint(public) != expected_fingerprint:
            raise PolicyError(
                f"{path} is signed by {fingerprint(public)}, not by {expected_fingerprint}."
            )
        return check_lines(lines(), public), frozenset(heads)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not an exported ledger ({type(error).__name__}: {error})."
        ) from None


def heads_in_receipts(path: Path, site: str, public: bytes) -> dict[str, bytes]:
    """Run id to ledger head, from this site's own signed receipts in a run's receipts.json.

    Raises:
        ConfigError: not such a file.
        ProtocolError: a receipt is not signed by this site.
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
    return {receipt.run_id: receipt.ledger_head}
