"""A run's changes: as a patch, on the host's workspace, on disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.sandbox import replace
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.linediff import Work
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.patch import render, summary
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import load_changes, save_changes

PLAIN, PROGRAM, LINK = 0o100644, 0o100755, 0o120000

NAMES = st.sampled_from(
    [
        "a",
        "b/c",
        "sp ace",
        'q"uote',
        "new\nline",
        "uml\u00e4ut",
        "esc\x1b",
        "tab\t",
        "back\\slash",
        "d/e/f",
        "b",
        "d/e",
        "d",
    ]
)
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from([b"one", b"two", b"", b"three\r", b"--- x", b"+y"]), max_size=12).map(
        b"\n".join
    ),
    st.lists(st.sampled_from([b"one\n", b"two\n", b"x\n"]), max_size=40).map(b"".join),
)
SIDE = st.one_of(
    st.none(),
    st.tuples(st.sampled_from([0o100644, 0o100755]), CONTENT),
    st.tuples(st.just(0o120000), st.just(b"target")),
)


def _changes(tree: dict[str, tuple[object, object]]) -> Changes:
    items = []
    for path, (before, after) in sorted(tree.items()):
        if before == after:
            continue
        kind = (
            ChangeKind.ADDED
            if before is None
            else ChangeKind.DELETED
            if after is None
            else ChangeKind.MODIFIED
        )
        items.append(
            Change(path=path, kind=kind, mode=after[0] if after else 0, old_mode=before[0] if before else 0,
                   before=before[1] if before else None, after=after[1] if after else None)
        )  # fmt: skip
    return Changes(items=tuple(items))


def _write(root: Path, tree: dict[str, object]) -> None:
    for path, side in tree.items():
        if side is None:
            continue
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if side[0] == 0o120000:
            target.symlink_to(side[1].decode())
        else:
            target.write_bytes(side[1])
            target.chmod(side[0] & 0o777)


def _read(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if name.split("/")[0] == ".git" or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            found[name] = (0o120000, os.readlink(path).encode())
        else:
            found[name] = (0o100755 if path.stat().st_mode & 0o100 else 0o100644, path.read_bytes())
    return found


def _disjoint(paths: dict[str, object]) -> dict[str, object]:
    """Without those that would need another one to be a file and a directory at once."""
    kept: dict[str, object] = {}
    for path, side in sorted(paths.items()):
        if side is not None and not any(path.startswith(other + "/") for other in kept):
            kept[path] = side
    return kept


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(NAMES, st.tuples(SIDE, SIDE), max_size=5))
def test_git_applies_what_we_render(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    """Byte for byte, modes and links included; and our own apply does the same."""
    before = _disjoint({path: side[0] for path, side in tree.items()})
    after = _disjoint({path: side[1] for path, side in tree.items()})
    changes = _changes({path: (before.get(path), after.get(path)) for path in tree})
    if not changes.items:
        return
    by_git, by_us = tmp_path_factory.mktemp("git"), tmp_path_factory.mktemp("us")
    for root in (by_git, by_us):
        _write(root, before)
    subprocess.run(["git", "init", "-q", str(by_git)], check=True)
    done = subprocess.run(
        ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", "-"],
        cwd=by_git, input=render(changes), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr, render(changes))
    assert _read(by_git) == after
    apply_changes(by_us, changes, include=lambda _: True)
    assert _read(by_us) == after


def test_a_hostile_file_does_not_stall_the_diff() -> None:
    before = b"x\n" * 30_000
    after = b"y\n" + b"x\ny\n" * 30_000
    changes = _changes({"f": ((0o100644, before), (0o100644, after))})
    assert render(changes)
    assert summary(changes)[0] == 1


def _period(count: int) -> tuple[bytes, bytes]:
    """What takes difflib the cube of it."""
    return b"a\nb\n" * (count // 2), b"b\na\na\n" * (count // 3)


@pytest.mark.parametrize(
    ("before", "after", "binary"),
    [
        (*_period(6_000), False),
        # two changes far from each other in a long file stay two hunks
        (b"".join(b"%d\n" % n for n in range(60_000)), None, False),
        (b"\n" * 1_000, b"\n" * 3_000_000, True),
    ],
    ids=["period", "long", "newlines"],
)
def test_git_applies_a_patch_that_is_bounded(
    tmp_path: Path, before: bytes, after: bytes | None, binary: bool
) -> None:
    if after is None:
        after = before.replace(b"\n77\n", b"\nseven\n").replace(b"\n59000\n", b"\n")
    changes = _changes({"f": ((PLAIN, before), (PLAIN, after))})
    patch = render(changes)
    assert (b"GIT binary patch" in patch) is binary
    if before.startswith(b"0\n"):
        assert patch.count(b"\n@@ ") == 2
        assert summary(changes) == (1, 1, 2)
    _write(tmp_path, {"f": (PLAIN, before)})
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(
        ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", "-"],
        cwd=tmp_path, input=patch, check=True,
    )  # fmt: skip
    assert (tmp_path / "f").read_bytes() == after


def test_many_such_files_share_what_may_be_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first are shown finely, then hunks are coarse, then there are no lines at all."""
    monkeypatch.setattr(Work.__init__, "__defaults__", (150_000,))
    before, after = b"a\nb\n" * 100, b"a\nb\n" * 50 + b"x\n" + b"a\nb\n" * 50 + b"y\n"
    one = _changes({"f": ((PLAIN, before), (PLAIN, after))}).items
    patch = render(Changes(items=one * 100))
    parts = patch.split(b"diff --git")[1:]
    assert len(parts) == 100
    kinds = [2 if b"GIT binary patch" in part else int(part != parts[0]) for part in parts]
    assert kinds == sorted(kinds)
    assert set(kinds) == {0, 1, 2}
    coarse = parts[kinds.index(1)]
    assert parts[0].count(b"\n+") < coarse.count(b"\n+")


