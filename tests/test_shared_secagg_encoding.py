"""The encoding is injective, so a hash over it commits to every field."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.secagg import transcript
from shared.secagg.encoding import (
    Field,
    digest,
    digest_over_hashes,
    digester,
    encode,
    encode_items,
)

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


hashes = st.lists(st.binary(min_size=32, max_size=32), max_size=5)


@given(st.text(max_size=10), fields, hashes)
def test_fast_forms_give_the_same_digest(label: str, some: list[Field], parts: list[bytes]) -> None:
    plain = digest(label, *some, *parts)
    assert digest_over_hashes(label, some, parts) == plain
    for cut in range(len(some) + 1):
        finish = digester(label, *some[:cut])
        assert finish(encode_items(*some[cut:], *parts)) == plain


def test_a_hash_of_another_size_is_refused() -> None:
    for wrong in (bytes(31), bytes(33), bytearray(32)):
        with pytest.raises(TypeError):
            digest_over_hashes("t", (), [bytes(32), wrong])  # type: ignore[list-item]


@given(hashes, st.text(max_size=8), st.text(max_size=8), st.randoms(use_true_random=False))
def test_tags_of_a_batch_are_the_single_ones(slots, owner, holder, rng) -> None:  # type: ignore[no-untyped-def]
    shares = [(rng.randbytes(32), rng.randbytes(32)) for _ in slots]
    single = [
        transcript.share_tag(at, owner, holder, kind, share)
        for at, pair in zip(slots, shares, strict=True)
        for kind, share in zip((transcript.SELF, transcript.RECOVERY), pair, strict=True)
    ]
    assert transcript.share_tags(slots, owner, holder, shares) == b"".join(single)
    checks = [transcript.check_value(at) for at in slots]
    assert transcript.check_values(b"".join(slots)) == b"".join(checks)
