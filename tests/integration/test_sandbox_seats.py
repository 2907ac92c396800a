"""Seats seen from the host: the uid alone, limits that are changed, what a dead worker leaves."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends import needs
from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import cgroups, hostfacts, members
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.protocol import Control, SandboxSpec
from ringfence.sandbox.seats import Seat, SharedPlace
from ringfence.sandbox.sharing import SharingBackend
from ringfence.testing.sandbox_base import listen_at, shell
from ringfence.testing.sandbox_seats import ALIKE, shared_spec

RULES = SandboxProfile(
    workspace_mode=WorkspaceMode.DIRECT,
    accept_unenforced=frozenset({"workspace_disk"}),
    limits=Limits(memory_mb=256, pids=128, disk_mb=32, cpus=1.0, file_mb=32),
)
PTRACE_ATTACH, CLONE_NEWUSER = 16, 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def container(state: Path) -> SharingBackend:
    if shutil.which("runc", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("runc is not installed: apt-get install runc")
    return ContainerBackend(state_dir=state, engine="runc")


def bubblewrap(state: Path) -> SharingBackend:
    return BubblewrapBackend(state_dir=state)


def spec_of(place: Path, number: int) -> SandboxSpec:
    for name in (f"workspace{number}", f"egress{number}"):
        (place / name).mkdir(exist_ok=True)
    return SandboxSpec(
        sandbox_id="sb_" + "0" * 25 + str(number),
        profile=RULES,
        workspace=place / f"workspace{number}",
        state_dir=place / "state",
        egress_dir=place / f"egress{number}",
    )


@asynccontextmanager
async def together(backend: SharingBackend, place: Path) -> AsyncIterator[Any]:
    shared = await backend.start_shared(shared_spec(spec_of(place, 1), 2))
    assert isinstance(shared, SharedPlace)
    try:
        yield shared, *[await shared.seat(spec_of(place, number)) for number in (1, 2)]
    finally:
        await shared.close()
        await backend.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path


def as_user(
    uid: int, tries: dict[str, Callable[[], object]], *, of: int | None = None
) -> dict[str, bool]:
    """Which of these work for a uid in the host's own namespaces; `of` a process: in its user
    namespace instead, where the uid is one of those. Nothing is loaded after ids are dropped.
    """
    out, into = os.pipe()
    space = -1 if of is None else os.open(f"/proc/{of}/ns/user", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            if space >= 0 and LIBC.setns(space, CLONE_NEWUSER) != 0:
                os._exit(1)
            os.setgroups([])
            # by way of the namespace's root: capabilities go with the step from that to another
            for each in (0, uid):
                os.setresgid(each, each, each)
                os.setresuid(each, each, each)
            done = {}
            for name, act in tries.items():
                try:
                    act()
                    done[name] = True
                except OSError:
                    done[name] = False
            os.write(into, json.dumps(done).encode())
        finally:
            os._exit(0)
    os.close(into)
    if space >= 0:
        os.close(space)
    with os.fdopen(out, "rb") as file:
        answer = file.read()
    os.waitpid(child, 0)
    found: dict[str, bool] = json.loads(answer)
    return found


def noted(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> list[Any]:
    """What a function answers from now on."""
    answers: list[Any] = []
    real = getattr(where, name)

    def asked(*told: Any) -> Any:
        answers.append(real(*told))
        return answers[-1]

    monkeypatch.setattr(where, name, asked)
    return answers


def uid_of(pid: int) -> int:
    (line,) = (
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line[:4] == "Uid:"
    )
    return int(line.split()[1])


async def at_work(seat: Seat) -> int:
    """Host pid of a program of a seat that holds a canary."""
    process = await seat.exec(
        ["bash", "-c", "echo up; exec sleep 300"], environment={"CANARY": "canary"}
    )
    assert await process.read() == b"up\n"
    for _ in range(200):
        for pid in seat._groups.members():
            if Path(f"/proc/{pid}/comm").read_text() == "sleep\n":
                return pid
        await asyncio.sleep(0.05)
    raise AssertionError("the program is in none of the seat's groups")


def trace(pid: int) -> None:
    if LIBC.ptrace(PTRACE_ATTACH, pid, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


@asynccontextmanager
async def doors(seat: Seat, egress: Path) -> AsyncIterator[Any]:
    """What one may try at a seat, from outside of every namespace of its: first what needs a uid
    alone, then what the kernel also asks a common user namespace for.
    """
    pid, home = await at_work(seat), seat._home
    listener = listen_at(egress / "egress.sock")
    way = os.open(egress, os.O_PATH | os.O_DIRECTORY)
    dialling = socket.socket(socket.AF_UNIX)
    plain: dict[str, Callable[[], object]] = {
        "kill": lambda: os.kill(pid, 0),
        "files": lambda: os.close(os.open(".", os.O_RDONLY, dir_fd=home)),
        "dial": lambda: dialling.connect(f"/proc/self/fd/{way}/egress.sock"),
    }
    inner: dict[str, Callable[[], object]] = {
        "environ": lambda: os.close(os.open(f"/proc/{pid}/environ", os.O_RDONLY)),
        "root": lambda: os.listdir(f"/proc/{pid}/root/"),
        "descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
    }
    try:
        yield pid, plain, inner
    finally:
        os.close(way)
        listener.close()
        dialling.close()


@pytest.mark.root
def test_the_uid_alone_keeps_seats_of_a_container_apart(place: Path) -> None:
    """In the user namespace of the other, and in no other of its namespaces, as if all of them had
    a hole: its processes, memory, files and way out are shut, and open to its own uid.
    """

    async def work() -> None:
        async with together(container(place / "state"), place) as (_, one, two):
            uids = [seat._facts.inside for seat in (one, two)]
            assert uids == [1000, 1001]
            async with doors(one, place / "egress1") as (pid, plain, inner):
                assert uid_of(pid) == one._facts.uid > 65_536
                tries = plain | inner
                assert as_user(uids[0], tries, of=pid) == dict.fromkeys(tries, True)
                tries["mem"] = lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
                tries["trace"] = lambda: trace(pid)
                assert as_user(uids[1], tries, of=pid) == dict.fromkeys(tries, False)

    asyncio.run(work())


@pytest.mark.root
@needs("bubblewrap")
def test_the_uid_alone_keeps_seats_of_bubblewrap_apart(place: Path) -> None:
    """There a namespace knows one id: it is tried from the host's."""

    async def work() -> None:
        async with together(bubblewrap(place / "state"), place) as (_, one, two):
            other = uid_of(await at_work(two))
            async with doors(one, place / "egress1") as (pid, plain, inner):
                assert 0 < uid_of(pid) != other > 0
                assert as_user(uid_of(pid), plain) == dict.fromkeys(plain, True)
                tries = plain | inner
                assert as_user(other, tries) == dict.fromkeys(tries, False)

    asyncio.run(work())


