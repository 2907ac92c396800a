"""Containers on a real host: what is read back, who dies with whom, what is left over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import cgroups, container, hostfacts
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.launcher import rehearse
from ringfence.sandbox.profile import PATH, bare_plan
from ringfence.sandbox.protocol import Control, Sandbox, SandboxSpec
from ringfence.sandbox.staging import Program
from ringfence.testing.sandbox_contract import shell
from ringfence.worker.ids import new_id

AS_ROOT = os.geteuid() == 0
ENGINES = ("runc", "crun", "podman") if AS_ROOT else ("crun", "podman")
PATHS = "/usr/sbin:/usr/bin"
ACCEPTED = (
    frozenset()
    if AS_ROOT
    else frozenset(one.value for one in (Control.MEMORY, Control.CPU, Control.PIDS))
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param, path=PATHS) is None:
        pytest.skip(f"{request.param} is not installed: apt-get install {request.param}")
    return str(request.param)


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    caches = (container.find_runtime, container.check_runtime)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def spec(place: Path, **profile: Any) -> SandboxSpec:
    for name in ("workspace", "state"):
        (place / name).mkdir(mode=0o700, exist_ok=True)
    return SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=SandboxProfile(
            **{
                "accept_unenforced": ACCEPTED,
                "limits": Limits(memory_mb=256, pids=64, disk_mb=64),
                **profile,
            }
        ),
        workspace=place / "workspace",
        state_dir=place / "state",
    )


async def started(place: Path, runtime: str, **profile: Any) -> Sandbox:
    return await ContainerBackend(state_dir=place / "state", engine=runtime).start(
        spec(place, **profile)
    )


def inside(place: Path, engine: str, command: str, **profile: Any) -> tuple[int, str]:
    async def work() -> tuple[int, str]:
        sandbox = await started(place, engine, **profile)
        try:
            return await shell(sandbox, command)
        finally:
            await sandbox.close()

    return asyncio.run(asyncio.wait_for(work(), 60))


# --- a runtime that lies: one flag of the configuration is taken out on the way to the real one

LIES = {
    "a capability": (
        "for s in ('bounding','effective','inheritable','permitted','ambient'):"
        " p['capabilities'][s] = ['CAP_NET_RAW']",
        "Cap",
    ),
    "no filter": ("c['linux'].pop('seccomp'); c.pop('annotations', None)", "Seccomp"),
    "another user": (
        "p['user'].update(uid=0, gid=0)",
        "Uid"
        if AS_ROOT
        else "Errno 71",  # there is no other: the kernel refuses it, and the engine fails
    ),
    "a writable root": ("c['root']['readonly'] = False", "/ is mounted without ro"),
    "a writable /usr": (
        "m['/usr']['options'][:] = ['rbind', 'rw']",
        "/usr is mounted without",
    ),
    "one mount more": (
        "c['mounts'].append({'destination': '/extra', 'type': 'tmpfs', 'source': 'x', 'options': []})",
        "/extra is writable",
    ),
    "a mask less": ("c['linux']['maskedPaths'].remove('/proc/kallsyms')", "/proc/kallsyms"),
    "/proc/sys": ("c['linux']['readonlyPaths'].remove('/proc/sys')", "/proc/sys is not mounted"),
    "the host's ipc": (
        "c['linux']['namespaces'] = [n for n in c['linux']['namespaces'] if n['type'] != 'ipc']",
        "ipc namespace is the host's",
    ),
    "spared by the memory killer": ("p['oomScoreAdj'] = 0", "oom_score_adj"),
}
"""What is changed, and the words that name it."""

HARMLESS = {
    "new privileges": (
        "p['noNewPrivileges'] = False",
        "grep -q 'NoNewPrivs:.1' /proc/self/status",
    ),
    "programs in /tmp": (
        "m['/tmp']['options'].remove('noexec')",
        "! { cp /bin/true /tmp/t && chmod +x /tmp/t && /tmp/t; }",
    ),
    "nothing": ("pass", "true"),
}
"""What is changed and holds all the same, because it was there before the runtime; the proof."""

LIAR = """#!/usr/bin/python3 -IS
import json, os, sys
words = sys.argv[1:]
if "create" in words:
    path = words[words.index("--bundle") + 1] + "/config.json"
    c = json.load(open(path))
    p, m = c["process"], {{one["destination"]: one for one in c["mounts"]}}
    {lie}
    json.dump(c, open(path, "w"))
