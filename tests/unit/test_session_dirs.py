"""The directories of sessions: what is removed, and which is whose."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.workspaces import WorkspaceStore

_SET_DUMPABLE = 4


@pytest.fixture
def plain_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a directory of a user whom modes bind, as they do not bind root."""
    monkeypatch.chdir(tmp_path)
    before = os.geteuid()
    if before:
        yield
        return
    os.chown(tmp_path, 65534, -1)
    libc = ctypes.CDLL(None)
    os.seteuid(65534)
    libc.prctl(_SET_DUMPABLE, 1)  # or /proc/self would stay root's
    try:
        yield
    finally:
        os.seteuid(before)
        libc.prctl(_SET_DUMPABLE, 1)


@pytest.mark.usefixtures("plain_user")
async def test_what_an_agent_has_shut_is_removed_and_restored_over() -> None:
    snapshots = WorkspaceStore(BlobStore(DirectoryObjects(Path("blobs"))))
    places = SessionDirectories(Path("state"), snapshots)
    here = await places.open("sesn_1", tenant="t")
    (here / "a").write_text("1")
    reference = await places.save("sesn_1", tenant="t")
    assert reference is not None
    (here / "d").mkdir()
    (here / "d" / "b").write_text("2")
    (here / "d").chmod(0)
    here.chmod(0)
    # not marked: it is made anew
    here = await places.open("sesn_1", tenant="t", reference=reference)
    assert [path.name for path in here.iterdir()] == ["a"]
    assert os.listdir("state/workspaces") == ["sesn_1"]
    (here / "d").mkdir(mode=0)
    await places.remove("sesn_1")
    assert os.listdir("state/workspaces") == []


async def test_drafts_that_nobody_goes_on_with_are_removed(tmp_path: Path) -> None:
    places = SessionDirectories(tmp_path)
    here = await places.open("sesn_1")
    draft = here.with_name(".sesn_1.0123456789abcdef")
    (draft / "d").mkdir(parents=True)
    os.utime(draft, (time.time() - 7200,) * 2)
    assert places.unused(3600) == [draft.name]
    await places.remove(draft.name)
    assert os.listdir(here.parent) == ["sesn_1"]
