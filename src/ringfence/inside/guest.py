"""Process 1 of a virtual machine: makes the place that it is told to make, runs programs in it.

Started by the kernel from an initramfs that holds this file, `mux.py`, the interpreter and a few
modules. It waits for the host at a virtio-serial port; that is where the snapshot is taken, so
nothing before it may hold a secret, an id or a random number. `SETUP` then brings the clock, new
entropy and the rules (requirement J).

The host believes nothing of what this process says: the guest's own walls (uid, control groups,
seccomp, mount flags) stand between the agent and the guest, and the machine's around both.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import struct
import sys
import time
import warnings  # noqa: F401  os.execvpe imports it, in a root where it would be somebody else's

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from mux import (
    CLOCK,
    EXEC,
    EXIT,
    GUEST_OPENED,
    KILL,
    LISTEN,
    MAX_COMMAND,
    MAX_STREAMS,
    OPEN,
    READY,
    SETUP,
    STARTED,
    Channel,
)

LIBC = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
NEWNS, NEWUTS, NEWIPC, NEWPID = 0x20000, 0x4000000, 0x8000000, 0x20000000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 24, 38, 22
SYS_CLONE, SYS_FINIT_MODULE, SYS_CLOSE_RANGE = 56, 313, 436
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
PORT = "/dev/vport0p1"
ROOT = "/new"
GROUP = "/cg/agent"
WALL = "/egress"
SOCKET = "/egress/egress.sock"
TO_EGRESS, TO_PROXY = 0, 1
LOOK_SECONDS = 0.2
STDIN, STDOUT, STDERR = 0, 1, 2
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    done = LIBC.mount(
        source.encode(), target.encode(), kind and kind.encode(), flags, data.encode() or None
    )
    if done:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {kind or 'bind'} on {target}: {os.strerror(number)}")


def close_from(lowest: int) -> None:
    """Every descriptor from here on, however high: one that is left is the guest's, in an agent."""
    if LIBC.syscall(SYS_CLOSE_RANGE, lowest, 0xFFFFFFFF, 0):
        raise OSError(ctypes.get_errno(), "close_range")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def boot() -> None:
    """Up to the port: what every machine of this kind has alike."""
    for directory in ("/proc", "/sys", "/dev", "/cg", ROOT, WALL, "/shm"):
        os.makedirs(directory, exist_ok=True)
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("sysfs", "/sys", "sysfs", NOSUID | NODEV | NOEXEC)
    mount("devtmpfs", "/dev", "devtmpfs", NOSUID)
    for name in read("/modules/order").split():
        descriptor = os.open(f"/modules/{name}", os.O_RDONLY)
        if LIBC.syscall(SYS_FINIT_MODULE, descriptor, b"", 0):
            raise OSError(ctypes.get_errno(), f"module {name}")
        os.close(descriptor)
    mount("cgroup2", "/cg", "cgroup2", NOSUID | NODEV | NOEXEC)
    write("/cg/cgroup.subtree_control", "+memory +cpu +pids")
    os.mkdir(GROUP)
    write("/proc/sys/user/max_user_namespaces", "0")
    write("/proc/sys/kernel/dmesg_restrict", "1")
    write("/proc/sys/kernel/kptr_restrict", "2")
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(control.fileno(), 0x8914, struct.pack("16sH14x", b"lo", 0x41))
    control.close()


class Program:
    """One exec: its number, process 1 of its namespace, and whether it was killed."""

    def __init__(self, number: int, pid: int) -> None:
        self.number, self.pid = number, pid
        self.status: int | None = None
        self.killed = False
        self.open = 2


