"""One frozen dataclass per message <-> bytes: versioned, length-checked, exact.

A message class is a frozen dataclass whose fields are annotated with a field kind, and which
`@message(tag)` registers:

    @message(0x7001)
    @dataclass(frozen=True, slots=True)
    class Greeting:
        sender: Annotated[str, Text()]
        body: Annotated[bytes, Blob(1024)]

`encode` and `decode` are inverse to each other: one value has one encoding, and bytes that
`encode` would not have written are refused (unsorted map keys, a flag of 2, trailing bytes).
So a hash of the bytes is a hash of the message. Nothing here executes what it reads.

Wire: "FW", PROTOCOL_VERSION (u16), tag (u16), then the fields in the order of the class, all
integers little endian; what has no fixed length is preceded by its length or count as u32.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from shared.errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 2**32 - 1
MAX_NAME_BYTES = 64

_MAGIC = b"FW"
_HEADER = struct.Struct("<2sHH")
_COUNT = struct.Struct("<I")
_registry: dict[int, type] = {}
_tags: dict[type, int] = {}
_layouts: dict[type, tuple[tuple[str, str, Kind], ...]] = {}

T = TypeVar("T")


class Kind(Protocol):
    """How one field travels; `where` names message and field for the error."""

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append the bytes of `value` to `out`, or raise ProtocolError."""

    def read(self, data: memoryview, at: int, where: str) -> tuple[Any, int]:
        """Return the value that starts at `at` and the position behind it, or raise."""


def _fail(where: str, fact: str) -> ProtocolError:
    return ProtocolError(f"{where} {fact}")


def _need(data: memoryview, at: int, size: int, where: str) -> int:
    end = at + size
    if end > len(data):
        raise _fail(where, f"is cut short: {size} bytes expected, {len(data) - at} left")
    return end


def _read_count(data: memoryview, at: int, limit: int, where: str) -> tuple[int, int]:
    end = _need(data, at, 4, where)
    (count,) = _COUNT.unpack_from(data, at)
    if count > limit:
        raise _fail(where, f"has {count} entries or bytes; the limit is {limit}")
    return count, end


@dataclasses.dataclass(frozen=True, slots=True)
class Unsigned:
    """An unsigned integer of 1, 2, 4 or 8 bytes."""

    size: int

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append `value`, which must be an int in [0, 256**size)."""
        if type(value) is not int or not 0 <= value < 1 << 8 * self.size:
            raise _fail(where, f"must be an integer of {8 * self.size} bits without sign")
        out.append(value.to_bytes(self.size, "little"))

    def read(self, data: memoryview, at: int, where: str) -> tuple[int, int]:
        """Read `size` bytes."""
        end = _need(data, at, self.size, where)
        return int.from_bytes(data[at:end], "little"), end


U8 = Unsigned(1)
U16 = Unsigned(2)
U32 = Unsigned(4)
U64 = Unsigned(8)


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """A truth value, one byte, 0 or 1."""

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append one byte."""
        if type(value) is not bool:
            raise _fail(where, "must be true or false")
        out.append(b"\x01" if value else b"\x00")

    def read(self, data: memoryview, at: int, where: str) -> tuple[bool, int]:
        """Read one byte; anything but 0 and 1 is refused."""
        end = _need(data, at, 1, where)
        if data[at] > 1:
            raise _fail(where, f"must be 0 or 1, is {data[at]}")
        return data[at] == 1, end


@dataclasses.dataclass(frozen=True, slots=True)
class Real:
    """A finite float64."""

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append eight bytes; not-a-number and infinity are refused."""
        if type(value) is not float or not math.isfinite(value):
            raise _fail(where, "must be a finite float")
        out.append(struct.pack("<d", value))

    def read(self, data: memoryview, at: int, where: str) -> tuple[float, int]:
        """Read eight bytes; not-a-number and infinity are refused."""
        end = _need(data, at, 8, where)
        (value,) = struct.unpack_from("<d", data, at)
        if not math.isfinite(value):
            raise _fail(where, "is not finite")
        return float(value), end


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """Bytes of one known length: hashes, keys, signatures."""

    size: int

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append the bytes as they are."""
        if type(value) is not bytes or len(value) != self.size:
            raise _fail(where, f"must be {self.size} bytes")
        out.append(value)

    def fits(self, values: tuple[Any, ...]) -> bool:
        """Whether `write` would take every one of these."""
        size = self.size
        return all(type(value) is bytes and len(value) == size for value in values)

    def read(self, data: memoryview, at: int, where: str) -> tuple[bytes, int]:
        """Read `size` bytes."""
        end = _need(data, at, self.size, where)
        return bytes(data[at:end]), end


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of any length up to `limit`; a view of bytes is written without a copy of it."""

    limit: int = MAX_MESSAGE_BYTES

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append length and bytes."""
        if type(value) is not bytes and not _is_view(value):
            raise _fail(where, "must be bytes")
        if len(value) > self.limit:
            raise _fail(where, f"has {len(value)} bytes; the limit is {self.limit}")
        out.append(_COUNT.pack(len(value)))
        out.append(value)

    def read(self, data: memoryview, at: int, where: str) -> tuple[bytes, int]:
        """Read length and bytes."""
        size, at = _read_count(data, at, self.limit, where)
        end = _need(data, at, size, where)
        return bytes(data[at:end]), end


