"""Runs outside the sandbox, standard library only: makes the place, becomes bubblewrap.

Started by `launcher.py` with N, the descriptor of a control socket, as its one argument. Frames
with descriptors come in, one goes out. Four phases:

prepare  makes the namespaces and the mounts and hands descriptors of them out: they live through
         the descriptors that the worker holds. The process then waits for the first exec.
attach   puts the workspace into a place that was prepared without one, see launch_attach.py.
seat     makes the place of one agent in a place that several have, see launch_seat.py. The process
         then waits as after prepare.
exec     enters them (it may stand there already), gives up every privilege and becomes
         bubblewrap, which encloses.

Everything here is decided by a plan that `profile.py` computed; nothing here reads a policy.
Its start is on the path of every run: `json`, `socket` and `signal` would double the time it
takes the interpreter to be there, so frames are `marshal` (both ends are one interpreter) and
the modules in C beneath the others are used.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket as socket
import ctypes
import errno
import fcntl
import marshal
import os
import resource
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
CLONE_VM, CLONE_VFORK, SIGCHLD, _STACK = 0x100, 0x4000, 17, 65536
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 32, 4096, 16384, 1 << 18, 1 << 20
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_RECURSIVE, AT_EMPTY_PATH = 1, 0o2000000, 0x8000, 0x1000
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_IDMAP = 0x00100000
SIGKILL = 9
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 2, 4, 8

# asm-generic numbers; x86_64 has the same ones for everything newer than 5.1
_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_OPENAT2, _NR_MOUNT_SETATTR = 428, 429, 437, 442
_NR_CLOSE_RANGE, _LAST, _CLOEXEC = 436, 0xFFFFFFFF, 4

TYPE_CHECKING = False  # typing itself takes longer to import than all of the above
if TYPE_CHECKING:
    from typing import Any

    Plan = dict[str, Any]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(LIBC.syscall(ctypes.c_long(number), *wide), what)


def unshare(flags: int) -> None:
    _check(LIBC.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, kind: int) -> None:
    _check(LIBC.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    result = LIBC.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {kind or 'bind'} on {target}")


def open_tree(directory: int, path: str, *, recursive: bool) -> int:
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH
    flags |= AT_RECURSIVE if recursive else 0
    name = ctypes.c_char_p(os.fsencode(path))
    return _syscall(_NR_OPEN_TREE, f"open_tree {path}", directory, name, flags)


def move_mount(tree: int, target: int, what: str) -> None:
    empty = ctypes.c_char_p(b"")
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_NR_MOVE_MOUNT, f"move_mount {what}", tree, empty, target, empty, flags)


def open_beneath(directory: int, path: str) -> int:
    """An O_PATH descriptor, through no link: the host may swap one in while we look."""
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    how = struct.pack("QQQ", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, resolve)
    name = ctypes.c_char_p(os.fsencode(path))
    buffer = ctypes.create_string_buffer(how, len(how))
    return _syscall(_NR_OPENAT2, f"open {path!r}", directory, name, buffer, len(how))


def set_attributes(tree: int, attributes: int, user_namespace: int, *, recursive: bool) -> None:
    value = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, user_namespace), 32)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    empty = ctypes.c_char_p(b"")
    _syscall(_NR_MOUNT_SETATTR, "mount_setattr", tree, empty, flags, value, 32)


def mapped_namespace(users: list[list[int]], groups: list[list[int]] | None = None) -> int:
    """A user namespace with these lines of (first id inside, first id here, count). For root.

    Whose namespace it is has ended before it is mapped, unwaited for: so there is nobody to speak
    with and nobody whom a kill of ours could leave behind, and /proc still names the namespace. It
    borrows our memory for its one call, because to copy and to drop that of an interpreter takes
    ten times as long as all of this. The kernel gives the files of an ended process to root.
    """
    stack = ctypes.create_string_buffer(_STACK)
    end = ctypes.c_void_p((ctypes.addressof(stack) + _STACK) & ~15)
    flags = ctypes.c_int(CLONE_NEWUSER | CLONE_VM | CLONE_VFORK | SIGCHLD)
    over = ctypes.cast(LIBC._exit, ctypes.c_void_p)  # noqa: SLF001  its name in unistd.h
    child = _check(LIBC.clone(over, end, flags, ctypes.c_void_p(0)), "clone a user namespace")
    try:
        for name, lines in (("uid_map", users), ("gid_map", groups or users)):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write("".join(f"{inside} {here} {count}\n" for inside, here, count in lines))
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.waitpid(child, 0)


def enter_user_namespace(uid_inside: int, gid_inside: int) -> None:
    """One of our own, in which we are these ids and nobody is any other: all that users may map."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid_inside} {uid} 1"),
        ("gid_map", f"{gid_inside} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_own_namespaces(*, as_root: bool) -> None:
    if not as_root:
        enter_user_namespace(os.getuid(), os.getgid())
    unshare(CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def receive(control: socket.socket) -> tuple[Plan, list[int]]:
    data, ancillary, _, _ = control.recvmsg(4, socket.CMSG_SPACE(64 * 4))
    descriptors: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"{len(payload) // 4}i", payload)
    if len(data) < 4:
        raise OSError(errno.EPIPE, "the worker is gone")
    (length,) = struct.unpack(">I", data)
    body = bytearray()
    while len(body) < length:
        chunk = control.recv(length - len(body))
        if not chunk:
            raise OSError(errno.EPIPE, "the worker is gone")
        body += chunk
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return marshal.loads(body), descriptors  # noqa: S302  the worker wrote it


def send(control: socket.socket, value: Plan, descriptors: list[int] = []) -> None:  # noqa: B006
    body = marshal.dumps(value)
    rights = struct.pack(f"{len(descriptors)}i", *descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    control.sendmsg([struct.pack(">I", len(body)) + body], ancillary)


def prepare(plan: Plan, descriptors: list[int]) -> tuple[Plan, list[int]]:
    as_root, uid = plan["as_root"], plan["uid"]
    # also loaded before the stage covers what it lies under
    waiting = _later_phase("launch_attach") if plan["waiting"] is not None else None
    idmap = enter_workspace(plan, descriptors[0]) if descriptors else -1
    enter_own_namespaces(as_root=as_root)
    listener = _later_phase("launch_network").listener(plan["proxy_port"])
    # Every source is cloned, and every tool read, before the stage covers what it lies under.
    trees, copying = clone_all(plan, max(idmap, 0))
    tools = {target: _content(path) for path, target in plan["tools"].items()}
    begun = {target: _content(path) for target, path in plan["begun"].items()}
    stage = plan["stage"]
    mount("stage", stage, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=0755")
    scratch(plan, uid)
    _mount_points(stage)
    # before the overlays, one of which has them below: what lies there may not change under it
    files = {path: begun.get(path, b"") + text.encode() for path, text in plan["files"].items()}
    write_files(stage, files, 0o644)
    fill(plan, trees, copying, "workspace")
    write_files(stage, tools | plan["programs"], 0o755)
    if waiting is not None:
        waiting.wait_for_workspace(stage, plan["gate"], plan["waiting"])
    # An ordinary user's bubblewrap belongs to the uid inside, which finds it as /proc/1/exe; what
    # it could write there would run outside with the next program (CVE-2019-5736).
    mount("none", stage, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    out = [
        os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC),
        os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC),
        os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC),
        listener,
    ]
    return {"ok": True}, out + handles(plan)


def enter_workspace(plan: Plan, workspace: int) -> int:
    """unshare() moves root and cwd into the copied mount tree, but no other descriptor: the
    workspace travels as the working directory. Returns the map of its owner, -1 for none.
    """
    owner, uid = os.fstat(workspace), plan["uid"]
    # the owner's ids, as they are on disk, become the sandbox's uid
    also = [[one, one, 1] for one in plan.get("creators", [])]
    owners = [[owner.st_uid, uid, 1], *also], [[owner.st_gid, uid, 1], *also]
    idmap = mapped_namespace(*owners) if plan["as_root"] else -1
    os.fchdir(workspace)
    return idmap


def fill(plan: Plan, trees: list[tuple[int, Plan]], copying: Any, view: str) -> None:
    """Mount all that is shown, and cover what is not; `view` is the workspace's place."""
    stage = plan["stage"]
    if copying is not None:
        try:
            copying.copy_tree(f"{stage}/scratch/copy", plan["uid"])
        except OSError as error:
            message = f"the workspace has to be copied, under the disk limit: {error.strerror}"
            raise OSError(error.errno, message) from None
        mount(f"{stage}/scratch/copy", f"{stage}/lower", None, MS_BIND)
    for tree, source in trees:
        _attach(stage, tree, source)
    for overlay in plan["overlays"]:
        _overlay(stage, overlay)
    if not plan["workspace_exec"]:
        top = os.open(f"{stage}/{view}", os.O_PATH | os.O_CLOEXEC)
        set_attributes(top, MOUNT_ATTR_NOEXEC, 0, recursive=True)
        os.close(top)
    for place, path, kind in plan["masks"]:
        _mask(stage, place, path, kind)


def handles(plan: Plan) -> list[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return [os.open(f"{plan['stage']}/{name}", flags) for name in plan["handles"]]


def clone_all(plan: Plan, idmap: int) -> tuple[list[tuple[int, Plan]], Any]:
    """Every source with its tree; what copies the workspace where it has no tree of its own, loaded
    before the stage covers what it lies under.
    """
    trees, copying = [], None
    for source in plan["sources"]:
        try:
            trees.append((_clone(plan, source, idmap), source))
        except UnmappableError:
            if source["path"] or source["target"] != "lower":
                raise
            copying = _later_phase("launch_copy")
    return trees, copying


def _clone(plan: Plan, source: Plan, idmap: int) -> int:
    recursive = not plan["as_root"]  # without privilege over the host no submount may be left out
    tree = open_tree(-100, source["path"] or ".", recursive=recursive)
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    attributes |= MOUNT_ATTR_RDONLY if source["read_only"] else 0
    attributes |= MOUNT_ATTR_IDMAP if plan["as_root"] and source["idmap"] else 0
    try:
        set_attributes(tree, attributes, idmap, recursive=recursive)
    except OSError as error:
        os.close(tree)
        if attributes & MOUNT_ATTR_IDMAP and error.errno == errno.EINVAL:
            what = source["path"] or "the workspace"
            message = f"{what} is on a file system without idmapped mounts"
            raise UnmappableError(error.errno, message) from None
        raise
    return tree


class UnmappableError(OSError):
    """Its owner cannot be made the sandbox's uid by a mount: overlayfs, nfs, fuse."""


def _overlay(stage: str, overlay: Plan) -> None:
    """With an upper directory: copy on write. Without: a veil, through which a socket or a FIFO,
    even one made later, is not the host's: an overlay has inodes of its own for them.
    """
    lower, target = f"{stage}/{overlay['lower']}", f"{stage}/{overlay['target']}"
    options = f"lowerdir={lower}:{stage}/{overlay['over']},userxattr"
    if overlay["writable"]:
        scratch = f"{stage}/scratch"
        options = f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work,userxattr"
    os.makedirs(target, exist_ok=True)
    mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, options)


def _mask(stage: str, place: str, path: str, kind: str) -> None:
    """Cover one path with what `prepare` made for it. Mounted here rather than by each program's
    bubblewrap: a mount stays on its file when a folder above it is renamed, a path does not.
    """
    root = os.open(f"{stage}/{place}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        target = open_beneath(root, path)
    except FileNotFoundError:
        return  # deleted since it was found, or below what is covered already
    finally:
        os.close(root)
    tree = open_tree(-100, f"{stage}/{kind}", recursive=False)
    set_attributes(
        tree, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, recursive=False
    )
    move_mount(tree, target, repr(path))
    os.close(tree)
    os.close(target)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def scratch(plan: Plan, uid: int) -> None:
    """What the agent writes beside its workspace, all of one size; over what stands there."""
    stage = plan["stage"]
    scratch = f"{stage}/scratch"
    os.makedirs(scratch, exist_ok=True)
    size = f"size={plan['disk_mb']}m,nr_inodes={max(4096, plan['disk_mb'] * 128)},mode=0755"
    mount("scratch", scratch, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for name in ("upper", "work", "tmp", "home", "shm"):
        os.mkdir(f"{scratch}/{name}", 0o700)
        os.chown(f"{scratch}/{name}", uid, uid if plan["as_root"] else -1)
    flags = MS_NOSUID | MS_NODEV | (0 if plan["tmp_exec"] else MS_NOEXEC)
    for name in ("tmp", "home", "shm"):
        target = f"{stage}/{name}"
        os.makedirs(target, exist_ok=True)
        mount(f"{scratch}/{name}", target, None, MS_BIND)
        mount("none", target, None, MS_REMOUNT | MS_BIND | flags)


def _mount_points(stage: str) -> None:
    """Those that are not made with what is mounted there, and what covers."""
    for name in ("workspace", "lower", "nothing", "bundle", "egress", "session"):
        os.mkdir(f"{stage}/{name}")
    os.mkdir(f"{stage}/shut", 0)
    for name, mode in (("masked", 0), ("blank", 0o444)):
        os.close(os.open(f"{stage}/{name}", os.O_CREAT | os.O_WRONLY, mode))


def _attach(stage: str, tree: int, source: Plan) -> None:
    target = f"{stage}/{source['target']}"
    if source["directory"]:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    place = os.open(target, os.O_PATH | os.O_CLOEXEC)
    move_mount(tree, place, source["target"])
    os.close(place)
    os.close(tree)


def write_files(stage: str, files: dict[str, bytes], mode: int) -> None:
    made = set()
    for path, data in files.items():
        target = f"{stage}/{path}"
        directory, _, _ = target.rpartition("/")
        if directory not in made:
            os.makedirs(directory, exist_ok=True)
            made.add(directory)
        with open(os.open(target, os.O_CREAT | os.O_WRONLY, mode), "wb") as file:
            file.write(data)


def become(plan: Plan, descriptors: list[int], *, inside: bool) -> None:
    """Enter the prepared place and exec bubblewrap. Returns only by raising."""
    mnt, net, user, standard_in, standard_out, standard_error, seccomp, status, *more = descriptors
    for path in plan["cgroups"]:
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write("0")
    if not inside:
        if not plan["as_root"]:
            setns(user, CLONE_NEWUSER)
        setns(net, CLONE_NEWNET)
        setns(mnt, CLONE_NEWNS)
    for name, value in plan["rlimits"].items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (ceiling, ceiling))
    if plan["as_root"]:
        _drop(plan["uid"])
    if os.geteuid() == 0 or os.getuid() == 0:
        # uid 1000 of a namespace made by root is the kernel's root: it can write /proc/sys.
        raise OSError(errno.EPERM, "refusing to start bubblewrap as euid 0")
    die_with(plan["parent"])
    os.chdir("/")  # not the host's workspace, which was the working directory of `prepare`
    os.dup2(standard_in, 0)
    os.dup2(standard_out, 1)
    os.dup2(standard_error, 2)
    # Options hold the environment: a command line is for every user of the host to read.
    options = os.memfd_create("options")
    os.write(options, b"".join(os.fsencode(word) + b"\0" for word in plan["options"]))
    os.lseek(options, 0, os.SEEK_SET)
    # Duplicated upwards first, so that none lands on another before it is read.
    handed = (seccomp, status, options, *more)
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 128) for one in handed]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, 10 + number)
    os.closerange(3, 10)
    close_from(10 + len(high))
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    os.execve(plan["bwrap"], plan["argv"], {})


