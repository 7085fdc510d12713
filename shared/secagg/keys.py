"""Keys of the secure sum: hybrid key agreement, key chains, and sealed messages.

Two sites agree on one key per run with X25519 and ML-KEM-768 together: it stays secret while
either of the two holds. From it they draw one fresh key per purpose and round.
Python cannot promise that a deleted key is gone from memory; what can be dropped here is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import ProtocolError
from shared.secagg.encoding import digest, encode

X25519_BYTES = 32
KEM_PUBLIC_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088
PUBLIC_BYTES = X25519_BYTES + KEM_PUBLIC_BYTES
SECRET_BYTES = 32 + 64  # X25519 scalar || ML-KEM seed (d || z)

Random = Callable[[int], bytes]
"""Gives as many uniform secret bytes as asked for: ``os.urandom``, or a fixed stream in tests."""


def hkdf(ikm: bytes, *, salt: bytes = b"", info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256, extract and expand, RFC 5869."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(ikm)


class EphemeralKeys:
    """One site's key-agreement keys for one run; used in set-up and then deleted.

    Source: RFC 7748 (X25519); FIPS 203 (ML-KEM-768).
    """

    def __init__(self, secret: bytes) -> None:
        """Rebuild from ``to_bytes()``: 96 secret bytes, X25519 scalar then ML-KEM seed."""
        if len(secret) != SECRET_BYTES:
            raise ProtocolError(f"ephemeral secret has {len(secret)} bytes, not {SECRET_BYTES}")
        self._secret = secret
        self._x25519 = X25519PrivateKey.from_private_bytes(secret[:32])
        self._kem = MLKEM768PrivateKey.from_seed_bytes(secret[32:])
        self.public: bytes = (
            self._x25519.public_key().public_bytes_raw() + self._kem.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls, random: Random = os.urandom) -> EphemeralKeys:
        """Draw new keys; `random` gives uniform secret bytes."""
        return cls(random(SECRET_BYTES))

    def to_bytes(self) -> bytes:
        """The 96 secret bytes, for the site's own store only."""
        return self._secret

    def dh(self, peer_public: bytes) -> bytes:
        """X25519 with the peer's public key (1216 bytes): 32 secret bytes.

        Raises:
            ProtocolError: wrong length, or a point of small order (the result would be known).
        """
        x25519, _ = _split_public(peer_public)
        try:
            return self._x25519.exchange(X25519PublicKey.from_public_bytes(x25519))
        except ValueError as error:
            raise ProtocolError("the peer's X25519 key gives a constant secret") from error

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Open an ML-KEM-768 ciphertext (1088 bytes): 32 secret bytes.

        A forged ciphertext of the right length gives an unrelated secret, not an error.

        Raises:
            ProtocolError: wrong length.
        """
        if len(ciphertext) != KEM_CIPHERTEXT_BYTES:
            raise ProtocolError(
                f"KEM ciphertext has {len(ciphertext)} bytes, not {KEM_CIPHERTEXT_BYTES}"
            )
        return self._kem.decapsulate(ciphertext)


def encapsulate(peer_public: bytes) -> tuple[bytes, bytes]:
    """Make a secret for the owner of `peer_public`: (ciphertext of 1088 bytes, 32 secret bytes).

    Raises:
        ProtocolError: wrong length, or not a valid ML-KEM-768 key (FIPS 203, section 7.2).
    """
    _, kem = _split_public(peer_public)
    try:
        secret, ciphertext = MLKEM768PublicKey.from_public_bytes(kem).encapsulate()
    except ValueError as error:
        raise ProtocolError("the peer's ML-KEM-768 key is not valid") from error
    return ciphertext, secret


def pair_key(
    *,
    run_hash: bytes,
    low: str,
    high: str,
    kem_secrets: Sequence[bytes],
    dh: bytes,
    publics: tuple[bytes, bytes],
    ciphertexts: Sequence[bytes],
) -> bytes:
    """Combine the secrets of one pair of sites into their key for the run: 32 bytes.

    Both ends pass the same values in the same order: first what belongs to `low`, the site whose
    name sorts first. Names, public keys and ciphertexts are bound in, so two sites that were shown
    different ones get different keys.

    Args:
        run_hash: Hash of the run's parameters.
        low, high: Site names, ``low < high``.
        kem_secrets: 32 bytes each, one per ciphertext: encapsulated by `low`, then by `high`.
        dh: The X25519 secret, 32 bytes.
        publics: `EphemeralKeys.public` of `low` and of `high`.
        ciphertexts: The KEM ciphertexts, made by `low` (to `high`), then by `high`.

    Raises:
        ProtocolError: names out of order, or secrets and ciphertexts of wrong number or length.
    """
    if not low < high:
        raise ProtocolError(f"site names of a pair must be sorted and differ: {low!r}, {high!r}")
    if not kem_secrets or len(kem_secrets) != len(ciphertexts):
        raise ProtocolError(f"{len(kem_secrets)} KEM secrets for {len(ciphertexts)} ciphertexts")
    if any(len(secret) != 32 for secret in (*kem_secrets, dh)):
        raise ProtocolError("a pair's KEM and X25519 secrets have 32 bytes each")
    hashed = [digest("public", public) for public in publics]
    hashed += [digest("ciphertext", ciphertext) for ciphertext in ciphertexts]
    info = encode("pair", low, high, *hashed)
    return hkdf(b"".join(kem_secrets) + dh, salt=run_hash, info=info)


class Ratchet:
    """A chain of keys that cannot be run backwards: an old key is lost with its state."""

    def __init__(self, state: bytes) -> None:
        """Start, or go on, from 32 secret bytes."""
        if len(state) != 32:
            raise ProtocolError(f"ratchet state has {len(state)} bytes, not 32")
        self._state = bytearray(state)

    @property
    def state(self) -> bytes:
        """The 32 secret bytes from which the chain goes on, for the site's own store only."""
        return bytes(self._state)

    def next_key(self) -> bytes:
        """Draw the next key (32 bytes) and overwrite the state it came from."""
        drawn = hkdf(bytes(self._state), info=encode("ratchet"), length=64)
        self._state[:] = drawn[32:]
        return drawn[:32]


def seal(key: bytes, plaintext: bytes, *, nonce_context: bytes) -> bytes:
    """Encrypt and authenticate with ChaCha20-Poly1305: 16 bytes longer than `plaintext`.

    Args:
        key: 32 bytes, for this one message: the nonce depends on the context alone.
        nonce_context: What the message is and for whom; bound in, not sent.
    """
    return ChaCha20Poly1305(key).encrypt(_nonce(nonce_context), plaintext, nonce_context)


def unseal(key: bytes, sealed: bytes, *, nonce_context: bytes) -> bytes:
    """Open what `seal` made.

    Raises:
        ProtocolError: altered, cut, or made under another key or context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_nonce(nonce_context), sealed, nonce_context)
    except InvalidTag as error:
        raise ProtocolError("a sealed message was altered or is for another place") from error


def _nonce(nonce_context: bytes) -> bytes:
    return digest("nonce", nonce_context)[:12]


def _split_public(public: bytes) -> tuple[bytes, bytes]:
    if len(public) != PUBLIC_BYTES:
        raise ProtocolError(f"ephemeral public key has {len(public)} bytes, not {PUBLIC_BYTES}")
    return public[:X25519_BYTES], public[X25519_BYTES:]