def _is_view(value: Any) -> bool:
    return type(value) is memoryview and value.format == "B" and value.c_contiguous


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """UTF-8 text of up to `limit` bytes, without control characters."""

    limit: int = MAX_NAME_BYTES

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append length and text."""
        if type(value) is not str:
            raise _fail(where, "must be text")
        try:
            raw = value.encode("utf-8")
        except UnicodeEncodeError:
            raise _fail(where, "must be text that UTF-8 can hold") from None
        self._check(value, len(raw), where)
        out.append(_COUNT.pack(len(raw)))
        out.append(raw)

    def read(self, data: memoryview, at: int, where: str) -> tuple[str, int]:
        """Read length and text."""
        size, at = _read_count(data, at, self.limit, where)
        end = _need(data, at, size, where)
        try:
            value = str(data[at:end], "utf-8")
        except UnicodeDecodeError:
            raise _fail(where, "is not UTF-8") from None
        self._check(value, size, where)
        return value, end

    def _check(self, value: str, size: int, where: str) -> None:
        if size > self.limit:
            raise _fail(where, f"has {size} bytes; the limit is {self.limit}")
        # An error text or a log line must not be forged by a line break inside a name.
        if not value.isascii() or not value.isprintable():
            for character in value:
                if not character.isprintable():
                    raise _fail(where, "holds a control character")


@dataclasses.dataclass(frozen=True, slots=True)
class Many:
    """A tuple of up to `limit` values of one kind."""

    item: Kind
    limit: int = 65_535

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append count and items."""
        if type(value) is not tuple or len(value) > self.limit:
            raise _fail(where, f"must be a tuple of at most {self.limit}")
        out.append(_COUNT.pack(len(value)))
        if isinstance(self.item, Fixed) and self.item.fits(value):
            out.extend(value)
            return
        for entry in value:
            self.item.write(out, entry, where)

    def read(self, data: memoryview, at: int, where: str) -> tuple[tuple[Any, ...], int]:
        """Read count and items."""
        count, at = _read_count(data, at, self.limit, where)
        if isinstance(self.item, Fixed):
            size = self.item.size
            end = _need(data, at, count * size, where)
            raw = bytes(data[at:end])
            return tuple(raw[i : i + size] for i in range(0, len(raw), size)), end
        values = []
        for _ in range(count):
            value, at = self.item.read(data, at, where)
            values.append(value)
        return tuple(values), at


@dataclasses.dataclass(frozen=True, slots=True)
class ByName:
    """A mapping of names to values of one kind; it travels in the order of the names."""

    item: Kind
    limit: int = 65_535
    name: ClassVar[Text] = Text()

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append count, then name and value, sorted by name."""
        if not isinstance(value, Mapping) or len(value) > self.limit:
            raise _fail(where, f"must be a mapping of at most {self.limit}")
        out.append(_COUNT.pack(len(value)))
        for key in sorted(value):
            self.name.write(out, key, where)
            self.item.write(out, value[key], where)

    def read(self, data: memoryview, at: int, where: str) -> tuple[dict[str, Any], int]:
        """Read count and pairs; names must rise strictly."""
        count, at = _read_count(data, at, self.limit, where)
        values: dict[str, Any] = {}
        last: str | None = None
        for _ in range(count):
            key, at = self.name.read(data, at, where)
            if last is not None and key <= last:
                raise _fail(where, "has names twice or out of order")
            values[key], at = self.item.read(data, at, where)
            last = key
        return values, at


@dataclasses.dataclass(frozen=True, slots=True)
class Maybe:
    """A value of one kind, or None."""

    item: Kind

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append a flag, and the value where there is one."""
        out.append(b"\x00" if value is None else b"\x01")
        if value is not None:
            self.item.write(out, value, where)

    def read(self, data: memoryview, at: int, where: str) -> tuple[Any, int]:
        """Read a flag, and the value where there is one."""
        present, at = Flag().read(data, at, where)
        return self.item.read(data, at, where) if present else (None, at)