def close_from(first: int, *, on_exec: bool = False) -> None:
    _syscall(_NR_CLOSE_RANGE, "close_range", first, _LAST, _CLOEXEC if on_exec else 0)


def die_with(parent: int) -> None:
    """Gain no privilege any more, and end when the parent does. After the last change of ids: the
    kernel forgets the signal with them.
    """
    _check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    set_death_signal()
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the worker is gone")


def set_death_signal() -> None:
    _check(LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "pdeathsig")


def _drop(uid: int) -> None:
    os.setgroups([])
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _later_phase(name: str) -> Any:
    """In a file of its own, so that bubblewrap does not wait for it."""
    return __import__(name)


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    inside = False
    descriptors: list[int] = []
    os.umask(0o022)  # the caller's may shut the sandbox's uid out of the place made for it
    _later_phase("launch_network").make_ahead()
    try:
        plan, descriptors = receive(control)
        if plan["phase"] == "attach":
            value, out = _later_phase("launch_attach").attach(plan, descriptors)
            send(control, value, out)
            return 0
        if plan["phase"] in {"prepare", "seat"}:
            seat = plan["phase"] == "seat"
            make = _later_phase("launch_seat").seat if seat else prepare
            value, out = make(plan, descriptors)
            send(control, value, out)
            for descriptor in out + descriptors:
                os.close(descriptor)
            inside = True
            plan, descriptors = receive(control)
        if plan["phase"] in {"oci", "podman", "gvisor", "gvisor_podman"}:
            _later_phase(f"launch_{plan['phase']}").become(plan, descriptors, inside=inside)
        become(plan, descriptors, inside=inside)
    except OSError as error:
        try:
            if len(descriptors) > 5:
                # the worker no longer reads the control socket: this is the program's own
                os.write(descriptors[5], f"launch: {error}\n".encode())
            send(control, {"ok": False, "errno": error.errno or 0, "message": str(error)})
        except OSError:
            pass  # nobody is there to be told
    return 1
