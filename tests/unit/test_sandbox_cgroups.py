"""Control groups of version 1, version 2 and hosts that mix them, on trees made of plain files.

What the kernel does with them is in the contract suite, on the version that the host has.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits
from ringfence.sandbox import cgroups
from ringfence.sandbox.protocol import Control

ID = "sb_" + "0" * 26
LIMITS = Limits(memory_mb=256, cpus=0.5, pids=64)
ALL = {Control.MEMORY, Control.CPU, Control.PIDS}


def _group(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.procs").write_text("")
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def _version_1(root: Path, *names: str) -> Path:
    for name in names:
        _group(root / name)
    return root


def _version_2(root: Path, own: str, monkeypatch: pytest.MonkeyPatch, *, busy: str = "") -> Path:
    """`busy` has processes of its own: a kernel would enable cpu and pids for its children all the
    same, and let nothing join them.
    """
    _group(root, cgroup__controllers="cpu memory pids")
    _group(root / own, cgroup__type="domain\n")
    if busy:
        (root / busy / "cgroup.procs").write_text("1\n")
    monkeypatch.setattr(cgroups, "_own_unified_group", lambda root: root / own)
    monkeypatch.setattr(cgroups, "_enable", lambda directory: ALL)
    return root


def test_version_1(tmp_path: Path) -> None:
    found = cgroups.discover(_version_1(tmp_path, "memory", "cpu", "pids", "freezer"))
    assert set(found.parents) == ALL
    assert not found.unified
    groups = cgroups.Groups(found, ID)
    states = groups.make(LIMITS)
    assert {state.control for state in states if state.enforced} == ALL
    assert len(groups.paths) == 4  # the freezer's too: a program that is in it can be stopped
    values = {file.name: file.read_text() for path in groups.paths for file in Path(path).iterdir()}
    assert values["memory.limit_in_bytes"] == str(256 << 20)
    assert values["memory.memsw.limit_in_bytes"] == str(256 << 20)
    assert (values["cpu.cfs_period_us"], values["cpu.cfs_quota_us"]) == ("100000", "50000")
    assert values["pids.max"] == "64"


def test_a_mixed_host_has_what_version_1_has(tmp_path: Path) -> None:
    """hugetlb alone in version 2, or pids missing: what is not there is not claimed."""
    _group(tmp_path / "unified", cgroup__controllers="hugetlb")
    found = cgroups.discover(_version_1(tmp_path, "memory", "cpu"))
    assert set(found.parents) == {Control.MEMORY, Control.CPU}
    assert found.freezer is None
    assert not cgroups.Groups(found, ID).freeze(frozen=True)


def test_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _version_2(tmp_path, "user.slice/app.slice/x.scope", monkeypatch)
    found = cgroups.discover(root)
    assert found.unified
    assert set(found.parents) == ALL
    groups = cgroups.Groups(found, ID)
    groups.make(LIMITS)
    (path,) = groups.paths
    values = {file.name: file.read_text() for file in Path(path).iterdir()}
    assert values["memory.max"] == str(256 << 20)
    assert values["memory.swap.max"] == "0"
    assert values["cpu.max"] == "50000 100000"
    assert values["pids.max"] == "64"
    assert groups.freeze(frozen=True)
    assert (Path(path) / "cgroup.freeze").read_text() == "1"


def test_version_2_looks_above_a_group_that_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "user.slice/app.slice/x.scope"
    found = cgroups.discover(_version_2(tmp_path, own, monkeypatch, busy=own))
    assert set(found.parents.values()) == {tmp_path / "user.slice" / "app.slice"}


@pytest.mark.user
def test_version_2_without_delegation_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _version_2(tmp_path, "session.scope", monkeypatch)
    for path in (root / "session.scope", root):
        path.chmod(0o500)
    try:
        assert cgroups.discover(root).parents == {}
    finally:
        root.chmod(0o700)
        (root / "session.scope").chmod(0o700)


@pytest.mark.parametrize(
    ("kept", "fine"),
    [("64", True), ("max", False), ("63", True), ("1000000", False), ("", False)],
)
def test_a_limit_is_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, *, fine: bool
) -> None:
    """Rounded down by less than a page is the limit; anything else is not one."""
    found = cgroups.discover(_version_1(tmp_path, "pids"))
    monkeypatch.setattr(Path, "read_text", lambda self: kept)
    monkeypatch.setattr(cgroups, "_start_time", lambda pid: 1)
    groups = cgroups.Groups(found, ID)
    if fine:
        assert groups.make(LIMITS)
    else:
        with pytest.raises(UnavailableError, match=r"the kernel keeps pids\.max"):
            groups.make(LIMITS)


def test_groups_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    found = cgroups.discover(_version_1(tmp_path, "pids"))
    start = cgroups._start_time(os.getpid())
    mine = f"ringfence-{os.getpid()}-{start}-{ID}"
    reused = f"ringfence-{os.getpid()}-{start + 1}-{ID}"
    gone = f"ringfence-4194304-1-{ID}"
    other = "ringfence-notes"
    for name in (mine, reused, gone, other):
        (tmp_path / "pids" / name).mkdir()
    assert cgroups.sweep(found) == 2
    assert {path.name for path in (tmp_path / "pids").iterdir() if path.is_dir()} == {mine, other}


def test_limits_are_read_back_later(tmp_path: Path) -> None:
    found = cgroups.discover(_version_1(tmp_path, "memory", "cpu", "pids"))
    groups = cgroups.Groups(found, ID)
    groups.make(LIMITS)
    assert {state.control for state in groups.read_back(LIMITS)} == ALL
    (pids,) = (Path(path) / "pids.max" for path in groups.paths if "pids" in Path(path).parts)
    pids.write_text("max\n")
    with pytest.raises(UnavailableError, match=r"pids\.max=max instead of 64"):
        groups.read_back(LIMITS)
    pids.unlink()
    with pytest.raises(UnavailableError, match="cannot be read"):
        groups.read_back(LIMITS)


@pytest.mark.parametrize("member", [True, False])
def test_a_move_to_where_we_are_moves_us_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: bool
) -> None:
    """A path of /proc/self/cgroup may name another's group where its root is not the mount's."""
    own, files = str(os.getpid()), []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        files.append(tmp_path / names / path.lstrip("/") / "cgroup.procs")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"1\n{own}\n" if member else "1\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    cgroups.await_moves()
    written = [file for file in files if file.read_text() == own]
    assert len(written) == (1 if member else 0)


def test_a_move_to_where_we_are_changes_nothing() -> None:
    before = Path("/proc/self/cgroup").read_text()
    cgroups.await_moves()
    assert Path("/proc/self/cgroup").read_text() == before
