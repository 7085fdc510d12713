"""Key agreement, key chains and sealed messages, against published vectors and tampering."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.secagg import keys

KEY = bytes(range(32))
CONTEXT = b"share of site-a for site-b, round 3"


def test_hkdf_gives_rfc_5869_test_case_1() -> None:
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    okm = keys.hkdf(b"\x0b" * 22, salt=salt, info=info, length=42)
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_hkdf_without_salt_gives_rfc_5869_test_case_3() -> None:
    okm = keys.hkdf(b"\x0b" * 22, info=b"", length=42)
    assert okm.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_x25519_gives_the_keys_and_secret_of_rfc_7748_section_6_1() -> None:
    alice, bob = (
        keys.EphemeralKeys(bytes.fromhex(scalar) + bytes(64))
        for scalar in (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        )
    )
    assert alice.public[:32].hex() == (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    assert alice.dh(bob.public) == bob.dh(alice.public)
    assert alice.dh(bob.public).hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_ml_kem_key_generation_gives_wycheproof_test_1() -> None:
    seed = bytes.fromhex(
        "7c9935a0b07694aa0c6d10e4db6b1add2fd81a25ccb148032dcd739936737f2d"
        "8626ed79d451140800e03b59b956f8210e556067407d13dc90fa9e8b872bfb8f"
    )
    public = keys.EphemeralKeys(bytes(32) + seed).public[32:].hex()
    assert public.startswith("a8e651a1e685f22478a8954f007bc7711b930772c78f092e82878e3e937f3679")
    assert public.endswith("8cb1dc4e8315f2af0d32f0017ae136e19f028")


def test_a_forged_kem_ciphertext_gives_the_rejection_secret_of_fips_203() -> None:
    own = keys.EphemeralKeys(KEY + bytes(range(64)))
    forged = bytes(1088)
    rejection_seed = bytes(range(32, 64))
    expected = hashlib.shake_256(rejection_seed + forged).digest(32)
    assert own.decapsulate(forged) == expected


def agree(**changed: object) -> tuple[bytes, bytes]:
    """Run the set-up of one pair; `changed` is what site b is made to believe."""
    a, b = keys.EphemeralKeys.generate(), keys.EphemeralKeys.generate()
    to_b, secret_ab = keys.encapsulate(b.public)
    to_a, secret_ba = keys.encapsulate(a.public)
    shown = {
        "run_hash": KEY,
        "low": "a",
        "high": "b",
        "publics": (a.public, b.public),
        "ciphertexts": (to_b, to_a),
    }
    at_a = keys.pair_key(kem_secrets=(secret_ab, a.decapsulate(to_a)), dh=a.dh(b.public), **shown)
    shown |= changed
    at_b = keys.pair_key(kem_secrets=(b.decapsulate(to_b), secret_ba), dh=b.dh(a.public), **shown)
    return at_a, at_b


def test_both_ends_of_a_pair_agree() -> None:
    at_a, at_b = agree()
    assert at_a == at_b
    assert len(at_a) == 32
    assert agree()[0] != at_a


@pytest.mark.parametrize(
    "changed",
    [
        {"run_hash": bytes(32)},
        {"low": "A"},
        {"high": "c"},
        {"publics": (bytes(1216), bytes(1216))},
        {"ciphertexts": (bytes(1088), bytes(1088))},
    ],
)
def test_ends_that_were_shown_different_things_do_not_agree(changed) -> None:
    at_a, at_b = agree(**changed)
    assert at_a != at_b


@pytest.mark.parametrize("wrong", ["dh", "first kem", "second kem"])
def test_every_secret_is_needed(wrong) -> None:
    secrets = {"dh": KEY, "first kem": KEY[::-1], "second kem": bytes(32)}

    def key(secrets: dict[str, bytes]) -> bytes:
        return keys.pair_key(
            run_hash=KEY,
            low="a",
            high="b",
            kem_secrets=(secrets["first kem"], secrets["second kem"]),
            dh=secrets["dh"],
            publics=(b"1", b"2"),
            ciphertexts=(b"3", b"4"),
        )

    assert key(secrets | {wrong: b"\x01" * 32}) != key(secrets)


@pytest.mark.parametrize(
    "bad",
    [
        {"low": "b", "high": "a"},
        {"high": "a"},
        {"kem_secrets": (KEY,)},
        {"kem_secrets": (), "ciphertexts": ()},
        {"kem_secrets": (KEY, KEY[:31])},
        {"dh": b""},
    ],
)
def test_a_malformed_pair_is_refused(bad) -> None:
    good = {
        "run_hash": KEY,
        "low": "a",
        "high": "b",
        "kem_secrets": (KEY, KEY),
        "dh": KEY,
        "publics": (b"1", b"2"),
        "ciphertexts": (b"3", b"4"),
    }
    keys.pair_key(**good)
    with pytest.raises(ProtocolError):
        keys.pair_key(**(good | bad))


def test_hostile_public_keys_are_refused() -> None:
    own = keys.EphemeralKeys.generate()
    small_order = bytes(32) + own.public[32:]
    not_reduced = own.public[:32] + b"\xff" * 1184  # coefficients above q
    with pytest.raises(ProtocolError, match="constant"):
        own.dh(small_order)
    with pytest.raises(ProtocolError, match="ML-KEM"):
        keys.encapsulate(not_reduced)
    for cut in (own.public[:-1], own.public + b"\x00", b""):
        with pytest.raises(ProtocolError, match="1216"):
            own.dh(cut)
        with pytest.raises(ProtocolError, match="1216"):
            keys.encapsulate(cut)
    with pytest.raises(ProtocolError, match="1088"):
        own.decapsulate(bytes(1087))


def test_ephemeral_keys_can_be_rebuilt_from_the_sites_own_store() -> None:
    own = keys.EphemeralKeys.generate()
    again = keys.EphemeralKeys(own.to_bytes())
    ciphertext, secret = keys.encapsulate(own.public)
    assert again.public == own.public
    assert again.decapsulate(ciphertext) == secret
    with pytest.raises(ProtocolError, match="96"):
        keys.EphemeralKeys(own.to_bytes()[:-1])


def test_a_ratchet_goes_on_where_it_was_stored_and_forgets_what_was_before() -> None:
    ratchet = keys.Ratchet(KEY)
    first = ratchet.next_key()
    stored = ratchet.state
    second = ratchet.next_key()
    assert keys.Ratchet(stored).next_key() == second
    assert len({first, second, stored, KEY, ratchet.state}) == 5
    # The chain is one way: nothing that is left gives the first key again.
    later = keys.Ratchet(stored)
    assert first not in {later.next_key() for _ in range(100)}
    with pytest.raises(ProtocolError, match="32"):
        keys.Ratchet(KEY[:31])


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_a_sealed_message_opens(plaintext, context) -> None:
    sealed = keys.seal(KEY, plaintext, nonce_context=context)
    assert len(sealed) == len(plaintext) + 16
    assert keys.unseal(KEY, sealed, nonce_context=context) == plaintext


def test_every_altered_bit_of_a_sealed_message_is_caught() -> None:
    sealed = keys.seal(KEY, b"two shares", nonce_context=CONTEXT)
    for bit in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="altered"):
            keys.unseal(KEY, bytes(altered), nonce_context=CONTEXT)


@pytest.mark.parametrize("size", [0, 15, 25])
def test_a_cut_sealed_message_is_caught(size) -> None:
    sealed = keys.seal(KEY, b"two shares", nonce_context=CONTEXT)
    with pytest.raises(ProtocolError):
        keys.unseal(KEY, sealed[:size], nonce_context=CONTEXT)


def test_a_sealed_message_opens_nowhere_else() -> None:
    sealed = keys.seal(KEY, b"two shares", nonce_context=CONTEXT)
    with pytest.raises(ProtocolError):
        keys.unseal(KEY, sealed, nonce_context=CONTEXT + b"1")
    with pytest.raises(ProtocolError):
        keys.unseal(KEY[::-1], sealed, nonce_context=CONTEXT)
