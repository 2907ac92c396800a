"""Compiled rules and what the host has → the plan of a launch. PURE; golden files hold it.

Two plans: `prepare_plan` is carried out by `launch.py` before anything of the agent runs,
`enclose_argv` is bubblewrap's command line. Both name paths of the stage, a file system that
exists only in the sandbox's private mount namespace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringfence.errors import CallerError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.protocol import (
    INSIDE_CLAUDE,
    INSIDE_EGRESS_DIR,
    INSIDE_HOME,
    INSIDE_PROXY_PORT,
    INSIDE_UID,
    INSIDE_WORKSPACE,
)

STAGES = ("/mnt", "/media", "/srv", "/opt", "/tmp")  # noqa: S108
"""Directories that the stage may cover, in a private mount namespace; the first that exists and
that bubblewrap itself does not lie under."""
SECCOMP_FD, STATUS_FD = 10, 11

PATH = "/opt/ringfence/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

_ETC_FILES = {
    "etc/passwd": "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n"
    f"agent:x:{INSIDE_UID}:{INSIDE_UID}::{INSIDE_HOME}:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": f"root:x:0:\nagent:x:{INSIDE_UID}:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "sandbox\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/resolv.conf": "",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/gitconfig": "[safe]\n\tdirectory = *\n",
}
"""The synthetic /etc: the host's own is absent. git's safe.directory is lifted because the one
uid inside owns nothing of a workspace that another host user owns."""

_ETC_FROM_HOST = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "python3",
)

_PROC_MASKED_FILES = ("kcore", "keys", "key-users", "timer_list", "sched_debug", "kmsg", "kallsyms")
_PROC_MASKED_DIRS = ("acpi", "scsi", "fs", "driver")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What was looked up on the host, so that planning stays pure.

    Attributes:
        as_root: ringfence was started by root. uid: host uid of the sandbox.
        links: root-level names that are links on the host, such as `bin` to `usr/bin`.
        existing: absolute host paths that exist, to whether each is a directory.
        real: those that go through a link on the host, to the path that they lead to.
        ca_bundle: content of the trust store, our CA included.
        masked: workspace-relative paths to hide, to whether each is a directory.
        proc_entries: names below /proc that exist on this kernel.
        stage: which of STAGES is covered.
    """

    as_root: bool
    uid: int
    links: Mapping[str, str]
    existing: Mapping[str, bool]
    ca_bundle: str
    masked: Mapping[str, bool]
    proc_entries: frozenset[str]
    stage: str = STAGES[0]
    egress_dir: str | None = None
    claude: str | None = None
    real: Mapping[str, str] = field(default_factory=dict)

    def real_path(self, path: str) -> str:
        """Where a host path leads to."""
        return self.real.get(path, path)


def host_paths(profile: SandboxProfile) -> tuple[str, ...]:
    """Host paths that the profile shows, /workspace left out: what the caller must look up."""
    paths = [*profile.readable, *profile.writable, *(f"/etc/{name}" for name in _ETC_FROM_HOST)]
    return tuple(dict.fromkeys(path for path in paths if not _is_workspace(path)))


def _is_workspace(path: str) -> bool:
    return path == INSIDE_WORKSPACE or path.startswith(INSIDE_WORKSPACE + "/")


def _below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


_RESERVED = ("/", "/proc", "/sys", "/dev", "/run", "/opt/ringfence", "/etc", "/usr", "/bin", "/lib")


def shown_paths(profile: SandboxProfile, facts: HostFacts) -> tuple[tuple[str, bool], ...]:
    """(host path, writable) of everything beside the workspace; deny wins over both lists.

    Raises:
        CallerError: `profile-path-refused` for a path that would cover a mount of our own.
    """
    shown: dict[str, bool] = {}
    for path, writable in [(p, False) for p in profile.readable] + [
        (p, True) for p in profile.writable
    ]:
        if _is_workspace(path) or path not in facts.existing:
            continue
        real = facts.real_path(path)
        # by where it leads: a link beside a blocked directory is another name for it
        if any(_below(real, facts.real_path(blocked)) for blocked in profile.blocked):
            continue
        if path in _RESERVED or (writable and _below(path, "/etc")):
            raise CallerError(
                "profile-path-refused",
                f"{path} cannot be shown: it would cover what the sandbox itself needs",
                hint="name the folder below it that the agent needs",
            )
        shown[path] = writable
    return tuple(shown.items())


