"""A program's start in each isolation technology, beside the raw tool with the same rules.

`python -m benchmarks.container [rounds [runtime …]]`. The raw side of a container is `RUNTIME run` with the
very configuration that ringfence gave its own, run by root; ours makes the place, joins the
control groups, reads everything back and throws it all away. `podman run --rm` with the same mounts,
ids, filter and limits is measured beside each container, as the tool that most people would take;
docker's daemon has to run for `docker run`, and none is started here.
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
from ringfence.sandbox import hostfacts, oci, podman, seccomp
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


async def ours(backend: Backend, place: Path) -> tuple[float, float, float]:
    """Seconds of a whole sandbox, and processor seconds; seconds of one more program in it."""
    spec = SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=SandboxProfile(),
        workspace=place / "workspace",
        state_dir=place / "state",
    )
    start, before = time.perf_counter(), spent()
    sandbox = await backend.start(spec)
    try:
        code = await (await sandbox.exec(["true"])).wait()
        whole, processor = time.perf_counter() - start, spent() - before
        await asyncio.sleep(0.8)  # as above
        start = time.perf_counter()
        code += await (await sandbox.exec(["true"])).wait()
        more = time.perf_counter() - start
    finally:
        await sandbox.close()
    if code:
        raise RuntimeError("the program failed")
    return whole, processor, more


async def compare(runtime: str, rounds: int) -> dict[str, list[float]]:
    """Times of both, and of podman beside a container, in turn."""
    beside = runtime in {"runc", "crun"} and shutil.which("podman", path=PATHS) is not None
    kinds = ("raw", "ours", "one more", "raw cpu", "ours cpu", *(("podman",) if beside else ()))
    times: dict[str, list[float]] = {name: [] for name in kinds}
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
                await asyncio.sleep(0.8)  # a worker's spare launcher is ready again
                whole, processor, more = await ours(backend, place)
                plain, cpu = await asyncio.to_thread(raw, runtime, place, number)
                podmans, _ = (
                    await asyncio.to_thread(raw, "podman", place, number) if beside else (0.0, 0.0)
                )
                if number:  # the first round warms the page cache
                    times["ours"].append(whole)
                    times["one more"].append(more)
                    times["raw"].append(plain)
                    times["ours cpu"].append(processor)
                    times["raw cpu"].append(cpu)
                    times.get("podman", []).append(podmans)
        finally:
            await backend.close()
    return times


def main(arguments: list[str]) -> None:
    """Entry."""
    if os.geteuid() != 0:
        print("the raw tools need root for the same rules: left out")
        return
    rounds = int(arguments[0]) if arguments else 15
    summary: Callable[[list[float]], float] = statistics.median
    for runtime in arguments[1:] or (*ENGINES, "runsc"):
        if shutil.which(runtime, path=PATHS) is None:
            print(f"{runtime}: apt-get install {runtime}")
            continue
        times = asyncio.run(compare(runtime, rounds))
        for name, values in times.items():
            beside = times["raw cpu" if name.endswith("cpu") else "raw"]
            base = summary(beside)
            print(
                f"{runtime} {name:9} median {summary(values) * 1000:5.0f} ms   best "
                f"{min(values) * 1000:5.0f} ms   {summary(values) / base:.2f}x of raw, best to "
                f"best {min(values) / min(beside):.2f}x (target 1.20)"
            )
        if podmans := times.get("podman"):
            whole = times["ours"]
            print(
                f"{runtime} ours beside `podman run`: {summary(whole) / summary(podmans):.2f}x, best "
                f"to best {min(whole) / min(podmans):.2f}x"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
