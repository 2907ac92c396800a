"""A `patch apply` that is killed at any step is taken back by the next one, and by nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import CallerError
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.applying import Journal, recover_all
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import load_changes, save_changes

FILE, RUN = 0o100644, 0o100755


def change(path: str, before: bytes | None, after: bytes | None, mode: int = FILE) -> Change:
    kind = ChangeKind.ADDED if before is None else ChangeKind.DELETED if after is None else ChangeKind.MODIFIED  # fmt: skip
    return Change(
        path=path,
        kind=kind,
        mode=mode if after is not None else 0,
        old_mode=FILE if before is not None else 0,
        before=before,
        after=after,
    )


CHANGES = Changes(
    items=(
        change("a.txt", b"one\n", b"two\n"),
        change("dir/deep/gone.txt", b"x", None),
        change("new/folder/n.sh", None, b"#!\n", RUN),
        change("z.txt", None, b"z"),
    ),
    refused=(("dev/fifo", "a special file"), ("bad\udcff", "too large")),
)


def tree(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode)
        if path.is_file()
        else "directory"
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    place = tmp_path / "workspace"
    (place / "dir" / "deep").mkdir(parents=True)
    (place / "a.txt").write_bytes(b"one\n")
    (place / "dir" / "deep" / "gone.txt").write_bytes(b"x")
    (place / "mine").mkdir()
    return place


def runs(tmp_path: Path) -> tuple[Path, Path]:
    run = tmp_path / "runs" / "run_1"
    run.mkdir(parents=True)
    return run.parent, run / "applying"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_sandbox_applying as t
from ringfence.sandbox import applying, apply
left = {count}
def deadly(name):
    real = getattr(os, name)
    def call(*a, **k):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(os, name, call)
for name in ("rename", "link", "mkdir", "rmdir", "unlink", "write"):
    deadly(name)
apply.apply_changes(Path({workspace!r}), t.CHANGES, include=lambda c: True, journal=Path({journal!r}))
"""


def test_killed_at_any_step_it_is_taken_back_or_done(workspace: Path, tmp_path: Path) -> None:
    state, journal = runs(tmp_path)
    before, taken_back, finished = tree(workspace), 0, False
    for count in range(60):
        code = KILLED.format(
            here=str(Path(__file__).parent),
            count=count,
            workspace=str(workspace),
            journal=str(journal),
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        if done.returncode == 0:
            finished = True
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = recover_all(state)
        assert not journal.exists()
        left = tree(workspace)
        leftover = [name for name in left if name.startswith(".ringfence-")]
        if not found and left != before and not leftover:
            finished = True  # killed after its last step: all of it is there
            break
        taken_back += bool(found)
        # killed between making the directory and saying so: an empty one may stay
        assert {k: v for k, v in left.items() if k not in leftover} == before
        assert all(left[name] == "directory" for name in leftover)
        for name in leftover:
            (workspace / name).rmdir()
    assert finished
    assert taken_back > 8
    assert (workspace / "a.txt").read_bytes() == b"two\n"
    assert (workspace / "new/folder/n.sh").read_bytes() == b"#!\n"
    assert not (workspace / "dir").exists()


def test_an_apply_that_is_under_way_is_left_alone(workspace: Path, tmp_path: Path) -> None:
    state, journal = runs(tmp_path)
    alive = Journal(journal, workspace)
    alive.begin(b".ringfence-" + b"0" * 16)
    assert recover_all(state) == []
    assert journal.exists()
    with pytest.raises(CallerError) as refused:
        apply_changes(workspace, CHANGES, include=lambda _: True, journal=journal)
    assert refused.value.code == "patch-conflict"
    alive.close()
    assert apply_changes(workspace, CHANGES, include=lambda _: True, journal=journal).written
    assert not journal.exists()


def test_a_journal_that_is_not_ours_moves_nothing(workspace: Path, tmp_path: Path) -> None:
    state, journal = runs(tmp_path)
    (workspace / "planted").mkdir()
    (workspace / "planted" / "old-0").write_text("evil")
    before = tree(workspace)
    step = {"act": "restore", "path": "YS50eHQ=", "kept": "old-0", "inode": 0, "mode": 0, "owner": [0, 0]}  # fmt: skip
    for head in ({"workspace": str(workspace), "directory": "planted"}, {"workspace": "/x"}, []):
        journal.write_text(json.dumps(head) + "\n" + json.dumps(step) + "\n")
        assert recover_all(state) == []
        assert tree(workspace) == before
    # what an agent writes into the workspace is never read as a journal
    (workspace / "applying").write_text("{}")
    os.remove(journal)
    assert recover_all(state) == []


def test_what_was_left_out_is_kept_with_the_changes(tmp_path: Path) -> None:
    path = tmp_path / "changes.bin"
    save_changes(path, CHANGES, "/w")
    assert load_changes(path) == (CHANGES, "/w")
    lines = path.read_text().splitlines()
    head = json.loads(lines[0])
    del head["refused"]
    path.write_text("\n".join([json.dumps(head), *lines[1:]]))
    assert load_changes(path)[0] == Changes(items=CHANGES.items)
