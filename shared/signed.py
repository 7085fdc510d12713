"""Signed files that people pass on: JSON that can be read, and that cannot be changed.

An invitation, a request, a kit and a roster are all one form: a schema, a body, the signer's
public key and its Ed25519 signature over the body's canonical bytes, with the schema as context.
Whoever opens one says which signer he expects; only where a key is seen for the first time is that
left open, and then its fingerprint has to be compared outside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shared.config import canonical_json, parse
from shared.errors import ConfigError, ProtocolError
from shared.identity import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, verify

MAX_BYTES = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Opened(Generic[T]):
    """A signed record whose signature holds under `signer`, 32 bytes."""

    record: T
    signer: bytes


def seal(identity: Identity, schema: str, record: object) -> bytes:
    """Sign a frozen dataclass of texts, whole numbers and tuples; the file's bytes."""
    body = canonical_json(record)
    table = {
        "schema": schema,
        "body": json.loads(body),
        "signer": identity.public.hex(),
        "signature": identity.sign(schema, body).hex(),
    }
    return json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"


def unseal(
    data: bytes, cls: type[T], schema: str, *, signer: bytes | None, where: str
) -> Opened[T]:
    """Read what `seal` wrote.

    Args:
        data: The file's bytes, not trusted.
        cls: What the body must be.
        schema: What the file must be; also the signature's context.
        signer: The key that must have signed; None where it is seen for the first time.
        where: How to name the file in messages.

    Raises:
        ProtocolError: not such a file, by another signer, or a byte was changed.
    """
    table = _table(data, schema, where)
    try:
        public, signature = bytes.fromhex(table["signer"]), bytes.fromhex(table["signature"])
        body = canonical_json(table["body"])
    except (KeyError, TypeError, ValueError):
        raise ProtocolError(f"{where} is damaged. Ask for it again.") from None
    if len(public) != PUBLIC_BYTES or len(signature) != SIGNATURE_BYTES:
        raise ProtocolError(f"{where} is damaged. Ask for it again.")
    if signer is not None and public != signer:
        raise ProtocolError(
            f"{where} is signed by another key than the one expected here. Do not use it; "
            "compare fingerprints with its sender by telephone."
        )
    verify(public, schema, body, signature, who=where)
    try:
        record = parse(cls, table["body"], where)
    except ConfigError as error:
        raise ProtocolError(str(error)) from None
    if canonical_json(record) != body:
        raise ProtocolError(f"{where} is not written in full. Ask for it again.")
    return Opened(record, public)


def schema_of(data: bytes, where: str) -> str:
    """Which kind of signed file this says it is; ProtocolError where it is none."""
    try:
        schema = json.loads(data[:MAX_BYTES])["schema"]
    except (ValueError, TypeError, KeyError, RecursionError):
        schema = None
    if not isinstance(schema, str):
        raise ProtocolError(f"{where} is not a signed file of Fedward. Ask for it again.")
    return schema


def _table(data: bytes, schema: str, where: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"{where} has {len(data)} bytes; such files have {MAX_BYTES} at most")
    found = schema_of(data, where)
    if found != schema:
        raise ProtocolError(f"{where} is a {found!r}; a {schema!r} is needed here.")
    table: dict[str, Any] = json.loads(data)
    if not isinstance(table.get("body"), dict):
        raise ProtocolError(f"{where} is damaged. Ask for it again.")
    return table
