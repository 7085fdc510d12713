"""Keystreams against published vectors, and from any place on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.secagg.prg import CHUNK, Keystream

KEY = bytes(range(32))


def stream(key: bytes, size: int, **where: object) -> bytes:
    out = np.empty(size, np.uint8)
    Keystream(key, **where).read_into(out)
    return out.tobytes()


def test_chacha20_gives_rfc_8439_appendix_a_1_vectors_1_and_2() -> None:
    assert stream(bytes(32), 128).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_chacha20_gives_rfc_8439_appendix_a_1_vector_3() -> None:
    assert stream(bytes(31) + b"\x01", 64, offset=64).hex() == (
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
    )


def test_aes_256_gives_the_cipher_of_zero_under_the_zero_key() -> None:
    first = stream(bytes(32), 16, prg="aes-256-ctr").hex()
    assert first == "dc95c078a2408989ad48a21492842087"  # NIST CAVP, ECBVarKey256 base block


@pytest.mark.parametrize("prg", ["chacha20", "aes-256-ctr"])
@settings(deadline=None)
@given(offset=st.integers(0, 1000), size=st.integers(0, 300))
def test_a_stream_can_be_read_from_any_byte_on(prg, offset, size) -> None:
    whole = stream(KEY, 1300, prg=prg)
    assert stream(KEY, size, offset=offset, prg=prg) == whole[offset : offset + size]


def test_reading_goes_on_where_it_stopped() -> None:
    keystream = Keystream(KEY)
    parts = [np.empty(size, np.uint32) for size in (1, 100, 7)]
    for part in parts:
        keystream.read_into(part)
    assert np.concatenate(parts).tobytes() == stream(KEY, 4 * 108)


def test_more_than_a_chunk_at_once_is_refused_not_left_unfilled() -> None:
    with pytest.raises(ValueError, match="at most"):
        Keystream(KEY).read_into(np.zeros(CHUNK + 1, np.uint32))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size) -> None:
    with pytest.raises(ProtocolError, match="32"):
        Keystream(bytes(size))
