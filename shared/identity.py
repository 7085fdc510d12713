"""A site's long-lived Ed25519 identity: made once, pinned by every other site.

Sites compare fingerprints outside the server (read over the phone), or pin one project authority
and take the certificates that it signed. A signature always covers a context, so one made for a
set-up message can never pass as one over a receipt.

Source: RFC 8032 (Ed25519); RFC 4648, section 6 (base32 of fingerprints).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import ConfigError, ProtocolError
from shared.messages import Fixed, Text, decode, encode, message

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64

_CERTIFICATE = "site certificate"


@message(0x0001)
@dataclass(frozen=True, slots=True)
class Certificate:
    """A project authority's word that a site of this name has this key."""

    project: Annotated[str, Text()]
    name: Annotated[str, Text()]
    public: Annotated[bytes, Fixed(PUBLIC_BYTES)]
    signature: Annotated[bytes, Fixed(SIGNATURE_BYTES)]


class Identity:
    """One site's private signing key; it never leaves the site."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public: bytes = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        """Make a new identity from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> Identity:
        """Rebuild an identity from its 32-byte seed (RFC 8032's private key)."""
        if len(seed) != 32:
            raise ConfigError(f"an Ed25519 private key has 32 bytes, not {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a PEM file written by `save`.

        Raises:
            ConfigError: unreadable, not an unencrypted Ed25519 key, or other users may read it.
        """
        try:
            mode = path.stat().st_mode & 0o777
            pem = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"identity {path}: {error.strerror}") from None
        if mode & 0o077:
            raise ConfigError(
                f"identity {path} may be read by other users (mode {mode:04o}); "
                f"run chmod 600 {path}, and enrol a new identity if the machine is shared."
            )
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            raise ConfigError(f"identity {path} is not an unencrypted PEM private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"identity {path} is not an Ed25519 key")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM (PKCS 8), readable by its owner alone; never over a file.

        Raises:
            ConfigError: the file exists (an identity is never replaced silently) or cannot
                be written.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(f"{path} exists; an identity is never overwritten") from None
        except OSError as error:
            raise ConfigError(f"identity {path}: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    @property
    def fingerprint(self) -> str:
        """What is read over the phone; see `fingerprint`."""
        return fingerprint(self.public)

    def sign(self, context: str, payload: bytes) -> bytes:
        """Sign `payload` for one purpose; 64 bytes, deterministic (RFC 8032)."""
        return self._key.sign(_signed(context, payload))


def fingerprint(public: bytes) -> str:
    """Name a public key in eight groups of four letters or digits (160 bits of SHA-256).

    >>> fingerprint(bytes(32))
    'mzuh-vlpy-mk6x-o3ep-ygfy-5h4o-eaej-ofef'
    """
    if len(public) != PUBLIC_BYTES:
        raise ConfigError(f"an Ed25519 public key has 32 bytes, not {len(public)}")
    text = base64.b32encode(hashlib.sha256(public).digest()[:20]).decode("ascii").lower()
    return "-".join(text[at : at + 4] for at in range(0, 32, 4))


def verify(public: bytes, context: str, payload: bytes, signature: bytes, *, who: str) -> None:
    """Check a signature of `Identity.sign` against a pinned public key.

    Args:
        public: 32 bytes, from this site's own roster and never from the message.
        context: The purpose that the signature must have been made for.
        payload: What must have been signed.
        signature: 64 bytes, not trusted.
        who: The site that is said to have signed, for the error.

    Raises:
        ProtocolError: the signature does not hold; `who` and `context` are named.
    """
    try:
        _holds(public, _signed(context, payload), signature)
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            f"{who}: the signature over its {context} does not hold under the key pinned for it"
        ) from None


def issue_certificate(authority: Identity, *, project: str, name: str, public: bytes) -> bytes:
    """Sign, as the project's authority, that the site `name` has the key `public`."""
    blank = Certificate(project, name, public, bytes(SIGNATURE_BYTES))
    signature = authority.sign(_CERTIFICATE, encode(blank))
    return encode(Certificate(project, name, public, signature))


def check_certificate(data: bytes, *, authority: bytes, project: str) -> Certificate:
    """Believe a certificate that the pinned authority signed for this project.

    Args:
        data: The certificate's bytes, not trusted.
        authority: The authority's public key, 32 bytes, pinned by this site.
        project: The project that the certificate must be for.

    Raises:
        ProtocolError: malformed, of another project, or not by this authority.
    """
    certificate = decode(Certificate, data)
    if certificate.project != project:
        raise ProtocolError(
            f"the certificate of {certificate.name} is for project {certificate.project}, "
            f"not {project}"
        )
    blank = Certificate(project, certificate.name, certificate.public, bytes(SIGNATURE_BYTES))
    verify(authority, _CERTIFICATE, encode(blank), certificate.signature, who=certificate.name)
    return certificate


@functools.lru_cache(maxsize=4096)
def _holds(public: bytes, signed: bytes, signature: bytes) -> None:
    # A signature that held once holds again: the same one comes in R2, R3 and the result, and in
    # a simulation all sites check it in one process. Failures raise, and are not remembered.
    _public_key(public).verify(signature, signed)


@functools.lru_cache(maxsize=1024)
def _public_key(public: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public)


def _signed(context: str, payload: bytes) -> bytes:
    # Injective: the zero byte ends the context, which is text of this code's own.
    if "\x00" in context:
        raise ValueError("a signature's context holds no zero byte")
    return b"fedward/1/" + context.encode("ascii") + b"\x00" + payload
