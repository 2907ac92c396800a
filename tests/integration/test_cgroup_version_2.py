"""Limits on a real kernel that has control groups of version 2 only, in an emulated machine: a
fake tree believes whatever its author believed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.sandbox.microvm_image import archive, build, interpreter

pytestmark = pytest.mark.timeout(400)
SOURCE = Path(__file__).parents[2] / "src"
ALL = ("cpu", "memory", "pids")
GUEST = Path(__file__).parents[1] / "guest_cgroup2.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    place = tmp_path_factory.mktemp("guest")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86 is missing")
    try:
        kernel = build(place / "image").kernel
    except UnavailableError as error:
        pytest.skip(error.message)
    path = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
    needed = "import __future__, ctypes, errno, json, resource, signal; from ringfence.sandbox import cgroups, enforce"
    files = dict(interpreter(path + needed))
    first = "from __future__ import annotations\n"
    start = f"#!{os.path.realpath(sys.executable)} -IS\n{first}{path}"
    files["init"] = (start.encode() + GUEST.read_bytes().replace(first.encode(), b""), 0o555)
    (place / "initramfs").write_bytes(archive(files))
    return boot(kernel, place / "initramfs")


def boot(kernel: Path, initramfs: Path) -> dict[str, object]:
    options = (
        "-M pc,acpi=off,usb=off -m 512 -smp 1 -accel tcg -cpu max -bios qboot.rom -nodefaults "
        "-no-user-config -no-reboot -display none -serial stdio"
    )
    words = "console=ttyS0 reboot=t panic=-1 quiet loglevel=0 lpj=800000 mitigations=off"
    what = ("-kernel", str(kernel), "-initrd", str(initramfs), "-append", words)
    argv = ["qemu-system-x86_64", *options.split(), *what]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("SEEN "):
            value: dict[str, object] = json.loads(line[5:])
            return value
    raise AssertionError(done.stdout + done.stderr)


def test_groups_are_made_beside_the_session_that_we_stand_in(seen: dict[str, object]) -> None:
    """Not below it: cpu and pids could be had there, but nothing could join (and memory not)."""
    assert seen["parents"] == dict.fromkeys(ALL, "/sys/fs/cgroup/user.slice")
    assert seen["session"] == ["domain", ""]
    assert seen["enforced"] == sorted(ALL)


def test_limits_hold(seen: dict[str, object]) -> None:
    assert seen["harmless"] == 7 << 8
    assert seen["hog"] == signal.SIGKILL
    assert 10 < int(str(seen["storm"])) < 20
    assert 0.3 < float(str(seen["busy"])) < 1.5  # of two seconds, half a processor


def test_a_kill_at_the_limit_is_told_from_one_of_the_hosts(seen: dict[str, object]) -> None:
    """The kernel counts who dies with its group twice."""
    assert seen["hosts kill"] == [signal.SIGKILL, 2, 0]
    assert seen["hogs kill"] == [4, 2]  # after both it is not known whose each was


def test_freezing_and_going_on(seen: dict[str, object]) -> None:
    assert seen["frozen"] == [False, True]


def test_what_is_kept_is_read_back(seen: dict[str, object]) -> None:
    assert seen["read back"] == [3, "sandbox-start-failed"]


def test_nothing_is_left(seen: dict[str, object]) -> None:
    assert seen["left"] == []


def test_a_busy_root_of_a_namespace_is_a_group_like_any_other(seen: dict[str, object]) -> None:
    """It has a type, and the host's root has none."""
    assert seen["namespace"] == []


def test_an_ordinary_user_without_delegation_is_refused_by_the_controls_names(
    seen: dict[str, object],
) -> None:
    words = "this host cannot enforce memory, cpu: no cgroup that we may write"
    assert seen["undelegated"] == [0, "control-unenforceable", words]


def test_an_ordinary_user_with_delegation_has_limits(seen: dict[str, object]) -> None:
    """The twin: beside the leaf that the user's manager put us into."""
    slice_ = "/sys/fs/cgroup/user.slice/user@1001.service/app.slice"
    assert seen["delegated"] == [[slice_], sorted(ALL), 7 << 8, signal.SIGKILL]
