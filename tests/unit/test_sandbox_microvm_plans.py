"""What a virtual machine and its helpers are given, and what they are not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import microvm_profile as plans
from ringfence.sandbox.microvm_image import archive, vmlinux
from ringfence.sandbox.profile import HostFacts, ImageRoot, Tools

FACTS = HostFacts(
    as_root=True,
    uid=2_000_000,
    tools=Tools(executable="tools/bwrap"),
    links={"bin": "usr/bin"},
    egress_dir="/state/egress",
    claude="/venv/claude",
)
RULES = SandboxProfile(limits=Limits(memory_mb=512, cpus=0.5, pids=64, disk_mb=100))


def test_the_machine_has_no_network_device_and_no_disk() -> None:
    argv = plans.machine_argv(700, incoming=True, serial=False, accelerator=plans.TRANSLATED)
    text = " ".join(argv)
    for word in ("-nic", "netdev", "-net", "usb=on", "drive", "blk", "slirp", "vfio", "path="):
        assert word not in text, word
    assert "-nodefaults" in argv
    assert "virtserialport,chardev=port,name=ringfence,nr=1" in argv
    assert argv[argv.index("-sandbox") + 1].count("deny") == 4


def test_qemu_sees_programs_and_a_kernel_and_the_relay_only_egress() -> None:
    machine, relay = (
        plans.machine_options(FACTS, plans.TRANSLATED),
        plans.relay_options(FACTS, "/usr"),
    )
    for options in (machine, relay):
        assert not any("workspace" in word or "/home" in word for word in options)
        assert "--seccomp" in options
        assert options[options.index("--cap-drop") + 1] == "ALL"
        assert "--cap-add" not in options
    assert not any("egress" in word for word in machine)
    assert "/run/ringfence" in relay


def test_the_device_is_shown_where_the_processor_helps_and_nowhere_else() -> None:
    def devices(accelerator: str) -> list[str]:
        options = plans.machine_options(FACTS, accelerator)
        assert options.index("--remount-ro") > options.index("--dev")
        return [b for a, b in itertools.pairwise(options) if a == "--dev-bind"]

    assert devices(plans.KVM) == ["/dev/kvm"]
    assert devices(plans.TRANSLATED) == []
    argv = plans.machine_argv(700, incoming=False, serial=True, accelerator=plans.KVM)
    assert argv[argv.index("-accel") + 1 : argv.index("-accel") + 4] == ["kvm", "-cpu", "host"]


def test_what_is_exported_lies_below_a_root_without_proc() -> None:
    options = plans.share_options(RULES, FACTS, FACTS)
    assert "/export/workspace" in options
    assert "/export/opt/ringfence/bin/claude" in options
    places = [b for a, b in itertools.pairwise(options) if a == "--proc"]
    assert places == ["/proc"]
    assert not any("/mnt/egress" in word for word in options)


def test_beside_an_image_the_file_server_has_the_hosts_programs_and_exports_the_images() -> None:
    image = ImageRoot(path="/images/x/rootfs", directories=("usr",), links={"bin": "usr/bin"})
    facts = replace(FACTS, image=image)
    options = plans.share_options(RULES, facts, FACTS)
    mounts = [tuple(options[i + 1 : i + 3]) for i, w in enumerate(options) if w == "--ro-bind"]
    assert ("/usr", "/usr") in mounts
    assert (f"{facts.stage}/image/usr", "/export/usr") in mounts
    assert "/usr" not in [source for source, place in mounts if place.startswith(plans.EXPORT)]


def test_only_an_ordinary_users_file_server_gives_up_no_groups() -> None:
    """Root has cleared them before; a user's namespace cannot."""
    user = replace(FACTS, as_root=False, uid=1234)
    assert "--seccomp" not in plans.share_options(RULES, FACTS, FACTS)
    options = plans.share_options(RULES, user, user)
    assert options[options.index("--seccomp") + 1] == str(plans.SECOND)


def test_the_host_holds_the_machine_to_the_limit_and_the_declared_overhead() -> None:
    megabytes = plans.memory_mb(RULES.limits)
    assert megabytes == 512 + plans.GUEST_MB + 16
    host = plans.host_limits(RULES.limits)
    assert host.memory_mb == megabytes + plans.MACHINE_MB + 100
    assert host.cpus == 0.5 + plans.MACHINE_CPUS


def test_the_guest_is_told_the_policys_own_numbers() -> None:
    rules = json.loads(
        plans.guest_rules(
            RULES,
            FACTS,
            seccomp=b"12345678",
            rlimits={"RLIMIT_CORE": 0},
            seconds=1.0,
            entropy=b"x",
            files=20_000,
        )
    )
    assert (rules["memory"], rules["pids"], rules["cpu_us"]) == (512 << 20, 64, 50_000)
    assert rules["files"] == 10_000
    assert rules["egress"] == "/run/ringfence"
    assert rules["workspace_exec"] is True
    assert plans.expected(RULES)["cpu.max"] == "50000 100000"


def test_a_kernel_that_nothing_unpacks_is_refused() -> None:
    from ringfence.errors import UnavailableError

    with pytest.raises(UnavailableError):
        vmlinux(bytes(4096))


def test_an_archive_is_the_same_for_the_same_files() -> None:
    files = {"a/b": (b"x", 0o444), "init": (b"#!", 0o555)}
    assert archive(files) == archive(dict(reversed(files.items())))
    assert archive(files) != archive({**files, "init": (b"#?", 0o555)})
