"""RFC 6962 Merkle trees: leaf and node hashes, the frontier for appending, proofs. PURE."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(body: bytes) -> bytes:
    """SHA-256(0x00 || body), RFC 6962 section 2.1."""
    return hashlib.sha256(b"\x00" + body).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right), RFC 6962 section 2.1."""
    return hashlib.sha256(b"\x01" + left + right).digest()


EMPTY_ROOT = hashlib.sha256(b"").digest()


class Frontier:
    """The roots of the complete subtrees of a growing tree: all that appending needs."""

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if len(hashes) != size.bit_count():
            raise ValueError("a tree of this size has another number of complete subtrees")
        self.size = size
        self._hashes = list(hashes)

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        node, level = leaf, self.size
        while level & 1:
            node = node_hash(self._hashes.pop(), node)
            level >>= 1
        self._hashes.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Root of the tree so far."""
        if not self._hashes:
            return EMPTY_ROOT
        node = self._hashes[-1]
        for left in reversed(self._hashes[:-1]):
            node = node_hash(left, node)
        return node

    def pack(self) -> bytes:
        """The subtree roots, largest first, 32 bytes each."""
        return b"".join(self._hashes)

    @classmethod
    def unpack(cls, size: int, data: bytes) -> Frontier:
        """The inverse of `pack`."""
        return cls(size, [data[at : at + 32] for at in range(0, len(data), 32)])


def root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes, as RFC 6962 section 2.1 defines MTH."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Audit path of one leaf, RFC 6962 section 2.1.1, lowest first."""
    size = len(leaves)
    if not 0 <= index < size:
        raise IndexError(index)
    if size == 1:
        return []
    split = _split(size)
    if index < split:
        return [*inclusion_proof(leaves[:split], index), root(leaves[split:])]
    return [*inclusion_proof(leaves[split:], index - split), root(leaves[:split])]


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes
) -> bool:
    """RFC 9162 section 2.1.3.2."""
    if not 0 <= index < size:
        return False
    node, last = index, size - 1
    value = leaf
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            value = node_hash(sibling, value)
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            value = node_hash(value, sibling)
        node >>= 1
        last >>= 1
    return last == 0 and value == expected_root


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """Proof that the first `old_size` leaves are a prefix, RFC 6962 section 2.1.2."""
    if not 0 < old_size <= len(leaves):
        raise IndexError(old_size)
    return _subproof(leaves, old_size, complete=True)


def _subproof(leaves: Sequence[bytes], old_size: int, *, complete: bool) -> list[bytes]:
    size = len(leaves)
    if old_size == size:
        return [] if complete else [root(leaves)]
    split = _split(size)
    if old_size <= split:
        return [*_subproof(leaves[:split], old_size, complete=complete), root(leaves[split:])]
    return [
        *_subproof(leaves[split:], old_size - split, complete=False),
        root(leaves[:split]),
    ]


def verify_consistency(
    old_size: int, size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """RFC 9162 section 2.1.4.2."""
    if old_size == size:
        return old_root == new_root and not proof
    if not 0 < old_size < size or not proof:
        return False
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    node, last = old_size - 1, size - 1
    while node & 1:
        node >>= 1
        last >>= 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            new = node_hash(new, sibling)
        node >>= 1
        last >>= 1
    return last == 0 and old == old_root and new == new_root


def _split(size: int) -> int:
    """Largest power of two smaller than `size`."""
    return 1 << ((size - 1).bit_length() - 1)
