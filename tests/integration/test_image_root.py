"""Sandboxes whose system is an image: nothing of the host's is there, what the image has works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backends import needs, settings
from images import copy_of_small
from ringfence.errors import UnavailableError
from ringfence.images import store
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.protocol import Backend, SandboxSpec
from ringfence.testing.sandbox_base import SandboxClauses, shell

pytestmark = pytest.mark.timeout(600)

TECHNOLOGIES = [
    pytest.param(BubblewrapBackend, marks=needs("bubblewrap")),
    pytest.param(ContainerBackend, marks=needs("container")),
    pytest.param(GvisorBackend, marks=needs("gvisor")),
]
SECRET = "canary-of-the-host"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images") / "state"
    place.parent.chmod(0o700)
    return copy_of_small(place)


@pytest.fixture
def canary() -> Iterator[Path]:
    """A file of the host that a sandbox without an image can read."""
    place = Path("/usr/local/share") / f"ringfence-{os.getpid()}"
    try:
        place.mkdir()
    except OSError:
        pytest.skip("needs to write below /usr/local")
    (place / "canary").write_text(SECRET)
    (place / "program").write_text("#!/bin/sh\necho " + SECRET)
    (place / "program").chmod(0o755)
    yield place
    for path in place.iterdir():
        path.unlink()
    place.rmdir()


class Clauses(SandboxClauses):
    @pytest.fixture(params=TECHNOLOGIES)
    def backend(self, request: pytest.FixtureRequest, state: Path) -> Backend:
        return request.param(state_dir=state)

    def imaged(self, backend: Backend, place: Path, image: str | None = "small") -> SandboxSpec:
        spec = self.spec(backend, place, image=image)
        limits = replace(spec.profile.limits, memory_mb=512, pids=128)
        return replace(spec, profile=replace(spec.profile, limits=limits))


class TestInside(Clauses):
    def test_nothing_of_the_hosts_programs_is_there(
        self, backend: Backend, place: Path, canary: Path
    ) -> None:
        look = f"cat {canary}/canary; {canary}/program; ls {canary.parent} | grep {canary.name}"
        found = self.inside(backend, self.imaged(backend, place), look)[1]
        assert found == ""
        found = self.inside(backend, self.imaged(backend, place, None), look)[1]
        assert found == f"{SECRET}{SECRET}\n{canary.name}\n"

    def test_what_the_image_has_works_as_the_agent(self, backend: Backend, place: Path) -> None:
        command = (
            "id -u; id -un; python3 -c 'import ssl, json, sys; print(sys.prefix)';"
            "perl -e 'print 6 * 7'; echo; readlink -f /bin/sh; cat /etc/hostname; pwd; echo $HOME"
        )
        status, output = self.inside(backend, self.imaged(backend, place), command)
        expected = ["1000", "agent", "/usr", "42", "/usr/bin/dash", "sandbox", "/workspace"]
        assert (status, output.split()) == (0, [*expected, "/home/agent"])

    def test_the_image_is_read_only(self, backend: Backend, place: Path) -> None:
        rootfs = store.ImageStore(backend._state_dir).find("small").rootfs  # type: ignore[attr-defined]
        before = sorted(os.listdir(rootfs / "usr"))
        tries = "; ".join(
            f"touch {path}/x && echo wrote {path}" for path in ("/", "/usr", "/etc", "/var", "/bin")
        )
        tries += "; chmod u+w /usr && echo chmod; rm -f /usr/bin/env && echo removed"
        tries += "; echo x >> /usr/lib/os-release && echo appended; touch /tmp/x && echo allowed"
        output = self.inside(backend, self.imaged(backend, place), tries)[1]
        if os.geteuid() == 0 or not isinstance(backend, GvisorBackend):
            assert output == "allowed\n"
        assert sorted(os.listdir(rootfs / "usr")) == before
        assert store.require(backend._state_dir, "small")  # type: ignore[attr-defined]

    def test_what_is_blocked_is_absent_of_the_image(self, backend: Backend, place: Path) -> None:
        spec = self.imaged(backend, place)
        look = "cat /etc/debian_version /lib/os-release; ls /usr/share/doc; echo end"
        seen = self.inside(backend, spec, look)[1]
        assert "NAME=" in seen
        assert len(seen.splitlines()) > 5
        blocked = ("/etc/debian_version", "/lib/os-release", "/usr/share/doc", "/var")
        shut = replace(spec, profile=replace(spec.profile, blocked=blocked))
        assert self.inside(backend, shut, look + "; ls /var")[1] == "end\ntmp\n"

    def test_an_image_in_use_is_not_removed(self, backend: Backend, place: Path) -> None:
        images = store.ImageStore(backend._state_dir)  # type: ignore[attr-defined]
        digest = images.find("small").digest

        async def work() -> None:
            async with self.started(backend, self.imaged(backend, place)) as sandbox:
                with pytest.raises(UnavailableError, match="is used by a sandbox"):
                    images.remove("small")
                assert (await shell(sandbox, "true"))[0] == 0

        self.run(work)
        with images.find(digest).held():
            pass  # nobody is left who would hold it against us


class TestRefused(Clauses):
    @pytest.fixture(params=TECHNOLOGIES[:1])
    def backend(self, request: pytest.FixtureRequest, state: Path) -> Backend:
        return request.param(state_dir=state)

    def test_a_file_that_was_changed_stops_the_start(self, backend: Backend, place: Path) -> None:
        spec = self.imaged(backend, place)
        assert self.inside(backend, spec, "true")[0] == 0
        victim = store.ImageStore(backend._state_dir).find("small").rootfs / "usr/bin/env"  # type: ignore[attr-defined]
        whole, times = victim.read_bytes(), victim.stat()
        victim.unlink()  # the tree may share the file with another
        victim.write_bytes(whole[:-1] + b"!")
        victim.chmod(times.st_mode & 0o7777)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UnavailableError, match="/usr/bin/env differs in content") as caught:
            self.inside(backend, spec, "true")
        assert caught.value.code == "image-damaged"
        victim.write_bytes(whole)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert self.inside(backend, spec, "true")[0] == 0


@needs("bubblewrap")
def test_a_policy_names_an_image_and_the_record_its_digest(state: Path, tmp_path: Path) -> None:
    policy, workspace = tmp_path / "policy.json", tmp_path / "workspace"
    workspace.mkdir()
    control = ["memory", "cpu", "pids"] if os.geteuid() else []
    document = {"version": 1, "preset": "strict", "accept_unenforced": control}
    digest = store.ImageStore(state).find("small").digest

    def ringfence(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ringfence", *words],
            env={**os.environ, **settings(state)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def run(image: str) -> subprocess.CompletedProcess[str]:
        policy.write_text(json.dumps({**document, "filesystem": {"image": image}}))
        words = ["--policy", str(policy), "--workspace", str(workspace), "--output", "json"]
        return ringfence("exec", *words, "--", "id", "-un")

    done = run("small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["output"] == "agent\n"
    records = ringfence("audit", "show", "--json").stdout
    started = [one for one in map(json.loads, records.splitlines()) if "isolation" in one]
    assert [one["image"] for one in started] == [digest]
    for unknown in ("other", "sha256:" + "0" * 64):
        done = run(unknown)
        assert done.returncode == 2
        assert "image-unknown" in done.stdout + done.stderr


def test_a_technology_without_images_refuses_one(tmp_path: Path) -> None:
    from ringfence.config import load_config
    from ringfence.wiring import backends

    known = backends(load_config(settings(tmp_path), settings_file=Path("/nonexistent")))
    rules = SandboxProfile(isolation="runtime", image="small")
    with pytest.raises(UnavailableError, match="runtime cannot start from an image"):
        known.get("runtime").probe(rules)
