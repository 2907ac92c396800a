"""The seccomp filter: as classic BPF, assembled here, and as an OCI profile. PURE.

Default deny: what the table does not name ends with EPERM, and a number the table's kernel does
not know yet ends with ENOSYS, so that libraries fall back as they do on an older kernel. Foreign
architectures are killed: i386 and x32 entry points have numbers of their own, and a filter that
forgets them is no filter (seccomp(2), "Caveats").

Ruled by argument: clone without any namespace flag; clone3 is ENOSYS, because its flags lie in
memory that a filter cannot read and libc then falls back to clone; sockets of the unix, inet,
inet6 and netlink-route families only (no vsock, packet, alg, xdp), inet ones that are streams or
datagrams of TCP and UDP only, pairs of the unix family only; ioctl without what types into the
host's terminal (TIOCSTI, TIOCLINUX: CVE-2017-5226, CVE-2023-28100) or has the kernel load a module
for whoever asks (line disciplines: CVE-2017-2636; bridges, VLANs); mknod of FIFOs and plain files;
personality only where it asks or sets the plain one (no READ_IMPLIES_EXEC, no ADDR_NO_RANDOMIZE).
io_setup is ENOSYS: of asynchronous contexts the whole host has one number (fs.aio-max-nr), which
no control group counts, and one sandbox could take all that its databases and machines need.

Nothing is made set-user-id: what is written in a workspace of the host has its owner, and would run
as them for every user of the host. openat2 is ENOSYS, because its mode lies in memory, too. A
set-group-id bit is left: folders that a team shares have it, and a filter sees no folder.

A family or protocol that no filter names would be looked for among the kernel's modules, without
any privilege: sctp, dccp and tipc have been roads to root before. So would a type: dccp answers to
type 6 without a protocol (net-pf-2-proto-0-type-6, CVE-2017-6074).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.sandbox.syscalls import AARCH64, RULED, X86_64

_LD, _JEQ, _JGE, _JSET, _RET, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_NR, _ARCH = 0, 4
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_ERRNO = 0x00050000
_EPERM, _ENOSYS, _EPROTONOSUPPORT, _EAFNOSUPPORT = 1, 38, 93, 97

_NAMESPACES = 0x7E020000 | 0x80
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and NEWTIME, which shares a bit with the exit signal:
clone's low byte is the signal, and no signal has bit 7."""

_X32 = 0x40000000
_FIRST_UNKNOWN = 463
"""Numbers from here on are newer than the table: ENOSYS, as the older kernel would say."""

_AF_UNIX, _INET_FAMILIES = 1, (2, 10)
_INET_PROTOCOLS = (0, 6, 17)
"""0 is the type's own: TCP for streams, UDP for datagrams."""
_TYPE_MASK, _INET_TYPES = 0xF, (1, 2)
"""SOCK_STREAM and SOCK_DGRAM; what lies above the mask are flags (SOCK_TYPE_MASK of net.h)."""
_AF_NETLINK, _NETLINK_ROUTE = 16, 0
FORBIDDEN_IOCTLS = (
    *(0x5412, 0x541C, 0x5423),  # TIOCSTI, TIOCLINUX, TIOCSETD
    *(0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1),  # SIOC{G,S}IFBR, {G,S}IFVLAN, BR{ADD,DEL}BR
)
_S_IFMT = 0xF000
_NODE_KINDS = (0x0000, 0x1000, 0x8000)
_S_ISUID = 0o4000
_MODES = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1}
_OPENS = {"open": 1, "openat": 2}
"""Where the mode of a call stands; and the flags of one, after which a mode may be left out."""
_MAKES = 0o100 | 0o20000000
"""O_CREAT and the bit of O_TMPFILE, on both machines: without them a mode is what lies there."""
_PERSONALITIES = (0x0, 0xFFFFFFFF)
_ABSENT = ("clone3", "io_setup", "openat2")
"""Libraries do without them where the kernel has none."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between machines: AUDIT_ARCH value, call numbers, presence of x32."""

    audit: int
    calls: dict[str, int]
    has_x32: bool


ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, X86_64, has_x32=True),
    "aarch64": Architecture(0xC00000B7, AARCH64, has_x32=False),
}


