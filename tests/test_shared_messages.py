"""One value, one encoding: what `encode` would not have written is refused."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.messages import (
    PROTOCOL_VERSION,
    U8,
    U16,
    U32,
    U64,
    Blob,
    ByName,
    Fixed,
    Flag,
    Many,
    Maybe,
    Nested,
    Real,
    Text,
    decode,
    encode,
    kind_of,
    message,
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """Something inside a message."""

    name: Annotated[str, Text(8)]
    key: Annotated[bytes, Fixed(4)]


@message(0xF001)
@dataclass(frozen=True, slots=True)
class Sample:
    """A field of every kind."""

    small: Annotated[int, U8]
    middle: Annotated[int, U16]
    large: Annotated[int, U32]
    huge: Annotated[int, U64]
    flag: Annotated[bool, Flag()]
    real: Annotated[float, Real()]
    blob: Annotated[bytes, Blob(20)]
    leaf: Annotated[Leaf, Nested(Leaf)]
    maybe: Annotated[Leaf | None, Maybe(Nested(Leaf))]
    many: Annotated[tuple[int, ...], Many(U16, 5)]
    by_name: Annotated[Mapping[str, bytes], ByName(Blob(6), 5)]


@message(0xF002)
@dataclass(frozen=True, slots=True)
class Pair:
    """A map and a flag, to be written by hand."""

    names: Annotated[Mapping[str, int], ByName(U8, 3)]
    flag: Annotated[bool, Flag()]


names = st.text(st.characters(categories=("L", "N"), max_codepoint=0x7F), min_size=1, max_size=8)
leaves = st.builds(Leaf, name=names, key=st.binary(min_size=4, max_size=4))
samples = st.builds(
    Sample,
    small=st.integers(0, 2**8 - 1),
    middle=st.integers(0, 2**16 - 1),
    large=st.integers(0, 2**32 - 1),
    huge=st.integers(0, 2**64 - 1),
    flag=st.booleans(),
    real=st.floats(allow_nan=False, allow_infinity=False),
    blob=st.binary(max_size=20),
    leaf=leaves,
    maybe=st.none() | leaves,
    many=st.lists(st.integers(0, 2**16 - 1), max_size=5).map(tuple),
    by_name=st.dictionaries(names, st.binary(max_size=6), max_size=5),
)


@given(samples)
def test_decode_is_the_inverse_of_encode(sample: Sample) -> None:
    data = encode(sample)
    assert decode(Sample, data) == sample
    assert kind_of(data) is Sample


@given(samples)
def test_a_view_of_bytes_is_written_as_the_bytes_themselves(sample: Sample) -> None:
    around = b"<" + sample.blob + b">"
    view = dataclasses.replace(sample, blob=memoryview(around)[1:-1])  # type: ignore[arg-type]
    assert encode(view) == encode(sample)


@given(samples, st.data())
def test_no_two_byte_strings_are_one_value(sample: Sample, choice: st.DataObject) -> None:
    data = bytearray(encode(sample))
    at = choice.draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << choice.draw(st.integers(0, 7))
    try:
        other = decode(Sample, bytes(data))
    except ProtocolError:
        return
    assert encode(other) == bytes(data)


@given(samples, st.integers(1, 200), st.binary(min_size=1, max_size=5))
def test_cut_and_longer_messages_are_refused(sample: Sample, cut: int, more: bytes) -> None:
    data = encode(sample)
    with pytest.raises(ProtocolError):
        decode(Sample, data[: max(0, len(data) - cut)])
    with pytest.raises(ProtocolError, match="bytes too many"):
        decode(Sample, data + more)


@given(st.binary(max_size=200))
def test_noise_is_refused_with_nothing_but_a_protocol_error(noise: bytes) -> None:
    for data in (noise, encode(Pair({}, True))[:6] + noise):
        try:
            assert encode(decode(Pair, data)) == data
        except ProtocolError as error:
            assert "Pair" in str(error)  # noqa: PT017 - most noise is refused, some is a Pair


GOOD = Sample(1, 2, 3, 4, True, 0.5, b"b", Leaf("a", b"1234"), None, (1, 2), {"x": b"", "y": b"z"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"small": 256}, "Sample.small must be an integer of 8 bits"),
        ({"small": -1}, "Sample.small"),
        ({"small": True}, "Sample.small"),
        ({"huge": 2**64}, "Sample.huge must be an integer of 64 bits"),
        ({"flag": 1}, "Sample.flag must be true or false"),
        ({"real": math.nan}, "Sample.real must be a finite float"),
        ({"real": math.inf}, "Sample.real"),
        ({"real": 1}, "Sample.real"),
        ({"blob": bytes(21)}, "Sample.blob has 21 bytes; the limit is 20"),
        ({"blob": "text"}, "Sample.blob must be bytes"),
        ({"blob": memoryview(bytes(8)).cast("I")}, "Sample.blob must be bytes"),
        ({"blob": memoryview(bytes(8))[::2]}, "Sample.blob must be bytes"),
        ({"leaf": None}, "Sample.leaf must be a Leaf"),
        ({"leaf": Leaf("a", b"123")}, "Leaf.key must be 4 bytes"),
        ({"leaf": Leaf("a\nb", b"1234")}, "Leaf.name holds a control character"),
        ({"leaf": Leaf("\u202e", b"1234")}, "Leaf.name holds a control character"),
        ({"leaf": Leaf("\ud800", b"1234")}, "Leaf.name must be text that UTF-8 can hold"),
        ({"leaf": Leaf("123456789", b"1234")}, "Leaf.name has 9 bytes; the limit is 8"),
        ({"many": (1,) * 6}, "Sample.many must be a tuple of at most 5"),
        ({"many": [1]}, "Sample.many must be a tuple"),
        ({"by_name": {str(i): b"" for i in range(6)}}, "Sample.by_name must be a mapping"),
    ],
)
def test_a_value_outside_its_limits_is_not_written(
    change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        encode(dataclasses.replace(GOOD, **change))  # type: ignore[arg-type]


def test_errors_do_not_show_the_value() -> None:
    with pytest.raises(ProtocolError) as caught:
        encode(dataclasses.replace(GOOD, leaf=Leaf("a", b"SECRET")))
    assert "SECRET" not in str(caught.value)


HEADER = encode(Pair({}, False))[:6]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"\x00\x00\x00\x00\x02", "Pair.flag must be 0 or 1, is 2"),
        (b"\x04\x00\x00\x00", "Pair.names has 4 entries"),
        (b"\xff\xff\xff\xff", "Pair.names has 4294967295 entries"),
        (
            b"\x02\x00\x00\x00\x01\x00\x00\x00b\x07\x01\x00\x00\x00a\x07\x00",
            "Pair.names has names twice or out of order",
        ),
        (
            b"\x02\x00\x00\x00\x01\x00\x00\x00a\x07\x01\x00\x00\x00a\x07\x00",
            "Pair.names has names twice or out of order",
        ),
        (b"\x01\x00\x00\x00\x01\x00\x00\x00\xff\x07\x00", "Pair.names is not UTF-8"),
        (b"\x01\x00\x00\x00\x41\x00\x00\x00", "Pair.names has 65 entries or bytes"),
        (b"\x01\x00\x00\x00\x05\x00\x00\x00ab", "Pair.names is cut short"),
    ],
)
def test_bytes_that_nobody_would_have_written_are_refused(body: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        decode(Pair, HEADER + body)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_on_arrival(value: float) -> None:
    data = encode(GOOD)
    at = data.index(struct.pack("<d", 0.5))
    with pytest.raises(ProtocolError, match=r"Sample\.real is not finite"):
        decode(Sample, data[:at] + struct.pack("<d", value) + data[at + 8 :])


def test_another_version_says_what_to_do() -> None:
    data = bytearray(encode(GOOD))
    data[2] = PROTOCOL_VERSION + 1
    with pytest.raises(ProtocolError, match="Install the same fedward version"):
        decode(Sample, bytes(data))


def test_another_message_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="Pair was expected, Sample came"):
        decode(Pair, encode(GOOD))
    with pytest.raises(ProtocolError, match="tag 0xeeee"):
        decode(Pair, HEADER[:4] + b"\xee\xee")
    with pytest.raises(ProtocolError, match="unknown tag 0xeeee"):
        kind_of(HEADER[:4] + b"\xee\xee")
    with pytest.raises(ProtocolError, match="does not start as"):
        decode(Pair, b"XX" + HEADER[2:])


def test_two_classes_cannot_have_one_tag() -> None:
    with pytest.raises(TypeError, match="taken by Sample"):

        @message(0xF001)
        @dataclass(frozen=True)
        class Other:
            """Takes a tag that is taken."""


def test_a_field_without_a_kind_is_a_mistake_of_ours() -> None:
    @message(0xF003)
    @dataclass(frozen=True)
    class Plain:
        """No kind."""

        value: int

    with pytest.raises(TypeError, match="needs exactly one field kind"):
        encode(Plain(1))


def test_the_wire_is_what_the_module_says() -> None:
    """Written out by hand from the module's text, so that a change of the format shows."""
    data = encode(Pair({"b": 2, "a": 1}, True))
    assert data == b"FW" + b"\x01\x00" + b"\x02\xf0" + (
        b"\x02\x00\x00\x00" + b"\x01\x00\x00\x00a\x01" + b"\x01\x00\x00\x00b\x02" + b"\x01"
    )
