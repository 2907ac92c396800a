"""Workspaces kept in a blob store and made anew: hostile trees, damage, tenants, collection."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import AgentError, CallerError, RingfenceError, UnavailableError
from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.worker.snapshot import MAX_PATH_BYTES, Blob, Entry, Manifest, encode, reference_of
from ringfence.worker.workspaces import SnapshotLimits, WorkspaceStore

WHOSE: dict[str, str] = {"tenant": "tenant_a", "session": "sess_1"}


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(DirectoryObjects(tmp_path / "blobs"))


@pytest.fixture
def store(blobs: BlobStore) -> WorkspaceStore:
    return WorkspaceStore(blobs)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "src" / "empty").mkdir(parents=True)
    (root / "src" / "run").write_bytes(b"#!/bin/sh\n")
    (root / "src" / "run").chmod(0o755)
    (root / "big").write_bytes(os.urandom(9 << 20))
    (root / "link").symlink_to("/etc/passwd")
    (root / "away").symlink_to("..", target_is_directory=True)
    os.utime(root / "src" / "run", ns=(1_700_000_000_123_456_789,) * 2)
    return root


def save(store: WorkspaceStore, tree: Path, **whose: str) -> str:
    return asyncio.run(store.save(tree, **{**WHOSE, **whose}))


def restore(store: WorkspaceStore, reference: str, place: Path, **more: Any) -> None:
    asyncio.run(store.restore(reference, place, **{**WHOSE, **more}))


def shape(root: Path) -> dict[bytes, object]:
    """All that a snapshot keeps, seen by other means."""
    found: dict[bytes, object] = {}
    top = os.fsencode(root)
    for place, directories, names in os.walk(top):
        for name in directories + names:
            path = os.path.join(place, name)
            status = os.lstat(path)
            key, mode = os.path.relpath(path, top), status.st_mode & 0o777
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("l", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                found[key] = ("d", mode)
            else:
                with open(path, "rb") as file:
                    found[key] = ("f", mode, status.st_mtime_ns, file.read())
    return found


def files_of(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_tree_comes_back_and_has_one_reference(
    store: WorkspaceStore, tree: Path, tmp_path: Path
) -> None:
    reference = save(store, tree)
    stored = {path: path.stat().st_ino for path in files_of(tmp_path / "blobs")}
    assert save(store, tree) == reference
    restore(store, reference, tmp_path / "again")
    assert shape(tmp_path / "again") == shape(tree)
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o700
    assert save(store, tmp_path / "again") == reference
    now = {path: path.stat().st_ino for path in files_of(tmp_path / "blobs")}
    assert now == stored, "what was kept was written again"
    assert {path.stat().st_mode & 0o777 for path in now} == {0o600}


_NAME = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
_LEAF = st.one_of(
    st.tuples(st.just("f"), st.binary(max_size=60), st.sampled_from([0o644, 0o755, 0o400, 0])),
    st.tuples(st.just("l"), _NAME | st.sampled_from([b"/", b"../..", b"."]), st.just(0)),
)
_TREE = st.recursive(
    st.dictionaries(_NAME, _LEAF, max_size=4),
    lambda inner: st.dictionaries(_NAME, _LEAF | inner, max_size=4),
    max_leaves=10,
)


def plant(root: bytes, tree: dict[bytes, Any]) -> None:
    os.mkdir(root)
    for name, what in tree.items():
        path = os.path.join(root, name)
        if isinstance(what, dict):
            plant(path, what)
        elif what[0] == "l":
            os.symlink(what[1], path)
        else:
            with open(path, "wb") as file:
                file.write(what[1])
            os.chmod(path, what[2] if os.geteuid() == 0 else what[2] | 0o400)


@given(tree=_TREE)
@settings(max_examples=40)
def test_any_tree_is_the_same_after_it_was_restored(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[bytes, Any]
) -> None:
    place = tmp_path_factory.mktemp("property")
    store = WorkspaceStore(BlobStore(DirectoryObjects(place / "blobs")))
    plant(os.fsencode(place / "tree"), tree)
    reference = save(store, place / "tree")
    restore(store, reference, place / "again")
    assert shape(place / "again") == shape(place / "tree")
    assert save(store, place / "again") == reference
    shutil.rmtree(place)


def test_what_is_no_file_is_left_out_and_modes_lose_what_is_dangerous(
    store: WorkspaceStore, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(tree / "fifo")
    (tree / "suid").write_bytes(b"x")
    (tree / "suid").chmod(0o6755)
    (tree / "sticky").mkdir()
    (tree / "sticky").chmod(0o3777)
    (tree / "one").write_bytes(b"1")
    os.link(tree / "one", tree / "two")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
        if os.geteuid() == 0:
            os.mknod(tree / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        restore(store, save(store, tree), tmp_path / "again")
    found = {path.name: path.lstat() for path in (tmp_path / "again").iterdir()}
    assert set(found) == {"suid", "sticky", "one", "two"}
    assert stat.S_IMODE(found["suid"].st_mode) == 0o755
    assert stat.S_IMODE(found["sticky"].st_mode) == 0o777
    assert found["one"].st_nlink == 1


@pytest.mark.parametrize("what", ["bytes", "sparse", "entries", "path", "depth"])
def test_limits(blobs: BlobStore, tmp_path: Path, what: str) -> None:
    store = WorkspaceStore(blobs, SnapshotLimits(max_bytes=1 << 20, max_entries=300))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(b"x" * (1 << 20))
    save(store, tree)  # the allowed twin
    if what == "bytes":
        (tree / "more").write_bytes(b"x")
    elif what == "sparse":
        with (tree / "sparse").open("wb") as file:
            file.truncate(1 << 42)
    elif what == "entries":
        for number in range(300):
            (tree / f"{number}").touch()
    else:
        here = os.open(tree, os.O_RDONLY)
        name = "d" * 250 if what == "path" else "d"
        for _ in range(MAX_PATH_BYTES // 250 + 1 if what == "path" else 270):
            os.mkdir(name, dir_fd=here)
            below = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    with pytest.raises(AgentError) as caught:
        save(store, tree)
    assert caught.value.code == "snapshot-refused"


def test_a_workspace_that_goes_on_changing_is_refused(
    store: WorkspaceStore, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    file = tree / "log"
    file.write_bytes(b"x" * (24 << 20))
    stop = threading.Event()

    def scribble() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            os.utime(file, ns=(number, number))

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        with pytest.raises(UnavailableError) as caught:
            save(store, tree)
    finally:
        stop.set()
        writer.join()
    assert caught.value.code == "snapshot-unsteady"
    save(store, tree)


def test_a_swap_while_it_is_read_leads_nowhere(
    store: WorkspaceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that becomes a link between the look and the opening; the race is made certain."""
    from ringfence.worker import workspaces

    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "secret").write_bytes(b"SECRET")
    (tree / "file").write_bytes(b"public")
    seen, real = [], workspaces.walk

    def swapping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for path, status in real(*arguments, **options):
            if path == b"file" and not seen:
                seen.append(path)
                (tree / "file").unlink()
                (tree / "file").symlink_to(tmp_path / "secret")
            yield path, status

    monkeypatch.setattr(workspaces, "walk", swapping)
    restore(store, save(store, tree), tmp_path / "again")
    assert seen
    assert os.readlink(tmp_path / "again" / "file") == str(tmp_path / "secret")


