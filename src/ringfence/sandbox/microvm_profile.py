"""Compiled rules → command lines of a virtual machine and its helpers. PURE; tests hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.bwrap_options import (
    cover_options,
    place_mounts,
    program_mounts,
    system_mounts,
)
from ringfence.sandbox.profile import (
    SECCOMP_FD,
    STATUS_FD,
    HostFacts,
    bare_plan,
    prepare_plan,
    source,
)
from ringfence.sandbox.protocol import (
    INSIDE_CLAUDE,
    INSIDE_EGRESS_DIR,
    INSIDE_PROXY_PORT,
    INSIDE_UID,
)

EXPORT = "/export"
FIRST, SECOND, THIRD = 13, 14, 15
"""Descriptors that a helper inherits beside its stdio."""

GUEST_MB = 128
"""Memory of the guest's own kernel and process 1, beside the programs' limit."""
MACHINE_MB = 320
"""Memory of QEMU, its translated code, virtiofsd and the relay on the host."""
MACHINE_CPUS = 0.5
"""Processor time of virtiofsd and the relay, beside the machine's own."""
_MACHINE_PIDS = 256
_TRANSLATED_MB = 128
KVM, TRANSLATED = "kvm", f"tcg,thread=multi,tb-size={_TRANSLATED_MB}"
"""QEMU's words for a processor that runs the guest itself, and for one that is emulated."""

_ARITY = {
    **dict.fromkeys(("--ro-bind", "--bind", "--symlink"), 2),
    **dict.fromkeys(("--tmpfs", "--remount-ro", "--dir"), 1),
}
_SETTINGS = ("--perms", "--size")
_SHARE_CAPS = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP")
"""What virtiofsd keeps, in a user namespace in which one uid is mapped; and chroot to start."""


def memory_mb(limits: Limits) -> int:
    """The machine's memory: the programs' limit and the guest's own, page tables included."""
    return limits.memory_mb + GUEST_MB + limits.memory_mb // 32


def host_limits(limits: Limits) -> Limits:
    """What the host's control groups hold the whole machine to: the backstop behind the guest's
    own groups, which hold the programs to the policy's numbers.
    """
    return replace(
        limits,
        memory_mb=memory_mb(limits) + MACHINE_MB + limits.disk_mb,
        cpus=limits.cpus + MACHINE_CPUS,
        pids=_MACHINE_PIDS,
    )


