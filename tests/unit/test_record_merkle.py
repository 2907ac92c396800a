"""RFC 6962 trees against known vectors, and against the definition written down naively."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.record import merkle

# The reference vectors of the Certificate Transparency implementations.
INPUTS = [
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
leaves = st.lists(st.binary(max_size=8).map(merkle.leaf_hash), min_size=1, max_size=70)


def naive(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    left, right = naive(hashes[:split]), naive(hashes[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_reference_vectors(size: int) -> None:
    hashes = [merkle.leaf_hash(data) for data in INPUTS[:size]]
    assert merkle.root(hashes).hex() == ROOTS[size - 1]


def test_the_empty_tree() -> None:
    assert merkle.Frontier().root() == merkle.EMPTY_ROOT == naive([])


@given(leaves)
def test_the_frontier_is_the_definition(hashes: list[bytes]) -> None:
    frontier = merkle.Frontier()
    for count, leaf in enumerate(hashes, 1):
        frontier.append(leaf)
        assert frontier.root() == naive(hashes[:count])
    again = merkle.Frontier.unpack(frontier.size, frontier.pack())
    again.append(hashes[0])
    assert again.root() == naive([*hashes, hashes[0]])


def test_a_frontier_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="complete subtrees"):
        merkle.Frontier.unpack(3, bytes(32))


@given(leaves, st.data())
@settings(deadline=None)
def test_inclusion(hashes: list[bytes], data: st.DataObject) -> None:
    size = len(hashes)
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(hashes, index)
    root = naive(hashes)
    assert merkle.verify_inclusion(hashes[index], index, size, proof, root)
    other = merkle.leaf_hash(b"not in any of the trees")
    assert not merkle.verify_inclusion(other, index, size, proof, root)
    assert not merkle.verify_inclusion(hashes[index], size, size, proof, root)
    assert not merkle.verify_inclusion(hashes[index], index, size, [*proof, other], root)
    if proof:
        assert not merkle.verify_inclusion(hashes[index], index, size, proof[:-1], root)
        proof[-1] = other
        assert not merkle.verify_inclusion(hashes[index], index, size, proof, root)


@given(leaves, st.data())
@settings(deadline=None)
def test_consistency(hashes: list[bytes], data: st.DataObject) -> None:
    size = len(hashes)
    old = data.draw(st.integers(1, size))
    proof = merkle.consistency_proof(hashes, old)
    old_root, new_root = naive(hashes[:old]), naive(hashes)
    assert merkle.verify_consistency(old, size, old_root, new_root, proof)
    other = merkle.leaf_hash(b"not in any of the trees")
    assert not merkle.verify_consistency(old, size, other, new_root, proof)
    assert not merkle.verify_consistency(old, size, old_root, other, proof)
    if old < size:
        assert not merkle.verify_consistency(old, size, old_root, new_root, [])
        assert not merkle.verify_consistency(old, size, old_root, new_root, [*proof, other])


def test_proofs_of_what_is_not_there() -> None:
    with pytest.raises(IndexError):
        merkle.inclusion_proof([merkle.leaf_hash(b"")], 1)
    with pytest.raises(IndexError):
        merkle.consistency_proof([merkle.leaf_hash(b"")], 0)
