"""The container backend: an OCI runtime, or podman, in the prepared place, without a daemon and
without root.

Started by root, a sandbox has a block of 65536 host ids; inside, 1000 is one of them, and the
runtime itself runs as another. Neither is an account of the host.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts, oci, podman, seccomp
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.launcher import rehearse
from ringfence.sandbox.profile import PATH, HostFacts, bare_plan
from ringfence.sandbox.protocol import INSIDE_UID, ControlState
from ringfence.sandbox.seats import SeatIds, SeatingBackend
from ringfence.sandbox.staging import Program

RUNTIMES = ("runc", "crun")
"""What `auto` takes, in this order."""
ENGINES = (*RUNTIMES, "podman")
_PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_ONE_ID = ("crun", "podman")
_DOCKER = (
    "docker cannot hold what a sandbox needs: its daemon, as the host's root, makes containers "
    "among its own mounts, where none of our masks is, and they outlive a killed ringfence"
)
_BLOCK = 65_536
_BLOCKS = 4_096
_OPTIONS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    # its control groups are made by us; it has no right to make any, and says so once
    "runc": ((), ("--no-new-keyring",)),
    "crun": (("--cgroup-manager", "disabled"), ("--no-new-keyring",)),
}
"""Of a runtime: global options, options of `create`."""
_FILTER = "run.oci.seccomp_bpf_data"
"""Where crun takes a filter that is compiled: else it compiles one at each start, a quarter of all
that it does. A crun that does not know the word has the profile, which says the same.
"""


HOW = STAGED
"""What this backend does for each control."""


class ContainerBackend(SeatingBackend):
    """`Backend` of the protocol."""

    def __init__(
        self,
        *,
        state_dir: Path,
        uid_base: int = 2_000_000,
        uid_count: int = 65_536,
        engine: str = "auto",
    ) -> None:
        super().__init__(state_dir=state_dir, uid_base=uid_base, uid_count=uid_count)
        # behind the single uids of other backends, so that no two sandboxes share one
        first = uid_base + uid_count
        self._uids = range(first + INSIDE_UID, first + _BLOCK * _BLOCKS, _BLOCK)
        self._engine = engine

    words = HOW
    phases = ("launch_oci",)
    by_bubblewrap = False

    @property
    def name(self) -> str:
        """See the protocol."""
        return "container"

    @property
    def from_images(self) -> bool:
        """See StagedBackend."""
        return True

    def check(self) -> None:
        """See StagedBackend."""
        find_runtime(self._engine, as_root=os.geteuid() == 0)

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        check_runtime(self._runtime(profile), self._uids[0])
        return super().probe(profile)

    def engine(self, profile: SandboxProfile) -> str:
        """See Engined of the protocol."""
        name = self._runtime(profile).name
        return "podman with crun" if name == "podman" else name

    def seat_ids(self, facts: HostFacts, number: int) -> SeatIds:
        """See SeatingBackend: the sandbox's block has one for each, inside and on the host."""
        if not facts.as_root:
            return SeatIds(facts)
        return SeatIds(replace(facts, uid=facts.uid + number, inside=facts.inside + number))

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See EnclosingBackend."""
        return container_plan(self._runtime(rules), rules, facts, program)

    def _runtime(self, rules: SandboxProfile) -> Path:
        engine = self._engine if rules.engine == "auto" else rules.engine
        return find_runtime(engine, as_root=os.geteuid() == 0)


def container_plan(
    runtime: Path, rules: SandboxProfile, facts: HostFacts, program: Program
) -> dict[str, Any]:
    """The plan of launch.py's second phase, without cgroups, rlimits and parent."""
    settings = oci.config(
        rules,
        facts,
        argv=program.argv,
        environment=program.environment,
        cwd=program.cwd,
        seccomp=_profile(platform.machine()),
        uid=facts.inside,
        one_id=not facts.as_root,
    )
    plan = {
        "stage": facts.stage,
        "as_root": facts.as_root,
        "map": block_map(facts),
        "links": dict(facts.links),
        "expect": oci.expectations(settings),
    }
    if runtime.name == "podman":
        beneath = find_runtime("crun", as_root=facts.as_root)
        bundle = f"{facts.stage}/bundle"
        own = (*_OPTIONS["crun"][0], "--root", f"{bundle}/state", "--log", f"{bundle}/log")
        script = podman.runtime_script(" ".join([str(beneath), *own]))
        return plan | podman.plan(str(runtime), script, settings, bundle, program.environment)
    before, create = _OPTIONS[runtime.name]
    if runtime.name == "crun":
        settings["annotations"] = {_FILTER: _filter(platform.machine())}
    return plan | {
        "phase": "oci",
        "runtime": [str(runtime), *before],
        "create": list(create),
        "gate_is_read": runtime.name == "runc",
        "hide_control_groups": runtime.name == "crun",
        "config": _as_text(settings),
    }