os.execv({real!r}, [{real!r}, *words])
"""


@pytest.fixture
def lying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Has the backend run a script in place of an engine, or of the runtime below podman."""
    # the sandbox's ids read it, which are an ordinary user's own
    shared = Path("/usr/local/lib/ringfence-test") if AS_ROOT else tmp_path / "engines"
    place = shared / str(os.getpid())
    place.mkdir(parents=True)

    def lie(engine: str, code: str) -> None:
        name = "crun" if engine == "podman" else engine
        liar = place / name
        real = shutil.which(name, path=PATHS)
        liar.write_text(LIAR.format(lie=code, real=real))
        liar.chmod(0o755)
        found = {name: liar, "podman": Path("/usr/bin/podman")}
        monkeypatch.setattr(container, "find_runtime", lambda name, **_: found[name])
        monkeypatch.setattr(container, "check_runtime", lambda *_: None)

    yield lie
    shutil.rmtree(place)
    with contextlib.suppress(OSError):
        place.parent.rmdir()  # unless a test beside this one has its own there


@pytest.mark.parametrize("lie", LIES)
def test_what_the_runtime_did_not_do_stops_the_start(
    tmp_path: Path, lie: str, engine: str, lying: Callable[[str, str], None]
) -> None:
    """Nothing of the program runs, and the error names the difference."""
    code, word = LIES[lie]
    lying(engine, code)
    ran = tmp_path / "workspace" / "ran"
    with pytest.raises(UnavailableError) as caught:
        inside(
            tmp_path,
            engine,
            f"touch {ran.name}",
            workspace_mode=WorkspaceMode.DIRECT,
            accept_unenforced=ACCEPTED | {"workspace_disk"},
        )
    assert caught.value.code == "sandbox-start-failed"
    assert word in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("lie", HARMLESS)
def test_what_does_not_depend_on_the_runtime(
    tmp_path: Path, lie: str, engine: str, lying: Callable[[str, str], None]
) -> None:
    """It holds, or the kernel refuses the container; with nothing changed it runs."""
    code, proof = HARMLESS[lie]
    lying(engine, code)
    try:
        assert inside(tmp_path, engine, f"{proof} && echo held")[1] == "held\n"
    except UnavailableError as error:
        assert "operation not permitted" in str(error).lower()
        assert lie != "nothing"


def test_a_group_that_was_not_joined_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a runtime without rights over limits goes on without them."""
    monkeypatch.setitem(sys.modules, "launch", importlib.import_module("ringfence.sandbox.launch"))
    phase = importlib.import_module("ringfence.sandbox.launch_oci")
    own = [line.rpartition("/")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    assert phase.in_groups(os.getpid(), [f"/x/{name}" for name in own]) == []
    assert phase.in_groups(os.getpid(), ["/x/elsewhere"]) == ["it is in 0 of its 1 control groups"]


@pytest.mark.root
def test_the_hosts_root_never_runs_a_container(engine: str) -> None:
    """Whatever a plan says; the same plan with a block of its own ids works."""
    facts = hostfacts.empty_place(3_001_000)
    runtime = container.find_runtime(engine, as_root=True)
    rules = SandboxProfile(workspace_mode=WorkspaceMode.READONLY)
    program = Program(["true"], {"PATH": PATH}, "/")
    plan = {
        **container.container_plan(runtime, rules, facts, program),
        "cgroups": [],
        "rlimits": {},
        "parent": os.getpid(),
    }
    place = {**bare_plan(facts), "files": {"etc/hostname": "sandbox\n"}}
    assert rehearse(place, plan) is None
    assert "host's root" in str(rehearse(place, {**plan, "map": [[0, 0, 65536]]}))


# --- engines


@pytest.mark.usefixtures("fresh_caches")
def test_docker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(started(tmp_path, "auto", engine="docker"))
    assert caught.value.code == "isolation-unavailable"
    assert "docker" in str(caught.value)
    assert "crun" in (caught.value.hint or "")


@pytest.mark.usefixtures("fresh_caches")
def test_podman_without_its_runtime_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "podman").symlink_to("/bin/true")
    monkeypatch.setattr(container, "_PATHS", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        inside(tmp_path, "podman", "true")
    assert caught.value.code == "isolation-unavailable"
    assert "crun" in (caught.value.hint or "")


@pytest.mark.usefixtures("fresh_caches")
def test_no_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_PATHS", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        inside(tmp_path, "auto", "true")
    assert caught.value.code == "isolation-unavailable"
    assert "apt-get install" in (caught.value.hint or "")


@pytest.mark.user
@pytest.mark.usefixtures("fresh_caches")
def test_runc_is_refused_to_an_ordinary_user(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        inside(tmp_path, "runc", "true")
    assert "crun" in (caught.value.hint or "")


# --- the workspace


def test_programs_of_the_workspace(tmp_path: Path, engine: str) -> None:
    """`exec_in_workspace: false` is the hardened container's noexec, and holds for the loader too."""
    loader = "$(ls /lib64/ld-linux-*.so.* /lib/ld-linux-*.so.* 2>/dev/null | head -1)"
    one = f"cp /bin/true t && chmod +x t && (./t || {loader} ./t) && echo ran"
    assert inside(tmp_path, engine, one, workspace_exec=True) == (0, "ran\n")
    assert inside(tmp_path, engine, one, workspace_exec=False)[1] == ""


