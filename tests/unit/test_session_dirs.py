"""The directories of sessions: what is removed, and which is whose."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.errors import CallerError
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import save_changes
from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.worker.marks import NO_SNAPSHOT, Mark, Work
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


def two_hosts(tmp_path: Path) -> tuple[SessionDirectories, SessionDirectories]:
    snapshots = WorkspaceStore(BlobStore(DirectoryObjects(tmp_path / "blobs")))
    one, two = (SessionDirectories(tmp_path / name, snapshots) for name in ("one", "two"))
    return one, two


async def test_what_a_lost_attempt_left_does_not_pass_for_the_snapshot(tmp_path: Path) -> None:
    """Its turn went on elsewhere and changed nothing: the snapshot's name is the one of before."""
    one, two = two_hosts(tmp_path)
    here = await one.open("sesn_1", tenant="t", travels=True)
    (here / "a").write_text("1")
    first = await one.save("sesn_1", tenant="t")
    await one.settled("sesn_1", first, 1)
    here = await one.open("sesn_1", tenant="t", reference=first, turn=2)
    (here / "a").write_text("half")
    # of the same turn: what it did stands
    here = await one.open("sesn_1", tenant="t", reference=first, turn=2)
    assert (here / "a").read_text() == "half"
    await two.open("sesn_1", tenant="t", reference=first, turn=2)
    assert await two.save("sesn_1", tenant="t") == first
    here = await one.open("sesn_1", tenant="t", reference=first, turn=3)
    assert (here / "a").read_text() == "1"


async def test_nor_for_an_empty_one_where_there_is_no_snapshot_yet(tmp_path: Path) -> None:
    one, _ = two_hosts(tmp_path)
    here = await one.open("sesn_1", tenant="t", travels=True)
    (here / "a").write_text("half")
    # the turn ended on another host, which could keep no snapshot
    here = await one.open("sesn_1", tenant="t", turn=2, travels=True)
    assert list(here.iterdir()) == []
    # one that stays on its host is its host's alone
    here = await one.open("sesn_2", tenant="t")
    (here / "a").write_text("1")
    here = await one.open("sesn_2", tenant="t", turn=5)
    assert (here / "a").read_text() == "1"


async def test_files_of_a_turn_without_a_snapshot_are_the_next_turns(tmp_path: Path) -> None:
    """Where it ended, and no later: what went on elsewhere has made them another's."""
    places, _ = two_hosts(tmp_path)
    here = await places.open("sesn_1", tenant="t")
    first = await places.save("sesn_1", tenant="t")
    await places.settled("sesn_1", first, 1)
    await places.open("sesn_1", tenant="t", reference=first, turn=2)
    (here / "a").write_text("2")
    assert await places.stands("sesn_1", first, 2) is Work.BEGUN
    await places.settled("sesn_1", None, 2)
    # a turn that was refused
    await places.settled("sesn_1", None, 3)
    assert await places.stands("sesn_1", first, 4) is None
    await places.open("sesn_1", tenant="t", reference=first, turn=4)
    assert (here / "a").read_text() == "2"
    await places.settled("sesn_1", None, 4)
    await places.open("sesn_1", tenant="t", reference=first, turn=6)
    assert list(here.iterdir()) == []


def reviewed(places: Path, here: Path, run: str) -> None:
    """A run in review mode that has made `a`."""
    directory = places / "runs" / run
    directory.mkdir(parents=True)
    made = Change(
        path="a", kind=ChangeKind.ADDED, mode=0o100644, old_mode=0, before=None, after=b"new"
    )
    save_changes(directory / "changes.bin", Changes(items=(made,)), str(here))


async def test_what_a_worker_was_writing_when_it_died_is_written(tmp_path: Path) -> None:
    places, _ = two_hosts(tmp_path)
    here = await places.open("sesn_1", tenant="t")
    reviewed(tmp_path / "one", here, "run_1")
    # it has noted whose changes they are, and written none
    mark = tmp_path / "one" / "workspace-snapshots" / "sesn_1"
    mark.write_bytes(Mark(reference=NO_SNAPSHOT, turn=1, work=Work.KEEPING, run="run_1").encode())
    assert await places.stands("sesn_1", None, 1) is Work.KEEPING
    assert (here / "a").read_text() == "new"
    assert await places.stands("sesn_1", None, 1) is Work.KEEPING
    # another attempt goes on in it: from then on it is begun again
    await places.open("sesn_1", tenant="t")
    assert await places.stands("sesn_1", None, 1) is Work.BEGUN


async def test_what_was_kept_is_known_and_what_could_not_be_is_not_said_to_be(
    tmp_path: Path,
) -> None:
    places, _ = two_hosts(tmp_path)
    here = await places.open("sesn_1", tenant="t")
    reviewed(tmp_path / "one", here, "run_1")
    await places.keep("run_1", "sesn_1")
    assert (here / "a").read_text() == "new"
    assert await places.stands("sesn_1", None, 1) is Work.KEEPING
    other = await places.open("sesn_2", tenant="t")
    (other / "a").write_text("in the way")
    reviewed(tmp_path / "one", other, "run_2")
    with pytest.raises(CallerError):
        await places.keep("run_2", "sesn_2")
    assert await places.stands("sesn_2", None, 1) is Work.BEGUN
    assert (other / "a").read_text() == "in the way"


@pytest.mark.parametrize(
    "mark",
    [
        Mark(reference="r"),
        Mark(reference="r", turn=3, work=Work.OVER),
        Mark(reference=NO_SNAPSHOT, turn=1, work=Work.KEEPING, run="run_1"),
    ],
)
def test_marks_are_read_as_they_are_written(mark: Mark) -> None:
    assert Mark.parse(mark.encode().decode()) == mark


def test_what_is_no_mark_makes_a_directory_anew() -> None:
    assert Mark.parse("r") == Mark(reference="r"), "an earlier version's"
    for text in ("", "r x begun", "r 1 done", "r 1"):
        assert Mark.parse(text) is None
