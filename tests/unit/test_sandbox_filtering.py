"""A program that puts the filter on itself, run for real: the kernel is asked what stands."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.sandbox import filtering, seccomp

MACHINE = platform.machine()
NAMES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(ctypes.c_long({number}), -100, None, None, None, 0)
print(ctypes.get_errno(), os.getpid() > 0)
"""
"""name_to_handle_at: EFAULT of the kernel, EPERM of the filter."""
NUMBERS = {"x86_64": 303, "aarch64": 264}


@pytest.fixture
def fence(tmp_path: Path) -> Path:
    return written(tmp_path / "fence", seccomp.build(MACHINE))


def written(path: Path, filters: bytes) -> Path:
    path.write_bytes(filtering.program(MACHINE, filters))
    path.chmod(0o755)
    return path


def no_new_privs() -> None:
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        env=environment,
        preexec_fn=no_new_privs,
        capture_output=True,
        text=True,
        check=False,
    )


def filters_of(*before: str) -> int:
    done = run(*before, "/bin/sh", "-c", "cat /proc/self/status")
    fields = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    return int(fields["Seccomp_filters"])


def test_one_filter_more_stands_and_every_further_one_adds(fence: Path) -> None:
    before = filters_of()
    assert filters_of(str(fence)) == before + 1
    assert filters_of(str(fence), str(fence)) == before + 2


def test_a_call_that_the_kernel_would_answer_is_refused(fence: Path) -> None:
    asked = NAMES.format(number=NUMBERS[MACHINE])
    assert run(sys.executable, "-c", asked).stdout == "14 True\n"
    assert run(str(fence), sys.executable, "-c", asked).stdout == "1 True\n"


def test_arguments_environment_and_exit_status_are_the_programs(fence: Path) -> None:
    script = 'echo "$0|$1|$2|$A"; exit 7'
    done = run(str(fence), "/bin/sh", "-c", script, "zero", "", "two words", A="b")
    assert (done.returncode, done.stdout) == (7, "zero||two words|b\n"), done.stderr


def test_where_the_kernel_takes_no_filter_nothing_runs(tmp_path: Path, fence: Path) -> None:
    none = written(tmp_path / "none", b"")
    done = run(str(none), "/bin/sh", "-c", "echo ran")
    assert (done.returncode, done.stdout) == (filtering.REFUSED, "")
    assert run(str(fence), "/bin/sh", "-c", "echo ran").stdout == "ran\n"


def test_a_program_that_is_not_there_is_no_success(fence: Path) -> None:
    assert run(str(fence), "/nonexistent").returncode == filtering.REFUSED
    assert run(str(fence)).returncode == filtering.REFUSED


def test_nothing_of_the_host_is_loaded_before_the_filter(fence: Path) -> None:
    """No interpreter in the file: LD_PRELOAD is read by the program's loader, under the filter."""
    text = fence.read_bytes()
    headers = [text[64 + 56 * n : 68 + 56 * n] for n in range(2)]
    kinds = {int.from_bytes(kind, "little") for kind in headers}
    assert kinds == {1, 0x6474E551}, "a segment and the stack; no PT_INTERP, no PT_DYNAMIC"
    assert os.stat(fence).st_size < 4096


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_each_machine_with_a_table_has_a_program(machine: str, number: int) -> None:
    made = filtering.program(machine, seccomp.build(machine))
    assert int.from_bytes(made[18:20], "little") == number
    code, table = made[176:240], made[240:256]
    assert len(code) == 64
    assert int.from_bytes(table[:2], "little") * 8 == len(made) - 256
    assert int.from_bytes(table[8:], "little") == 0x400000 + 256
    assert made[256:] == seccomp.build(machine)


def test_a_machine_without_code_is_no_program() -> None:
    with pytest.raises(LookupError):
        filtering.program("riscv64", b"")
