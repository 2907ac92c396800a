"""`ringfence run` and `exec` in a virtual machine: the real claude, a simulated model.

On a host without hardware virtualisation the machine is emulated, and all of it is slow: time limits
are those of a busy host, and most of this runs in `make test-all` alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from harness import Box, script

from backends import machines, needs
from images import copy_of_small
from ringfence.images.store import ImageStore
from ringfence.sandbox.microvm import MicrovmBackend

pytestmark = [needs("microvm"), pytest.mark.timeout(1800)]
MACHINE = {"backend": "microvm", "emulation": "allow"}
SHARED = {"RINGFENCE_MACHINES": str(place)} if (place := machines()) else {}
LONG = {"max_duration_seconds": 1600, "max_tool_seconds": 200}


def test_a_command_runs_under_the_guests_kernel(box: Box) -> None:
    box.policy({"preset": "strict", "isolation": MACHINE, "execution": LONG})
    done = box.execute("uname -r; echo x > new", seconds=850, **SHARED)
    assert done.code == 0, done.err + done.out
    assert "-cloud-amd64" in done.json["output"]
    assert done.json["changed_files"] == ["new"]
    assert list(box.workspace.iterdir()) == []
    (started,) = [record for record in box.records() if record["type"] == "sandbox.started"]
    assert started["isolation"] == "microvm"


def test_emulation_is_allowed_by_name_and_never_as_something_stronger(box: Box) -> None:
    if not MicrovmBackend(state_dir=box.state).emulated:
        pytest.skip("this host's processor runs machines itself")
    for isolation, more, code, word in (
        ({"backend": "microvm"}, (), 4, "emulation-refused"),
        ({"backend": "bubblewrap", "emulation": "allow"}, ("microvm",), 3, "isolation-denied"),
        ({"threat_model": "hostile_multi_tenant"}, (), 4, "isolation-unavailable"),
        (
            {"threat_model": "hostile_multi_tenant", "emulation": "allow"},
            ("microvm",),
            3,
            "isolation-denied",
        ),
    ):
        box.policy({"preset": "strict", "isolation": isolation})
        done = box.execute("true", *(("--isolation", *more) if more else ()))
        assert (done.code, done.json["error"]["code"]) == (code, word), done.err + done.out
        assert "emulat" in done.out


@pytest.mark.storm
def test_claude_does_the_demos_task_in_a_machine(box: Box) -> None:
    """Its tools find the failing test, its patch mends it, the workspace stays as it was."""
    scenarios = resources.files("ringfence.simulator") / "scenarios"
    story = yaml.safe_load((scenarios / "demo.yaml").read_text())
    for name, text in story["files"].items():
        (box.workspace / name).write_text(text)
    box.policy({"preset": "strict", "isolation": MACHINE, "execution": LONG})
    done = box.run(
        script(*story["steps"], words=story["prompt"]),
        *("--isolation", "microvm"),
        seconds=1700,
        **SHARED,
    )
    assert done.code == 0, done.err + done.out
    assert done.json["status"] == "succeeded"
    assert done.json["changed_files"] == ["basket.py"]
    assert _tests(box.workspace).returncode != 0
    (box.place / "patch").write_text(done.json["patch"])
    subprocess.run(["git", "apply", "../patch"], cwd=box.workspace, check=True)
    assert _tests(box.workspace).returncode == 0
    decided = [r for r in box.records() if r["type"] == "tool.decided"]
    assert [r["name"] for r in decided] == ["Bash", "Read", "Bash", "Edit", "Bash"]
    assert {r["outcome"] for r in decided} == {"allow"}


@pytest.mark.storm
def test_an_agent_in_an_image_in_a_machine_finds_the_images_files(box: Box) -> None:
    """The host's claude, the image's programs, the guest's kernel: and nothing of the host's."""
    copy_of_small(box.place / "made")
    (box.place / "made" / "images").rename(box.state / "images")
    listed = ImageStore(box.state).find("small").rootfs / "var/lib/dpkg/status"
    command = "sha256sum </var/lib/dpkg/status >seen; uname -r >>seen"
    box.policy(
        {
            "preset": "strict",
            "isolation": MACHINE,
            "filesystem": {"image": "small"},
            "execution": LONG,
        }
    )
    steps = [{"tool": "Bash", "input": {"command": command}}, {"text": "seen"}]
    done = box.run(script(*steps), seconds=1700, **SHARED)
    assert done.code == 0, done.err + done.out
    assert done.json["changed_files"] == ["seen"]
    assert hashlib.sha256(listed.read_bytes()).hexdigest() in done.json["patch"]
    assert "-cloud-amd64" in done.json["patch"]
    (started,) = [record for record in box.records() if record["type"] == "sandbox.started"]
    assert started["image"].startswith("sha256:")


def _tests(place: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-B", "-m", "unittest"]
    return subprocess.run(command, cwd=place, capture_output=True, check=False)