class _Program:
    """Instructions with forward labels; classic BPF jumps are 8-bit, so blocks stay short."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int]] = []

    def add(self, code: int, value: int, on_true: int = 0, on_false: int = 0) -> None:
        self.code.append((code, on_true, on_false, value))

    def load(self, offset: int) -> None:
        self.add(_LD, offset)

    def argument(self, index: int, *, high: bool = False) -> None:
        """The low (or high) half of a 64-bit argument; both machines are little-endian."""
        self.load(16 + 8 * index + (4 if high else 0))

    def returns(self, value: int) -> None:
        self.add(_RET, value)

    def unless_equal_skip(self, value: int, block: _Program) -> None:
        """Run the block, which always returns, when the accumulator is `value`."""
        self.add(_JEQ, value, 0, len(block.code))
        self.code += block.code

    def bytes(self) -> bytes:
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in self.code)


def errno(number: int) -> int:
    """The filter's return value for an errno."""
    return _ERRNO | number


@functools.cache
def build(machine: str) -> bytes:
    """The program for `bwrap --seccomp`: an array of struct sock_filter.

    Raises:
        LookupError: for a machine without a table; the caller fails closed.
    """
    architecture = ARCHITECTURES[machine]
    program = _Program()
    program.load(_ARCH)
    program.add(_JEQ, architecture.audit, 1, 0)
    program.returns(_KILL)
    program.load(_NR)
    if architecture.has_x32:
        program.add(_JGE, _X32, 0, 1)
        program.returns(_KILL)
    program.add(_JGE, _FIRST_UNKNOWN, 0, 1)
    program.returns(errno(_ENOSYS))
    for name, block in _ruled().items():
        if name in architecture.calls:
            program.unless_equal_skip(architecture.calls[name], block)
    _allow(program, {n for name, n in architecture.calls.items() if name not in RULED})
    program.returns(errno(_EPERM))
    return program.bytes()


def unmade(machine: str, call: str) -> bytes:
    """A program that lets everything pass but one call, which succeeds without being made.

    No wall: it is for a program that insists on a call which an ordinary user's namespace refuses,
    and whose own filter comes on top. Foreign entry points are killed as above.

    Raises:
        LookupError: for a machine or a call without a number.
    """
    architecture = ARCHITECTURES[machine]
    program = _Program()
    program.load(_ARCH)
    program.add(_JEQ, architecture.audit, 1, 0)
    program.returns(_KILL)
    program.load(_NR)
    program.add(_JEQ, architecture.calls[call], 0, 1)
    program.returns(errno(0))
    program.returns(_ALLOW)
    return program.bytes()


def _allow(program: _Program, numbers: set[int]) -> None:
    """Runs of numbers as ranges: a third of the instructions of one test a number."""
    for first, last in _ranges(sorted(numbers)):
        if first == last:
            program.add(_JEQ, first, 0, 1)
            program.returns(_ALLOW)
        else:
            program.add(_JGE, first, 0, 2)
            program.add(_JGE, last + 1, 1, 0)
            program.returns(_ALLOW)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _ruled() -> dict[str, _Program]:
    return {
        "clone": _clone(),
        **{name: _always(errno(_ENOSYS)) for name in _ABSENT},
        "socket": _socket(),
        "socketpair": _one_of(0, (_AF_UNIX,), _EAFNOSUPPORT),
        "ioctl": _ioctl(),
        "personality": _one_of(0, _PERSONALITIES, _EPERM),
        **{name: _mode(argument) for name, argument in _MODES.items()},
        **{name: _open(argument) for name, argument in _OPENS.items()},
        "mknod": _mknod(1),
        "mknodat": _mknod(2),
    }


def _always(value: int) -> _Program:
    program = _Program()
    program.returns(value)
    return program


def _clone() -> _Program:
    program = _Program()
    program.argument(0)
    program.add(_JSET, _NAMESPACES, 0, 1)
    program.returns(errno(_EPERM))
    program.returns(_ALLOW)
    return program


def _socket() -> _Program:
    program = _Program()
    program.argument(0)
    program.add(_JEQ, _AF_UNIX, 0, 1)
    program.returns(_ALLOW)
    for family in _INET_FAMILIES:
        program.unless_equal_skip(family, _inet())
    program.unless_equal_skip(_AF_NETLINK, _one_of(2, (_NETLINK_ROUTE,), _EAFNOSUPPORT))
    program.returns(errno(_EAFNOSUPPORT))
    return program


def _inet() -> _Program:
    program = _Program()
    program.argument(1)
    program.add(_AND, _TYPE_MASK)
    for kind in _INET_TYPES:
        program.unless_equal_skip(kind, _one_of(2, _INET_PROTOCOLS, _EPROTONOSUPPORT))
    # not the kernel's own word for it: that it was not asked can be told from inside
    program.returns(errno(_EPERM))
    return program