def test_a_patch_of_the_first_changes() -> None:
    tree = dict.fromkeys(("a", "b", "c"), ((PLAIN, b"x\n"), (PLAIN, b"y\n")))
    changes = _changes(tree)
    assert render(changes, most=2) == render(Changes(items=changes.items[:2]))
    assert render(changes, most=3) == render(changes)


def _apply(root: Path, tree: dict[str, tuple[object, object]]) -> None:
    apply_changes(root, _changes(tree), include=lambda _: True)


def test_apply_refuses_conflicts_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"changed by the person")
    with pytest.raises(CallerError) as caught:
        _apply(tmp_path, {"a": ((PLAIN, b"1"), (PLAIN, b"2")), "b": (None, (PLAIN, b"new"))})
    assert caught.value.code == "patch-conflict"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("make", "before"),
    [
        (lambda path: path.write_bytes(b"t"), (LINK, b"t")),
        (lambda path: path.symlink_to("t"), (PLAIN, b"t")),
        (lambda path: path.mkdir(), (PLAIN, b"t")),
        (os.mkfifo, (PLAIN, b"t")),
        (lambda path: path.write_bytes(b"theirs"), None),
        (lambda path: (path / "theirs").mkdir(parents=True) or (path / "theirs/x").touch(), None),
    ],
)
def test_apply_refuses_another_kind(
    tmp_path: Path, make: Callable[[Path], object], before: tuple[int, bytes] | None
) -> None:
    make(tmp_path / "a")
    with pytest.raises(CallerError) as caught:
        _apply(tmp_path, {"a": (before, (PLAIN, b"new"))})
    assert caught.value.code == "patch-conflict"


def test_a_conflict_shows_no_control_characters(tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        _apply(tmp_path, {"esc\x1b[2J\u202e": ((PLAIN, b"1"), (PLAIN, b"2"))})
    assert "\x1b" not in caught.value.message
    assert "\u202e" not in caught.value.message


def test_apply_never_writes_through_a_link(tmp_path: Path) -> None:
    outside, workspace = tmp_path / "outside", tmp_path / "workspace"
    outside.mkdir()
    workspace.mkdir()
    (workspace / "d").symlink_to(outside)
    with pytest.raises(CallerError):
        _apply(workspace, {"d/new": (None, (PLAIN, b"x"))})
    assert list(outside.iterdir()) == []
    # unless the link is one of the changes: a directory stands there then
    _apply(workspace, {"d/new": (None, (PLAIN, b"x")), "d": ((LINK, os.fsencode(outside)), None)})
    assert (workspace / "d" / "new").read_bytes() == b"x"
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "a/../../x", ""])
def test_apply_takes_normal_paths_only(tmp_path: Path, path: str) -> None:
    workspace = tmp_path / "w"
    workspace.mkdir()
    with pytest.raises(Exception, match="not a normal path"):
        _apply(workspace, {path: (None, (PLAIN, b"x"))})
    assert list(tmp_path.rglob("x")) == []


def test_apply_keeps_what_is_private(tmp_path: Path) -> None:
    for name, mode in (("secret", 0o600), ("tool", 0o750), ("script", 0o640)):
        (tmp_path / name).write_bytes(b"1")
        (tmp_path / name).chmod(mode)
    _apply(
        tmp_path,
        {
            "secret": ((PLAIN, b"1"), (PLAIN, b"2")),
            "tool": ((PROGRAM, b"1"), (PLAIN, b"1")),
            "script": ((PLAIN, b"1"), (PROGRAM, b"1")),
        },
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "tool": 0o640, "script": 0o750}


