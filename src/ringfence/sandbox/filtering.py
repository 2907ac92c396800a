"""A program that puts the filter on itself and becomes another: an ELF file, made here. PURE.

For a technology that starts programs its own way and takes no filter of ours. What runs is 64 bytes
of machine code, for each architecture that has a table: prctl(PR_SET_SECCOMP), execve of its
arguments, exit with REFUSED if either fails. No interpreter and no library is loaded, so that no
variable (LD_PRELOAD, PYTHONPATH) and no file of the workspace has a say before the filter stands,
and nothing of the host has to be installed for it. It needs no_new_privs, as any filter does.

Whether the filter then stands is not this program's to say: who starts it asks the kernel.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

REFUSED = 125
"""Exit status when the kernel does not take the filter."""

_BASE = 0x400000
"""Where it is loaded: above any mmap_min_addr, and a multiple of 64 KiB, aarch64's largest page."""
_ELF_HEADER, _PROGRAM_HEADER = 64, 56
_LOAD, _STACK, _EXECUTE, _WRITE, _READ = 1, 0x6474E551, 1, 2, 4
_CODE = _ELF_HEADER + 2 * _PROGRAM_HEADER
_INSTRUCTION = 8
"""Bytes of a struct sock_filter."""


class _Machine(NamedTuple):
    """EM_ value of elf.h, and 64 bytes of code: what follows them is a struct sock_fprog."""

    number: int
    code: bytes


# The stack at the start: argc, argv[0], argv[1], … NULL, the environment (System V ABI).
_X86_64 = bytes.fromhex(
    "bf16000000"  # mov edi, PR_SET_SECCOMP
    "be02000000"  # mov esi, SECCOMP_MODE_FILTER
    "488d152f000000"  # lea rdx, [code + 64]
    "b89d000000"  # mov eax, prctl
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "7518"  # jne refused
    "488d742410"  # lea rsi, [rsp + 16]
    "488b3e"  # mov rdi, [rsi]
    "488b0c24"  # mov rcx, [rsp]
    "488d54cc10"  # lea rdx, [rsp + 8 * rcx + 16]
    "b83b000000"  # mov eax, execve
    "0f05"  # syscall
    "bf7d000000"  # refused: mov edi, REFUSED
    "b8e7000000"  # mov eax, exit_group
    "0f05"  # syscall
)
_AARCH64 = b"".join(
    struct.pack("<I", word)
    for word in (
        0xD28002C0,  # mov x0, PR_SET_SECCOMP
        0xD2800041,  # mov x1, SECCOMP_MODE_FILTER
        0x100001C2,  # adr x2, code + 64
        0xD28014E8,  # mov x8, prctl
        0xD4000001,  # svc 0
        0xB50000E0,  # cbnz x0, refused
        0xF94003E3,  # ldr x3, [sp]
        0x910043E1,  # add x1, sp, 16
        0xF9400020,  # ldr x0, [x1]
        0x8B030C22,  # add x2, x1, x3, lsl 3
        0xD2801BA8,  # mov x8, execve
        0xD4000001,  # svc 0
        0xD2800FA0,  # refused: mov x0, REFUSED
        0xD2800BC8,  # mov x8, exit_group
        0xD4000001,  # svc 0
        0xD503201F,  # nop
    )
)
_MACHINES = {"x86_64": _Machine(62, _X86_64), "aarch64": _Machine(183, _AARCH64)}


def program(machine: str, filters: bytes) -> bytes:
    """An executable file. Its arguments are an absolute path and that program's arguments.

    Args:
        machine: as of `platform.machine()`.
        filters: an array of struct sock_filter, see `seccomp.build`.

    Raises:
        LookupError: for a machine without code; the caller fails closed.
    """
    made = _MACHINES[machine]
    at = _BASE + _CODE + len(made.code) + struct.calcsize("<HxxxxxxQ")
    fprog = struct.pack("<HxxxxxxQ", len(filters) // _INSTRUCTION, at)
    body = made.code + fprog + filters
    size = _CODE + len(body)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack(
        *("<HHIQQQIHHHHHH", 2, made.number, 1, _BASE + _CODE, _ELF_HEADER, 0, 0),
        *(_ELF_HEADER, _PROGRAM_HEADER, 2, 0, 0, 0),
    )
    load = struct.pack("<IIQQQQQQ", _LOAD, _READ | _EXECUTE, 0, _BASE, _BASE, size, size, 0x10000)
    # without this header the kernel would make the stack executable
    stack = struct.pack("<IIQQQQQQ", _STACK, _READ | _WRITE, 0, 0, 0, 0, 0, 16)
    return header + load + stack + body
