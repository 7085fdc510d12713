"""A chunk is accepted at its own place in the vector that was signed, and nowhere else."""

import os

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.secagg import merkle
from shared.secagg.encoding import encode


def chunk(data: bytes, index: int, chunk_size: int) -> bytes:
    return data[index * chunk_size : (index + 1) * chunk_size]


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 40))
def test_every_chunk_is_accepted_in_its_place(data, chunk_size) -> None:
    tree = merkle.Tree(data, chunk_size)
    assert tree.root == merkle.root(data, chunk_size)
    for i in range(merkle.chunk_count(len(data), chunk_size)):
        where = {"index": i, "size": len(data), "chunk_size": chunk_size}
        merkle.check_chunk(tree.root, chunk(data, i, chunk_size), tree.proof(i), **where)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(1, 30), st.data())
def test_an_altered_chunk_proof_place_or_root_is_caught(data, chunk_size, draw) -> None:
    tree = merkle.Tree(data, chunk_size)
    count = merkle.chunk_count(len(data), chunk_size)
    i = draw.draw(st.integers(0, count - 1))
    own, proof = chunk(data, i, chunk_size), tree.proof(i)
    where = {"index": i, "size": len(data), "chunk_size": chunk_size}
    bit = draw.draw(st.integers(0, 8 * len(own) - 1))
    altered = bytearray(own)
    altered[bit // 8] ^= 1 << bit % 8
    wrong = [
        (tree.root, bytes(altered), proof, where),
        (tree.root, own + b"\x00", proof, where),
        (tree.root, own[:-1], proof, where),
        (tree.root, own, (*proof, bytes(32)), where),
        (tree.root, own, proof, where | {"size": len(data) + 1}),
        (tree.root, own, proof, where | {"index": i + 1}),
        (tree.root, own, proof, where | {"index": i - count}),
        (tree.root[:-1] + bytes([tree.root[-1] ^ 1]), own, proof, where),
    ]
    if proof:
        level = draw.draw(st.integers(0, len(proof) - 1))
        forged = (*proof[:level], os.urandom(32), *proof[level + 1 :])
        wrong.append((tree.root, own, forged, where))
        wrong.append((tree.root, own, proof[1:], where))
    for root, part, path, place in wrong:
        if place["index"] == i + 1 and i + 1 < count and chunk(data, i + 1, chunk_size) == own:
            continue  # equal neighbours of a repetitive vector
        with pytest.raises(ProtocolError):
            merkle.check_chunk(root, part, path, **place)


def test_two_chunks_that_change_places_give_another_root() -> None:
    assert merkle.root(b"aabb", 2) != merkle.root(b"bbaa", 2)


def test_the_sizes_are_bound_into_the_root() -> None:
    roots = {merkle.root(bytes(n), size) for n in range(5) for size in range(1, 5)}
    assert len(roots) == 20


def test_an_inner_node_cannot_pass_for_a_chunk() -> None:
    left, right = os.urandom(64), os.urandom(64)
    tree = merkle.Tree(left + right, 64)
    children = tree.proof(1)[0] + tree.proof(0)[0]
    assert merkle.Tree(children, 64).root != tree.root
    with pytest.raises(ProtocolError):
        merkle.check_chunk(tree.root, children, (), index=0, size=128, chunk_size=128)


@pytest.mark.parametrize(
    ("size", "chunk_size", "count"), [(0, 4, 1), (1, 4, 1), (8, 4, 2), (9, 4, 3)]
)
def test_chunks_are_counted(size, chunk_size, count) -> None:
    assert merkle.chunk_count(size, chunk_size) == count


def test_the_root_is_the_documented_tree() -> None:
    def in_domain(name: str, content: bytes) -> bytes:
        return blake3(content, derive_key_context=f"fedward/secagg/1 merkle {name}").digest()

    first, second, third = (in_domain("leaf", part) for part in (b"abcd", b"efgh", b"ij"))
    top = in_domain("node", in_domain("node", first + second) + third)
    assert merkle.root(b"abcdefghij", 4) == in_domain("root", encode("merkle", 10, 4, top))
