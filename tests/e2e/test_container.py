"""`ringfence run` in a container: the real claude, a simulated model."""

from __future__ import annotations

import shutil

import pytest
from harness import Box, bash, processes_with, script, signal, wait_for

pytestmark = pytest.mark.skipif(
    shutil.which("crun", path="/usr/bin:/usr/sbin") is None,
    reason="crun is not installed: apt-get install crun",
)


ENGINES = [
    "auto",
    pytest.param(
        "podman",
        marks=pytest.mark.skipif(
            shutil.which("podman", path="/usr/bin") is None,
            reason="podman is not installed: apt-get install podman",
        ),
    ),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_in_a_container(box: Box, engine: str) -> None:
    """Claude works, its change is a patch, and the record names the technology."""
    box.policy({"preset": "strict", "isolation": {"backend": "container", "engine": engine}})
    write = {"tool": "Write", "input": {"file_path": "/workspace/a.txt", "content": "new\n"}}
    done = box.run(
        script(write, bash("id -u; head -1 /proc/1/cmdline | tr -d '\\0'"), {"text": "done"})
    )
    assert done.code == 0, done.err
    assert not (box.workspace / "a.txt").exists()
    patch = next((box.state / "runs").glob("*/run.patch")).read_text()
    assert "+new" in patch
    started = [record for record in box.records() if record["type"] == "sandbox.started"]
    assert [record["isolation"] for record in started] == ["container"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_in_a_container_leaves_nobody(box: Box, engine: str) -> None:
    marker = f"rf-e2e-container-{box.place.name[-20:]}"
    box.policy({"preset": "strict", "isolation": {"backend": "container", "engine": engine}})
    process = box.spawn(
        *("exec", "--workspace", str(box.workspace)),
        *("--policy", str(box.place / "policy.yaml"), "--"),
        *("bash", "-c", f"exec -a {marker} sleep 300"),
    )
    try:
        assert wait_for(lambda: processes_with(f"{marker}\x00300"), 40)
        process.send_signal(signal.SIGKILL)
        assert wait_for(lambda: not processes_with(f"{marker}\x00300"), 1)
    finally:
        process.kill()
        process.communicate()


def test_an_engine_that_cannot_hold_it_stops_the_run(box: Box) -> None:
    box.policy({"preset": "strict", "isolation": {"backend": "container", "engine": "docker"}})
    done = box.execute("true")
    assert done.code == 4
    assert "isolation-unavailable" in done.out + done.err
    assert "docker" in done.out + done.err
