"""A program's start in each isolation technology, beside the raw tool with the same rules.

`python -m benchmarks.container [rounds [runtime …]]`. The raw side of a container is `RUNTIME run` with the
very configuration that ringfence gave its own, run by root; ours makes the place, joins the
control groups, reads everything back and throws it all away. `podman run --rm` with the same mounts,
ids, filter and limits is measured beside each container, as the tool that most people would take;
docker's daemon has to run for `docker run`, and none is started here.

Before the first move of a process into a control group after a pause the kernel waits for all
processors, 8 to 20 ms, and not again for moves that follow soon. The raw tool moves a process as
we do, so that both sides are measured after the same: a pause, and a move a moment ago.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, hostfacts, oci, podman, seccomp
from ringfence.sandbox.container import ENGINES, ContainerBackend
from ringfence.sandbox.gvisor import FLAGS, GvisorBackend
from ringfence.sandbox.profile import PATH
from ringfence.sandbox.protocol import Backend, SandboxSpec
from ringfence.worker.ids import new_id

PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
BLOCK = 3_000_000_000


def spent() -> float:
    """Processor seconds of this process and of all that it has waited for."""
    own, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def bundle(place: Path, runtime: str) -> Path:
    """A bundle for the raw tool: the same mounts, namespaces and filter over plain directories."""
    stage = place / "stage"
    for name in ("etc", "tmp", "shm", "home", "workspace"):
        (stage / name).mkdir(parents=True)
    (stage / "etc" / "hostname").write_text("sandbox\n")
    for path in (place, stage, *stage.iterdir()):
        path.chmod(0o755)
    facts = hostfacts.empty_place()
    settings: dict[str, Any] = json.loads(
        json.dumps(
            oci.config(
                SandboxProfile(),
                facts,
                argv=["true"],
                environment={"PATH": PATH},
                cwd="/",
                seccomp=seccomp.oci(platform.machine()),
                namespaces=(*oci.NAMESPACES, "pid", "network", "user"),
            )
        ).replace(facts.stage + "/", f"{stage}/")
    )
    if runtime == "runsc":
        # it takes no filter here, because ours is not set by it either, and no network of ours
        del settings["linux"]["seccomp"]
    lines = [{"containerID": 0, "hostID": BLOCK, "size": 65536}]
    settings["linux"] |= {"uidMappings": lines, "gidMappings": lines}
    root = place / "bundle" / "rootfs"
    root.mkdir(parents=True)
    for path in (root, root.parent):
        path.chmod(0o755)
        os.chown(path, BLOCK, BLOCK)
    for name, target in facts.links.items():
        (root / name).symlink_to(target)
    (root.parent / "config.json").write_text(json.dumps(settings))
    return root.parent


_LEFT_OUT = {
    *("--pidfile", "--runtime", "--ipc", "--network", "--pid", "--cgroups", "--pids-limit"),
    *("--dns", "--ulimit"),
}
"""Of our options to podman, each with a value: what only one in a sandbox's own namespaces and
control groups is told.
"""


_LIMITS = (
    *("--network", "none", "--memory", "2g", "--cpus", "2", "--pids-limit", "256"),
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
)


def podman_words(place: Path) -> list[str]:
    """`podman run` as a user would type it for the same container, crun below it. Its storage stays
    from round to round, where ours is new each time.
    """
    settings = json.loads((place / "bundle" / "config.json").read_text())
    options, _ = podman.run_options(settings, str(place / "bundle"), {"PATH": PATH})
    split = options.index("run")
    words = ["podman", *_kept(options[:split]), "--runtime", str(shutil.which("crun", path=PATHS))]
    words += ["run", "--rm", *_LIMITS]
    (place / "bundle" / "seccomp.json").write_text(json.dumps(settings["linux"]["seccomp"]))
    return words + _kept(options[split + 1 :])


def _kept(options: list[str]) -> list[str]:
    """Without those, and without our /dev: podman makes its own, and a terminal's."""
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word in _LEFT_OUT:
            next(words)
        elif word in {"--tmpfs", "--volume"}:
            value = next(words)
            kept += [] if value.startswith("/dev:") or ":/dev/pts:" in value else [word, value]
        elif word != "--detach":
            kept.append(word)
    return kept


def command(runtime: str, place: Path, number: int) -> list[str]:
    """The raw tool's command line for the bundle."""
    program = str(shutil.which(runtime, path=PATHS))
    if runtime == "podman":
        words = podman_words(place)
    else:
        words = [program, "--root", str(place / "state"), *(FLAGS if runtime == "runsc" else ())]
        words += ["run"] if runtime == "runsc" else ["run", "--no-new-keyring"]
        words += ["--bundle", str(place / "bundle"), f"bench-{os.getpid()}-{number}"]
    if runtime not in {"crun", "podman"}:
        return words
    # crun stops at a mix of control group versions; ringfence hides them from it
    hide = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    private = ["unshare", "-m", "--propagation", "private"]
    return [*private, "sh", "-c", hide, "sh", *words]