def prepare_plan(profile: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
    """The plan of launch.py's first phase, JSON-shaped."""
    review = profile.workspace_mode is WorkspaceMode.REVIEW
    sources = [
        _source(
            "",
            "lower" if review else "workspace",
            read_only=profile.workspace_mode is WorkspaceMode.READONLY,
            idmap=True,
            directory=True,
        )
    ]
    for index, (path, writable) in enumerate(shown_paths(profile, facts)):
        directory = facts.existing[path]
        sources.append(
            _source(
                path, f"shown/{index}", read_only=not writable, idmap=writable, directory=directory
            )
        )
    if facts.egress_dir is not None:
        sources.append(_source(facts.egress_dir, "egress", read_only=True))
    if facts.claude is not None:
        sources.append(_source(facts.claude, "claude", read_only=True, directory=False))
    for name in _ETC_FROM_HOST:
        path = f"/etc/{name}"
        if path in facts.existing:
            sources.append(
                _source(path, f"etc/{name}", read_only=True, directory=facts.existing[path])
            )
    return {
        "phase": "prepare",
        "stage": facts.stage,
        "as_root": facts.as_root,
        "uid": facts.uid,
        "proxy_port": INSIDE_PROXY_PORT,
        "sources": sources,
        "disk_mb": profile.limits.disk_mb,
        "tmp_exec": profile.tmp_exec,
        "overlay": review,
        "files": {**_ETC_FILES, "etc/ssl/certs/ca-certificates.crt": facts.ca_bundle},
        "handles": ["workspace", "lower", "scratch/upper", "home", "tmp"],
    }


def _source(
    path: str, target: str, *, read_only: bool, idmap: bool = False, directory: bool = True
) -> dict[str, Any]:
    return {
        "path": path,
        "target": target,
        "read_only": read_only,
        "idmap": idmap,
        "directory": directory,
    }


def enclose_argv(
    profile: SandboxProfile,
    facts: HostFacts,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: str,
) -> list[str]:
    """Bubblewrap's command line. Order is meaning: a later mount covers an earlier one."""
    arguments = [
        "bwrap",
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *("--disable-userns", "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID)),
        *("--hostname", "sandbox", "--cap-drop", "ALL", "--clearenv"),
        *("--die-with-parent", "--new-session"),
        *("--seccomp", str(SECCOMP_FD), "--json-status-fd", str(STATUS_FD)),
        *("--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/"),
        *_system(facts),
        *_proc(facts),
        *_places(profile, facts),
        *_masks(facts),
    ]
    for path in profile.blocked:
        arguments += _covers(path, profile, facts)
    arguments += ["--remount-ro", "/"]
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--chdir", cwd, "--", *command]


def _system(facts: HostFacts) -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if name in facts.links:
            arguments += ["--symlink", facts.links[name], f"/{name}"]
        elif f"/{name}" in facts.existing:
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    return [*arguments, "--ro-bind", f"{facts.stage}/etc", "/etc"]


def _proc(facts: HostFacts) -> list[str]:
    arguments = ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    for name in _PROC_MASKED_FILES:
        if name in facts.proc_entries:
            arguments += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    for name in _PROC_MASKED_DIRS:
        if name in facts.proc_entries:
            arguments += ["--tmpfs", f"/proc/{name}", "--remount-ro", f"/proc/{name}"]
    return arguments


def _places(profile: SandboxProfile, facts: HostFacts) -> list[str]:
    workspace = "--ro-bind" if profile.workspace_mode is WorkspaceMode.READONLY else "--bind"
    arguments = [
        *("--bind", f"{facts.stage}/tmp", "/tmp", "--bind", f"{facts.stage}/tmp", "/var/tmp"),  # noqa: S108
        *("--bind", f"{facts.stage}/shm", "/dev/shm"),  # noqa: S108
        *("--bind", f"{facts.stage}/home", INSIDE_HOME),
    ]
    if facts.egress_dir is not None:
        arguments += ["--ro-bind", f"{facts.stage}/egress", INSIDE_EGRESS_DIR]
    if facts.claude is not None:
        arguments += ["--ro-bind", f"{facts.stage}/claude", INSIDE_CLAUDE]
    for index, (path, writable) in enumerate(shown_paths(profile, facts)):
        arguments += ["--bind" if writable else "--ro-bind", f"{facts.stage}/shown/{index}", path]
    return [*arguments, workspace, f"{facts.stage}/workspace", INSIDE_WORKSPACE]


def _masks(facts: HostFacts) -> list[str]:
    """Cover hidden files: an empty directory nobody may enter, or a file nobody may read."""
    arguments = []
    for path, directory in sorted(facts.masked.items()):
        target = f"{INSIDE_WORKSPACE}/{path}"
        if directory:
            arguments += ["--perms", "0000", "--size", "4096", "--tmpfs", target]
            arguments += ["--remount-ro", target]
        else:
            arguments += ["--ro-bind", f"{facts.stage}/masked", target]
    return arguments


def _covers(path: str, profile: SandboxProfile, facts: HostFacts) -> list[str]:
    """A blocked path is absent already unless it lies below something shown."""
    if _is_workspace(path) and path != INSIDE_WORKSPACE:
        return []  # masked with the hidden files, where its kind is known
    if path not in facts.existing:
        return []
    arguments = []
    for target in _names_inside(facts.real_path(path), profile, facts):
        if facts.existing[path]:
            arguments += ["--perms", "0000", "--size", "4096", "--tmpfs", target]
            arguments += ["--remount-ro", target]
        else:
            arguments += ["--ro-bind", f"{facts.stage}/masked", target]
    return arguments


def _names_inside(real: str, profile: SandboxProfile, facts: HostFacts) -> tuple[str, ...]:
    """Every path inside at which a real path of the host would be seen."""
    found = {}
    for shown in ("/usr", *(path for path, _ in shown_paths(profile, facts))):
        top = facts.real_path(shown)
        if real != top and _below(real, top):
            found[shown + real[len(top) :]] = True
    return tuple(found)