@dataclasses.dataclass(frozen=True, slots=True)
class Nested:
    """A dataclass inside a message; it needs no tag of its own."""

    of: type

    def write(self, out: list[bytes], value: Any, where: str) -> None:
        """Append the fields of `value`."""
        if type(value) is not self.of:
            raise _fail(where, f"must be a {self.of.__name__}")
        for name, label, kind in _fields(self.of):
            kind.write(out, getattr(value, name), label)

    def read(self, data: memoryview, at: int, where: str) -> tuple[Any, int]:
        """Read the fields in order."""
        values = []
        for _, label, kind in _fields(self.of):
            value, at = kind.read(data, at, label)
            values.append(value)
        return self.of(*values), at


def _fields(cls: type[Any]) -> tuple[tuple[str, str, Kind], ...]:
    known = _layouts.get(cls)
    if known is None:
        known = _layouts[cls] = _layout(cls)
    return known


def _layout(cls: type[Any]) -> tuple[tuple[str, str, Kind], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = []
    for field in dataclasses.fields(cls):
        kinds: tuple[Any, ...] = getattr(hints[field.name], "__metadata__", ())
        if len(kinds) != 1:
            raise TypeError(f"{cls.__name__}.{field.name} needs exactly one field kind")
        fields.append((field.name, f"{cls.__name__}.{field.name}", kinds[0]))
    return tuple(fields)


def message(tag: int) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as the message with this tag (u16, one class each)."""

    def register(cls: type[T]) -> type[T]:
        if tag in _registry and _registry[tag].__qualname__ != cls.__qualname__:
            raise TypeError(f"tag {tag:#06x} is taken by {_registry[tag].__name__}")
        _registry[tag] = cls
        _tags[cls] = tag
        return cls

    return register


def encode(value: object) -> bytes:
    """Turn a registered message into its one encoding.

    Raises:
        ProtocolError: a field holds what its kind does not allow; message and field are named.
    """
    cls = type(value)
    out = [_HEADER.pack(_MAGIC, PROTOCOL_VERSION, _tags[cls])]
    for name, label, kind in _fields(cls):
        kind.write(out, getattr(value, name), label)
    return b"".join(out)


def decode(cls: type[T], data: bytes) -> T:
    """Read a message of the class that is expected here; anything else is refused.

    Args:
        cls: The registered message class; the caller knows which message is due.
        data: All of the message's bytes, from the other side and not trusted.

    Raises:
        ProtocolError: not this message or this version, cut short, too long, or a field out of
            its limits; message and field are named, the caller adds who sent it.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise _fail(cls.__name__, f"is cut short: {len(view)} bytes")
    magic, version, tag = _HEADER.unpack_from(view, 0)
    if magic != _MAGIC:
        raise _fail(cls.__name__, "does not start as a Fedward message does")
    if version != PROTOCOL_VERSION:
        raise _fail(
            cls.__name__,
            f"has protocol version {version}; this site speaks {PROTOCOL_VERSION}. "
            "Install the same fedward version on both sides.",
        )
    if tag != _tags[cls]:
        other = _registry[tag].__name__ if tag in _registry else f"tag {tag:#06x}"
        raise _fail(cls.__name__, f"was expected, {other} came")
    value, end = Nested(cls).read(view, _HEADER.size, cls.__name__)
    if end != len(view):
        raise _fail(cls.__name__, f"has {len(view) - end} bytes too many")
    return typing.cast(T, value)


def kind_of(data: bytes) -> type[Any]:
    """The class of the message that `data` claims to be; ProtocolError when there is none."""
    if len(data) < _HEADER.size:
        raise _fail("a message", f"is cut short: {len(data)} bytes")
    tag = _HEADER.unpack_from(data, 0)[2]
    if tag not in _registry:
        raise _fail("a message", f"has the unknown tag {tag:#06x}")
    return _registry[tag]