def _one_of(argument: int, values: tuple[int, ...], otherwise: int) -> _Program:
    """Allow when an argument is one of the values; else the errno."""
    program = _Program()
    program.argument(argument)
    for value in values:
        program.add(_JEQ, value, 0, 1)
        program.returns(_ALLOW)
    program.returns(errno(otherwise))
    return program


def _ioctl() -> _Program:
    program = _Program()
    # The kernel looks at 32 bits of the request, whatever the upper half says (CVE-2019-10063).
    program.argument(1)
    for request in FORBIDDEN_IOCTLS:
        program.add(_JEQ, request, 0, 1)
        program.returns(errno(_EPERM))
    program.returns(_ALLOW)
    return program


def _mode(argument: int) -> _Program:
    program = _Program()
    program.argument(argument)
    program.add(_JSET, _S_ISUID, 0, 1)
    program.returns(errno(_EPERM))
    program.returns(_ALLOW)
    return program


def _open(flags_argument: int) -> _Program:
    program, made = _Program(), _mode(flags_argument + 1)
    program.argument(flags_argument)
    program.add(_JSET, _MAKES, 0, len(made.code))
    program.code += made.code
    program.returns(_ALLOW)
    return program


def _mknod(mode_argument: int) -> _Program:
    """FIFOs and plain files; a device number of 0/0 would be a forged whiteout in an overlay."""
    program = _Program()
    program.argument(mode_argument)
    program.add(_AND, _S_IFMT | _S_ISUID)
    for kind in _NODE_KINDS:
        program.add(_JEQ, kind, 0, 1)
        program.returns(_ALLOW)
    program.returns(errno(_EPERM))
    return program


_OCI_NAMES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_LOW = 0xFFFFFFFF


def oci(machine: str) -> dict[str, Any]:
    """The same table and rules as `linux.seccomp` of the OCI runtime specification.

    Other than in the BPF, what is refused by its argument ends with EPERM like all else: libseccomp
    takes one comparison of an argument a rule, so that there is no word for "none of these".

    Raises:
        LookupError: for a machine without a table; the caller fails closed.
    """
    plain = sorted(name for name in ARCHITECTURES[machine].calls if name not in RULED)
    rules: list[tuple[str, tuple[dict[str, Any], ...]]] = [
        ("clone", (_masked(0, _NAMESPACES, 0),)),
        ("socket", (_equal(0, _AF_UNIX),)),
        ("socket", (_equal(0, _AF_NETLINK), _equal(2, _NETLINK_ROUTE))),
        *(
            (
                "socket",
                (_equal(0, family), _masked(1, _TYPE_MASK, kind), _equal(2, protocol)),
            )
            for family in _INET_FAMILIES
            for kind in _INET_TYPES
            for protocol in _INET_PROTOCOLS
        ),
        ("socketpair", (_equal(0, _AF_UNIX),)),
        *(("ioctl", (_masked(1, mask, value),)) for mask, value in all_but(FORBIDDEN_IOCTLS)),
        *(("personality", (_equal(0, value),)) for value in _PERSONALITIES),
        *(("mknod", (_masked(1, _S_IFMT | _S_ISUID, kind),)) for kind in _NODE_KINDS),
        *(("mknodat", (_masked(2, _S_IFMT | _S_ISUID, kind),)) for kind in _NODE_KINDS),
        *((name, (_masked(mode, _S_ISUID, 0),)) for name, mode in _MODES.items()),
        *((name, (_masked(flags + 1, _S_ISUID, 0),)) for name, flags in _OPENS.items()),
        *((name, (_masked(flags, _MAKES, 0),)) for name, flags in _OPENS.items()),
    ]
    known = ARCHITECTURES[machine].calls
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": [_OCI_NAMES[machine]],
        "syscalls": [
            {"names": plain, "action": "SCMP_ACT_ALLOW"},
            *(
                {"names": [name], "action": "SCMP_ACT_ALLOW", "args": list(tests)}
                for name, tests in rules
                if name in known
            ),
            # libc falls back from clone3 to clone, whose flags a filter can read
            *(
                {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS}
                for name in _ABSENT
            ),
        ],
    }


def _equal(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def all_but(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(mask, value) pairs that match each 32-bit number but these, and no other: what is beside
    the path to them in the tree of bits. The upper half of an argument is in no mask, because the
    kernel does not look at it (CVE-2019-10063).
    """
    for bit in range(31, -1, -1):
        above = _LOW & ~((1 << (bit + 1)) - 1)
        for prefix in sorted({value & above for value in values}):
            for value in (prefix, prefix | 1 << bit):
                mask = above | 1 << bit
                if all(one & mask != value for one in values):
                    yield mask, value
