"""Compiled rules and what the host has → the plan of a launch. PURE; golden files hold it.

`prepare_plan` is carried out by `launch.py` before anything of the agent runs, `attach_plan`
where a sandbox waited without a workspace. Both name paths of the stage, a file system that
exists only in the sandbox's private mount namespace; so do `bwrap_options`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ringfence.errors import CallerError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.protocol import (
    INSIDE_HOME,
    INSIDE_PROXY_PORT,
    INSIDE_SESSION_FILES,
    INSIDE_UID,
    INSIDE_WORKSPACE,
    WAITING_GATE,
)

STAGES = ("/mnt", "/media", "/srv", "/opt", "/tmp")  # noqa: S108
"""Directories that the stage may cover, in a private mount namespace; the first that exists."""
SECCOMP_FD, STATUS_FD, OPTIONS_FD = 10, 11, 12

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """bubblewrap, and what of it is copied to the stage.

    The uid of a sandbox cannot reach a virtual environment in root's home, which is 0700.

    Attributes:
        executable: absolute path of the host, or one relative to the stage.
        copied: absolute host path to path below the stage.
    """

    executable: str
    copied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRoot:
    """An image's files as the system inside, in place of the host's.

    Attributes:
        path: of its root on the host.
        directories: paths below it that are shown, such as `usr` and `opt/tool`; /etc apart.
        links: root-level names that are links in it, such as `bin` to `usr/bin`.
        covered: absolute paths inside that a policy blocks, to whether each is a directory.
    """

    path: str
    directories: tuple[str, ...]
    links: Mapping[str, str] = field(default_factory=dict)
    covered: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What was looked up on the host, so that planning stays pure.

    Attributes:
        as_root: ringfence was started by root. uid: host uid of the sandbox, `inside` there.
        links: root-level names that are links in the system shown, such as `bin` to `usr/bin`.
        image: what the system is, when it is not the host's own.
        existing: absolute host paths that exist, to whether each is a directory.
        ca_file: the host's trust store, which the place's begins with.
        ca_bundle: what follows there: an image's trust store, our CA.
        masked: workspace-relative paths to hide, to whether each is a directory.
        proc_entries: names below /proc that exist on this kernel.
        blank: those of `masked` that are an empty file inside and not an unreadable one.
        real: absolute host paths to what they are without links; absent is itself.
        protected: ringfence's own directories on the host: absent inside like blocked ones.
        special: sockets, FIFOs and devices below a writable path of the profile, relative to it.
        tools: where bubblewrap is, see `Tools`.
        stage: which of STAGES is covered.
        programs: executables of our own beside claude, name to text.
    """

    as_root: bool
    uid: int
    inside: int = INSIDE_UID
    tools: Tools
    links: Mapping[str, str] = field(default_factory=dict)
    existing: Mapping[str, bool] = field(default_factory=dict)
    ca_file: str | None = None
    ca_bundle: str = ""
    masked: Mapping[str, bool] = field(default_factory=dict)
    blank: frozenset[str] = frozenset()
    proc_entries: frozenset[str] = frozenset()
    real: Mapping[str, str] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    special: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stage: str = STAGES[0]
    egress_dir: str | None = None
    session_files: str | None = None
    claude: str | None = None
    programs: Mapping[str, str] = field(default_factory=dict)
    image: ImageRoot | None = None


SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Beside /usr; links to it on most hosts."""


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
    """(host path, writable) of everything beside the workspace; deny wins over both lists, by
    name and by what a name leads to. With an image a path of the system is the image's own.

    Raises:
        CallerError: `profile-path-refused` for a path that would cover a mount of our own.
    """
    shown: dict[str, bool] = {}
    denied = _denied(profile, facts)
    for path, writable in [(p, False) for p in profile.readable] + [
        (p, True) for p in profile.writable
    ]:
        if _is_workspace(path) or path not in facts.existing:
            continue
        if _of_image(path, facts):
            if writable:
                raise CallerError(
                    "profile-path-refused",
                    f"{path} cannot be written to: an image stands there",
                    hint="take the path out, or the line filesystem.image",
                )
            continue
        spellings = (path, facts.real.get(path, path))
        if any(_below(spelling, blocked) for spelling in spellings for blocked in denied):
            continue
        if any(name in _RESERVED or (writable and _below(name, "/etc")) for name in spellings):
            raise CallerError(
                "profile-path-refused",
                f"{path} cannot be shown: it would cover what the sandbox itself needs",
                hint="name the folder below it that the agent needs",
            )
        shown[path] = writable
    return tuple(shown.items())


def _of_image(path: str, facts: HostFacts) -> bool:
    if facts.image is None:
        return False
    system = ("etc", "usr", *SYSTEM, *facts.image.directories)
    return any(_below(path, f"/{name}") for name in system)


def _denied(profile: SandboxProfile, facts: HostFacts) -> set[str]:
    named = {*profile.blocked, *facts.protected}
    return named | {facts.real.get(path, path) for path in named}


def _masks(profile: SandboxProfile, facts: HostFacts) -> list[tuple[str, str, str]]:
    """(place of the stage, path below it, kind) of all that is covered: a directory is `shut`, a
    file `masked` or `blank`.
    """
    masks = []
    for path, directory in facts.masked.items():
        kind = "shut" if directory else "blank" if path in facts.blank else "masked"
        masks.append(("workspace", path, kind))
    for index, (path, _) in enumerate(shown_paths(profile, facts)):
        base = facts.real.get(path, path)
        for blocked in (*profile.blocked, *facts.protected):
            real = facts.real.get(blocked, blocked)
            if blocked in facts.existing and real != base and _below(real, base):
                below = real[len(base) :].lstrip("/")
                kind = "shut" if facts.existing[blocked] else "masked"
                masks.append((f"shown/{index}", below, kind))
        masks += [(f"shown/{index}", below, "masked") for below in facts.special.get(path, ())]
    return sorted(masks)


def prepare_plan(
    profile: SandboxProfile, facts: HostFacts, *, waiting: Mapping[str, bytes] | None = None
) -> dict[str, Any]:
    """The plan of launch.py's first phase, JSON-shaped. With `waiting` the workspace is left out,
    and these files stand in its place.
    """
    without = waiting is not None
    sources, overlays = ([], []) if without else _workspace(profile, "workspace")
    handles = ["scratch/upper", "home", "tmp"]
    for index, (path, writable) in enumerate(shown_paths(profile, facts)):
        directory, target = facts.existing[path], f"shown/{index}"
        if directory and not writable:
            overlays.append(_layer(f"veiled/{index}", target, writable=False))
            target = f"veiled/{index}"
        sources.append(
            source(path, target, read_only=not writable, idmap=writable, directory=directory)
        )
    if facts.egress_dir is not None:
        sources.append(source(facts.egress_dir, "egress", read_only=True))
    if facts.session_files is not None:
        _refuse_above_session_files(profile, facts)
        sources.append(source(facts.session_files, "session", read_only=True))
    if facts.claude is not None:
        sources.append(source(facts.claude, "claude", read_only=True, directory=False))
    below, layers = _system_sources(facts)
    return {
        **bare_plan(facts),
        "sources": sources + below,
        "overlays": overlays + layers,
        "masks": _masks(profile, facts),
        "disk_mb": profile.limits.disk_mb,
        "tmp_exec": profile.tmp_exec,
        "workspace_exec": without or profile.workspace_exec,
        "files": _etc_files(facts),
        "begun": {_CA_BUNDLE: facts.ca_file} if facts.ca_file and facts.image is None else {},
        "handles": handles if without else [*_WORKSPACE_HANDLES, *handles],
        "waiting": None if waiting is None else dict(waiting),
        "gate": WAITING_GATE,
        "programs": {f"programs/{name}": text.encode() for name, text in facts.programs.items()},
    }


def _refuse_above_session_files(profile: SandboxProfile, facts: HostFacts) -> None:
    """In what is shown no place can be made for a mount. Raises CallerError."""
    for path, _ in shown_paths(profile, facts):
        if _below(INSIDE_SESSION_FILES, path) or _below(path, INSIDE_SESSION_FILES):
            raise CallerError(
                "profile-path-refused",
                f"{path} cannot be shown: the session's files are at {INSIDE_SESSION_FILES}",
                hint="name the folder that the agent needs, or make the session without files",
            )


def _system_sources(facts: HostFacts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sources and overlays of the system: parts of the host's /etc, or an image, over whose /etc
    lies what is made here.
    """
    if facts.image is not None:
        image = source(facts.image.path, "image", read_only=True)
        return [image], [_layer("own/etc", "etc", writable=False, over="image/etc")]
    paths = [f"/etc/{name}" for name in _ETC_FROM_HOST if f"/etc/{name}" in facts.existing]
    return [
        source(path, path[1:], read_only=True, directory=facts.existing[path]) for path in paths
    ], []


_CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"


