"""The Merkle log against the reference vectors of Certificate Transparency, and against forgery."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import rfc9162
from shared.errors import ProtocolError

# Entries, roots and proofs of the reference implementation's own tests
# (certificate-transparency, merkletree/merkle_tree_test.cc); RFC 9162 kept RFC 6962's hashing.
ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
_A = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
_B = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
_C = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
_D = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
_E = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
INCLUSION = {  # (entry counted from 1, size)
    (1, 1): [],
    (1, 8): [_A, _B, _C],
    (6, 8): [_D, _E, ROOTS[3]],
    (3, 3): [ROOTS[1]],
    (2, 5): [ROOTS[0], _B, _D],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [_A, _B, _C],
    (6, 8): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a", _E, ROOTS[3]],
    (2, 5): [_B, _D],
}
LEAVES = [rfc9162.leaf_hash(entry) for entry in ENTRIES]


def test_roots_of_the_reference_vectors() -> None:
    found = [rfc9162.root_of(LEAVES[: size + 1]).hex() for size in range(8)]
    assert found == ROOTS
    assert rfc9162.root_of([]).hex() == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


@pytest.mark.parametrize(("place", "proof"), INCLUSION.items())
def test_inclusion_of_the_reference_vectors(place: tuple[int, int], proof: list[str]) -> None:
    number, size = place
    assert [h.hex() for h in rfc9162.inclusion_proof(LEAVES[:size], number - 1)] == proof
    root, path = bytes.fromhex(ROOTS[size - 1]), [bytes.fromhex(h) for h in proof]
    rfc9162.check_inclusion(root, size, number - 1, LEAVES[number - 1], path)


@pytest.mark.parametrize(("place", "proof"), CONSISTENCY.items())
def test_consistency_of_the_reference_vectors(place: tuple[int, int], proof: list[str]) -> None:
    old, size = place
    assert [h.hex() for h in rfc9162.consistency_proof(LEAVES[:size], old)] == proof
    roots = [bytes.fromhex(ROOTS[n - 1]) for n in place]
    path = [bytes.fromhex(h) for h in proof]
    rfc9162.check_consistency(roots[0], old, roots[1], size, path)


def leaves_of(count: int, salt: int = 0) -> list[bytes]:
    return [rfc9162.leaf_hash(bytes([salt, i])) for i in range(count)]


@given(st.data())
def test_every_proof_holds_and_no_other_does(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    index = data.draw(st.integers(0, size - 1))
    leaves = leaves_of(size)
    root, proof = rfc9162.root_of(leaves), rfc9162.inclusion_proof(leaves, index)
    rfc9162.check_inclusion(root, size, index, leaves[index], proof)
    stranger = rfc9162.leaf_hash(b"never logged")
    forgeries = [(root, size, index, stranger, proof)]
    forgeries += [(root, size, i, leaves[index], proof) for i in range(size) if i != index]
    forgeries += [(root, size, index, leaves[index], (*proof, proof[0] if proof else root))]
    forgeries += [(root, size, index, leaves[index], proof[:-1])] if proof else []
    for forged in forgeries:
        with pytest.raises(ProtocolError):
            rfc9162.check_inclusion(*forged)


@given(st.data())
def test_a_log_that_was_cut_or_rewritten_is_found(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 40))
    old = data.draw(st.integers(1, size - 1))
    leaves = leaves_of(size)
    old_root, root = rfc9162.root_of(leaves[:old]), rfc9162.root_of(leaves)
    proof = rfc9162.consistency_proof(leaves, old)
    rfc9162.check_consistency(old_root, old, root, size, proof)
    changed = list(leaves)
    changed[data.draw(st.integers(0, old - 1))] = rfc9162.leaf_hash(b"rewritten")
    other_root = rfc9162.root_of(changed)
    for forged in (
        (old_root, old, other_root, size, rfc9162.consistency_proof(changed, old)),
        (root, size, old_root, old, ()),  # cut
        (old_root, old, root, size, proof[:-1]),
        (old_root, old, root, size, (*proof, root)),
        (other_root, size, root, size, ()),  # two logs of one size
    ):
        with pytest.raises(ProtocolError):
            rfc9162.check_consistency(*forged)


def test_entries_that_do_not_exist() -> None:
    with pytest.raises(ProtocolError, match="does not exist"):
        rfc9162.inclusion_proof(LEAVES, 8)
    with pytest.raises(ProtocolError, match="cannot begin"):
        rfc9162.consistency_proof(LEAVES, 9)
    with pytest.raises(ProtocolError, match="does not exist"):
        rfc9162.check_inclusion(bytes(32), 8, 8, LEAVES[0], ())
    with pytest.raises(ProtocolError, match="hashes of 32"):
        rfc9162.check_inclusion(bytes(32), 8, 1, LEAVES[0], (b"short",) * 3)
