"""A Merkle log as RFC 9162 defines it: roots, inclusion proofs, consistency proofs.

One signed root over n entries lets anyone show later that an entry is among them (inclusion), and
that a longer log still begins with the same n entries (consistency), without the other entries.
SHA-256; entries and inner nodes are hashed in separate domains.

Source: RFC 9162, "Certificate Transparency Version 2.0", sections 2.1.1 to 2.1.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from shared.errors import ProtocolError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(entry: bytes) -> bytes:
    """Hash of one entry, 32 bytes."""
    return hashlib.sha256(b"\x00" + entry).digest()


def root_of(leaves: Sequence[bytes]) -> bytes:
    """MTH: the root over leaf hashes, in order; of an empty log the hash of nothing.

    >>> root_of([leaf_hash(b"")]).hex()[:16]
    '6e340b9cffb37a98'
    """
    if len(leaves) <= 1:
        return leaves[0] if leaves else EMPTY_ROOT
    split = _split(len(leaves))
    return _node(root_of(leaves[:split]), root_of(leaves[split:]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """PATH: hashes that lead from leaf `index` (0-based) to the root, from the leaf up."""
    if not 0 <= index < len(leaves):
        raise ProtocolError(f"entry {index} does not exist; the log has {len(leaves)}")
    if len(leaves) == 1:
        return ()
    split = _split(len(leaves))
    if index < split:
        return (*inclusion_proof(leaves[:split], index), root_of(leaves[split:]))
    return (*inclusion_proof(leaves[split:], index - split), root_of(leaves[:split]))


def consistency_proof(leaves: Sequence[bytes], size: int) -> tuple[bytes, ...]:
    """PROOF: hashes that show that the log still begins with its first `size` entries."""
    if not 0 < size <= len(leaves):
        raise ProtocolError(f"{size} entries cannot begin a log of {len(leaves)}")
    return _subproof(leaves, size, whole=True)


def check_inclusion(
    root: bytes, size: int, index: int, leaf: bytes, proof: Sequence[bytes]
) -> None:
    """Check that `leaf` is number `index` of the log of `size` entries behind `root`.

    Raises:
        ProtocolError: it is not, or the proof has the wrong form.
    """
    if not 0 <= index < size:
        raise ProtocolError(f"entry {index} does not exist; the log has {size}")
    inner, last, node = index, size - 1, leaf
    for sibling in _hashes(proof):
        if last == 0:
            raise ProtocolError("the proof of inclusion has hashes too many")
        if inner & 1 or inner == last:
            node = _node(sibling, node)
            while not inner & 1 and inner:
                inner, last = inner >> 1, last >> 1
        else:
            node = _node(node, sibling)
        inner, last = inner >> 1, last >> 1
    if last or node != root:
        raise ProtocolError(f"entry {index} is not in the log behind this root")


def check_consistency(
    old_root: bytes, old_size: int, root: bytes, size: int, proof: Sequence[bytes]
) -> None:
    """Check that the log behind `root` begins with the log behind `old_root`.

    Raises:
        ProtocolError: it does not: entries were changed, removed or moved; or a bad proof.
    """
    bad = ProtocolError(
        f"the log of {size} entries does not begin with the {old_size} entries seen before: it "
        "was cut or rewritten, or two logs were shown"
    )
    if not 0 < old_size <= size:
        raise bad
    if old_size == size:
        if old_root != root or proof:
            raise bad
        return
    path = list(_hashes(proof))
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        raise bad
    inner, last = old_size - 1, size - 1
    while inner & 1:
        inner, last = inner >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise bad
        if inner & 1 or inner == last:
            old, new = _node(sibling, old), _node(sibling, new)
            while not inner & 1 and inner:
                inner, last = inner >> 1, last >> 1
        else:
            new = _node(new, sibling)
        inner, last = inner >> 1, last >> 1
    if last or old != old_root or new != root:
        raise bad


def _subproof(leaves: Sequence[bytes], size: int, *, whole: bool) -> tuple[bytes, ...]:
    if size == len(leaves):
        return () if whole else (root_of(leaves),)
    split = _split(len(leaves))
    if size <= split:
        return (*_subproof(leaves[:split], size, whole=whole), root_of(leaves[split:]))
    return (*_subproof(leaves[split:], size - split, whole=False), root_of(leaves[:split]))


def _hashes(proof: Sequence[bytes]) -> Sequence[bytes]:
    if any(len(entry) != HASH_BYTES for entry in proof):
        raise ProtocolError(f"a proof is a list of hashes of {HASH_BYTES} bytes")
    return proof


def _split(count: int) -> int:
    return 1 << (count - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
