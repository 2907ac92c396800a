"""Compiled rules → Anthropic's sandbox runtime in a place of its own. PURE.

The runtime binds the root that it is started in into every sandbox, readable. So reads are denied
before it is there: it is started in a root that holds nothing of the host but what the profile
shows. bubblewrap lays that out, and in it the runtime encloses each program once more with
namespaces, mounts and a filter of its own, which denies few calls: ours is put on top of it.

Its proxies are not used. Inside, unix sockets cannot be opened, so that the way out is TCP: the
runtime relays its port 3128 to the same port of the place's network namespace, where egress itself
accepts (`network.httpProxyPort`). Its `mitmProxy` setting would lead to a socket of ours too, with
its own proxy and list of hosts in between: this way no code of the runtime decides on a request.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.bwrap_options import cover_options, place_mounts, system_mounts
from ringfence.sandbox.profile import (
    SECCOMP_FD,
    STATUS_FD,
    HostFacts,
    prepare_plan,
    shown_paths,
    source,
)
from ringfence.sandbox.protocol import (
    INSIDE_EGRESS_SOCKET,
    INSIDE_HOME,
    INSIDE_PROXY_PORT,
    INSIDE_UID,
    INSIDE_WORKSPACE,
)

HERE = "/opt/ringfence/runtime"
"""Where the place has Node, the package and its settings."""
_SCRATCH = "/run/runtime"
"""The runtime's own: its socket, which nobody inside can open, and its home."""
_PATH = "/usr/local/bin:/usr/bin:/bin"
_PACKAGE = "@anthropic-ai/sandbox-runtime"
_VARIABLE = "RINGFENCE_EXPORT_"

_ENTER = f"""\
f=; n=; c=; s=
while read -r k v; do
  case "$k" in
    Seccomp:) f=$v ;; NoNewPrivs:) n=$v ;; CapEff:) c=$v ;; Seccomp_filters:) s=$v ;;
  esac
done </proc/self/status
if [ "$f $n $c" != "2 1 0000000000000000" ]; then
  echo "ringfence: the sandbox runtime has not enclosed this program" >&2
  exit 125
fi
exec {HERE}/fence /bin/sh -c "$0" "$s" "$@"
"""
"""Runs inside, before anything of the agent: the runtime goes on without its filter when it cannot
find it, so that what the kernel says is looked at each time, with no program but the shell. Then
comes our own filter (`filtering`), on top of the runtime's and under `_FENCED`: whatever reaches a
process with fewer filters could act through it, and the runtime has a process namespace for each
program, in which this shell becomes process 2. Process 1 is the runtime's and cannot be traced.
"""

_FENCED = f"""\
s=
while read -r k v; do
  case "$k" in Seccomp_filters:) s=$v ;; esac
done </proc/self/status
if [ "$s" != "$(($0 + 1))" ]; then
  echo "ringfence: the kernel does not show our own filter on this program" >&2
  exit 125
fi
if [ -w /dev ]; then
  echo "ringfence: the sandbox runtime has left /dev writable" >&2
  exit 125
fi
unset s k v
{_VARIABLE}I=0
while eval "{_VARIABLE}E=\\${{{_VARIABLE}${_VARIABLE}I-}}"; [ -n "${_VARIABLE}E" ]; do
  eval "${_VARIABLE}E"; unset "{_VARIABLE}${_VARIABLE}I"; {_VARIABLE}I=$(({_VARIABLE}I + 1))
done
unset {_VARIABLE}I {_VARIABLE}E
cd "$1" && shift && exec "$@"
"""
"""What was asked for is read back: one filter more than the runtime's, and a /dev that nobody can
write. A runtime to come may make its /dev after our words to bubblewrap. The variables come in
wrapped, because those of a program would reach the runtime itself first: a PATH with a folder of
the workspace, a NODE_OPTIONS. The loop's own have names that no program's variable has."""

_BWRAP = """\
#!/bin/bash
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == -- ]]; then
    exec @BWRAP@ "${@:1:i-1}" --bind /dev/shm /dev/shm --remount-ro /dev "${@:i}"
  fi
done
exec @BWRAP@ "$@"
"""
"""What the runtime starts as bubblewrap. Its /dev is a tmpfs of the agent's own, without a size and
with programs run from it, made after all that its settings can say: so the last words are ours.
/dev/shm is the place's, with the size of all that is ephemeral."""


class RuntimePaths(NamedTuple):
    """Absolute host paths: the `node` binary, and the node_modules that holds the package."""

    node: str
    modules: str


