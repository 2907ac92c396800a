"""System call numbers of what the filter allows or rules on: literal tables, one a machine. PURE.

The selection starts from the containers project's default profile, less everything that makes
namespaces, mounts, keys, performance counters, rings or handles, or reads another process.
"""

from __future__ import annotations

from ringfence.sandbox.syscalls_aarch64 import AARCH64
from ringfence.sandbox.syscalls_x86_64 import X86_64

__all__ = ["AARCH64", "RULED", "X86_64"]

RULED = frozenset(
    {
        *("clone", "clone3", "socket", "socketpair", "ioctl", "personality", "mknod", "mknodat"),
        *("io_setup", "chmod", "fchmod", "fchmodat", "fchmodat2"),
        *("creat", "open", "openat", "openat2"),
    }
)
"""Not allowed as such: `seccomp.py` looks at their arguments, or says that there is none."""