def _etc_files(facts: HostFacts) -> dict[str, str]:
    files = {**_ETC_FILES, _CA_BUNDLE: facts.ca_bundle}
    if facts.image is None:
        return files
    # an ordinary user's image is his own to read, whole; nothing inside asks for a password
    files |= {"etc/shadow": "", "etc/gshadow": ""}
    return {f"own/{path}": text for path, text in files.items()}


_WORKSPACE_HANDLES = ("workspace", "lower")


def refuse_waiting(profile: SandboxProfile) -> None:
    """Raise CallerError `profile-path-refused` where the place cannot be made before the workspace
    is known: what is written to a path of the host belongs to the workspace's owner.
    """
    for path in profile.writable:
        if not _is_workspace(path):
            raise CallerError(
                "profile-path-refused",
                f"{path} is writable, so a sandbox cannot start before its workspace is known",
                hint="such a run starts without the warm pool",
            )


def attach_plan(profile: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
    """The plan that puts the workspace, as `prepare_plan` would have, into a place without one."""
    sources, overlays = _workspace(profile, "attached")
    masks = _masks(profile, facts)
    return {
        "phase": "attach",
        "stage": facts.stage,
        "as_root": facts.as_root,
        "uid": facts.uid,
        "sources": sources,
        "overlays": overlays,
        "masks": [("attached", path, kind) for place, path, kind in masks if place == "workspace"],
        "workspace_exec": profile.workspace_exec,
        "handles": list(_WORKSPACE_HANDLES),
        "gate": WAITING_GATE,
    }


def _workspace(
    profile: SandboxProfile, target: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sources and overlays of the workspace; its own path is empty, see launch.py."""
    direct = profile.workspace_mode is WorkspaceMode.DIRECT
    read_only = profile.workspace_mode is WorkspaceMode.READONLY
    own = source("", target if direct else "lower", read_only=read_only, idmap=True)
    return [own], [] if direct else [_layer("lower", target, writable=not read_only)]


def bare_plan(facts: HostFacts) -> dict[str, Any]:
    """A place with nothing in it."""
    return {
        "phase": "prepare",
        "stage": facts.stage,
        "as_root": facts.as_root,
        "uid": facts.uid,
        "proxy_port": INSIDE_PROXY_PORT,
        "tools": dict(facts.tools.copied),
        "sources": [],
        "overlays": [],
        "masks": [],
        "disk_mb": 1,
        "tmp_exec": False,
        "workspace_exec": True,  # there is none to take it from
        "files": {},
        "begun": {},
        "handles": [],
        "waiting": None,
        "gate": WAITING_GATE,
        "programs": {},
    }


def exec_plan(facts: HostFacts, options: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """The plan of launch.py's second phase for bubblewrap, without cgroups, rlimits and parent."""
    return {
        "phase": "exec",
        "as_root": facts.as_root,
        "uid": facts.uid,
        "bwrap": str(PurePosixPath(facts.stage) / facts.tools.executable),
        "options": list(options),
        "argv": ["bwrap", "--args", str(OPTIONS_FD), "--", *command],
    }


def _layer(lower: str, target: str, *, writable: bool, over: str = "nothing") -> dict[str, Any]:
    return {"lower": lower, "over": over, "target": target, "writable": writable}


def source(
    path: str, target: str, *, read_only: bool, idmap: bool = False, directory: bool = True
) -> dict[str, Any]:
    """A host path that the stage has, `target` being below it."""
    return {
        "path": path,
        "target": target,
        "read_only": read_only,
        "idmap": idmap,
        "directory": directory,
    }


def programs(facts: HostFacts) -> tuple[tuple[str, str], ...]:
    """(path to mount, place inside) of the system's directories, /etc apart."""
    if facts.image is not None:
        return tuple((f"{facts.stage}/image/{one}", f"/{one}") for one in facts.image.directories)
    places = ["/usr", *(f"/{name}" for name in SYSTEM if f"/{name}" in facts.existing)]
    return tuple((place, place) for place in places)


def system_covers(profile: SandboxProfile, facts: HostFacts) -> tuple[tuple[str, bool], ...]:
    """(path, whether a directory) of what is blocked of the system's programs; of the rest, see
    `_masks`, or it is absent anyway.
    """
    if facts.image is not None:
        return tuple(facts.image.covered.items())
    system = [place for _, place in programs(facts)]
    blocked = dict.fromkeys(facts.real.get(path, path) for path in profile.blocked)
    return tuple(
        (path, facts.existing[path])
        for path in blocked
        if path in facts.existing and any(_below(path, base) and path != base for base in system)
    )
