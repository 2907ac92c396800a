"""Images in virtual machines: the one that is named by its content is what a guest has, and no
machine that was saved or waits has seen any.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from backends import needs
from images import built
from leaks import descendants
from ringfence.images.store import ImageStore
from ringfence.inside import guest
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.launcher import Spare
from ringfence.sandbox.microvm import MicrovmBackend, MicrovmSandbox
from ringfence.sandbox.microvm_image import Image as BootImage
from ringfence.sandbox.microvm_machine import Machine, Snapshots
from ringfence.sandbox.microvm_profile import TRANSLATED, memory_mb
from ringfence.sandbox.protocol import Control, SandboxSpec
from ringfence.testing.sandbox_contract import shell

pytestmark = [pytest.mark.storm, pytest.mark.timeout(1800), needs("microvm")]
LIMITS = Limits(memory_mb=256, pids=64, disk_mb=64, cpus=1.0, file_mb=32)
ACCEPTED = (
    frozenset()
    if os.geteuid() == 0
    else frozenset({Control.MEMORY.value, Control.CPU.value, Control.PIDS.value})
)
INSTALLED = [
    name
    for name in ("bc", "patch", "time", "make", "jq")
    if Path(f"/var/lib/dpkg/info/{name}.list").exists() and Path(f"/usr/bin/{name}").is_file()
]
"""Packages that no base has, of those that the host has, each with a program of its name."""
PROGRAMS = {f"with-{name}": (name, f"/usr/bin/{name}") for name in INSTALLED[:2]}
"""Image to the package that it alone has, and its program."""
FIRST, SECOND = [*PROGRAMS, "none", "none"][:2]


class Made(NamedTuple):
    """A state directory with both images, and their digests by name."""

    state: Path
    digests: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    if len(PROGRAMS) < 2:
        pytest.skip("needs a Debian host with two of bc, patch, time, make and jq")
    place = tmp_path_factory.mktemp("images")
    state = place / "state"
    state.mkdir(mode=0o700)
    digests = {}
    for name, (package, _) in PROGRAMS.items():
        definition = place / f"{name}.yaml"
        packages = {"apt": ["bash", "coreutils", package]}
        words = {"version": 1, "source": "host", "claude": False, "packages": packages}
        definition.write_text(json.dumps(words))
        digests[name] = built(state, definition, "--name", name)["digest"]
    return Made(state, digests)


class Seen(NamedTuple):
    """Of one run in a machine: what was shown, what the machine was, and the image that it had."""

    lines: list[str]
    machine: Machine
    image: str


async def run(
    backend: MicrovmBackend,
    made: Made,
    place: Path,
    image: str,
    script: str,
    mounts: list[tuple[str, set[str]]] | None = None,
) -> Seen:
    """`mounts` is given what virtiofsd can open, while the machine is there."""
    (place / "workspace").mkdir(exist_ok=True)
    rules = SandboxProfile(emulation=True, limits=LIMITS, accept_unenforced=ACCEPTED)
    sandbox = await backend.start(
        SandboxSpec(
            sandbox_id=f"sb_{0:026d}",
            profile=replace(rules, image=image),
            workspace=place / "workspace",
            state_dir=made.state,
        )
    )
    try:
        assert isinstance(sandbox, MicrovmSandbox)
        assert sandbox._machine is not None
        assert sandbox._image is not None
        _, output = await shell(sandbox, script)
        if mounts is not None:
            mounts += exported()
        return Seen(output.splitlines(), sandbox._machine, sandbox._image.digest)
    finally:
        await sandbox.close()


LOOK = "".join(
    f"sha256sum <{program} 2>/dev/null || echo no {name}\n"
    for name, (_, program) in PROGRAMS.items()
)


def expected(made: Made, image: str) -> list[str]:
    rootfs = ImageStore(made.state).find(image).rootfs
    return [
        f"{hashlib.sha256((rootfs / program.lstrip('/')).read_bytes()).hexdigest()}  -"
        if name == image
        else f"no {name}"
        for name, (_, program) in PROGRAMS.items()
    ]


def exported() -> list[tuple[str, set[str]]]:
    """What our virtiofsd can open for a guest: (path in its own file system, mount options)."""
    found = []
    for pid, words in descendants(os.getpid()):
        if words.split(b"\0")[0].endswith(b"virtiofsd"):
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
                _, _, _, root, _, options = line.split()[:6]
                found.append((root, set(options.split(","))))
    return found


def test_a_machine_has_the_packages_of_the_image_whose_digest_is_named(
    made: Made, tmp_path: Path
) -> None:
    """By the content's own name. Its system cannot be written, and what is the agent's can: that
    is not the guest's to decide, but lies in the mounts of who opens files for it.
    """
    shut = ["/usr/bin/new", "/usr/lib/new", "/etc/new", "/new"]
    open_ = ["/tmp/new", "/workspace/new", "/home/agent/new"]
    write = (
        f"for one in {' '.join(shut + open_)}; do "
        "if (: >$one) 2>/dev/null; then echo wrote $one; else echo no $one; fi; done\n"
    )
    mounts: list[tuple[str, set[str]]] = []

    async def work() -> Seen:
        backend = MicrovmBackend(state_dir=made.state)
        try:
            digest = made.digests[FIRST]
            return await run(backend, made, tmp_path, digest, LOOK + write, mounts)
        finally:
            await backend.close()

    seen = asyncio.run(work())
    assert seen.image == made.digests[FIRST]
    assert seen.lines == [
        *expected(made, FIRST),
        *(f"no {one}" for one in shut),
        *(f"wrote {one}" for one in open_),
    ]
    tree = f"/images/trees/{made.digests[FIRST].removeprefix('sha256:')}/rootfs/"
    of_image = [(root, options) for root, options in mounts if tree in root]
    assert any(root.endswith("/usr") for root, _ in of_image)
    assert all("ro" in options for _, options in of_image)
    assert any("rw" in options for _, options in mounts)


TURNS = (FIRST, SECOND, FIRST, SECOND)


def test_a_saved_or_waiting_machine_has_seen_no_image(made: Made, tmp_path: Path) -> None:
    """One snapshot serves both images because neither is in it: it is written once, before any
    is there. And one that had an image is never had again.
    """

    async def work(backend: MicrovmBackend) -> list[Seen]:
        backend.warm()  # the later ones get a guest that waited for nobody in particular
        found = []
        for image in TURNS:
            found.append(await run(backend, made, tmp_path, image, LOOK))
            if len(found) > 1:
                async with asyncio.timeout(120):
                    while not backend._warm:
                        await asyncio.sleep(0.1)
                await next(iter(backend._warm.values()))
            elif not digests:
                digests.extend(saved(made.state))
        await backend.close()
        return found

    digests: list[str] = []
    seen = asyncio.run(work(MicrovmBackend(state_dir=made.state)))
    for image, one in zip(TURNS, seen, strict=True):
        assert one.lines == expected(made, image)
        assert one.image == made.digests[image]
    assert len({id(one.machine) for one in seen}) == len(seen)
    assert saved(made.state) == digests
    (path,) = (made.state / "microvm").glob("snapshot-*[!6]")
    held = path.read_bytes()
    code = Path(guest.__file__).read_bytes()
    assert code[1000:1064] in held  # what is in the guest's memory can be found there
    for name, (_, program) in PROGRAMS.items():
        data = (ImageStore(made.state).find(name).rootfs / program.lstrip("/")).read_bytes()
        assert data[4096:4160] not in held
        assert made.digests[name].encode() not in held


def saved(state: Path) -> list[str]:
    place = state / "microvm"
    return sorted(f"{p.name} {p.read_text()}" for p in place.glob("snapshot-*.sha256"))


def test_a_snapshot_is_of_one_kernel_and_one_first_file_system(tmp_path: Path) -> None:
    """What is booted is named by its content too: of other content another snapshot is made."""

    def key(digest: str, accelerator: str = TRANSLATED) -> str:
        image = BootImage(tmp_path / "kernel", tmp_path / "initramfs", digest)
        snapshots = Snapshots(tmp_path, image, range(1), Spare(), accelerator)
        return snapshots._key(memory_mb(LIMITS))

    assert key("a") == key("a")
    assert key("a") != key("b")
    assert key("a") != key("a", "kvm")