@pytest.mark.user
def test_what_its_owner_has_shut_is_kept_and_shut_again(
    store: WorkspaceStore, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "shut").mkdir(parents=True)
    (tree / "shut" / "file").write_bytes(b"x")
    (tree / "shut" / "file").chmod(0)
    (tree / "shut").chmod(0o100)
    reference = save(store, tree)
    assert (tree / "shut").stat().st_mode & 0o777 == 0o100
    restore(store, reference, tmp_path / "again")
    assert (tmp_path / "again" / "shut").stat().st_mode & 0o777 == 0o100
    assert save(store, tmp_path / "again") == reference


@pytest.mark.root
def test_it_belongs_to_whom_it_is_made_for(
    store: WorkspaceStore, tree: Path, tmp_path: Path
) -> None:
    restore(store, save(store, tree), tmp_path / "again", owner=65_534)
    paths = [tmp_path / "again", *(tmp_path / "again").rglob("*")]
    assert {path.lstat().st_uid for path in paths} == {65_534}


@pytest.mark.parametrize("how", ["missing", "flipped", "cut", "bomb", "another"])
def test_damage_is_an_error_and_no_half_workspace(
    store: WorkspaceStore, tree: Path, tmp_path: Path, how: str
) -> None:
    import zstandard

    reference = save(store, tree)
    manifest = reference.split(".")[1]
    victims = [path for path in files_of(tmp_path / "blobs") if path.name != manifest]
    victim = max(victims, key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    if how == "missing":
        victim.unlink()
    elif how == "flipped":
        victim.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif how == "cut":
        victim.write_bytes(whole[: len(whole) // 2])
    elif how == "bomb":
        victim.write_bytes(zstandard.compress(b"\0" * (1 << 28)))
    else:
        victim.write_bytes(zstandard.compress(b"x" * (4 << 20)))
    with pytest.raises(UnavailableError) as caught:
        restore(store, reference, tmp_path / "again")
    assert caught.value.code == ("blob-missing" if how == "missing" else "blob-damaged")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name]
    if how == "missing":  # and is mended by the next save
        assert save(store, tree) == reference
        restore(store, reference, tmp_path / "again")


def test_a_manifest_that_lies_restores_nothing(
    blobs: BlobStore, store: WorkspaceStore, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    digest = blobs.put("tenant_a", b"x")
    for entries in (
        (Entry(b"../outside/file", "f", 0o644, 0, 1),),
        (Entry(b"out", "l", target=b"../outside"), Entry(b"out/file", "f", 0o644, 0, 1)),
        (Entry(b"suid", "f", 0o4755, 0, 1),),
    ):
        data = encode(Manifest(entries, (Blob(digest, 1),)))
        reference = reference_of(blobs.put("tenant_a", data), len(data))
        with pytest.raises(UnavailableError) as caught:
            restore(store, reference, tmp_path / "again")
        assert caught.value.code == "blob-damaged"
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_place_that_is_taken(store: WorkspaceStore, tree: Path, tmp_path: Path) -> None:
    reference = save(store, tree)
    (tmp_path / "empty").mkdir()
    restore(store, reference, tmp_path / "empty")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        before = shape(tmp_path)
        with pytest.raises(CallerError):
            restore(store, reference, tmp_path / name)
        assert shape(tmp_path) == before


def test_another_tenants_reference_restores_nothing(
    store: WorkspaceStore, tree: Path, tmp_path: Path
) -> None:
    reference = save(store, tree)
    for tenant in ("tenant_b", "tenant"):
        with pytest.raises(CallerError) as caught:
            restore(store, reference, tmp_path / "again", tenant=tenant)
        assert caught.value.code == "snapshot-unknown"
    for tenant in ("", "../tenant_a", "tenant_a/..", "a b"):
        with pytest.raises(CallerError) as caught:
            restore(store, reference, tmp_path / "again", tenant=tenant)
        assert caught.value.code == "usage"
    assert not (tmp_path / "again").exists()
    restore(store, reference, tmp_path / "again", session="sess_2")


def test_collection_keeps_what_references_need(
    store: WorkspaceStore, tree: Path, tmp_path: Path
) -> None:
    def collect(*references: str, tenant: str = "tenant_a", grace: float = 0) -> int:
        return asyncio.run(store.collect(tenant, references, grace_seconds=grace))

    first = save(store, tree)
    other = save(store, tree, tenant="tenant_b")
    (tree / "big").write_bytes(b"much smaller")
    second = save(store, tree)
    assert collect(second, grace=3600) == 0, "what is young may have no reference yet"
    assert collect(first, second) == 0
    assert collect(second) >= 3
    with pytest.raises(CallerError):
        restore(store, first, tmp_path / "first")
    restore(store, second, tmp_path / "second")
    restore(store, other, tmp_path / "other", tenant="tenant_b")
    with pytest.raises(RingfenceError):
        collect(first, second)  # what a missing manifest needs is not known
    restore(store, second, tmp_path / "third")
    assert collect() >= 2
    assert collect(other, tenant="tenant_b") == 0


def test_a_blob_that_the_next_collection_could_take_is_written_again(
    store: WorkspaceStore, tree: Path, tmp_path: Path
) -> None:
    reference = save(store, tree)
    for path in files_of(tmp_path / "blobs"):
        os.utime(path, (1, 1))
    assert save(store, tree) == reference
    assert asyncio.run(store.collect("tenant_a", [], grace_seconds=3600)) == 0


def test_a_place_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs").chmod(0o777)
    with pytest.raises(UnavailableError) as caught:
        DirectoryObjects(tmp_path / "blobs")
    assert caught.value.code == "store-unavailable"


def test_who_is_cancelled_leaves_nothing(store: WorkspaceStore, tree: Path, tmp_path: Path) -> None:
    (tree / "big").write_bytes(os.urandom(48 << 20))
    reference = save(store, tree)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await store.restore(reference, tmp_path / "again", **WHOSE)
        assert not [path for path in tmp_path.iterdir() if "again" in path.name]

    asyncio.run(give_up())
    restore(store, reference, tmp_path / "again")
