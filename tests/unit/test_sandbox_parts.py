"""The sandbox's pure parts: filter, plan, patterns, files that run later."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import AgentError, CallerError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import seccomp
from ringfence.sandbox.bwrap_options import enclose_options
from ringfence.sandbox.hostfiles import classify
from ringfence.sandbox.profile import HostFacts, Tools, prepare_plan, shown_paths
from ringfence.sandbox.protocol import Change, ChangeKind
from ringfence.sandbox.syscalls import AARCH64, RULED, X86_64
from ringfence.sandbox.workspace import MAX_MASKS, Patterns, Scan, scan

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS, EPROTONOSUPPORT, EAFNOSUPPORT = 0x50001, 0x50026, 0x5005D, 0x50061


def verdict(
    machine: str,
    number: int,
    *arguments: int,
    audit: int | None = None,
    code: bytes | None = None,
) -> int:
    """Run the filter as the kernel would."""
    architecture = seccomp.ARCHITECTURES[machine]
    data = struct.pack(
        "=IIQ6Q", number, audit or architecture.audit, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6]
    )
    program = list(struct.iter_unpack("=HBBI", code or seccomp.build(machine)))
    at = accumulator = 0
    while True:
        operation, on_true, on_false, value = program[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[operation]
            at += on_true if holds else on_false


TABLES = {"x86_64": X86_64, "aarch64": AARCH64}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_call_that_succeeds_without_being_made_is_the_only_one(machine: str) -> None:
    code, calls = seccomp.unmade(machine, "setgroups"), TABLES[machine]
    found = {name: verdict(machine, number, code=code) for name, number in calls.items()}
    assert found.pop("setgroups") == 0x50000
    assert set(found.values()) == {ALLOW}
    assert verdict(machine, calls["setgroups"], audit=0x40000003, code=code) == KILL
    with pytest.raises(LookupError):
        seccomp.unmade(machine, "no such call")


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
    assert verdict(machine, calls["io_setup"]) == ENOSYS
    assert verdict(machine, calls["openat2"]) == ENOSYS
    for family in (1, 2, 10):
        assert verdict(machine, calls["socket"], family, 1, 0) == ALLOW
    assert verdict(machine, calls["socket"], 16, 3, 0) == ALLOW
    for family, protocol in ((16, 15), (17, 0), (38, 0), (40, 0), (44, 0), (0xFFFFFFFF, 0)):
        assert verdict(machine, calls["socket"], family, 1, protocol) == EAFNOSUPPORT
    for family in (2, 10):
        for protocol in (0, 6, 17):
            assert verdict(machine, calls["socket"], family, 1, protocol) == ALLOW
        for protocol in (1, 33, 132, 136, 255, 262):
            assert verdict(machine, calls["socket"], family, 1, protocol) == EPROTONOSUPPORT
        for kind in (1, 2, 1 | 0o2000000, 2 | 0o4000):
            assert verdict(machine, calls["socket"], family, kind, 0) == ALLOW
        # 6 alone has the kernel load dccp, and 5 and 10 are looked for
        for kind in (0, 3, 4, 5, 6, 10, 6 | 0o2000000):
            assert verdict(machine, calls["socket"], family, kind, 0) == EPERM
    assert verdict(machine, calls["socketpair"], 1, 1, 0) == ALLOW
    for family in (2, 16, 30, 38, 40):
        assert verdict(machine, calls["socketpair"], family, 1, 0) == EAFNOSUPPORT
    for request in (0x5401, 0x5413, 0x8912):
        assert verdict(machine, calls["ioctl"], 0, request) == ALLOW
    for request in (0x5412, 0x541C, 0x5423, 0x8940, 0x8982, 0x89A0):
        assert verdict(machine, calls["ioctl"], 0, request) == EPERM
    assert verdict(machine, calls["ioctl"], 0, 0x5412 | 1 << 32) == EPERM
    assert verdict(machine, calls["personality"], 0) == ALLOW
    assert verdict(machine, calls["personality"], 0x0040000) == EPERM
    assert verdict(machine, calls["mknodat"], 0, 0, 0o010644) == ALLOW
    assert verdict(machine, calls["mknodat"], 0, 0, 0o020644) == EPERM
    assert verdict(machine, calls["mknodat"], 0, 0, 0o104755) == EPERM
    assert verdict(machine, 5000) == ENOSYS
    assert verdict(machine, calls["read"], audit=0x40000003) == KILL


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_nothing_is_made_set_user_id(machine: str) -> None:
    calls = TABLES[machine]
    modes = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1}
    for name, before in modes.items():
        for mode, ending in ((0o755, ALLOW), (0o2775, ALLOW), (0o4755, EPERM), (0o6000, EPERM)):
            if name in calls:
                assert verdict(machine, calls[name], *[0] * before, mode) == ending, name
    for name, before in {"open": 1, "openat": 2}.items():
        if name not in calls:
            continue
        for flags, mode, ending in (
            (0o100 | 1, 0o4755, EPERM),
            (0o20000000 | 2, 0o4755, EPERM),
            (0o100 | 1, 0o755, ALLOW),
            (0, 0o4755, ALLOW),  # no file is made: a mode is whatever lies there
        ):
            assert verdict(machine, calls[name], *[0] * before, flags, mode) == ending, name


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
    endings = {ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT, EPROTONOSUPPORT}
    assert verdict("x86_64", number, *arguments) in endings


FACTS = HostFacts(
    as_root=True,
    uid=2_000_000,
    tools=Tools(executable="/usr/bin/bwrap"),
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
    argv = enclose_options(profile, FACTS, environment={"A": "b"}, cwd="/workspace")
    text = " ".join(argv)
    for wanted in (
        "--unshare-user --unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup --disable-userns",
        "--uid 1000 --gid 1000",
        "--cap-drop ALL --clearenv --die-with-parent --new-session --seccomp 10",
        "--ro-bind /proc/sys /proc/sys",
        "--ro-bind /mnt/shown/0 /shared",
        "--bind /mnt/workspace /workspace",
        "--ro-bind /mnt/egress /run/ringfence",
        "--ro-bind /mnt/claude /opt/ringfence/bin/claude",
        "--remount-ro / --setenv A b --chdir /workspace",
    ):
        assert wanted in text, wanted
    assert "/absent" not in text
    assert "--share-net" not in text
    assert text.index("--remount-ro / ") > text.index(" /mnt/workspace /workspace")
    plan = prepare_plan(profile, FACTS)
    assert plan["masks"] == [
        ("shown/0", "secret", "shut"),
        ("workspace", ".env", "masked"),
        ("workspace", ".ssh", "shut"),
    ]
    assert [(o["target"], o["writable"]) for o in plan["overlays"]] == [
        ("workspace", True),
        ("shown/0", False),
    ]


def test_deny_wins_over_shown_paths() -> None:
    profile = SandboxProfile(
        readable=("/shared",), writable=("/shared/file",), blocked=("/shared/file",)
    )
    assert shown_paths(profile, FACTS) == (("/shared", False),)


def test_deny_wins_through_links() -> None:
    """By what a name leads to: /alias is /data/secret, /shared is /data, /bin/id is /usr/bin/id."""
    facts = replace(
        FACTS,
        existing={
            **dict.fromkeys(("/alias", "/shared", "/data/secret", "/state"), True),
            **dict.fromkeys(("/bin/id", "/usr/bin/id"), False),
        },
        real={"/alias": "/data/secret", "/shared": "/data", "/bin/id": "/usr/bin/id"},
        protected=("/state",),
    )
    profile = SandboxProfile(
        readable=("/alias", "/shared", "/state"), blocked=("/data/secret", "/bin/id")
    )
    assert shown_paths(profile, facts) == (("/shared", False),)
    assert ("shown/0", "secret", "shut") in prepare_plan(profile, facts)["masks"]
    argv = enclose_options(profile, facts, environment={}, cwd="/workspace")
    assert "--ro-bind /mnt/masked /usr/bin/id" in " ".join(argv)


@pytest.mark.parametrize("path", ["/", "/proc", "/etc", "/usr", "/run", "/opt/ringfence"])
def test_no_link_to_what_would_cover_our_own(path: str) -> None:
    facts = replace(FACTS, existing={"/alias": True}, real={"/alias": path})
    with pytest.raises(CallerError):
        prepare_plan(SandboxProfile(readable=("/alias",)), facts)


@pytest.mark.parametrize("path", ["/", "/proc", "/etc", "/usr", "/run", "/opt/ringfence"])
def test_no_path_covers_our_own(path: str) -> None:
    facts = replace(FACTS, existing={path: True})
    with pytest.raises(CallerError):
        prepare_plan(SandboxProfile(readable=(path,)), facts)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/mnt", False), ("/mnt/session", False), ("/mnt/session/a", False), ("/mnt/data", True)],
)
def test_what_is_shown_does_not_stand_where_a_sessions_files_are(
    path: str, *, allowed: bool
) -> None:
    facts = replace(FACTS, existing={path: True}, session_files="/state/session-files/x")
    profile = SandboxProfile(readable=(path,))
    if allowed:
        sources = {one["target"]: one for one in prepare_plan(profile, facts)["sources"]}
        assert sources["session"]["read_only"]
        assert sources["session"]["path"] == "/state/session-files/x"
        return
    with pytest.raises(CallerError) as caught:
        prepare_plan(profile, facts)
    assert caught.value.code == "profile-path-refused"
    prepare_plan(profile, replace(facts, session_files=None))


def test_patterns() -> None:
    patterns = Patterns((".env", "*.pem", "**/.config/gh/**", "build/*.key", "secret/**"))
    for path in (
        ".env",
        ".Env",
        "X.PEM",
        "a/b/.env",
        "x.pem",
        "a/.config/gh",
        "build/a.key",
        "secret",
        "a/c.pem",
    ):
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


def _found(root: Path) -> Scan:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        return scan(descriptor, ("*.pem",))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/config",
            "sub/.git/config",
            "bare.git/config",
            ".git/modules/a/config",
            ".gitmodules",
        ),
        *(".git/modules/a/modules/b/config", ".git/worktrees/w/config.worktree", ".gitconfig"),
        *(".git/config.worktree", ".git/FETCH_HEAD", ".git/logs/HEAD", ".git/auth.inc"),
    ],
)
def test_git_files_with_a_credential_are_found(tmp_path: Path, path: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('[remote "o"]\n\turl = https://host/x\n')
    assert _found(tmp_path).git_configs == ()
    file.write_text('[remote "o"]\n\turl = https://u:canary@host/x\n')
    assert _found(tmp_path).git_configs == (path,)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("url = https://u:p@h/x", True),
        ("url = https://:p@h/x", True),
        ("url = https://ghp_0123456789abcdef@h/x", True),
        ('url = "https://u:p"@h/x', True),
        ("url = https://u:\\\np@h/x", True),
        ("[http] extraheader = AUTHORIZATION: basic x", True),
        ('[http "https://h"]\n\tExtraHeader = x', True),
        ("[sendemail]\n\tsmtppass = x", True),
        ("[credential]\n\thelper = cache", True),
        ("[x]\n\thelper = !echo password=x", True),
        ("url = git@github.com:o/r.git", False),
        ("url = https://github.com/o/r.git", False),
        ("url = ssh://git@host:22/x", False),
        ("[user]\n\temail = a@b.c", False),
        ("[core]\n\tpasskey-free = x", False),
    ],
)
def test_what_counts_as_a_credential(tmp_path: Path, text: str, *, found: bool) -> None:
    (tmp_path / ".gitconfig").write_text(text + "\n")
    assert bool(_found(tmp_path).git_configs) is found


def test_more_masks_than_can_be_mounted(tmp_path: Path) -> None:
    for number in range(MAX_MASKS + 1):
        (tmp_path / f"{number}.pem").touch()
    with pytest.raises(AgentError, match="masked"):
        _found(tmp_path)
    (tmp_path / "0.pem").unlink()
    assert len(_found(tmp_path).hidden) == MAX_MASKS


HELD = (".git/hooks/pre-commit", ".GIT/config", "sub/.git", ".envrc", ".vscode/tasks.json", ".claude/settings.json",
        "CLAUDE.md", ".mcp.json", ".github/workflows/x.yml", ".gitlab-ci.yml", ".gitattributes", ".husky/pre-push",
        ".npmrc", "git~1/config", ".g\u200cit/config", ".git./config", ".devcontainer/devcontainer.json",
        ".git::$INDEX_ALLOCATION/config", ".git:x/hooks/y", "data/HEAD", "fixtures/x.git/config", ".hg/hgrc",
        ".dir-locals.el", ".nvim.lua", ".vim/ftplugin/c.vim", ".gdbinit", ".Rprofile", ".bash_login", "_vimrc",
        ".mise.toml", "mise.local.toml", ".config/mise/config.toml", ".cursorrules", ".github/copilot-instructions.md",
        ".opencode/plugin/x.ts", ".kiro/hooks/x", "AGENTS.override.md", ".pnp.cjs", "bunfig.toml", ".mvn/extensions.xml",
        ".bazelrc", ".cargo/config.toml", ".bundle/config", ".lintstagedrc.json", ".cirrus.star", "x.desktop",
        "a/.run/x.run.xml", "x.sublime-project", ".vs/tasks.vs.json")  # fmt: skip
ADVICE = (
    "Makefile",
    "conftest.py",
    "package.json",
    "pyproject.toml",
    "Dockerfile",
    "a/b/CMakeLists.txt",
    "x.pth",
    "setup.py",
    "binding.gyp",
    "vitest.config.mts",
    "x/Directory.Build.props",
    "BUILD",
    "mix.exs",
    "requirements-dev.txt",
    "package-lock.json",
    "gradle/wrapper/gradle-wrapper.jar",
    ".tool-versions",
    ".env.local",
    "main.tf",
)
PLAIN = (
    "src/main.py",
    "README.md",
    "docs/git.md",
    "github/workflows.md",
    "makefiles.txt",
    "data.json",
    "src/head.py",
    "a/heads",
    "time 12:30.txt",
    "config/app.json",
    "src/build/x.py",
    "hooks/use-state.ts",
    "digit/config",
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


# --- the filter as an OCI profile


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_all_but_a_few_numbers(values: list[int], other: int) -> None:
    """Each number but these is matched exactly once, whatever stands in the upper half."""
    pairs = list(seccomp.all_but(values))
    for number in (*values, other, *(value ^ 1 for value in values)):
        for upper in (0, 0xDEAD << 32):
            hits = sum((number | upper) & mask == value for mask, value in pairs)
            assert hits == (number not in values)


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_profile_names_what_the_filter_allows(machine: str) -> None:
    profile = seccomp.oci(machine)
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(profile["architectures"]) == 1
    plain, *ruled = profile["syscalls"]
    calls = seccomp.ARCHITECTURES[machine].calls
    assert set(plain["names"]) == set(calls) - RULED
    assert {one["names"][0] for one in ruled} == RULED & set(calls)
    allowed = [one for one in ruled if one["action"] == "SCMP_ACT_ALLOW"]
    assert all(one["args"] for one in allowed)
    for one in allowed:
        # more than one test of an argument would be taken as "or"
        indexes = [test["index"] for test in one["args"]]
        assert len(indexes) == len(set(indexes))
