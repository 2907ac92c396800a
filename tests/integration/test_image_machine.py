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
from ringfence.images.store import ImageStore
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
PROGRAMS = {"packer": ("gzip", "/usr/bin/gzip"), "differ": ("diffutils", "/usr/bin/cmp")}
"""Image to the package that it alone has, essential on every Debian, and its program."""


class Made(NamedTuple):
    """A state directory with both images, and their digests by name."""

    state: Path
    digests: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    if not Path("/var/lib/dpkg/info/gzip.list").exists():
        pytest.skip("needs a Debian host, of whose packages the images are made")
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


async def run(backend: MicrovmBackend, made: Made, place: Path, image: str, script: str) -> Seen:
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


def test_a_machine_has_the_packages_of_the_image_whose_digest_is_named(
    made: Made, tmp_path: Path
) -> None:
    """By the content's own name. Its system cannot be written, and what is the agent's can."""
    shut = ["/usr/bin/new", "/usr/lib/new", "/etc/new", "/new"]
    open_ = ["/tmp/new", "/workspace/new", "/home/agent/new"]
    write = (
        f"for one in {' '.join(shut + open_)}; do if said=$( (: >$one) 2>&1 ); "
        'then echo "wrote $one"; else echo "${said##*: } $one"; fi; done\n'
    )
    mounts = "while read -r _ at _ how _; do [ $at = / ] && echo ${how%%,*}; done </proc/mounts\n"

    async def work() -> Seen:
        backend = MicrovmBackend(state_dir=made.state)
        try:
            digest = made.digests["packer"]
            return await run(backend, made, tmp_path, digest, LOOK + write + mounts)
        finally:
            await backend.close()

    seen = asyncio.run(work())
    assert seen.image == made.digests["packer"]
    assert seen.lines == [
        *expected(made, "packer"),
        *(f"Read-only file system {one}" for one in shut),
        *(f"wrote {one}" for one in open_),
        "ro",
    ]


def test_a_saved_or_waiting_machine_has_seen_no_image(made: Made, tmp_path: Path) -> None:
    """One snapshot serves both images because neither is in it: it is written once, before any
    is there. And one that had an image is never had again.
    """

    async def work(backend: MicrovmBackend) -> list[Seen]:
        backend.warm()  # the later ones get a guest that waited for nobody in particular
        found = []
        for image in ("packer", "differ", "packer", "differ"):
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
    for image, one in zip(("packer", "differ", "packer", "differ"), seen, strict=True):
        assert one.lines == expected(made, image)
        assert one.image == made.digests[image]
    assert len({id(one.machine) for one in seen}) == len(seen)
    assert saved(made.state) == digests
    (path,) = (made.state / "microvm").glob("snapshot-*[!6]")
    held = path.read_bytes()
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
