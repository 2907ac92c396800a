"""The kernel's doors, tried from a live sandbox; each kind of refusal has a call beside it that works.

The unit tests run the filter; these show that it is the one in force, for every program and on
every way into the kernel.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from attacked import ALL, make

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.protocol import SandboxSpec
from ringfence.testing.sandbox_contract import shell
from ringfence.worker.ids import new_id

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="call numbers and entry points of x86_64"
    ),
    # the module's sandbox is started within the first test, and one of them is emulated
    pytest.mark.timeout(700),
]

PROBE = r"""
import ctypes, fcntl, json, mmap, os, signal, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    return "ok" if result >= 0 else ctypes.get_errno()
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "ok"
    except OSError as error:
        return error.errno
def child(function):
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
def through_int80():
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # getpid of i386
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
nothing = ctypes.create_string_buffer(128)
clone3 = ctypes.create_string_buffer(struct.pack("8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)
calls = {
    "unshare user": (272, 0x10000000), "unshare time": (272, 0x80), "setns": (308, 0, 0),
    "clone user": (56, 0x10000000 | 17, 0, 0, 0, 0), "clone3 user": (435, clone3, 64),
    "mount": (165, nothing, nothing, nothing, 0, 0), "umount": (166, b"/tmp", 2),
    "fsopen": (430, b"tmpfs", 0), "fsmount": (432, 0, 0, 0), "fspick": (433, -100, b"/", 0),
    "open_tree": (428, -100, b"/", 1), "move_mount": (429, 0, b"", 0, b"", 0),
    "mount_setattr": (442, -100, b"/", 0, nothing, 32), "pivot_root": (155, b"/", b"/"),
    "chroot": (161, b"/tmp"), "ptrace": (101, 0, 0, 0, 0), "kcmp": (312, 1, 1, 0, 0, 0),
    "process_vm_readv": (310, os.getpid(), nothing, 0, nothing, 0, 0),
    "process_vm_writev": (311, os.getpid(), nothing, 0, nothing, 0, 0),
    "pidfd_getfd": (438, 0, 0, 0), "bpf": (321, 0, nothing, 128),
    "perf_event_open": (298, nothing, 0, -1, -1, 0), "userfaultfd": (323, 1),
    "io_uring_setup": (425, 1, nothing), "io_uring_enter": (426, 0, 0, 0, 0, 0, 0),
    "add_key": (248, b"user", b"n", b"v", 1, -3), "keyctl": (250, 0, -3, 0),
    "request_key": (249, b"user", b"n", nothing, -3),
    "name_to_handle_at": (303, -100, b"/", nothing, nothing, 0),
    "open_by_handle_at": (304, -100, nothing, 0), "kexec_load": (246, 0, 0, 0, 0),
    "kexec_file_load": (320, 0, 0, 0, 0, 0), "init_module": (175, nothing, 0, b""),
    "finit_module": (313, 0, b"", 0), "delete_module": (176, b"x", 0), "syslog": (103, 10, 0, 0),
    "reboot": (169, 0, 0, 0, 0), "swapon": (167, b"/x", 0), "acct": (163, b"/tmp/a"),
    "quotactl": (179, 0, 0, 0, 0), "iopl": (172, 0), "ioperm": (173, 0, 1, 0),
    "modify_ldt": (154, 0, nothing, 16), "settimeofday": (164, 0, 0), "adjtimex": (159, nothing),
    "clock_settime": (227, 0, nothing), "sethostname": (170, b"x", 1), "vhangup": (153,),
    "fanotify_init": (300, 0, 0), "lookup_dcookie": (212, 0, nothing, 1), "vmsplice": (278, 1, 0, 0, 0),
    "no address randomisation": (135, 0x0040000), "read implies exec": (135, 0x0400000),
    "memfd_secret": (447, 0), "process_madvise": (440, 0, 0, 0, 0, 0),
    "move_pages": (279, 0, 0, 0, 0, 0, 0), "migrate_pages": (256, 0, 0, 0, 0),
    "statmount": (457, nothing, nothing, 0, 0), "listmount": (458, nothing, nothing, 0, 0),
    "character device": (133, b"/tmp/c", 0o20666, 0x103), "block device": (133, b"/tmp/b", 0o60666, 0x801),
    "whiteout": (133, b"/workspace/w", 0o20000, 0), "a call of the future": (600,),
}
families = {f"family {f}": attempt(socket.socket, f, t) for f in (3, 9, 17, 21, 23, 29, 30, 31, 38, 40, 41, 42, 44, 45)
            for t in (1, 2, 3, 5)}
pair = (ctypes.c_int * 2)()
terminal = os.openpty()[1]
inet = socket.socket()
refused = {name: call(*arguments) for name, arguments in calls.items()} | families
refused |= {f"pair of {f}": call(53, f, 5, 0, pair) for f in (2, 16, 30, 40)}
refused |= {f"protocol {p}": attempt(socket.socket, 2, t, p)
            for t, p in ((3, 1), (2, 1), (1, 33), (1, 132), (2, 136), (1, 262), (3, 255))}
refused |= {f"netlink {p}": attempt(socket.socket, 16, 3, p) for p in (4, 9, 12, 15, 16)}
refused |= {f"ioctl {r:x}": attempt(fcntl.ioctl, terminal, r, b"\0" * 16) for r in (0x5412, 0x541C, 0x5423)}
refused |= {f"ioctl {r:x}": attempt(fcntl.ioctl, inet, r, b"\0" * 64) for r in (0x8940, 0x8982, 0x89A0)}
works = {
    "getpid": call(39), "fork": child(lambda: None), "unix pair": call(53, 1, 1, 0, pair),
    "tcp": attempt(socket.socket, 2, 1, 6), "udp": attempt(socket.socket, 10, 2, 17),
    "netlink route": attempt(socket.socket, 16, 3, 0), "fifo": call(133, b"/tmp/f", 0o10600, 0),
    "window size": attempt(fcntl.ioctl, terminal, 0x5413, b"\0" * 8),
    "flags of lo": attempt(fcntl.ioctl, inet, 0x8913, struct.pack("16s24x", b"lo")),
    "plain personality": call(135, 0), "memfd": call(319, b"x", 0), "futex": call(202, nothing, 1, 1, 0, 0, 0),
}
killed = {"int 0x80": child(through_int80), "x32": child(lambda: call(0x40000000 | 39))}
print(json.dumps([refused, works, killed]))
"""


@pytest.fixture(scope="module", params=ALL)
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    """What the probe saw: of what must be refused, of what must work, of foreign entry points."""
    place = tmp_path_factory.mktemp("kernel")
    for name in ("workspace", "state"):
        (place / name).mkdir(mode=0o700)
    (place / "workspace" / "probe.py").write_text(PROBE)
    accepted = frozenset() if os.geteuid() == 0 else frozenset({"memory", "cpu", "pids"})
    found = asyncio.run(asyncio.wait_for(_inside(request.param, place, accepted), 600))
    return [*json.loads(found), {"isolation": request.param}]


async def _inside(isolation: str, place: Path, accepted: frozenset[str]) -> str:
    sandbox = await make(isolation, place / "state").start(
        SandboxSpec(
            sandbox_id=new_id("sb"),
            profile=SandboxProfile(accept_unenforced=accepted, emulation=True),
            workspace=place / "workspace",
            state_dir=place / "state",
        )
    )
    try:
        code, output = await shell(sandbox, "python3 probe.py 2>&1")
        assert code == 0, output
        return output
    finally:
        await sandbox.close()


def test_every_door_is_shut(seen: list[dict[str, object]]) -> None:
    """EPERM, ENOSYS, and what an unknown family or protocol answers; nothing else, not EFAULT."""
    wrong = {name: result for name, result in seen[0].items() if result not in {1, 38, 93, 97}}
    assert wrong == {}
    assert len(seen[0]) > 90


def test_what_programs_need_works(seen: list[dict[str, object]]) -> None:
    # gVisor has one personality and no call to ask for it
    lacking = {"plain personality"} if seen[3]["isolation"] == "gvisor" else set()
    assert {name for name, result in seen[1].items() if result not in {"ok", 0}} == lacking


def test_foreign_entry_points_kill(seen: list[dict[str, object]]) -> None:
    """SIGSYS: numbers of another machine mean other calls."""
    assert seen[2] == {"int 0x80": -31, "x32": -31}