def _enclosed(*, name: str, filtered: bool) -> list[str]:
    return [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *("--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID), "--hostname", name),
        *("--cap-drop", "ALL", "--clearenv", "--die-with-parent", "--new-session"),
        *(("--seccomp", str(SECCOMP_FD)) if filtered else ()),
        *("--json-status-fd", str(STATUS_FD)),
        *("--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/"),
    ]


def machine_options(facts: HostFacts, accelerator: str) -> list[str]:
    """bubblewrap's, around QEMU: programs, a kernel, a first file system, and nothing else but the
    device where the processor helps.
    """
    device = ("--dev-bind", "/dev/kvm", "/dev/kvm") if accelerator == KVM else ()
    return [
        *_enclosed(name="machine", filtered=True),
        "--disable-userns",
        *program_mounts(facts),
        *("--ro-bind", f"{facts.stage}/vm", "/vm", "--dev", "/dev", *device),
        *("--remount-ro", "/dev"),
        *("--remount-ro", "/", "--chdir", "/"),
    ]


def machine_plan(facts: HostFacts, kernel: str, initramfs: str) -> dict[str, Any]:
    """The place that QEMU runs in, apart from the workspace's."""
    sources = [
        source(kernel, "vm/kernel", read_only=True, directory=False),
        source(initramfs, "vm/initramfs", read_only=True, directory=False),
    ]
    return {**bare_plan(facts), "sources": sources}


_KERNEL = (
    "console=ttyS0 reboot=t panic=-1 quiet loglevel=0 lpj=800000 mitigations=off "
    "cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=1 audit=0 apparmor=0"
)
"""Nothing here weakens the guest towards the agent: side channels between processes of one
sandbox cross no boundary, and the host's kernel has mitigations of its own."""


def machine_argv(megabytes: int, *, incoming: bool, serial: bool, accelerator: str) -> list[str]:
    """QEMU: no network device, no display, no USB, no disk; a port, and a bridge to plug the file
    system into. ACPI is off, with which Debian's kernel does not start under emulation.
    """
    memory = f"memory-backend-memfd,id=memory,size={megabytes}M,share=on"
    return [
        "qemu-system-x86_64",
        *("-M", "pc,acpi=off,usb=off,vmport=off,memory-backend=memory", "-object", memory),
        *("-m", str(megabytes), "-smp", "1", "-bios", "qboot.rom", "-accel", accelerator),
        *("-cpu", "host" if accelerator == KVM else "max"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-serial", "stdio" if serial else "null"),
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *("-kernel", "/vm/kernel", "-initrd", "/vm/initramfs", "-append", _KERNEL),
        *("-device", "pci-bridge,chassis_nr=1,id=bridge,shpc=on,addr=6"),
        *("-device", "virtio-serial-pci,addr=4,max_ports=2"),
        *("-chardev", f"socket,id=port,fd={SECOND}"),
        *("-device", "virtserialport,chardev=port,name=ringfence,nr=1"),
        *("-chardev", f"socket,id=monitor,fd={FIRST}", "-mon", "chardev=monitor,mode=control"),
        *(("-incoming", f"fd:{THIRD}") if incoming else ()),
    ]


def place_plan(
    rules: SandboxProfile, facts: HostFacts, files: Mapping[str, str], python: str
) -> dict[str, Any]:
    """The workspace's place, with the relay's files and the interpreter's in it."""
    plan = prepare_plan(rules, facts)
    if not python.startswith("/usr"):
        plan["sources"].append(source(python, "python", read_only=True))
    return {**plan, "files": {**plan["files"], **files}}


def share_options(rules: SandboxProfile, facts: HostFacts, own: HostFacts) -> list[str]:
    """bubblewrap's, around virtiofsd: what a program sees under bubblewrap, below EXPORT, where a
    chroot leaves behind the /proc that virtiofsd itself needs. `own`: `facts` with the host's
    programs, virtiofsd among them, where those have an image's.
    """
    inner = [
        *("--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/"),
        *system_mounts(facts),
        *("--tmpfs", "/dev", "--dir", "/proc", "--dir", INSIDE_EGRESS_DIR),
        *place_mounts(rules, replace(facts, egress_dir=None)),
        *cover_options(rules, facts),
        *("--remount-ro", "/"),
    ]
    capabilities = [
        word
        for name in (*_SHARE_CAPS, "SYS_CHROOT", "SETPCAP")
        for word in ("--cap-add", "CAP_" + name)
    ]
    # virtiofsd gives up its groups and ends when it cannot; an ordinary user's namespace, in which
    # nobody can, keeps those that every program of the user has
    unmade = () if facts.as_root else ("--seccomp", str(SECOND))
    return [
        *_enclosed(name="files", filtered=False),
        *unmade,
        *capabilities,
        *program_mounts(own),
        *("--proc", "/proc", "--dev", "/dev", "--dir", "/tmp", "--dir", "/run"),  # noqa: S108
        *_below_export(inner),
        *("--remount-ro", "/", "--chdir", "/"),
    ]


def _below_export(options: Sequence[str]) -> list[str]:
    """The same mounts with another root."""
    out: list[str] = []
    words = iter(options)
    for option in words:
        operands = [next(words) for _ in range(1 if option in _SETTINGS else _ARITY[option])]
        if option not in _SETTINGS:
            operands[-1] = (EXPORT + operands[-1]).rstrip("/")
        out += [option, *operands]
    return out


def share_argv(program: str) -> list[str]:
    """virtiofsd: the one that comes with QEMU 7.2."""
    return [
        *(program, f"--fd={FIRST}", "-f", "--rlimit-nofile=0", "-o", f"source={EXPORT}"),
        *("-o", "sandbox=chroot", "-o", "cache=auto", "-o", "log_level=err", "-o", "no_xattr"),
    ]


def relay_options(facts: HostFacts, python: str) -> list[str]:
    """bubblewrap's, around the relay: an interpreter and egress's directory."""
    own = () if python.startswith("/usr") else ("--ro-bind", f"{facts.stage}/python", python)
    egress = ("--ro-bind", f"{facts.stage}/egress", INSIDE_EGRESS_DIR)
    return [
        *_enclosed(name="relay", filtered=True),
        "--disable-userns",
        *program_mounts(facts),
        *own,
        *("--ro-bind", f"{facts.stage}/relay", "/relay"),
        *(egress if facts.egress_dir is not None else ()),
        *("--remount-ro", "/", "--chdir", "/"),
    ]


def guest_rules(
    rules: SandboxProfile,
    facts: HostFacts,
    *,
    seccomp: bytes,
    rlimits: Mapping[str, int],
    seconds: float,
    entropy: bytes,
    files: int,
) -> bytes:
    """What the guest is told to make, as JSON. `files` is how many the file server can hold open:
    half of it is what the guest may remember, the other half what comes before it looks again.
    """
    limits = rules.limits
    value = {
        "time": seconds,
        "entropy": entropy.hex(),
        "seccomp": seccomp.hex(),
        "tmp_exec": rules.tmp_exec,
        "workspace_exec": rules.workspace_exec,
        "claude": INSIDE_CLAUDE if facts.claude is not None else "",
        "egress": INSIDE_EGRESS_DIR if facts.egress_dir is not None else "",
        "proxy_port": INSIDE_PROXY_PORT,
        "files": files // 2,
        "memory": limits.memory_mb << 20,
        "pids": limits.pids,
        "cpu_us": math.ceil(limits.cpus * 100_000),
        "uid": INSIDE_UID,
        "rlimits": {name: value for name, value in rlimits.items() if name != "RLIMIT_NPROC"},
    }
    return json.dumps(value).encode()


def expected(rules: SandboxProfile) -> dict[str, str]:
    """What the guest's kernel has to say of its group afterwards."""
    limits = rules.limits
    return {
        "memory.max": str(limits.memory_mb << 20),
        "pids.max": str(limits.pids),
        "cpu.max": f"{math.ceil(limits.cpus * 100_000)} 100000",
    }