SWAPS = {
    "d": (None, (PLAIN, b"a file now")),
    "d/deep/x": ((PLAIN, b"x"), None),
    "f": ((PLAIN, b"f"), None),
    "f/in/it": (None, (PROGRAM, b"in")),
    "kept": ((PLAIN, b"old"), (PLAIN, b"new")),
    "link": ((LINK, b"kept"), (PLAIN, b"a file now")),
    "new/dir/file": (None, (LINK, b"elsewhere")),
    "gone/only": ((PLAIN, b"x"), None),
}


def _before_swaps(root: Path) -> None:
    _write(root, {path: side[0] for path, side in SWAPS.items()})
    (root / "d" / "empty").mkdir()
    (root / "kept").chmod(0o600)


def _snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        link, mode = path.is_symlink(), path.lstat().st_mode
        content = (
            os.fsencode(os.readlink(path)) if link else b"" if path.is_dir() else path.read_bytes()
        )
        found[str(path.relative_to(root))] = (mode, content)
    return found


def test_apply_swaps_files_and_directories(tmp_path: Path) -> None:
    _before_swaps(tmp_path)
    _apply(tmp_path, SWAPS)
    assert _read(tmp_path) == {
        path: (0o100755 if side[1][0] == PROGRAM else side[1][0], side[1][1])
        for path, side in SWAPS.items()
        if side[1] is not None
    }
    assert not (tmp_path / "gone").exists()


def test_apply_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call that changes the tree fails once; every time all is as it was."""
    calls = ("mkdir", "rmdir", "unlink", "link", "rename", "symlink", "fsync", "fchmod")
    real = {name: getattr(os, name) for name in calls}
    failed = 0
    for at in range(100):
        root = tmp_path / str(at)
        root.mkdir()
        _before_swaps(root)
        before, left = _snapshot(root), at

        def counted(name: str) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(28, "No space left on device")
                return real[name](*arguments, **keywords)

            return call

        for name in calls:
            monkeypatch.setattr(replace.os, name, counted(name))
        try:
            _apply(root, SWAPS)
        except CallerError as error:
            assert error.code == "patch-conflict"
            # a second name that cannot be made is a copy instead, and the failure goes no further
            assert _snapshot(root) == before, at
            failed += 1
        finally:
            for name in calls:
                monkeypatch.setattr(replace.os, name, real[name])
        if left >= 0:
            break
    else:
        raise AssertionError("it never went through")
    assert failed > 15


def _fds(*paths: Path) -> list[int]:
    return [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in paths]


def test_what_the_host_changed_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    """The patch must not undo the person's own work, neither by us nor by git."""
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for directory in (lower, upper):
        directory.mkdir()
    for name in ("theirs", "same", "deleted"):
        (lower / name).write_bytes(b"1\n")
    begun = (lower / "deleted").stat().st_ctime_ns
    (upper / "theirs").write_bytes(b"1\nagent\n")
    (upper / "same").write_bytes(b"1\nagent\n")
    while upper.stat().st_ctime_ns <= begun:
        upper.touch()
    (lower / "theirs").write_bytes(b"1\nperson\n")
    fds = _fds(lower, upper)
    try:
        changes = read_changes(*fds, begun_ns=begun)
    finally:
        for descriptor in fds:
            os.close(descriptor)
    found = {change.path: change for change in changes.items}
    assert found["same"].before == b"1\n"
    assert (found["theirs"].kind, found["theirs"].before) == (ChangeKind.ADDED, None)
    assert dict(changes.refused)["theirs"].startswith("changed on the host")
    with pytest.raises(CallerError):
        apply_changes(lower, changes, include=lambda _: True)
    (lower / "deleted").unlink()
    lower.rename(work)
    git = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    assert subprocess.run(
        git, cwd=work, input=render(changes), capture_output=True, check=False
    ).returncode
    assert (work / "theirs").read_bytes() == b"1\nperson\n"
    one = Changes(items=(found["same"],))
    assert not subprocess.run(
        git, cwd=work, input=render(one), capture_output=True, check=False
    ).returncode


def test_saved_changes_round_trip(tmp_path: Path) -> None:
    changes = _changes(
        {"a\udcff": ((0o100644, b"\x00"), (0o100755, b"2")), "b": (None, (0o120000, b"t"))}
    )
    save_changes(tmp_path / "c", changes, "/w")
    assert load_changes(tmp_path / "c") == (changes, "/w")
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0
    (tmp_path / "c").write_text("{}")
    with pytest.raises(CallerError):
        load_changes(tmp_path / "c")