def test_signals_and_statuses(tmp_path: Path, engine: str) -> None:
    """A broken pipe ends a program as it does outside; statuses are a shell's."""
    assert inside(tmp_path, engine, "yes | head -1; echo ${PIPESTATUS[0]}") == (0, "y\n141\n")
    assert inside(tmp_path, engine, "kill -TERM $$")[0] == 143

    async def work() -> None:
        sandbox = await started(tmp_path, engine)
        try:
            (tmp_path / "workspace" / "plain").write_text("x")
            for argv, code in ((["/no/such"], 127), (["./plain"], 126), (["nope"], 127)):
                assert await (await sandbox.exec(argv)).wait() == code
        finally:
            await sandbox.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_process_1_is_out_of_reach(tmp_path: Path, engine: str) -> None:
    """It has rights in its namespace that the program lacks, and no file of it opens; nor one of
    podman's monitor.
    """
    command = (
        "for p in 1 $(pgrep -x conmon); do "
        "for f in environ mem maps fd/0 root/etc/passwd; do head -c1 /proc/$p/$f && echo $f; done; "
        "done 2>/dev/null; for s in HUP INT TERM STOP KILL; do kill -$s 1; done 2>/dev/null; "
        "head -c0 /proc/self/environ && echo alive"
    )
    assert inside(tmp_path, engine, command) == (0, "alive\n")


# --- deaths

KEEPER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_container import started
async def main():
    sandbox = await started(Path({place!r}), {engine!r})
    process = await sandbox.exec(["bash", "-c", "exec -a {marker} sleep 300 & exec -a {marker} sleep 300"])
    print(process._monitor.pid, flush=True)
    await process.wait()
    print("ended", flush=True)
asyncio.run(main())
"""


def with_marker(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if line[0] == marker.encode():
                found.append(int(entry.name))
    return found


def until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile has none
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize("victim", ["ringfence", "launcher", "process 1", "child of process 1"])
def test_all_die_within_a_second(tmp_path: Path, engine: str, victim: str) -> None:
    """A child of process 1 is podman's monitor, or the program, which took a process along."""
    marker = f"rf-death-{os.getpid()}-{victim[0]}-{engine}"
    text = KEEPER.format(
        here=str(Path(__file__).parent), place=str(tmp_path), engine=engine, marker=marker
    )
    keeper = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    try:
        assert keeper.stdout is not None
        monitor = int(keeper.stdout.readline())
        assert until(lambda: len(with_marker(marker)) == 2, 10)
        pid = {"ringfence": keeper.pid, "launcher": monitor}.get(victim) or _children(monitor)[0]
        if victim == "child of process 1":
            (pid,) = _children(pid)
            assert (engine == "podman") == (Path(f"/proc/{pid}/comm").read_text() == "conmon\n")
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: not with_marker(marker), 1)
        if victim != "ringfence":
            assert keeper.stdout.readline() == "ended\n"
    finally:
        keeper.kill()
        keeper.wait()
        keeper.stdout.close()  # type: ignore[union-attr]
    cgroups.sweep(cgroups.discover())


# --- what is left over


def _left() -> dict[str, Any]:
    gc.collect()  # what tests before this one dropped has descriptors too
    groups = [
        str(p) for parent in cgroups.discover().parents.values() for p in parent.glob("ringfence-*")
    ]
    return {
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "groups": [one for one in groups if f"-{os.getpid()}-" in one],
        "children": _children(os.getpid()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "temporary": sorted(
            name for name in os.listdir("/tmp") if "runc" in name or "crun" in name
        ),
        # that of root's runc, which an ordinary user neither fills nor reads
        "runtimes": sorted(os.listdir("/run/runc")) if os.access("/run/runc", os.R_OK) else [],
    }


async def _many(place: Path, engine: str, count: int) -> None:
    backend = ContainerBackend(state_dir=place / "state", engine=engine)
    gate = asyncio.Semaphore(8)

    async def one(number: int) -> None:
        async with gate:
            sandbox = await backend.start(spec(place))
            try:
                process = await sandbox.exec(["sleep", "300"] if number % 2 else ["true"])
                if number % 2:
                    await process.kill()
                else:
                    assert await process.wait() == 0
            finally:
                await sandbox.close()

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


@pytest.mark.parametrize("count", [16, pytest.param(500, marks=pytest.mark.storm)])
def test_many_leave_nothing(tmp_path: Path, engine: str, count: int) -> None:
    asyncio.run(_many(tmp_path, engine, 1))  # what is made once a process
    before = _left()
    asyncio.run(asyncio.wait_for(_many(tmp_path, engine, count), 30 + count))
    assert _left() == before
