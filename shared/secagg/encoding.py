"""One injective encoding for everything that is hashed, signed or used as a key's context.

Two different lists of fields never give the same bytes, so a hash over an encoding commits to
every field and to where each one ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

Field = bytes | int | str

_DOMAIN = b"fedward/secagg/1"
_HASH = b"b" + (32).to_bytes(8, "little")


def encode(label: str, *fields: Field) -> bytes:
    """Encode a label and fields so that no other label or fields give the same bytes.

    Each item is one type byte (``s``, ``b``, ``i``), its length as 8 bytes little endian, and its
    content: UTF-8 for text, the bytes themselves, or the shortest two's complement, little endian,
    for an integer of any size and sign.

    Args:
        label: What the bytes are for; two purposes never share one.
        fields: In an order that the label fixes. A bool is refused: it would equal 0 or 1.

    Raises:
        TypeError: a field is not bytes, int or str.

    >>> encode("t", 1).hex(" ")
    '73 01 00 00 00 00 00 00 00 74 69 01 00 00 00 00 00 00 00 01'
    """
    return b"".join(_item(field) for field in (label, *fields))


def digest(label: str, *fields: Field) -> bytes:
    """SHA-256 over the project's domain and ``encode(label, *fields)``: 32 bytes."""
    return hashlib.sha256(_DOMAIN + encode(label, *fields)).digest()


def digester(*fields: Field) -> Callable[[bytes], bytes]:
    """``digest`` of an encoding whose first items are fixed: takes the encoding of the others.

    ``digester("a", x)(encode_items(y, z))`` is ``digest("a", x, y, z)``.
    """
    start = hashlib.sha256(_DOMAIN + encode_items(*fields))

    def finish(rest: bytes) -> bytes:
        state = start.copy()
        state.update(rest)
        return state.digest()

    return finish


def encode_items(*fields: Field) -> bytes:
    """The encoding of some fields, to be put together with others'; not a whole encoding."""
    return b"".join(_item(field) for field in fields)


def digest_over_hashes(label: str, fields: Sequence[Field], hashes: Sequence[bytes]) -> bytes:
    """``digest(label, *fields, *hashes)``, fast for many hashes of 32 bytes.

    Raises:
        TypeError: an entry of `hashes` is not 32 bytes.
    """
    if not all(type(entry) is bytes and len(entry) == 32 for entry in hashes):
        raise TypeError("a hash has 32 bytes")
    tail = _HASH + _HASH.join(hashes) if hashes else b""
    return hashlib.sha256(_DOMAIN + encode(label, *fields) + tail).digest()


def _item(field: Field) -> bytes:
    if type(field) is bytes:  # by far the most frequent kind
        return b"b" + len(field).to_bytes(8, "little") + field
    match field:
        case bool():
            raise TypeError("a bool cannot be told from an integer here; encode it as text")
        case str():
            kind, content = b"s", field.encode()
        case bytes():
            kind, content = b"b", field
        case int():
            size = (field if field >= 0 else ~field).bit_length() // 8 + 1
            kind, content = b"i", field.to_bytes(size, "little", signed=True)
        case _:
            raise TypeError(f"cannot encode {type(field).__name__}; give bytes, int or str")
    return kind + len(content).to_bytes(8, "little") + content
