"""A program's start in each isolation technology, beside the raw tool with the same rules.

`python -m benchmarks.container [rounds [runtime …]]`. The raw side of a container is `RUNTIME run` with the
very configuration that ringfence gave its own, run by root; ours makes the place, joins the
control groups, reads everything back and throws it all away.
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
from ringfence.sandbox import hostfacts, oci, seccomp
from ringfence.sandbox.container import RUNTIMES, ContainerBackend
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


def raw(runtime: str, place: Path, number: int) -> tuple[float, float]:
    """Seconds of one `run`, and processor seconds."""
    gvisor = runtime.endswith("runsc")
    words = [runtime, "--root", str(place / "state"), *(FLAGS if gvisor else ())]
    words += ["run"] if gvisor else ["run", "--no-new-keyring"]
    # crun stops at a mix of control group versions; ringfence hides them from it
    hide = "umount /sys/fs/cgroup/unified 2>/dev/null; " if runtime.endswith("crun") else ""
    words = [*words, "--bundle", str(place / "bundle"), f"bench-{os.getpid()}-{number}"]
    if hide:
        words = [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            hide + 'exec "$@"',
            "sh",
            *words,
        ]
    start, before = time.perf_counter(), spent()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
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
    """Times of both, alternating."""
    kinds = ("raw", "ours", "one more", "raw cpu", "ours cpu")
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
        program = str(shutil.which(runtime, path=PATHS))
        try:
            for number in range(rounds + 1):
                await asyncio.sleep(0.8)  # a worker's spare launcher is ready again
                whole, processor, more = await ours(backend, place)
                plain, cpu = await asyncio.to_thread(raw, program, place, number)
                if number:  # the first round warms the page cache
                    times["ours"].append(whole)
                    times["one more"].append(more)
                    times["raw"].append(plain)
                    times["ours cpu"].append(processor)
                    times["raw cpu"].append(cpu)
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
    for runtime in arguments[1:] or (*RUNTIMES, "runsc"):
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


if __name__ == "__main__":
    main(sys.argv[1:])
