"""Control groups of version 1, version 2 and hosts that mix them, on trees made of plain files.

What the kernel does with them is in the contract suite, on the version that the host has.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits
from ringfence.sandbox import cgroups, members
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
    # believed when the kernel says it
    events = Path(path) / "cgroup.events"
    events.write_text("populated 1\nfrozen 0\n")
    assert not groups.freeze(frozen=True)
    events.write_text("populated 1\nfrozen 1\n")
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
    monkeypatch.setattr(members, "start_time", lambda pid: 1)
    groups = cgroups.Groups(found, ID)
    if fine:
        assert groups.make(LIMITS)
    else:
        with pytest.raises(UnavailableError, match=r"the kernel keeps pids\.max"):
            groups.make(LIMITS)


def test_groups_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    found = cgroups.discover(_version_1(tmp_path, "pids"))
    start = members.start_time(os.getpid())
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


@pytest.mark.parametrize(("pids", "thawed"), [("0\n", False), ("0\n77\n", True)])
def test_only_orphans_are_thawed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pids: str, thawed: bool
) -> None:
    """A process of a PID namespace that cannot be seen from here is said to be 0."""
    _group(tmp_path, cgroup__procs=pids, freezer__state="FROZEN")
    monkeypatch.setattr(members, "_parent", lambda pid: 1)
    monkeypatch.setattr(os, "pidfd_open", _refuse)
    members.end_orphans(tmp_path)
    assert (tmp_path / "freezer.state").read_text() == ("THAWED" if thawed else "FROZEN")


def _refuse(pid: int) -> int:
    raise OSError(pid)


def test_a_process_of_another_namespace_is_not_this_ones_own_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = cgroups.Groups(cgroups.discover(_version_1(tmp_path, "freezer")), ID)
    groups.make(LIMITS)
    (path,) = groups.paths
    (Path(path) / "cgroup.procs").write_text("0\n77\n")
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    groups.end_frozen()
    assert killed == [77]


def test_version_2_hands_its_controllers_down_or_no_seat_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cgroups.discover(_version_2(tmp_path, "app.slice/x.scope", monkeypatch))
    groups = cgroups.Groups(found, ID)
    groups.make(LIMITS)
    inner = groups.within()
    assert {str(parent) for parent in inner.parents.values()} == set(groups.paths)
    assert (set(inner.parents), inner.unified, inner.freezer) == (ALL, True, None)
    seat = cgroups.Groups(inner, "sb_" + "1" * 26)
    seat.make(LIMITS)
    assert all(path.startswith(groups.paths[0] + "/ringfence-") for path in seat.paths)
    monkeypatch.setattr(cgroups, "_enable", lambda _: {Control.CPU, Control.PIDS})
    with pytest.raises(UnavailableError, match="memory"):
        groups.within()


def test_version_1_counts_what_is_below_or_no_seat_is_made(tmp_path: Path) -> None:
    found = cgroups.discover(_version_1(tmp_path, "memory", "cpu", "pids", "freezer"))
    groups = cgroups.Groups(found, ID)
    groups.make(LIMITS)
    inner = groups.within()
    assert inner.freezer == groups.freezer
    assert {str(one) for one in (*inner.parents.values(), inner.freezer)} == set(groups.paths)
    file = inner.parents[Control.MEMORY] / "memory.use_hierarchy"
    file.unlink()
    file.mkdir()  # can neither be written nor read
    with pytest.raises(UnavailableError, match="memory"):
        groups.within()


EVENTS = "low 0\nhigh 0\nmax 41\noom {oom}\noom_kill 4\noom_group_kill 1\n"


@pytest.mark.parametrize(("oom", "kills"), [(0, 0), (1, 3)])
def test_what_the_host_killed_for_its_own_want_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oom: int, kills: int
) -> None:
    """A limit that was met (`max`), and made room, killed nobody."""
    groups = cgroups.Groups(cgroups.discover(_version_2(tmp_path, "x", monkeypatch)), ID)
    groups.make(LIMITS)
    (Path(groups.paths[0]) / "memory.events").write_text(EVENTS.format(oom=oom))
    assert groups.memory_kills() == kills


@pytest.mark.parametrize(
    ("file", "unified"), [("memory.oom_control", False), ("memory.events", True)]
)
def test_what_was_killed_at_the_limit_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, unified: bool
) -> None:
    root = _version_2(tmp_path, "x", monkeypatch) if unified else _version_1(tmp_path, "memory")
    groups = cgroups.Groups(cgroups.discover(root), ID)
    groups.make(LIMITS)
    assert groups.memory_kills() is None
    place = Path(groups.paths[0]) / file
    reached = EVENTS.format(oom=2) if unified else "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
    place.write_text(reached)
    assert groups.memory_kills() == 3
    place.write_text("oom 1\noom_kill 1\noom_group_kill 1\n")
    assert groups.memory_kills() == 1
    place.write_text("oom 1\noom_kill ?\n")
    assert groups.memory_kills() is None
    place.write_text("oom_kill\n")
    assert groups.memory_kills() is None
    place.write_text("under_oom 0\n")
    assert groups.memory_kills() == 0


def test_without_an_account_nothing_is_counted(tmp_path: Path) -> None:
    groups = cgroups.Groups(cgroups.discover(_version_1(tmp_path, "pids")), ID)
    groups.make(LIMITS)
    assert groups.memory_kills() is None
