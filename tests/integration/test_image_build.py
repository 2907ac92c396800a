"""Real builds. One of the whole image in a session at most, kept between sessions below
~/.cache/ringfence-test under a name that changes with the builder's own code.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends import needs
from images import built, cache, ringfence_image
from ringfence.errors import UnavailableError
from ringfence.images import fetch, store, tree
from ringfence.images.contents import packages_in
from ringfence.images.image import Image
from ringfence.images.inside import command
from ringfence.images.process import Tools, find_tool
from ringfence.images.whole import differences
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.protocol import Backend
from ringfence.testing.sandbox_base import SandboxClauses
from ringfence.worker.launch import bundled_claude

ROOT = Path(__file__).parents[2]
SMALL = {"version": 1, "source": "host", "claude": False, "packages": {"apt": ["python3"]}}
MINUTES = 60
FULL = 12 * MINUTES

on_debian = pytest.mark.skipif(find_tool("dpkg-query") is None, reason="needs dpkg")
with_mmdebstrap = pytest.mark.skipif(
    find_tool("mmdebstrap") is None or find_tool("newuidmap") is None,
    reason="needs mmdebstrap and uidmap (apt-get install mmdebstrap uidmap)",
)


def has_python3_of_debian() -> bool:
    return Path("/var/lib/dpkg/info/python3.list").exists()


def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture(scope="module")
def whole() -> Image:
    """The built-in image, from the mirrors; workers of one session wait for each other."""
    state = cache()
    state.mkdir(parents=True, exist_ok=True)
    with (state / "test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ringfence_image(state, "build", "--json")
    if "Could not resolve" in done.stdout or "Temporary failure" in done.stdout:
        pytest.skip("no Debian mirror can be reached from here")
    assert done.returncode == 0, done.stdout + done.stderr
    return store.require(state)


def inside(image: Image, *program: str) -> str:
    """Run in the image as uid 1000 where we are root, and as the tree's owner otherwise."""
    dropped = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    words = [*(dropped if os.geteuid() == 0 else []), *program]
    done = subprocess.run(
        command(image.rootfs, image.rootfs / "workspace", words),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@with_mmdebstrap
@pytest.mark.timeout(FULL)
def test_the_whole_image_is_whole_and_works(whole: Image) -> None:
    assert differences(whole) == []
    inside(whole, "python3", "-c", "import anthropic, mcp, pydantic")
    assert inside(whole, "git", "--version").startswith("git version")
    assert inside(whole, "rg", "--version").startswith("ripgrep")
    assert "Claude Code" in inside(whole, "/opt/ringfence/bin/claude", "--version")
    assert not list(whole.rootfs.glob("etc/apt/sources.list*"))
    packages = whole.manifest["packages"]
    assert {"anthropic", "mcp", "pydantic"} <= packages["pip"].keys()
    assert {"git", "ripgrep", "python3", "ca-certificates"} <= packages["apt"].keys()


@with_mmdebstrap
@pytest.mark.timeout(FULL)
@pytest.mark.parametrize(
    "technology",
    [
        pytest.param(BubblewrapBackend, marks=needs("bubblewrap")),
        pytest.param(ContainerBackend, marks=needs("container")),
        pytest.param(GvisorBackend, marks=needs("gvisor")),
    ],
)
class TestAsTheSystem(SandboxClauses):
    # one command does ten programs' work, claude's start and 1500 imports among it
    patience = 4.0

    @pytest.fixture
    def backend(self, technology: Callable[..., Backend]) -> Backend:
        return technology(state_dir=cache())

    def test_what_an_agent_needs_works(
        self, whole: Image, backend: Backend, tmp_path: Path
    ) -> None:
        """All of it of the image, as uid 1000; and claude, which is the host's."""
        (tmp_path / "workspace").mkdir()
        tmp_path.chmod(0o700)
        spec = self.spec(backend, tmp_path, image=whole.digest)
        limits = replace(spec.profile.limits, memory_mb=1024, pids=256, file_mb=1024)
        spec = replace(spec, profile=replace(spec.profile, limits=limits), claude=bundled_claude())
        command = (
            "id -u; python3 -c 'import anthropic, mcp, pydantic; print(anthropic.__file__)';"
            "pip --version; python3 -m venv --without-pip /tmp/v && echo venv; git init -q /tmp/g;"
            "git -C /tmp/g status -s -b; echo needle > /tmp/g/hay; rg -c needle /tmp/g;"
            "claude --version; ls /opt/ringfence/bin"
        )
        status, output = self.inside(backend, spec, command)
        assert status == 0
        lines = output.splitlines()
        assert lines[0] == "1000"
        assert lines[1].startswith("/usr/local/lib/python3")
        assert lines[2].startswith("pip ")
        assert lines[3] == "venv"
        assert lines[4].startswith("## No commits yet")
        assert lines[5] == "/tmp/g/hay:1"
        assert "Claude Code" in lines[6]
        assert lines[7:] == ["claude"]


@with_mmdebstrap
@pytest.mark.timeout(FULL)
def test_modules_are_compiled_and_never_compiled_again(whole: Image) -> None:
    code = "import anthropic, sys; print(anthropic.__cached__)"
    cached = whole.rootfs / inside(whole, "python3", "-c", code).lstrip("/")
    assert int.from_bytes(cached.read_bytes()[4:8], "little") == 0b01  # PEP 552: unchecked hash


@with_mmdebstrap
@pytest.mark.timeout(FULL)
def test_a_second_build_does_nothing(whole: Image) -> None:
    began = whole.rootfs.stat().st_ctime_ns
    again = built(cache())
    assert again["cached"]
    assert again["digest"] == whole.digest
    assert whole.rootfs.stat().st_ctime_ns == began


DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def docker_words(command: str) -> set[str]:
    """Names after `command` in the Dockerfile's last stage."""
    stage = DOCKERFILE.rsplit("\nFROM ", 1)[1].replace("\\\n", " ")
    words: set[str] = set()
    for found in re.findall(rf"{command} ([^&\n]*)", stage):
        words |= {word for word in found.split() if not word.startswith("-")}
    return words


@with_mmdebstrap
@pytest.mark.timeout(FULL)
def test_the_dockerfile_gives_what_the_image_gives(whole: Image) -> None:
    packages = whole.manifest["packages"]
    asked = whole.manifest["definition"]["packages"]
    assert docker_words("pip install") == set(asked["pip"])
    assert docker_words("pip install") <= packages["pip"].keys()
    python = {"python3", "python3-pip", "python3-venv"}  # the base image's own
    assert docker_words("apt-get install") == set(asked["apt"]) - python
    assert docker_words("apt-get install") <= packages["apt"].keys()
    passwd = (whole.rootfs / "etc/passwd").read_text()
    assert re.search(r"useradd -m -s /bin/bash -u 1000 agent\b", DOCKERFILE)
    assert "\nagent:x:1000:1000::/home/agent:/bin/bash\n" in passwd
    assert "USER agent" in DOCKERFILE
    assert "WORKDIR /workspace" in DOCKERFILE
    assert f"/{tree.CLAUDE}" in DOCKERFILE
    assert (whole.rootfs / tree.CLAUDE).stat().st_mode & 0o111
    assert (whole.rootfs / "workspace").is_dir()
    pinned = re.search(r'"(claude-agent-sdk==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert pinned[1] in DOCKERFILE


@pytest.fixture
def storage() -> Iterator[Path]:
    """podman's own, apart from the host's; podman refuses a long path."""
    place = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
    yield place
    shutil.rmtree(place)


def podman(*arguments: str | Path, storage: Path, feed: Any = None) -> str:
    done = subprocess.run(
        ["podman", "--root", storage / "r", "--runroot", storage / "rr", "--storage-driver", "vfs",
         "--cgroup-manager", "cgroupfs", *arguments],
        stdin=feed, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.root
@on_debian
@pytest.mark.skipif(shutil.which("podman") is None, reason="needs podman (apt-get install podman)")
@pytest.mark.skipif(not has_python3_of_debian(), reason="needs Debian's python3 on the host")
@pytest.mark.timeout(FULL)
def test_podman_takes_every_form(tmp_path: Path, storage: Path) -> None:
    state = tmp_path / "state"
    built(state, small(tmp_path), "--name", "small")
    for form, tag in (("docker-archive", "localhost/d:1"), ("oci", "localhost/o:1")):
        file = tmp_path / form
        done = ringfence_image(state, "export", "small", "--format", form, "--tag", tag, "-o", file)
        assert done.returncode == 0, done.stderr
        assert tag in podman("load", "-i", file, storage=storage)
        (found,) = json.loads(podman("image", "inspect", tag, storage=storage))
        assert found["Config"]["User"] == "1000:1000"
        assert found["Config"]["WorkingDir"] == "/workspace"
        file.unlink()
    tar = tmp_path / "tar"
    assert ringfence_image(state, "export", "small", "--format", "tar", "-o", tar).returncode == 0
    podman("import", tar, "localhost/t:1", storage=storage)
    place = Path(podman("image", "mount", "localhost/d:1", storage=storage).strip())
    try:
        image = store.require(state, "small")
        mounted = tree.render(tree.scan(place))
        assert tree.digest_of(mounted) == image.digest
        assert (place / "home/agent").stat().st_uid == 1000
    finally:
        podman("image", "umount", "localhost/d:1", storage=storage)


@on_debian
@pytest.mark.skipif(not has_python3_of_debian(), reason="needs Debian's python3 on the host")
@pytest.mark.timeout(FULL)
def test_two_builds_of_the_same_host_have_one_digest(tmp_path: Path) -> None:
    one = built(tmp_path / "1", small(tmp_path))
    two = built(tmp_path / "2", small(tmp_path))
    assert not one["cached"]
    assert not two["cached"]
    assert one["digest"] == two["digest"]
    image = store.require(tmp_path / "1")
    inside(image, "python3", "-c", "import ssl, json")
    done = ringfence_image(tmp_path / "1", "verify")
    assert done.returncode == 0, done.stdout
    victim = image.rootfs / "usr/lib/os-release"
    content = victim.read_bytes()
    victim.write_bytes(content[:-2] + b"!" + content[-1:])
    os.utime(victim, (tree.EPOCH, tree.EPOCH))
    done = ringfence_image(tmp_path / "1", "verify")
    assert done.returncode == 4
    assert done.stdout == "/usr/lib/os-release differs in content\n"


@pytest.mark.skipif(find_tool("npm") is None, reason="needs npm")
@pytest.mark.timeout(FULL)
def test_node_packages_come_without_what_names_their_index(tmp_path: Path) -> None:
    (tmp_path / "root/usr/local").mkdir(parents=True)
    tools = Tools(log=tmp_path / "log", scratch=tmp_path)
    packages = ["typescript@5.9.3"]
    try:
        fetch.node_packages(tools, packages, tmp_path / "root", tmp_path / "work")
    except UnavailableError:
        if re.search("ENOTFOUND|EAI_AGAIN|ECONNREFUSED", (tmp_path / "log").read_text()):
            pytest.skip("no index of npm can be reached from here")
        raise
    assert packages_in(tmp_path / "root")["npm"] == {"typescript": "5.9.3"}
    modules = tmp_path / "root/usr/local/lib/node_modules"
    assert (tmp_path / "root/usr/local/bin/tsc").resolve().is_relative_to(modules)
    assert not list(modules.rglob(".package-lock.json"))
    assert "_resolved" not in (modules / "typescript/package.json").read_text()


def left_over(state: Path, temporary: Path) -> list[str]:
    found = [str(path) for path in (state / "images").glob("building-*")]
    found += [str(path) for path in temporary.iterdir()]
    return found + [
        line
        for line in Path("/proc/mounts").read_text().splitlines()
        if str(state) in line or str(temporary) in line
    ]


def processes_of(temporary: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(temporary).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def interrupted(tmp_path: Path, number: int, *, until: str) -> tuple[int, Path, Path]:
    """Start a real build, send a signal when a program has said `until`; its status."""
    state, temporary = tmp_path / "state", tmp_path / "temporary"
    temporary.mkdir()
    for place in (temporary, *temporary.parents):
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            # an ordinary user's builder has other ids, which have to come through
            place.chmod(place.stat().st_mode | 0o055)
    definition = tmp_path / "d.yaml"
    definition.write_text(json.dumps({"version": 1, "claude": False}))
    process = subprocess.Popen(
        [sys.executable, "-m", "ringfence", "image", "build", definition],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(state), "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = state / "images" / "last-build.log"
    end = time.monotonic() + 4 * MINUTES
    while until not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(number)
    return process.wait(60), state, temporary


@with_mmdebstrap
@pytest.mark.timeout(FULL)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, number: int) -> None:
    status, state, temporary = interrupted(tmp_path, number, until="I: running apt-get update")
    assert status == 130
    assert left_over(state, temporary) == []
    assert processes_of(temporary) == []
    assert store.ImageStore(state).names() == {}


@pytest.mark.storm
@with_mmdebstrap
@pytest.mark.timeout(FULL)
def test_what_a_killed_build_left_the_next_one_takes_away(tmp_path: Path) -> None:
    status, state, temporary = interrupted(
        tmp_path, signal.SIGKILL, until="I: installing essential packages"
    )
    assert status == -signal.SIGKILL
    end = time.monotonic() + MINUTES
    while processes_of(temporary) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(temporary) == []
    assert not [
        line for line in Path("/proc/mounts").read_text().splitlines() if str(temporary) in line
    ]
    assert left_over(state, temporary)  # it was killed: nobody could
    built(state, small(tmp_path))
    assert left_over(state, temporary) == []


@pytest.mark.storm
@with_mmdebstrap
@pytest.mark.timeout(2 * FULL)
def test_a_rebuild_from_the_mirrors_has_the_same_digest(whole: Image, tmp_path: Path) -> None:
    assert built(tmp_path / "again")["digest"] == whole.digest


@with_mmdebstrap
def test_without_mmdebstrap_the_apt_line_is_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dpkg", "apt-get", "apt-config", "setpriv"):
        (tools / name).symlink_to(find_tool(name) or name)
    # a host with nothing else on PATH, in a name space where sbin has none either
    code = (
        "import ringfence.images.process as p, sys; p._SBIN = '/nonexistent';"
        "from ringfence.wiring import main; sys.argv = ['ringfence', 'image', 'build', '--json'];"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": str(tools), "HOME": str(tmp_path), "RINGFENCE_STATE_DIR": str(tmp_path / "s")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "image-tool-missing"
    assert "apt-get install mmdebstrap" in error["hint"]
    assert "--from-host" in error["hint"]


@on_debian
@pytest.mark.timeout(FULL)
def test_a_package_that_no_mirror_has_fails_with_apt_s_own_words(tmp_path: Path) -> None:
    if find_tool("mmdebstrap") is None or (os.geteuid() and find_tool("newuidmap") is None):
        pytest.skip("needs mmdebstrap and uidmap (apt-get install mmdebstrap uidmap)")
    definition = tmp_path / "d.yaml"
    definition.write_text(
        json.dumps({"version": 1, "claude": False, "packages": {"apt": ["no-such-package-here"]}})
    )
    done = ringfence_image(tmp_path / "s", "build", definition, "--json")
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "image-build-failed"
    assert "no-such-package-here" in error["message"]
    assert list((tmp_path / "s" / "images").glob("building-*")) == []
