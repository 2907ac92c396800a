"""The sandbox's pure parts: filter, plan, patterns, patch, files that run later."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import seccomp
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.hostfiles import classify
from ringfence.sandbox.patch import render, summary
from ringfence.sandbox.profile import HostFacts, enclose_argv, prepare_plan, shown_paths
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import load_changes, save_changes
from ringfence.sandbox.syscalls import AARCH64, X86_64
from ringfence.sandbox.workspace import Patterns, scan

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS, EAFNOSUPPORT = 0x50001, 0x50026, 0x50061


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """Run the filter as the kernel would."""
    architecture = seccomp.ARCHITECTURES[machine]
    data = struct.pack(
        "=IIQ6Q", number, audit or architecture.audit, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6]
    )
    program = list(struct.iter_unpack("=HBBI", seccomp.build(machine)))
    at = accumulator = 0
    while True:
        code, on_true, on_false, value = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += on_true if holds else on_false


TABLES = {"x86_64": X86_64, "aarch64": AARCH64}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter(machine: str) -> None:
    calls = TABLES[machine]
    for name in ("read", "write", "openat", "execve", "futex", "mmap", "exit_group", "wait4"):
        assert verdict(machine, calls[name]) == ALLOW, name
    assert verdict(machine, calls["clone"], 17) == ALLOW
    for flag in (
        0x10000000,
        0x20000000,
        0x40000000,
        0x00020000,
        0x02000000,
        0x04000000,
        0x08000000,
        0x80,
    ):
        assert verdict(machine, calls["clone"], flag | 17) == EPERM
    assert verdict(machine, calls["clone3"]) == ENOSYS
    for family in (1, 2, 10):
        assert verdict(machine, calls["socket"], family, 1, 0) == ALLOW
    assert verdict(machine, calls["socket"], 16, 3, 0) == ALLOW
    for family, protocol in ((16, 15), (17, 0), (38, 0), (40, 0), (44, 0), (0xFFFFFFFF, 0)):
        assert verdict(machine, calls["socket"], family, 1, protocol) == EAFNOSUPPORT
    assert verdict(machine, calls["ioctl"], 0, 0x5401) == ALLOW
    assert verdict(machine, calls["ioctl"], 0, 0x5412) == EPERM
    assert verdict(machine, calls["ioctl"], 0, 0x5412 | 1 << 32) == EPERM
    assert verdict(machine, calls["personality"], 0) == ALLOW
    assert verdict(machine, calls["personality"], 0x0040000) == EPERM
    assert verdict(machine, calls["mknodat"], 0, 0, 0o010644) == ALLOW
    assert verdict(machine, calls["mknodat"], 0, 0, 0o020644) == EPERM
    assert verdict(machine, 5000) == ENOSYS
    assert verdict(machine, calls["read"], audit=0x40000003) == KILL


DENIED_X86 = {
    "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "unshare": 272, "setns": 308, "bpf": 321,
    "perf_event_open": 298, "keyctl": 250, "add_key": 248, "request_key": 249, "process_vm_readv": 310,
    "process_vm_writev": 311, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "pidfd_getfd": 438, "mount_setattr": 442, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "init_module": 175, "finit_module": 313, "kexec_load": 246, "reboot": 169, "swapon": 167,
    "kcmp": 312, "syslog": 103, "chroot": 161, "iopl": 172, "settimeofday": 164, "modify_ldt": 154, "quotactl": 179,
}  # fmt: skip


@pytest.mark.parametrize("name", list(DENIED_X86))
def test_denied_calls(name: str) -> None:
    assert verdict("x86_64", DENIED_X86[name]) == EPERM


def test_x32_is_killed() -> None:
    assert verdict("x86_64", 0x40000000 | 1) == KILL


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_the_filter_always_ends(number: int, arguments: list[int]) -> None:
    assert verdict("x86_64", number, *arguments) in {ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT}


FACTS = HostFacts(
    as_root=True,
    uid=2_000_000,
    links={"bin": "usr/bin", "lib": "usr/lib"},
    existing={
        "/shared": True,
        "/shared/secret": True,
        "/shared/file": False,
        "/etc/localtime": False,
    },
    ca_bundle="",
    masked={".env": False, ".ssh": True},
    proc_entries=frozenset({"kcore", "fs"}),
    egress_dir="/state/egress/x",
    claude="/state/claude/x",
)


def test_the_command_line() -> None:
    profile = SandboxProfile(readable=("/shared", "/absent"), blocked=("/etc", "/shared/secret"))
    argv = enclose_argv(profile, FACTS, ["true"], environment={"A": "b"}, cwd="/workspace")
    text = " ".join(argv)
    for wanted in (
        "--unshare-user --unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup --disable-userns",
        "--uid 1000 --gid 1000",
        "--cap-drop ALL --clearenv --die-with-parent --new-session --seccomp 10",
        "--ro-bind /proc/sys /proc/sys",
        "--ro-bind /mnt/shown/0 /shared",
        "--perms 0000 --size 4096 --tmpfs /shared/secret",
        "--bind /mnt/workspace /workspace",
        "--ro-bind /mnt/egress /run/ringfence",
        "--ro-bind /mnt/claude /opt/ringfence/bin/claude",
        "--ro-bind /mnt/masked /workspace/.env",
        "--tmpfs /workspace/.ssh",
        "--remount-ro / --setenv A b --chdir /workspace -- true",
    ):
        assert wanted in text, wanted
    assert "/absent" not in text
    assert "--share-net" not in text
    assert text.index("--remount-ro / ") > text.index(" /workspace/.env")


def test_deny_wins_over_shown_paths() -> None:
    profile = SandboxProfile(
        readable=("/shared",), writable=("/shared/file",), blocked=("/shared/file",)
    )
    assert shown_paths(profile, FACTS) == (("/shared", False),)


@pytest.mark.parametrize("path", ["/", "/proc", "/etc", "/usr", "/run", "/opt/ringfence"])
def test_no_path_covers_our_own(path: str) -> None:
    facts = HostFacts(
        **{**{f: getattr(FACTS, f) for f in FACTS.__slots__}, "existing": {path: True}}
    )
    with pytest.raises(CallerError):
        prepare_plan(SandboxProfile(readable=(path,)), facts)


def test_patterns() -> None:
    patterns = Patterns((".env", "*.pem", "**/.config/gh/**", "build/*.key", "secret/**"))
    for path in (".env", "a/b/.env", "x.pem", "a/.config/gh", "build/a.key", "secret", "a/c.pem"):
        assert patterns.match(path), path
    for path in (
        "env",
        ".env.example",
        "pem",
        "build/x/a.key",
        "a/build/a.key",
        "a/secret",
        "secrets",
    ):
        assert not patterns.match(path), path


@given(st.lists(st.text(max_size=8), max_size=5), st.text(max_size=20))
def test_any_pattern_is_a_pattern(patterns: list[str], path: str) -> None:
    assert Patterns(tuple(patterns)).match(path) in {True, False}


def test_scan_lifts_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("s")
    (tmp_path / ".env.example").write_text("s")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        found = scan(descriptor, (".env", ".env.*"), shown=(".env.example",))
    finally:
        os.close(descriptor)
    assert found.hidden == (".env",)


NAMES = st.sampled_from(
    [
        "a",
        "b/c",
        "sp ace",
        'q"uote',
        "new\nline",
        "uml\u00e4ut",
        "esc\x1b",
        "tab\t",
        "back\\slash",
        "d/e/f",
    ]
)
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from([b"one", b"two", b"", b"three\r", b"--- x", b"+y"]), max_size=12).map(
        b"\n".join
    ),
    st.lists(st.sampled_from([b"one\n", b"two\n", b"x\n"]), max_size=40).map(b"".join),
)
SIDE = st.one_of(
    st.none(),
    st.tuples(st.sampled_from([0o100644, 0o100755]), CONTENT),
    st.tuples(st.just(0o120000), st.just(b"target")),
)


def _changes(tree: dict[str, tuple[object, object]]) -> Changes:
    items = []
    for path, (before, after) in sorted(tree.items()):
        if before == after:
            continue
        kind = (
            ChangeKind.ADDED
            if before is None
            else ChangeKind.DELETED
            if after is None
            else ChangeKind.MODIFIED
        )
        items.append(
            Change(path=path, kind=kind, mode=after[0] if after else 0, old_mode=before[0] if before else 0,
                   before=before[1] if before else None, after=after[1] if after else None)
        )  # fmt: skip
    return Changes(items=tuple(items))


def _write(root: Path, tree: dict[str, object]) -> None:
    for path, side in tree.items():
        if side is None:
            continue
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if side[0] == 0o120000:
            target.symlink_to(side[1].decode())
        else:
            target.write_bytes(side[1])
            target.chmod(side[0] & 0o777)


def _read(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if name.split("/")[0] == ".git" or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            found[name] = (0o120000, os.readlink(path).encode())
        else:
            found[name] = (0o100755 if path.stat().st_mode & 0o100 else 0o100644, path.read_bytes())
    return found


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(NAMES, st.tuples(SIDE, SIDE), max_size=5))
def test_git_applies_what_we_render(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    """Byte for byte, modes and links included; and our own apply does the same."""
    changes = _changes(tree)
    if not changes.items:
        return
    before = {path: side[0] for path, side in tree.items()}
    after = {path: side[1] for path, side in tree.items() if side[1] is not None}
    by_git, by_us = tmp_path_factory.mktemp("git"), tmp_path_factory.mktemp("us")
    for root in (by_git, by_us):
        _write(root, before)
    subprocess.run(["git", "init", "-q", str(by_git)], check=True)
    done = subprocess.run(
        ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", "-"],
        cwd=by_git, input=render(changes), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr, render(changes))
    assert _read(by_git) == after
    apply_changes(by_us, changes, include=lambda _: True)
    assert _read(by_us) == after


def test_a_hostile_file_does_not_stall_the_diff() -> None:
    before = b"x\n" * 30_000
    after = b"y\n" + b"x\ny\n" * 30_000
    changes = _changes({"f": ((0o100644, before), (0o100644, after))})
    assert render(changes)
    assert summary(changes)[0] == 1


def test_apply_refuses_conflicts_whole(tmp_path: Path) -> None:
    changes = _changes({"a": ((0o100644, b"1"), (0o100644, b"2")), "b": (None, (0o100644, b"new"))})
    (tmp_path / "a").write_bytes(b"changed by the person")
    with pytest.raises(CallerError) as caught:
        apply_changes(tmp_path, changes, include=lambda _: True)
    assert caught.value.code == "patch-conflict"
    assert not (tmp_path / "b").exists()


def test_apply_never_writes_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "d").symlink_to(outside)
    changes = _changes({"d/new": (None, (0o100644, b"x"))})
    with pytest.raises(CallerError):
        apply_changes(workspace, changes, include=lambda _: True)
    assert list(outside.iterdir()) == []


def test_saved_changes_round_trip(tmp_path: Path) -> None:
    changes = _changes(
        {"a\udcff": ((0o100644, b"\x00"), (0o100755, b"2")), "b": (None, (0o120000, b"t"))}
    )
    save_changes(tmp_path / "c", changes, "/w")
    assert load_changes(tmp_path / "c") == (changes, "/w")
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0
    (tmp_path / "c").write_text("{}")
    with pytest.raises(CallerError):
        load_changes(tmp_path / "c")


HELD = (".git/hooks/pre-commit", ".GIT/config", "sub/.git", ".envrc", ".vscode/tasks.json", ".claude/settings.json",
        "CLAUDE.md", ".mcp.json", ".github/workflows/x.yml", ".gitlab-ci.yml", ".gitattributes", ".husky/pre-push",
        ".npmrc", "git~1/config", ".g\u200cit/config", ".git./config", ".devcontainer/devcontainer.json")  # fmt: skip
ADVICE = (
    "Makefile",
    "conftest.py",
    "package.json",
    "pyproject.toml",
    "Dockerfile",
    "a/b/CMakeLists.txt",
    "x.pth",
    "setup.py",
)
PLAIN = (
    "src/main.py",
    "README.md",
    "docs/git.md",
    "github/workflows.md",
    "makefiles.txt",
    "data.json",
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [*((p, "held") for p in HELD), *((p, "advice") for p in ADVICE), *((p, "") for p in PLAIN)],
)
def test_files_that_run_later(path: str, expected: str) -> None:
    change = Change(
        path=path, kind=ChangeKind.ADDED, mode=0o100644, old_mode=0, before=None, after=b""
    )
    found = classify(change)
    assert ("held" if found and found.held else "advice" if found else "") == expected
