"""A Merkle root over the chunks of a vector, so that one chunk can be checked alone.

Leaves, inner nodes and the root are hashed by BLAKE3 in three separate domains, and the root binds
the sizes: no node can be passed off as a leaf, and no vector as one of another length. The tree has
the shape of RFC 9162, section 2.1.1 (the left half is the largest power of two below the whole).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blake3 import blake3

from shared.errors import ProtocolError
from shared.secagg.encoding import encode

HASH_BYTES = 32

_LEAF = "fedward/secagg/1 merkle leaf"
_NODE = "fedward/secagg/1 merkle node"
_ROOT = "fedward/secagg/1 merkle root"

Buffer = bytes | bytearray | memoryview


def chunk_count(size: int, chunk_size: int) -> int:
    """Chunks of `size` bytes: the last may be short; an empty vector has one empty chunk."""
    return max(1, -(-size // chunk_size))


def root(data: Buffer, chunk_size: int) -> bytes:
    """32 bytes that commit to `data`, its size and the chunk size (bytes, >= 1)."""
    return Tree(data, chunk_size).root


class Tree:
    """The hashes over one vector, kept to prove its chunks; the vector itself is not kept."""

    def __init__(self, data: Buffer, chunk_size: int) -> None:
        """Hash `data`, bytes-like, in chunks of `chunk_size` bytes."""
        view = memoryview(data).cast("B")
        self.size = len(view)
        self.chunk_size = chunk_size
        count = chunk_count(self.size, chunk_size)
        leaves = [_leaf(view[i * chunk_size : (i + 1) * chunk_size]) for i in range(count)]
        self._levels = [leaves, *_levels_above(leaves)]
        self.root: bytes = _bind(self._levels[-1][0], self.size, chunk_size)

    def proof(self, index: int) -> tuple[bytes, ...]:
        """The hashes beside the path of chunk `index`, from the leaf up: 32 bytes each."""
        path: list[bytes] = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                path.append(level[index ^ 1])
            index //= 2
        return tuple(path)


def check_chunk(
    expected_root: bytes,
    chunk: Buffer,
    proof: Sequence[bytes],
    *,
    index: int,
    size: int,
    chunk_size: int,
) -> None:
    """Check that `chunk` is number `index` of the vector of `size` bytes behind a root.

    Raises:
        ProtocolError: it is not, or the proof has the wrong form.
    """
    count = chunk_count(size, chunk_size)
    if not 0 <= index < count:
        raise ProtocolError(f"chunk {index} does not exist; the vector has {count} chunks")
    if len(chunk) != min(chunk_size, size - index * chunk_size):
        raise ProtocolError(f"chunk {index} has {len(chunk)} bytes, which is not its length")
    sides = _sides(index, count)
    if len(proof) != len(sides) or any(len(node) != HASH_BYTES for node in proof):
        raise ProtocolError(f"proof of chunk {index} needs {len(sides)} hashes of 32 bytes")
    node = _leaf(memoryview(chunk))
    for sibling, is_left in zip(proof, sides, strict=True):
        node = _node(node, sibling) if is_left else _node(sibling, node)
    if _bind(node, size, chunk_size) != expected_root:
        raise ProtocolError(f"chunk {index} is not part of the vector that was signed")


def _sides(index: int, count: int) -> list[bool]:
    """From the leaf up: whether the path is the left child."""
    sides: list[bool] = []
    while count > 1:
        half = _left_size(count)
        sides.append(index < half)
        if index < half:
            count = half
        else:
            index, count = index - half, count - half
    return sides[::-1]


def _levels_above(nodes: list[bytes]) -> Iterator[list[bytes]]:
    """Pair by pair up to the root; a last one alone moves up as it is: the RFC's shape."""
    while len(nodes) > 1:
        pairs = zip(nodes[::2], nodes[1::2], strict=False)
        odd = nodes[-1:] if len(nodes) % 2 else []
        nodes = [*(_node(left, right) for left, right in pairs), *odd]
        yield nodes


def _left_size(count: int) -> int:
    return 1 << (count - 1).bit_length() - 1


def _leaf(chunk: memoryview) -> bytes:
    return blake3(chunk, derive_key_context=_LEAF).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return blake3(left + right, derive_key_context=_NODE).digest()


def _bind(top: bytes, size: int, chunk_size: int) -> bytes:
    return blake3(encode("merkle", size, chunk_size, top), derive_key_context=_ROOT).digest()