def raw(runtime: str, place: Path, number: int) -> tuple[float, float]:
    """Seconds of one `run`, and processor seconds."""
    words = command(runtime, place, number)
    start, before = time.perf_counter(), spent()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, spent() - before


STATES = ("after a pause", "after a move")
_PAUSE_SECONDS = 0.8
"""A worker's spare launcher is ready again, and the kernel no longer ready to move a process."""


async def settled(state: str) -> None:
    """Have the machine in one of `STATES`."""
    await asyncio.sleep(_PAUSE_SECONDS)
    if state == "after a move":
        await asyncio.to_thread(cgroups.await_moves)


async def ours(backend: Backend, place: Path, state: str) -> tuple[float, float, float]:
    """Seconds of a whole sandbox, and processor seconds; seconds of one more program in it."""
    spec = SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=SandboxProfile(),
        workspace=place / "workspace",
        state_dir=place / "state",
    )
    await settled(state)
    start, before = time.perf_counter(), spent()
    sandbox = await backend.start(spec)
    try:
        code = await (await sandbox.exec(["true"])).wait()
        whole, processor = time.perf_counter() - start, spent() - before
        await settled(state)
        start = time.perf_counter()
        code += await (await sandbox.exec(["true"])).wait()
        more = time.perf_counter() - start
    finally:
        await sandbox.close()
    if code:
        raise RuntimeError("the program failed")
    return whole, processor, more


async def one_round(
    runtime: str, backend: Backend, place: Path, number: int, state: str
) -> dict[str, float]:
    """Seconds of each side, and of podman beside a container."""
    whole, processor, more = await ours(backend, place, state)
    await settled(state)
    plain, cpu = await asyncio.to_thread(raw, runtime, place, number)
    found = {"raw": plain, "ours": whole, "one more": more, "raw cpu": cpu, "ours cpu": processor}
    beside = runtime in {"runc", "crun"} and shutil.which("podman", path=PATHS) is not None
    if beside and state == STATES[0]:
        await settled(state)
        found["podman"] = (await asyncio.to_thread(raw, "podman", place, number))[0]
    return found


async def compare(runtime: str, rounds: int, state: str) -> dict[str, list[float]]:
    """Times of all, in turn."""
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Path(name)
        for one in ("workspace", "state"):
            (place / one).mkdir(mode=0o700)
        bundle(place, runtime)
        backend: Backend = (
            GvisorBackend(state_dir=place / "state")
            if runtime == "runsc"
            else ContainerBackend(state_dir=place / "state", engine=runtime)
        )
        backend.warm()
        try:
            for number in range(rounds + 1):
                found = await one_round(runtime, backend, place, number, state)
                if number:  # the first round warms the page cache
                    for kind, seconds in found.items():
                        times.setdefault(kind, []).append(seconds)
        finally:
            await backend.close()
    return times


def show(runtime: str, times: dict[str, list[float]]) -> None:
    """Print what was measured."""
    summary: Callable[[list[float]], float] = statistics.median
    for name, values in times.items():
        beside = times["raw cpu" if name.endswith("cpu") else "raw"]
        print(
            f"{runtime} {name:9} median {summary(values) * 1000:5.1f} ms   best "
            f"{min(values) * 1000:5.1f} ms   {summary(values) / summary(beside):.2f}x of raw, best "
            f"to best {min(values) / min(beside):.2f}x (target 1.20)"
        )
    if podmans := times.get("podman"):
        whole = times["ours"]
        print(
            f"{runtime} ours beside `podman run`: {summary(whole) / summary(podmans):.2f}x, best "
            f"to best {min(whole) / min(podmans):.2f}x"
        )


def main(arguments: list[str]) -> None:
    """Entry."""
    if os.geteuid() != 0:
        print("the raw tools need root for the same rules: left out")
        return
    rounds = int(arguments[0]) if arguments else 15
    for runtime in arguments[1:] or (*ENGINES, "runsc"):
        if shutil.which(runtime, path=PATHS) is None:
            print(f"{runtime}: apt-get install {runtime}")
            continue
        for state in STATES:
            print(f"{runtime}, {state}:")
            show(runtime, asyncio.run(compare(runtime, rounds, state)))


if __name__ == "__main__":
    main(sys.argv[1:])
