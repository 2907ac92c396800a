"""Writing a patch to the host: only what is still as the agent saw it, beneath, through no link."""

from __future__ import annotations

import os
import termios
from pathlib import Path

import pytest

from ringfence.errors import CallerError, DeniedError, RingfenceError
from ringfence.sandbox import seccomp
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.hostfiles import classify
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.safeopen import open_beneath

FILE, LINK = 0o100644, 0o120000


def change(path: str, before: tuple[int, bytes] | None, after: tuple[int, bytes] | None) -> Change:
    kind = ChangeKind.MODIFIED
    if before is None or after is None:
        kind = ChangeKind.ADDED if before is None else ChangeKind.DELETED
    (old_mode, old), (mode, new) = before or (0, None), after or (0, None)
    return Change(path=path, kind=kind, mode=mode, old_mode=old_mode, before=old, after=new)


def apply(workspace: Path, *changes: Change) -> None:
    apply_changes(workspace, Changes(items=changes), include=lambda _: True)


MODIFY = change("a", (FILE, b"old"), (FILE, b"new"))
ADD = change("a", None, (FILE, b"new"))
DELETE = change("a", (FILE, b"old"), None)
RELINK = change("a", (LINK, b"old"), (LINK, b"new"))
OTHER = change("b", None, (FILE, b"b"))


@pytest.mark.parametrize(
    ("host", "applied", "conflicts"),
    [
        ("old", [MODIFY, DELETE], [ADD, RELINK]),
        ("else", [], [MODIFY, DELETE, ADD, RELINK]),
        (None, [ADD], [MODIFY, DELETE, RELINK]),
        ("->old", [RELINK], [MODIFY, DELETE, ADD]),
        ("->else", [], [MODIFY, DELETE, ADD, RELINK]),
    ],
    ids=["as-seen", "changed", "absent", "link-as-seen", "link-changed"],
)
def test_only_what_is_as_the_agent_saw_it_is_written(
    tmp_path: Path, host: str | None, applied: list[Change], conflicts: list[Change]
) -> None:
    """One conflict, and nothing at all is written."""
    cases = [(c, True) for c in applied] + [(c, False) for c in conflicts]
    for number, (one, fits) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        if host is not None and host.startswith("->"):
            (place / "a").symlink_to(host[2:])
        elif host is not None:
            (place / "a").write_text(host)
        if fits:
            apply(place, OTHER, one)
            assert (place / "b").read_text() == "b"
            if one.after is None:
                assert not os.path.lexists(place / "a")
            continue
        with pytest.raises(CallerError) as caught:
            apply(place, OTHER, one)
        assert caught.value.code == "patch-conflict"
        assert not (place / "b").exists()


@pytest.mark.parametrize("target", ["inner", "../outside"])
def test_no_link_of_the_workspace_is_written_through(tmp_path: Path, target: str) -> None:
    """Not even one that stays inside: the patch says `d/x`, and the person read `d/x`."""
    workspace, outside = tmp_path / "workspace", tmp_path / "outside"
    for place in (workspace, outside, workspace / "inner"):
        place.mkdir()
    (workspace / "d").symlink_to(target)
    with pytest.raises(CallerError) as caught:
        apply(workspace, change("d/x", None, (FILE, b"x")))
    assert caught.value.code == "patch-conflict"
    assert list(outside.iterdir()) == list((workspace / "inner").iterdir()) == []
    apply(workspace, change("inner/x", None, (FILE, b"x")))
    assert (workspace / "inner" / "x").read_bytes() == b"x"


@pytest.mark.parametrize("path", ["../x", "d/../x", "./x", "d//x", "d/./x", "/x", "x/"])
def test_a_path_that_is_not_normal_is_refused(tmp_path: Path, path: str) -> None:
    """It could name a file that was shown to nobody; `.git/../.git/hooks/x` was shown as another."""
    workspace = tmp_path / "workspace"
    (workspace / "d").mkdir(parents=True)
    with pytest.raises(RingfenceError) as caught:
        apply(workspace, change(path, None, (FILE, b"x")))
    assert caught.value.code in {"path-escapes", "patch-conflict"}
    assert [p.name for p in tmp_path.rglob("*")] == ["workspace", "d"]


def test_opening_beneath_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "last").symlink_to("real/file")
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.close(open_beneath(root, "real/file", os.O_RDONLY))
        for path in ("link/file", "last", "../x", "real/../../x", "/etc/passwd"):
            with pytest.raises(DeniedError):
                os.close(open_beneath(root, path, os.O_RDONLY))
    finally:
        os.close(root)


def test_a_new_link_is_held_back_wherever_it_stands() -> None:
    held = classify(change("docs/notes", None, (LINK, b"/etc/passwd")))
    assert held is not None
    assert held.held
    assert classify(change("docs/notes", None, (FILE, b"/etc/passwd"))) is None


def test_both_calls_that_type_into_a_terminal_are_forbidden() -> None:
    """TIOCSTI and TIOCLINUX, by the numbers of this host's own headers."""
    assert {termios.TIOCSTI, termios.TIOCLINUX} <= set(seccomp.FORBIDDEN_IOCTLS)
