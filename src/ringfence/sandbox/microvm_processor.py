"""Whether this host's processor runs a guest itself, or QEMU has to emulate one.

A device file proves nothing: /dev/kvm is also there where a kernel only imitates virtualisation in
software, and a guest crawls on it or dies (measured). So KVM counts when the processor says that it
can, our own uid may open the device, and a guest booted on it in time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.sandbox.launcher import Spare
from ringfence.sandbox.microvm_image import build
from ringfence.sandbox.microvm_machine import Machine, booted, hardware, qemu_version
from ringfence.sandbox.microvm_profile import KVM, TRANSLATED

DEVICE = Path("/dev/kvm")
BOOT_SECONDS = 10.0
"""Real virtualisation boots the guest in one or two; emulation in three on an idle host, and the
imitated kind in thirty or never."""
_MEGABYTES = 256
_RULE = 'a udev rule: KERNEL=="kvm", MODE="0666"'
_MEND = "use hardware with VT-x or AMD-V on, or a virtual machine to which its host passes them"


@dataclass(frozen=True, slots=True)
class Processor:
    """What machines run on.

    Attributes:
        accelerator: QEMU's word. problem: why it is not KVM; empty when it is. mend: what would.
    """

    accelerator: str
    problem: str = ""
    mend: str = ""

    @property
    def emulated(self) -> bool:
        """Whether there is no hardware's boundary around the guest."""
        return self.accelerator != KVM


def decide(cpuinfo: str, device: tuple[str, str] | None, boot: Callable[[], str]) -> Processor:
    """KVM, or why not.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        device: why a machine cannot open the device, and the mend; None when it can.
        boot: boots a guest on it; returns what went wrong. Asked last, and only when all else says
            yes: it takes seconds.
    """
    flags = {
        word for line in cpuinfo.splitlines() if line.startswith("flags") for word in line.split()
    }
    if not flags & {"vmx", "svm"}:
        return Processor(TRANSLATED, "the processor shows neither vmx nor svm", _MEND)
    if device is not None:
        return Processor(TRANSLATED, *device)
    if problem := boot():
        return Processor(TRANSLATED, f"no guest boots on {DEVICE}: {problem}", _MEND)
    return Processor(KVM)


def device_problem(path: Path, *, as_root: bool) -> tuple[str, str] | None:
    """Why a machine cannot open the device, and what would mend it; None when it can.

    Started by root, a machine is a uid of its own that is in no group: the device has to be open to
    all, as systemd makes it by default and Debian does not. What it gives is virtual machines.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path}: {error.strerror}", "modprobe kvm_intel or kvm_amd"
    if as_root and mode & 0o006 != 0o006:
        return f"{path} is not open to a sandbox's own uid", _RULE
    if not as_root and not os.access(path, os.R_OK | os.W_OK):
        return f"{path} is not open to this user", "add the user to the group kvm"
    return None


class Processors:
    """The decision for one state directory, made once. A boot that succeeded is remembered there
    for this kernel, processor and QEMU; one that failed is tried again by the next process.
    """

    def __init__(self, directory: Path, uids: range) -> None:
        self._directory, self._uids = directory, uids
        self._lock = threading.Lock()
        self._found: Processor | None = None

    def get(self) -> Processor:
        """May take seconds the first time where there is hardware. Callable from any thread."""
        with self._lock:
            if self._found is None:
                cpuinfo = Path("/proc/cpuinfo").read_text()
                device = device_problem(DEVICE, as_root=os.geteuid() == 0)
                self._found = decide(cpuinfo, device, self._proved)
            return self._found

    def _proved(self) -> str:
        words = json.dumps([*hardware(), qemu_version()])
        mark = self._directory / f"kvm-{hashlib.sha256(words.encode()).hexdigest()[:32]}"
        if mark.exists():
            return ""
        answers: list[str] = []
        # a loop of its own, whatever loop runs in the thread that asks
        thread = threading.Thread(target=lambda: answers.append(asyncio.run(self._boot())))
        thread.start()
        thread.join()
        if not answers or answers[0]:
            return answers[0] if answers else "it broke"
        mark.touch(mode=0o600)
        return ""

    async def _boot(self) -> str:
        spare, began = Spare(), time.monotonic()
        try:
            image = await asyncio.to_thread(build, self._directory)
            began = time.monotonic()
            async with asyncio.timeout(BOOT_SECONDS):
                machine = await Machine.start(image, _MEGABYTES, self._uids, spare, accelerator=KVM)
                try:
                    await booted(machine)
                finally:
                    await asyncio.shield(machine.close())
        except TimeoutError:
            return f"it took longer than {BOOT_SECONDS:.0f} s ({time.monotonic() - began:.0f} s)"
        except (UnavailableError, OSError) as error:
            return str(error)
        return ""