@pytest.mark.root
def test_a_limit_of_all_that_was_changed_stops_the_next_seat(place: Path) -> None:
    """The sum holds one agent off another, so it is read again before each sits down."""

    async def work() -> None:
        async with together(container(place / "state"), place) as (shared, one, two):
            (pids,) = (Path(p) for p in shared._groups.paths if (Path(p) / "pids.max").exists())
            assert (pids / "pids.max").read_text() == "128\n"
            for seat in (one, two):
                (own,) = pids.glob(f"ringfence-*-{seat.sandbox_id}")
                assert (own / "pids.max").read_text() == "64\n"
            await one.close()
            (pids / "pids.max").write_text("max")
            with pytest.raises(UnavailableError, match=r"pids\.max=max"):
                await shared.seat(spec_of(place, 1))
            (pids / "pids.max").write_text("128")
            again = await shared.seat(spec_of(place, 1))
            assert (await shell(again, "pwd"))[0] == 0

    asyncio.run(work())


@pytest.mark.root
def test_a_seat_with_somebody_left_is_given_to_nobody(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stands in a seat's groups and in none of its namespaces is killed with it; where that
    fails, the seat stays taken.
    """

    async def work() -> None:
        async with together(container(place / "state"), place) as (shared, one, two):
            with subprocess.Popen(["sleep", "300"]) as stray:
                for path in one._groups.paths:
                    (Path(path) / "cgroup.procs").write_text(str(stray.pid))
                await one.close()
                assert stray.wait(10) == -9
            assert shared._seats.free == [0]
            monkeypatch.setattr(cgroups.Groups, "end", lambda _: False)
            with pytest.raises(UnavailableError, match="could not be ended"):
                await two.close()
            assert shared._seats.free == [0]
            monkeypatch.undo()
            await two.close()
            assert shared._seats.free == [0, 1]

    asyncio.run(work())


@pytest.mark.root
@needs("bubblewrap")
def test_a_seat_that_is_broken_off_at_its_last_step_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every descriptor may be taken when the seat is prepared, and one more is asked for."""

    async def work() -> None:
        backend = bubblewrap(place / "state")
        shared: Any = await backend.start_shared(shared_spec(spec_of(place, 1), 2))
        try:
            await (await shared.seat(spec_of(place, 1))).close()  # what is made once a worker
            before = set(os.listdir("/proc/self/fd"))
            launchers = noted(monkeypatch, shared._spare, "take")
            leases = noted(monkeypatch, hostfacts, "lease_uid")

            def full(*_: object) -> int:
                raise OSError(errno.EMFILE, "too many open files")

            with monkeypatch.context() as patched:
                patched.setattr("ringfence.sandbox.staged.os.memfd_create", full)
                with pytest.raises(OSError, match="too many"):
                    await shared.seat(spec_of(place, 2))
            assert set(os.listdir("/proc/self/fd")) == before
            assert launchers[0].process.returncode is not None
            paths = cgroups.Groups(shared._inner, spec_of(place, 2).sandbox_id).paths
            assert not [path for path in paths if Path(path).exists()]
            assert shared._seats.free == [0, 1]
            # the same seat, made whole
            again = await shared.seat(spec_of(place, 2))
            assert leases[1].uid == leases[0].uid
            assert (await shell(again, "pwd"))[0] == 0
        finally:
            await shared.close()
            await backend.close()

    asyncio.run(work())


@pytest.mark.root
@needs("bubblewrap")
def test_a_sandbox_that_is_broken_off_at_its_last_step_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of a sandbox for one agent alone."""

    async def work() -> None:
        backend: Any = bubblewrap(place / "state")
        try:
            await (await backend.start(spec_of(place, 1))).close()  # what is made once a worker
            await backend._spare.close()
            before = set(os.listdir("/proc/self/fd"))
            launchers = noted(monkeypatch, backend._spare, "take")

            def full(*_: object) -> int:
                raise OSError(errno.EMFILE, "too many open files")

            with monkeypatch.context() as patched:
                patched.setattr("ringfence.sandbox.staged.os.memfd_create", full)
                with pytest.raises(OSError, match="too many"):
                    await backend.start(spec_of(place, 2))
            assert set(os.listdir("/proc/self/fd")) == before
            assert launchers[0].process.returncode is not None
            paths = cgroups.Groups(cgroups.discover(), spec_of(place, 2).sandbox_id).paths
            assert not [path for path in paths if Path(path).exists()]
            again = await backend.start(spec_of(place, 2))
            assert (await shell(again, "pwd"))[0] == 0
            await again.close()
        finally:
            await backend.close()

    asyncio.run(work())


@pytest.mark.root
@needs("bubblewrap")
def test_groups_of_seats_of_a_dead_worker_are_swept(place: Path) -> None:
    """A sandbox's group cannot be removed while those of its seats stand below it."""
    hierarchy = cgroups.discover()
    with subprocess.Popen(["true"]) as dead:
        start = members.start_time(dead.pid)
        dead.wait()
    name = f"ringfence-{dead.pid}-{start}-sb_"
    left = [parent / (name + "8" * 26) for parent in {*hierarchy.parents.values()}]
    for group in left:
        (group / (name + "9" * 26)).mkdir(parents=True)

    async def work() -> None:
        async with together(bubblewrap(place / "state"), place) as (_, one, _two):
            own = [Path(path) for path in one._groups.paths]
            cgroups.sweep(hierarchy)  # any worker of this host may have been first
            assert not any(group.exists() for group in left)
            # those of a worker that lives stay
            assert all(path.exists() for path in own)
        assert not any(path.exists() or path.parent.exists() for path in own)

    asyncio.run(work())


@pytest.mark.user
@needs("bubblewrap")
def test_an_ordinary_user_accepts_one_uid_by_name(place: Path) -> None:
    async def work() -> None:
        backend = bubblewrap(place / "state")
        missing = {s.control.value for s in backend.probe(RULES) if not s.enforced} | ALIKE
        spec = spec_of(place, 1)
        delegated = Control.PIDS in cgroups.discover().parents
        for name in ALIKE - ({Control.PIDS.value} if delegated else set()):
            rules = replace(RULES, accept_unenforced=frozenset(missing - {name}))
            with pytest.raises(UnavailableError) as caught:
                await backend.start_shared(shared_spec(replace(spec, profile=rules), 2))
            assert caught.value.code == "control-unenforceable"
            assert name in (caught.value.hint or "")
        rules = replace(RULES, accept_unenforced=frozenset(missing))
        shared = await backend.start_shared(shared_spec(replace(spec, profile=rules), 2))
        await shared.close()

    asyncio.run(work())
