"""The configuration of a container → the options of `podman run`. PURE; a test reads them all.

podman writes the runtime's configuration itself, so that what is asked of it is asked by flag, and
what became of it is read back from the kernel as of any other runtime (`oci.expectations`). It runs
in the namespaces that were made for the sandbox: what it calls the host's network and processes is
the sandbox's own network namespace with a loopback alone, and its own PID namespace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ringfence.errors import CallerError

NAME = "program"
MADE, GO = GATES = ("made", "go")
TERMINALS = "pts"
GATE = 6
STDIO = (7, 8, 9)
"""Descriptors that podman and its monitor hand down untouched; a plain shell knows one digit."""

_GLOBAL = {
    "root": "storage",
    "runroot": "run",
    "tmpdir": "tmp",
    "volumepath": "volumes",
    "runtime": "runtime",
}
"""Option to its path below the bundle, which is a file system of this container alone: there is no
state that two containers, or the host's own podman, could share."""

_FLAGS = (
    *("--name", NAME, "--detach", "--pull", "never", "--log-driver", "none"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--read-only", "--read-only-tmpfs=false"),
    # those that the sandbox was given; podman makes the others
    *("--network", "host", "--pid", "host"),
    *("--ipc", "none", "--uts", "private", "--cgroupns", "private"),
    # they are joined before podman is started, and read back; it has no right to make any
    *("--cgroups", "no-conmon", "--pids-limit", "-1"),
    # nothing of the host's names, addresses and proxies, and nothing that waits for systemd
    *("--no-hosts", "--dns", "none", "--http-proxy=false", "--systemd", "false"),
    *(
        "--sdnotify",
        "ignore",
        "--restart",
        "no",
        "--umask",
        "0022",
        "--no-healthcheck",
        "--passwd=false",
    ),
)

_OURS = ("PATH", "HOME", "TMPDIR", "USER", "SHELL", "LANG", "TZ", "container", "NOTIFY_SOCKET")
_OUR_FAMILIES = ("LD_", "GLIBC_", "GO", "XDG_", "CONTAINER", "STORAGE_", "_", "LISTEN_", "DBUS_")
"""Variables that podman, its monitor or their loader would take for their own."""


_AWAY = " ".join(f"{number}>&-" for number in STDIO)
_SOCKETS = "<&{} >&{} 2>&{}".format(*STDIO) + f" {_AWAY}"


def runtime_script(command: str) -> str:
    """What podman's monitor calls as a runtime, in place of `command`.

    The monitor gives a container pipes, which whoever has its uid can open anew through /proc; what
    stands in the runtime's place puts the sandbox's own sockets there. Before the container is
    started it says so, and waits until what was made has been read back.
    """
    return f"""#!/bin/sh
cd "${{0%/*}}" || exit 1
case $1 in
create) exec {command} "$@" {_SOCKETS} ;;
start) echo "$2" >{MADE} && read -r _ <{GO} || exit 1 ;;
esac
exec {command} "$@" {_AWAY}
"""


def sandbox_script(command: str, gate: int) -> str:
    """The same for gVisor, whose first program waits at a gate, its descriptor `gate`, which only
    `run` can hand in: the sandbox runs once it is made, and nothing is left to be started.

    No part of this kernel sees what gVisor mounts, so that what podman wrote is read before gVisor
    does: the script says where that lies, and waits.
    """
    run = f"{command} run --detach --pass-fd {GATE}:{gate}"
    return f"""#!/bin/sh
cd "${{0%/*}}" || exit 1
case $1 in
create) shift; echo "$2" >{MADE} && read -r _ <{GO} || exit 1
        exec {run} "$@" {_SOCKETS} ;;
start) exit 0 ;;
esac
exec {command} "$@" {GATE}>&- {_AWAY}
"""


def engine_files(script: str, bundle: str) -> dict[str, str]:
    """Files below the bundle, without the seccomp profile; `script` is the runtime's."""
    return {
        "runtime": script,
        "containers.conf": """[containers]
env = []
[engine]
lock_type = "file"
events_logger = "none"
cgroup_manager = "cgroupfs"
""",
        "storage.conf": f"""[storage]
driver = "vfs"
graphroot = "{bundle}/{_GLOBAL["root"]}"
runroot = "{bundle}/{_GLOBAL["runroot"]}"
""",
    }


def plan(
    engine: str,
    script: str,
    settings: Mapping[str, Any],
    bundle: str,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """What the plan of a start has for podman in place of a runtime: it makes the configuration
    itself. `script` stands in the runtime's place.
    """
    options, inherited = run_options(settings, bundle, environment)
    files = engine_files(script, bundle)
    if not own_kernel(settings):
        files["seccomp.json"] = json.dumps(settings["linux"]["seccomp"])
    return {
        "phase": "podman",
        "engine": [engine, *options],
        "environment": {
            **inherited,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": bundle,
            "CONTAINERS_CONF": f"{bundle}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{bundle}/storage.conf",
        },
        "files": files,
        "gates": list(GATES),
        "read_only": [m["source"] for m in settings["mounts"] if "rro" in m["options"]],
        "config": "",
    }


def run_options(
    settings: Mapping[str, Any], bundle: str, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The options of podman for a configuration of `oci.config`, and podman's own environment.

    A command line is for every user of the host to read, so what the program gets of variables goes
    through podman's environment, less what podman would take for its own.

    Raises:
        CallerError: `profile-path-refused` for a path that podman's syntax cannot say.
    """
    process = settings["process"]
    options = [
        word for name, place in _GLOBAL.items() for word in (f"--{name}", f"{bundle}/{place}")
    ]
    options += ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "run", *_FLAGS]
    options += ["--pidfile", f"{bundle}/pid", "--hostname", settings["hostname"]]
    options += ["--security-opt", f"seccomp={_filter(settings, bundle)}"]
    options += ["--oom-score-adj", str(process["oomScoreAdj"])]
    options += ["--user", f"{process['user']['uid']}:{process['user']['gid']}"]
    options += ["--workdir", process["cwd"], *_of_kernel(settings["linux"]), *_of_process(process)]
    own = {name: environment[name] for name in environment if not _is_podmans(name)}
    for name, value in environment.items():
        options += ["--env", name if name in own else f"{name}={value}"]
    for name in ("HOSTNAME", "TERM", "container", "HOME", "PATH"):
        options += [] if name in environment else ["--unsetenv", name]
    for mount in (*settings["mounts"], *in_place_of_podmans(settings)):
        if not (own_kernel(settings) and _unasked(mount)):
            options += _mount(mount, bundle)
    return [*options, "--rootfs", f"{bundle}/rootfs", *process["args"]], own


def _of_kernel(linux: Mapping[str, Any]) -> list[str]:
    options = []
    if masked := linux["maskedPaths"]:
        options += ["--security-opt", "mask=" + ":".join(masked)]
    if "uidMappings" not in linux:
        return [*options, "--userns", "host"]
    for lines, flag in (("uidMappings", "--uidmap"), ("gidMappings", "--gidmap")):
        for one in linux[lines]:
            options += [flag, f"{one['containerID']}:{one['hostID']}:{one['size']}"]
    return options


def _unasked(mount: Mapping[str, Any]) -> bool:
    """What podman asks every runtime for in our words, and a kernel in user space makes itself; a
    /dev that it were told of would cost it its own /dev/pts.
    """
    return mount["type"] in {"devpts", "cgroup"} or mount["destination"] == "/dev"


def _filter(settings: Mapping[str, Any], bundle: str) -> str:
    return "unconfined" if own_kernel(settings) else f"{bundle}/seccomp.json"


def own_kernel(settings: Mapping[str, Any]) -> bool:
    """Whether this configuration leaves calls to a runtime with a kernel of its own."""
    return "seccomp" not in settings["linux"]


def _of_process(process: Mapping[str, Any]) -> list[str]:
    # else set from outside on the process that is made: podman's defaults are above our ceilings
    if "rlimits" not in process:
        return ["--ulimit", "host"]
    options = []
    for one in process["rlimits"]:
        name = one["type"].removeprefix("RLIMIT_").lower()
        options += ["--ulimit", f"{name}={one['soft']}:{one['hard']}"]
    return options


def _is_podmans(name: str) -> bool:
    return name in _OURS or name.startswith(_OUR_FAMILIES)


def in_place_of_podmans(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What it would show of the host's /sys, and the files that it puts on top of our own."""
    etc = next(one["source"] for one in settings["mounts"] if one["destination"] == "/etc")
    shut = ["ro", "nosuid", "nodev", "noexec"]
    hidden = [
        {"destination": place, "type": "tmpfs", "options": [*shut, "mode=755", "size=4k"]}
        for place in ("/sys", "/sys/fs/cgroup")
        if not own_kernel(settings)  # which has a /sys of its own
    ]
    return [
        *hidden,
        {
            "destination": "/etc/hostname",
            "type": "bind",
            "source": f"{etc}/hostname",
            "options": ["bind", "rprivate", *shut],
        },
    ]


def _mount(mount: Mapping[str, Any], bundle: str) -> list[str]:
    place, kind = mount["destination"], mount["type"]
    words = [word for word in mount["options"] if word != "rro"]
    if kind == "proc":
        return []  # podman's own, with the same options
    if any(mark in path for path in (place, mount.get("source", "")) for mark in ":,\n"):
        raise CallerError(
            "profile-path-refused",
            f"{place} cannot be shown by podman: a colon or a comma divides its options",
            hint="isolation.engine: runc or crun, or another name",
        )
    if kind == "devpts":
        # its word for one has none for nosuid and noexec: shown is one that we mount
        return ["--volume", f"{bundle}/{TERMINALS}:{place}:rw,rprivate,nosuid,noexec"]
    if kind == "tmpfs":
        # else it copies to the top what is to be covered; of /dev it hands on any word as it is
        words += [] if place == "/dev" else ["notmpcopyup"]
        words = [word for word in words if not word.startswith("nr_inodes=")]
        return ["--tmpfs", f"{place}:{','.join(words)}"]
    return ["--volume", f"{mount['source']}:{place}:{','.join(words)}"]