class Guest(Channel):
    def __init__(self, port: int) -> None:
        super().__init__(port, MAX_COMMAND)
        self.rules: dict[str, Any] = {}
        self.programs: dict[int, Program] = {}
        self.listeners: dict[int, socket.socket] = {}
        self.next = self.kept = 0
        self.filter = b""
        self.children, self.wake = os.pipe()
        os.set_blocking(self.children, False)
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        self.watched[self.children] = self.reap

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind == SETUP:
            self.answer(payload)
        elif kind == EXEC:
            self.start(number, json.loads(payload))
        elif kind == KILL:
            self.kill(number)
        elif kind == CLOCK:
            self.send(CLOCK, 0, struct.pack(">Q", time.monotonic_ns()))
        elif kind == LISTEN:
            (self.listen if payload == b"\1" else self.deafen)()
        else:
            super().on_frame(kind, number, payload)

    # the place

    def answer(self, payload: bytes) -> None:
        try:
            value = {"ok": True, **self.setup(json.loads(payload))}
        except (OSError, ValueError, KeyError) as error:
            value = {"ok": False, "message": str(error)[:500]}
        self.send(READY, 0, json.dumps(value).encode())

    def setup(self, rules: dict[str, Any]) -> dict[str, Any]:
        self.rules = rules
        time.clock_settime(time.CLOCK_REALTIME, rules["time"])
        reseed(bytes.fromhex(rules["entropy"]))
        code = bytes.fromhex(rules["seccomp"])
        self.code = ctypes.create_string_buffer(code, len(code))
        self.filter = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(self.code))
        attach_root()
        for name in ("tmp", "var/tmp", "home/agent", "dev/shm"):
            flags = NOSUID | NODEV | (0 if rules["tmp_exec"] else NOEXEC)
            own = f"{ROOT}/{name}"
            mount(own, own, None, BIND)
            mount("none", own, None, REMOUNT | BIND | flags)
        if not rules["workspace_exec"]:
            own = f"{ROOT}/workspace"
            mount(own, own, None, BIND)
            mount("none", own, None, REMOUNT | BIND | NOSUID | NODEV | NOEXEC)
        devices()
        if rules["claude"]:
            shut(f"{ROOT}{rules['claude']}")
        if rules["egress"]:
            mount("egress", WALL, "tmpfs", NOSUID | NODEV | NOEXEC, "size=64k,mode=0755")
            place = f"{ROOT}{rules['egress']}"
            mount(WALL, place, None, BIND)
            mount("none", place, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | NOEXEC)
        self.proxy(rules["proxy_port"])
        return limit(rules)

    def proxy(self, port: int) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        self.accept_on(listener, TO_PROXY)

    def listen(self) -> None:
        if TO_EGRESS in self.listeners or not self.rules["egress"]:
            return
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(SOCKET)
        os.chmod(SOCKET, 0o666)
        self.accept_on(listener, TO_EGRESS)

    def deafen(self) -> None:
        """Nobody listens outside: whoever dials inside is to learn it as he would there."""
        listener = self.listeners.pop(TO_EGRESS, None)
        if listener is not None:
            del self.watched[listener.fileno()]
            listener.close()
            os.unlink(SOCKET)

    def accept_on(self, listener: socket.socket, kind: int) -> None:
        listener.listen(128)
        listener.setblocking(False)
        self.listeners[kind] = listener
        self.watched[listener.fileno()] = lambda: self.accept(listener, kind)

    def accept(self, listener: socket.socket, kind: int) -> None:
        try:
            end, _ = listener.accept()
        except OSError:
            return
        if len(self.streams) > MAX_STREAMS // 2:
            end.close()
            return
        self.next = (self.next + 1) % 0x7FFFFFFF
        number = GUEST_OPENED | self.next
        self.send(OPEN, number, bytes([kind]))
        descriptor = end.detach()
        self.add(number, descriptor, descriptor)

    def forget(self) -> None:
        """The host's file server holds a descriptor for every file that this kernel remembers, and
        has so many: a search of the whole file system would leave it with none.
        """
        known = int(read("/proc/sys/fs/inode-nr").split()[0])
        if known > max(self.rules["files"], self.kept + self.rules["files"] // 4):
            write("/proc/sys/vm/drop_caches", "2")
            # what is in use stays, and is not asked for again at every turn
            self.kept = int(read("/proc/sys/fs/inode-nr").split()[0])
        elif known < self.kept:
            self.kept = known

    # programs

    def start(self, number: int, program: Any) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        pid = LIBC.syscall(SYS_CLONE, NEWPID | NEWNS | NEWIPC | NEWUTS | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            try:
                first([theirs for _, theirs in pairs], program, self.rules, self.filter)
            finally:
                os._exit(126)
        for _, theirs in pairs:
            theirs.close()
        if pid < 0:
            raise OSError(ctypes.get_errno(), "no process for a program")
        self.programs[number] = Program(number, pid)
        self.add(number + STDIN, -1, pairs[0][0].detach())
        self.add(number + STDOUT, pairs[1][0].detach(), -1)
        if program["merge"]:
            pairs[2][0].close()
            self.programs[number].open = 1
        else:
            self.add(number + STDERR, pairs[2][0].detach(), -1)
        self.send(STARTED, number)

    def kill(self, number: int) -> None:
        program = self.programs.get(number)
        if program is None:
            return
        program.killed = True
        if program.status is None:
            os.kill(program.pid, signal.SIGKILL)
        else:
            self.finish(program)

    def reap(self) -> None:
        try:
            while os.read(self.children, 512):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for program in self.programs.values():
                if program.pid == pid:
                    program.status = os.waitstatus_to_exitcode(status) & 0xFF
                    if program.killed:
                        program.status = 128 + signal.SIGKILL
                    self.finish(program)
                    break

    def finish(self, program: Any) -> None:
        """Its namespace is empty: send what is left, wait for nobody."""
        for offset in (STDIN, STDOUT, STDERR):
            stream = self.streams.get(program.number + offset)
            if stream is None:
                continue
            stream.final = True
            if offset == STDIN or program.killed:
                self.drop(stream)

    def on_closed(self, number: int) -> None:
        program = self.programs.get(number & ~3)
        if number & GUEST_OPENED or program is None:
            return
        if number & 3 != STDIN:
            program.open -= 1

    def settle(self) -> None:
        for program in list(self.programs.values()):
            stdin = self.streams.get(program.number)
            if program.status is not None and not program.open and stdin is None:
                del self.programs[program.number]
                self.send(EXIT, program.number, struct.pack(">B", program.status))


def reseed(entropy: bytes) -> None:
    descriptor = os.open("/dev/random", os.O_WRONLY)
    fcntl.ioctl(
        descriptor, RNDADDENTROPY, struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy
    )
    fcntl.ioctl(descriptor, RNDRESEEDCRNG)
    os.close(descriptor)


def attach_root() -> None:
    """The file system's device was plugged in after the snapshot."""
    for _ in range(200):
        write("/sys/bus/pci/rescan", "1")
        if any(
            name.startswith("virtio") for name in os.listdir("/sys/bus/virtio/drivers/virtiofs")
        ):
            break
        time.sleep(0.01)
    mount("root", ROOT, "virtiofs", NOSUID | NODEV)


def devices() -> None:
    mount(f"{ROOT}/dev/shm", "/shm", None, BIND)
    dev = f"{ROOT}/dev"
    mount("dev", dev, "tmpfs", NOSUID, "size=64k,mode=0755")
    for name, (major, minor) in DEVICES.items():
        os.mknod(f"{dev}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"{dev}/{name}", 0o666)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("ptmx", "pts/ptmx"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        os.symlink(target, f"{dev}/{name}")
    os.mkdir(f"{dev}/shm")
    os.mkdir(f"{dev}/pts")
    mount("devpts", f"{dev}/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    mount("/shm", f"{dev}/shm", None, BIND)
    mount("none", dev, None, REMOUNT | BIND | RDONLY | NOSUID)


def shut(path: str) -> None:
    """Execute-only: the kernel makes a process that its own uid may not read not dumpable. The
    mode is changed in a layer above the file, which only names it (overlayfs, metacopy).
    """
    os.makedirs("/layer", exist_ok=True)
    mount("layer", "/layer", "tmpfs", NODEV, "size=256k,mode=0755")
    for name in ("upper", "work"):
        os.mkdir(f"/layer/{name}")
    directory, name = os.path.split(path)
    options = f"lowerdir={directory},upperdir=/layer/upper,workdir=/layer/work,metacopy=on"
    # An overlay acts as who mounted it, and one that may opens files with O_NOATIME, which the host
    # refuses to virtiofsd for a file of another owner: so it is mounted by one that may not.
    pid = os.fork()
    if pid == 0:
        try:
            without_fowner()
            mount("claude", directory, "overlay", NOSUID | NODEV, options)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise OSError(errno.EPERM, "claude cannot be made execute-only")
    os.chown(path, 0, 0)
    os.chmod(path, 0o111)
    mount("none", directory, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def without_fowner() -> None:
    """Give up CAP_FOWNER (capset(2), version 3)."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    value = ctypes.create_string_buffer(24)
    if LIBC.capget(header, value):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("6I", value.raw))
    words[0] &= ~(1 << 3)
    words[1] &= ~(1 << 3)
    value = ctypes.create_string_buffer(struct.pack("6I", *words), 24)
    if LIBC.capset(header, value):
        raise OSError(ctypes.get_errno(), "capset")


def limit(rules: dict[str, Any]) -> dict[str, Any]:
    """Set the group of all programs, and say what the kernel keeps."""
    wanted = {
        "memory.max": str(rules["memory"]),
        "pids.max": str(rules["pids"]),
        "cpu.max": f"{rules['cpu_us']} 100000",
    }
    for name, value in wanted.items():
        write(f"{GROUP}/{name}", value)
    return {name: read(f"{GROUP}/{name}") for name in wanted}


def first(ends: list[socket.socket], program: Any, rules: dict[str, Any], code: bytes) -> NoReturn:
    """Process 1 of a program's namespaces: when it ends, the kernel kills all that are left."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    socket.sethostname("sandbox")
    proc = f"{ROOT}/proc"
    mount("proc", proc, "proc", NOSUID | NODEV | NOEXEC)
    mount(f"{proc}/sys", f"{proc}/sys", None, BIND)
    mount("none", f"{proc}/sys", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | NOEXEC)
    os.setsid()
    stdin, stdout, stderr = (end.fileno() for end in ends)
    child = os.fork()
    if child == 0:
        try:
            write(f"{GROUP}/cgroup.procs", "0")
            become((stdin, stdout, stdout if program["merge"] else stderr), program, rules, code)
        except FileNotFoundError:
            os._exit(127)
        except OSError as error:
            os._exit(127 if error.errno == errno.ENOTDIR else 126)
        finally:
            os._exit(126)
    close_from(0)
    while True:
        pid, status = os.wait()
        if pid == child:
            result = os.waitstatus_to_exitcode(status)
            os._exit(128 - result if result < 0 else result)


def become(stdio: tuple[int, int, int], program: Any, rules: dict[str, Any], code: bytes) -> None:
    os.setsid()
    for name, value in rules["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 64) for one in stdio]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number)
    close_from(3)
    os.chroot(ROOT)
    os.chdir(program["cwd"])
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    os.setgroups([])
    os.setresgid(rules["uid"], rules["uid"], rules["uid"])
    os.setresuid(rules["uid"], rules["uid"], rules["uid"])
    os.umask(0o022)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(errno.EPERM, "no_new_privs")
    buffer = ctypes.create_string_buffer(code, len(code))
    if LIBC.prctl(PR_SET_SECCOMP, 2, buffer, 0, 0):
        raise OSError(errno.EPERM, "seccomp")
    os.execvpe(program["argv"][0], program["argv"], program["environment"])


def main() -> None:
    os.environ.clear()
    boot()
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    guest = Guest(port)
    guest.send(READY, 0)
    while True:
        guest.step(LOOK_SECONDS if guest.programs else 3600)
        guest.settle()
        if guest.programs:
            guest.forget()


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print("ringfence guest:", type(error).__name__, error, flush=True)
        raise
