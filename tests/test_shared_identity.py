"""Identities: RFC 8032, contexts, files that nobody else may read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, ProtocolError
from shared.identity import (
    Identity,
    check_certificate,
    fingerprint,
    issue_certificate,
    verify,
)

# RFC 8032, section 7.1, TEST 1.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")


def test_the_public_key_is_the_one_of_rfc_8032() -> None:
    assert Identity.from_bytes(SEED).public == PUBLIC


def test_what_is_signed_is_context_and_payload() -> None:
    signature = Identity.from_bytes(SEED).sign("receipt", b"payload")
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(signature, b"fedward/1/receipt\x00payload")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_a_signature_holds_for_its_own_context_payload_and_key(a: bytes, b: bytes) -> None:
    identity, other = Identity.from_bytes(SEED), Identity.from_bytes(b"\x01" * 32)
    signature = identity.sign("receipt", a)
    verify(identity.public, "receipt", a, signature, who="north")
    wrong = [
        (identity.public, "voucher", a, signature),
        (other.public, "receipt", a, signature),
        (identity.public, "receipt", a, bytes(64)),
        (identity.public, "receipt", a, signature[:63]),
        (bytes(32), "receipt", a, signature),
    ]
    if a != b:
        wrong.append((identity.public, "receipt", b, signature))
    for public, context, payload, false in wrong:
        with pytest.raises(ProtocolError, match="north: the signature over its"):
            verify(public, context, payload, false, who="north")


def test_a_payload_cannot_move_into_the_context() -> None:
    identity = Identity.from_bytes(SEED)
    signature = identity.sign("a", b"b\x00c")
    with pytest.raises(ProtocolError):
        verify(identity.public, "a\x00b", b"c", signature, who="north")
    with pytest.raises(ValueError, match="zero byte"):
        identity.sign("a\x00b", b"c")


def test_the_file_is_for_its_owner_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    identity, path = Identity.generate(), tmp_path / "identity.pem"
    identity.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).public == identity.public
    with pytest.raises(ConfigError, match="never overwritten"):
        Identity.generate().save(path)
    assert Identity.load(path).public == identity.public
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="may be read by other users"):
        Identity.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    foreign = generate_private_key(SECP256R1())
    encodings = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    locked = serialization.BestAvailableEncryption(b"word")
    files = {
        "not an Ed25519 key": foreign.private_bytes(*encodings, serialization.NoEncryption()),
        "not an unencrypted PEM": foreign.private_bytes(*encodings, locked),
        "not an unencrypted PEM private key": b"hello",
    }
    for complaint, content in files.items():
        path = tmp_path / "file.pem"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=complaint):
            Identity.load(path)
    with pytest.raises(ConfigError, match="No such file"):
        Identity.load(tmp_path / "nothing.pem")
    with pytest.raises(ConfigError, match="No such file"):
        Identity.generate().save(tmp_path / "nowhere" / "identity.pem")
    with pytest.raises(ConfigError, match="32 bytes"):
        Identity.from_bytes(b"short")


def test_fingerprints_are_read_over_the_phone() -> None:
    text = Identity.from_bytes(SEED).fingerprint
    assert text == fingerprint(PUBLIC)
    groups = text.split("-")
    assert [len(group) for group in groups] == [4] * 8
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz234567-")
    with pytest.raises(ConfigError):
        fingerprint(b"short")


def test_generated_identities_differ() -> None:
    assert Identity.generate().public != Identity.generate().public


def test_the_private_key_is_not_shown() -> None:
    identity = Identity.from_bytes(SEED)
    assert SEED.hex() not in repr(identity)
    assert repr(SEED) not in repr(identity)


def test_a_certificate_of_the_pinned_authority_names_a_site_and_its_key() -> None:
    authority, site = Identity.generate(), Identity.generate()
    data = issue_certificate(authority, project="heart", name="north", public=site.public)
    certificate = check_certificate(data, authority=authority.public, project="heart")
    assert (certificate.name, certificate.public) == ("north", site.public)


def test_a_strangers_certificate_is_refused() -> None:
    authority, stranger = Identity.generate(), Identity.generate()
    data = issue_certificate(stranger, project="heart", name="north", public=stranger.public)
    with pytest.raises(ProtocolError, match="north: the signature over its site certificate"):
        check_certificate(data, authority=authority.public, project="heart")
    true = issue_certificate(authority, project="heart", name="north", public=stranger.public)
    with pytest.raises(ProtocolError, match="for project heart, not lungs"):
        check_certificate(true, authority=authority.public, project="lungs")
    moved = true.replace(b"north", b"south")
    with pytest.raises(ProtocolError, match="south: the signature"):
        check_certificate(moved, authority=authority.public, project="heart")
    other_key = true.replace(stranger.public, authority.public)
    with pytest.raises(ProtocolError, match="north: the signature"):
        check_certificate(other_key, authority=authority.public, project="heart")
