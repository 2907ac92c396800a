"""Rules, facts and a program → the configuration of an OCI container. PURE; golden files hold it.

The place is the one that `launch.py` prepared: its limits, masks and sizes are mounts already, and
the container only joins them. Control groups, resource limits and the user, PID and network
namespaces are made before a runtime is started, so that none has to be trusted with them; what is
asked of the runtime here is read back from the kernel by `launch_oci.py`, see `expectations`.

Also for a runtime with a kernel of its own: `config` takes the namespaces and the seccomp profile
that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.profile import HostFacts, programs, shown_paths, system_covers
from ringfence.sandbox.protocol import (
    INSIDE_CLAUDE,
    INSIDE_EGRESS_DIR,
    INSIDE_HOME,
    INSIDE_SESSION_FILES,
    INSIDE_UID,
    INSIDE_WORKSPACE,
)

NAMESPACES = ("mount", "ipc", "uts", "cgroup")
"""Made by the runtime; the others are there before it is."""
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
OOM_SCORE = 500
"""Whoever must give memory back on a full host, an agent does so before a service."""

_MASKED = (
    *("acpi", "asound", "bus", "driver", "fs", "irq", "kallsyms", "kcore", "key-users", "keys"),
    *("kmsg", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats"),
)
_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
"""The specification's own, which a user namespace has as mounts of the host's."""
_READ_ONLY = ("sys", "sysrq-trigger")

_QUIET = ("nosuid", "nodev")
_SHUT = (*_QUIET, "noexec")


def config(
    rules: SandboxProfile,
    facts: HostFacts,
    *,
    argv: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    seccomp: Mapping[str, Any] | None = None,
    namespaces: Sequence[str] = NAMESPACES,
    uid: int = INSIDE_UID,
    one_id: bool = False,
) -> dict[str, Any]:
    """The content of config.json (OCI runtime specification 1.0.2).

    `environment` is all that the program gets. `seccomp` becomes `linux.seccomp`; None leaves the
    calls to a runtime with a kernel of its own. `namespaces` are what the runtime has to make, and
    `uid` is the program's inside, and its group. With `one_id` the runtime has a single id, as
    its root: it makes a user namespace more, in which the program has that id as `uid`.
    """
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in namespaces],
        "maskedPaths": _of_proc(facts, _MASKED),
        "readonlyPaths": _of_proc(facts, _READ_ONLY),
    }
    if seccomp is not None:
        linux["seccomp"] = seccomp
    if one_id:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = [{"containerID": uid, "hostID": 0, "size": 1}]
        linux["gidMappings"] = linux["uidMappings"]
    return {
        "ociVersion": "1.0.2",
        "hostname": "sandbox",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": uid, "umask": 0o22},
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": cwd,
            "capabilities": {name: [] for name in CAPABILITY_SETS},
            "noNewPrivileges": True,
            "oomScoreAdj": OOM_SCORE,
        },
        "mounts": mounts(rules, facts, one_id=one_id),
        "linux": linux,
    }


def _of_proc(facts: HostFacts, names: Sequence[str]) -> list[str]:
    return [f"/proc/{name}" for name in names if name in facts.proc_entries]


def mounts(
    rules: SandboxProfile, facts: HostFacts, *, one_id: bool = False
) -> list[dict[str, Any]]:
    """Order is meaning: a later mount covers an earlier one."""
    # a user namespace may not mount the processes of one above it, only show what is mounted
    proc = _bind("/proc", "/proc", *_SHUT) if one_id else _kernel("proc", "/proc", *_SHUT)
    return [
        *_system(facts),
        proc,
        _kernel("tmpfs", "/dev", "ro", "nosuid", "noexec", "mode=755", "size=64k", "nr_inodes=64"),
        _kernel("devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666"),
        *_places(rules, facts),
        *_covers(rules, facts),
    ]


def _kernel(kind: str, place: str, *options: str) -> dict[str, Any]:
    return {"destination": place, "type": kind, "source": kind, "options": list(options)}


def _bind(source: str, place: str, *options: str) -> dict[str, Any]:
    # recursive: a mount that lies within one of another user namespace cannot be left out
    words = ["rbind", "rprivate", *options]
    return {"destination": place, "type": "bind", "source": source, "options": words}


def _system(facts: HostFacts) -> list[dict[str, Any]]:
    return [
        # with all that is mounted below: a host may have its /usr/local apart
        *(_bind(path, place, "ro", "rro", *_QUIET) for path, place in programs(facts)),
        _bind(f"{facts.stage}/etc", "/etc", "ro", *_SHUT),
    ]


def _places(rules: SandboxProfile, facts: HostFacts) -> list[dict[str, Any]]:
    stage = facts.stage
    scratch = _QUIET if rules.tmp_exec else _SHUT
    places = [
        _bind(f"{stage}/tmp", "/tmp", "rw", *scratch),  # noqa: S108
        _bind(f"{stage}/tmp", "/var/tmp", "rw", *scratch),  # noqa: S108
        _bind(f"{stage}/shm", "/dev/shm", "rw", *scratch),  # noqa: S108
        _bind(f"{stage}/home", INSIDE_HOME, "rw", *scratch),
    ]
    if facts.egress_dir is not None:
        places.append(_bind(f"{stage}/egress", INSIDE_EGRESS_DIR, "ro", *_SHUT))
    if facts.claude is not None:
        places.append(_bind(f"{stage}/claude", INSIDE_CLAUDE, "ro", *_QUIET))
    for index, (path, writable) in enumerate(shown_paths(rules, facts)):
        places.append(_bind(f"{stage}/shown/{index}", path, "rw" if writable else "ro", *_QUIET))
    if facts.session_files is not None:
        places.append(_bind(f"{stage}/session", INSIDE_SESSION_FILES, "ro", *_SHUT))
    read_only = rules.workspace_mode is WorkspaceMode.READONLY
    words = ("ro" if read_only else "rw", *(_QUIET if rules.workspace_exec else _SHUT))
    return [*places, _bind(f"{stage}/workspace", INSIDE_WORKSPACE, *words)]


def _covers(rules: SandboxProfile, facts: HostFacts) -> list[dict[str, Any]]:
    return [
        _kernel("tmpfs", path, "ro", *_SHUT, "mode=000", "size=4k")
        if directory
        else _bind(f"{facts.stage}/masked", path, "ro", *_SHUT)
        for path, directory in system_covers(rules, facts)
    ]


def expectations(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the kernel has to say of process 1 of a container with this configuration: fields of
    /proc/PID/status as who runs the runtime reads them, the options of each mount, and
    /proc/PID/oom_score_adj.
    """
    user, maps = settings["process"]["user"]["uid"], settings["linux"].get("uidMappings")
    ids = " ".join([str(maps[0]["hostID"] if maps else user)] * 4)
    status = {
        "Uid": ids,
        "Gid": ids,
        "NoNewPrivs": "1",
        **{f"Cap{name}": "0" * 16 for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")},
    }
    if "seccomp" in settings["linux"]:
        status["Seccomp"] = "2"
    places = {"/": ["ro"]}
    for one in settings["mounts"]:
        words = [word for word in one["options"] if word in {"ro", "rw", *_SHUT}]
        places[one["destination"]] = words if "ro" in words else ["rw", *words]
    for path in settings["linux"]["readonlyPaths"]:
        places[path] = ["ro"]
    devices = [f"/dev/{name}" for name in _DEVICES]
    for path in (*settings["linux"]["maskedPaths"], *devices):
        places[path] = []
    return {
        "status": status,
        "mounts": places,
        "oom_score_adj": str(settings["process"]["oomScoreAdj"]),
    }
