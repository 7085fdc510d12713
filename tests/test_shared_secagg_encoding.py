"""The encoding is injective, so a hash over it commits to every field."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.secagg.encoding import Field, digest, encode

fields = st.lists(st.binary(max_size=40) | st.integers() | st.text(max_size=20), max_size=6)
DECODERS: dict[bytes, Callable[[bytes], Field]] = {
    b"s": bytes.decode,
    b"b": bytes,
    b"i": lambda raw: int.from_bytes(raw, "little", signed=True),
}


def decode(encoded: bytes) -> list[Field]:
    items: list[Field] = []
    while encoded:
        kind, size = encoded[:1], int.from_bytes(encoded[1:9], "little")
        items.append(DECODERS[kind](encoded[9 : 9 + size]))
        encoded = encoded[9 + size :]
    return items


@settings(deadline=None)
@given(st.text(max_size=10), fields)
def test_an_encoding_can_be_read_back_so_no_two_inputs_share_one(label, items) -> None:
    decoded = decode(encode(label, *items))
    assert decoded == [label, *items]
    assert [type(a) for a in decoded] == [type(a) for a in [label, *items]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", b"b"), ("a", "b")),
        (("a", 1), ("a", b"\x01")),
        (("a", b"", b"x"), ("a", b"x", b"")),
        (("a",), ("a", b"")),
        (("a", -1), ("a", 255)),
    ],
)
def test_fields_that_joined_bytes_would_confuse_differ(first, second) -> None:
    assert encode(*first) != encode(*second)
    assert digest(*first) != digest(*second)


def test_the_bytes_are_fixed() -> None:
    encoded = encode("pair", b"\x00\xff", -2, "é")
    assert encoded.hex() == (
        "7304000000000000007061697262020000000000000000ff690100000000000000fe730200000000000000c3a9"
    )
    assert digest("pair", 7) == hashlib.sha256(b"fedward/secagg/1" + encode("pair", 7)).digest()


@pytest.mark.parametrize("field", [True, None, 1.5, [b"a"]])
def test_other_types_are_refused(field) -> None:
    with pytest.raises(TypeError):
        encode("a", field)