def settings(rules: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
    """The runtime's settings file. What may be read is what the place has."""
    writable = [path for path, may_write in shown_paths(rules, facts) if may_write]
    places = ["/tmp", "/var/tmp", INSIDE_HOME]  # noqa: S108  the sandbox's own
    if rules.workspace_mode is not WorkspaceMode.READONLY:
        places.append(INSIDE_WORKSPACE)
    return {
        "network": {
            # an empty list would mean no way out at all; who decides is egress, and no name is here
            "allowedDomains": ["egress.invalid"],
            "deniedDomains": [],
            "httpProxyPort": INSIDE_PROXY_PORT,
            "socksProxyPort": INSIDE_PROXY_PORT,
        },
        "filesystem": {
            # what is not shown is absent already. To deny the root here too has the runtime put a
            # file system in its place that the agent can write, past the disk limit (measured)
            "denyRead": [],
            "allowWrite": [*places, *writable],
            "denyWrite": [],
        },
        "bwrapPath": f"{HERE}/bwrap",
    }


def runtime_plan(
    rules: SandboxProfile, facts: HostFacts, paths: RuntimePaths, fence: bytes
) -> dict[str, Any]:
    """The plan of launch.py's first phase: bubblewrap's, and what the runtime is made of.
    `fence` is the program that puts our filter on itself, see `filtering`.
    """
    plan = prepare_plan(rules, facts)
    plan["sources"] += [
        source(paths.node, "runtime/node", read_only=True, directory=False),
        source(paths.modules, "runtime/node_modules", read_only=True),
    ]
    plan["files"] |= {
        "runtime/settings.json": json.dumps(settings(rules, facts)),
        # socat tries the first address only, and egress accepts on this one
        "etc/hosts": "127.0.0.1 localhost\n",
    }
    plan["programs"] |= {
        "runtime/fence": fence,
        "runtime/bwrap": _BWRAP.replace("@BWRAP@", _bwrap(facts)).encode(),
    }
    return plan


def runtime_options(rules: SandboxProfile, facts: HostFacts) -> list[str]:
    """Bubblewrap's options for the place that the runtime is started in. No limit on user
    namespaces, and no filter yet, which would forbid them: the runtime makes its own, and its /proc
    needs one here that nothing covers.
    """
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *("--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID), "--hostname", "sandbox"),
        *("--cap-drop", "ALL", "--clearenv", "--die-with-parent", "--new-session"),
        *("--json-status-fd", str(STATUS_FD)),
        *("--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/"),
        *system_mounts(facts),
        *("--proc", "/proc"),
        *_devices(),
        *place_mounts(rules, facts),
        *cover_options(rules, facts),
        *("--ro-bind", f"{facts.stage}/runtime", HERE),
        # bubblewrap reads it and closes it: the descriptor must not be there for the runtime
        *("--ro-bind-data", str(SECCOMP_FD), "/run/.unused"),
        *("--perms", "0700", "--size", str(16 << 20), "--tmpfs", _SCRATCH),
    ]
    if facts.tools.copied:
        arguments += ["--ro-bind", f"{facts.stage}/tools", "/opt/ringfence/tools"]
    return [*arguments, "--remount-ro", "/"]


def _devices() -> list[str]:
    """A /dev without terminals. For `--dev` bubblewrap becomes root in a namespace first, because a
    devpts needs one: the namespace of IPC would be that root's, which is the agent's uid, and
    /proc/sys/fs/mqueue could be written. The runtime mounts a /proc past all that covers it here.
    """
    options = ["--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/dev"]
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    links = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, place in links.items():
        options += ["--symlink", f"/proc/self/{place}", f"/dev/{name}"]
    return options


def environment_options(environment: Mapping[str, str]) -> list[str]:
    """The runtime's own environment, and the program's wrapped in it."""
    own = {
        "PATH": _PATH,
        "HOME": _SCRATCH,
        "TMPDIR": _SCRATCH,
        "LANG": "C.UTF-8",
        # what the runtime gives to programs as TMPDIR; its default is one folder for all sandboxes
        "CLAUDE_CODE_TMPDIR": "/tmp",  # noqa: S108
    }
    wrapped = {
        f"{_VARIABLE}{index}": f"export {name}={shlex.quote(value)}"
        for index, (name, value) in enumerate(by_proxy(environment).items())
    }
    return [word for pair in (own | wrapped).items() for word in ("--setenv", *pair)]


def by_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """A program's environment without the socket that it cannot open here: claude asks for the
    model as any client would, through the proxy, where egress knows the host and ends the TLS.
    """
    found = dict(environment)
    if found.get("ANTHROPIC_UNIX_SOCKET") == INSIDE_EGRESS_SOCKET:
        del found["ANTHROPIC_UNIX_SOCKET"]
        found["ANTHROPIC_BASE_URL"] = "https://api.anthropic.com"
    return found


def command(argv: Sequence[str], cwd: str) -> list[str]:
    """The runtime, in it a shell, our filter on it, and a shell again that becomes the program."""
    client = f"{HERE}/node_modules/{_PACKAGE}/dist/cli.js"
    start = [f"{HERE}/node", client, "--settings", f"{HERE}/settings.json", "--"]
    return [*start, "/bin/sh", "-c", _ENTER, _FENCED, cwd, *argv]


def _bwrap(facts: HostFacts) -> str:
    return f"/opt/ringfence/{facts.tools.executable}" if facts.tools.copied else "/usr/bin/bwrap"
