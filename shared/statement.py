"""Signed audit statements: in-toto Statement v1 in a DSSE envelope, Ed25519.

Both forms are other people's standards, so that a statement is checked without Fedward: any DSSE
library verifies the envelope (the tests use securesystemslib's own), any JSON Schema validator the
statement. The payload is canonical JSON (RFC 8785); integers that a double cannot hold are written
as texts.

Sources: https://github.com/in-toto/attestation (Statement v1);
https://github.com/secure-systems-lab/dsse (envelope 1.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from shared.errors import ConfigError, ProtocolError
from shared.identity import Identity

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "urn:fedward:audit:1"
_LARGEST = 2**53 - 1


def statement(subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto Statement about files.

    Args:
        subjects: Path below the run directory -> sha256 in hex.
        predicate: What is said of them; JSON values.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in sorted(subjects.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": _exact(dict(predicate)),
    }


def sign_statement(record: Mapping[str, Any], key_file: Path) -> str:
    """The statement in a signed envelope, as JSON text.

    Args:
        record: From `statement`.
        key_file: The auditor's private key, PEM, readable by its owner alone.

    Raises:
        ConfigError: the key is not usable.
    """
    Identity.load(key_file)  # refuses what is not Ed25519, or may be read by others
    signer = CryptoSigner(load_pem_private_key(key_file.read_bytes(), password=None))
    envelope = Envelope(rfc8785.dumps(dict(record)), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return _written(envelope)


def _written(envelope: Envelope) -> str:
    return json.dumps(envelope.to_dict(), indent=2) + "\n"


def open_statement(text: str, public: bytes) -> dict[str, Any]:
    """The statement inside an envelope that this key signed.

    Args:
        text: The envelope, not trusted.
        public: The auditor's Ed25519 key, 32 bytes, known from elsewhere.

    Raises:
        ProtocolError: not such an envelope, another signer, or a byte was changed.
    """
    try:
        envelope = Envelope.from_dict(json.loads(text))
        if envelope.payload_type != PAYLOAD_TYPE or _written(envelope) != text:
            raise ProtocolError("the audit statement is not in the form that it was written in")
        key = SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(public))
        if len(envelope.signatures) != 1:
            raise ProtocolError("an audit statement has one signature, its auditor's")
        envelope.verify([key], 1)
        record: dict[str, Any] = json.loads(envelope.payload)
        if rfc8785.dumps(record) != envelope.payload:
            raise ProtocolError("the audit statement's payload is not in canonical form")
    except VerificationError:
        raise ProtocolError("the audit statement is not signed by the auditor's key") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not an audit statement ({type(error).__name__})") from None
    if record.get("_type") != STATEMENT_TYPE or record.get("predicateType") != PREDICATE_TYPE:
        raise ProtocolError("the envelope holds another kind of statement")
    return record


def auditor_key(path: Path) -> Identity:
    """The auditor's key; made where there is none.

    Raises:
        ConfigError: it is not usable, or cannot be made.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"{path.parent}: {error.strerror}") from None
        Identity.generate().save(path)
    return Identity.load(path)


def _exact(value: Any) -> Any:
    """JSON values that every reader reads alike: large integers become texts."""
    if isinstance(value, Mapping):
        return {str(key): _exact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(inner) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return str(value)
    return value