@functools.cache
def _filter(machine: str) -> str:
    return base64.b64encode(seccomp.build(machine)).decode()


@functools.cache
def _profile(machine: str) -> Mapping[str, Any]:
    return seccomp.oci(machine)


@functools.cache
def _profile_as_text(machine: str) -> str:
    return json.dumps(_profile(machine), ensure_ascii=True)


def _as_text(settings: Mapping[str, Any]) -> str:
    """JSON of a configuration with `_profile`, which is most of it and the same for all programs:
    to make both anew took a millisecond of each start.
    """
    own = {name: value for name, value in settings.items() if name != "linux"}
    linux = {name: value for name, value in settings["linux"].items() if name != "seccomp"}
    outer, inner = (json.dumps(part, ensure_ascii=True)[:-1] for part in (own, linux))
    profile = _profile_as_text(platform.machine())
    return f'{outer}, "linux": {inner}, "seccomp": {profile}}}}}'


def block_map(facts: HostFacts) -> list[list[int]]:
    """Lines of the user namespace's maps: (first id inside, first id of the host, count)."""
    if facts.as_root:
        return [[0, facts.uid - facts.inside, _BLOCK]]
    return [[0, facts.uid, 1]]


@functools.cache
def find_runtime(engine: str, *, as_root: bool) -> Path:
    """The program of an engine; `auto` takes the first that is there and can serve this user.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    usable = ENGINES if as_root else _OF_ONE_ID
    automatic = [name for name in RUNTIMES if name in usable]
    for name in automatic if engine == "auto" else (engine,):
        found = shutil.which(name, path=_PATHS)
        if found is not None and name in usable:
            return Path(found)
    if engine == "docker":
        raise UnavailableError(
            "isolation-unavailable",
            _DOCKER,
            hint="isolation.engine: podman, runc or crun, which need no daemon",
        )
    if engine in ENGINES and engine not in usable:
        raise UnavailableError(
            "isolation-unavailable",
            f"{engine} wants ids of its own, and an ordinary user has one",
            hint="start ringfence as root, or isolation.engine: crun",
        )
    wanted = " or ".join(automatic) if engine == "auto" else engine
    raise UnavailableError(
        "isolation-unavailable",
        f"{wanted} is not installed",
        hint=f"apt-get install {automatic[0] if engine == 'auto' else engine}",
    )


@functools.cache
def check_runtime(runtime: Path, uid: int) -> None:
    """Try, not guess: a container that does nothing, read back like every other.

    Raises:
        UnavailableError: `isolation-unavailable`, with the runtime's own words.
    """
    facts = hostfacts.empty_place(uid)
    rules = SandboxProfile(workspace_mode=WorkspaceMode.READONLY)
    plan = {
        **container_plan(runtime, rules, facts, Program(["true"], {"PATH": PATH}, "/")),
        "cgroups": [],
        "rlimits": {},
    }
    place = {**bare_plan(facts), "files": {"etc/hostname": "sandbox\n"}}
    words = rehearse(place, {**plan, "parent": os.getpid()})
    if words is not None:
        raise UnavailableError(
            "isolation-unavailable",
            f"{runtime.name} cannot start a container: {words}",
            hint="it needs user namespaces: sysctl user.max_user_namespaces=10000"
            + ("; podman needs conmon and crun, too" if runtime.name == "podman" else ""),
        )
