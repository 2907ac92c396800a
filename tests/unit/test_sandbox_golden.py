"""What a policy becomes on the host, line by line: the plan of the mounts, bubblewrap's arguments,
the configuration of a container.

After a change that is meant: `python tests/unit/test_sandbox_golden.py write`, and read the
difference as what an attacker would: a mount that is new, a flag that is gone.
"""

from __future__ import annotations

import base64
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.load import PRESETS, from_mapping
from ringfence.sandbox import oci, seccomp
from ringfence.sandbox.bwrap_options import enclose_options
from ringfence.sandbox.container import container_plan
from ringfence.sandbox.profile import HostFacts, ImageRoot, Tools, prepare_plan
from ringfence.sandbox.staging import Program

GOLDEN = Path(__file__).parent / "golden" / "sandbox"

PATHS = {
    "filesystem": {
        "readable_paths": ["/shared", "/absent"],
        "writable_paths": ["/workspace", "/cache"],
        "blocked_paths": ["/etc", "/shared/secret", "/workspace/private"],
    }
}
IMAGED = {
    "preset": "strict",
    "filesystem": {
        **PATHS["filesystem"],
        "image": "agent",
        "readable_paths": ["/usr/x", "/shared"],
    },
}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    **{f"{name}-root": ({"preset": name}, True) for name in PRESETS},
    "strict-user": ({"preset": "strict"}, False),
    "paths-root": ({"preset": "strict", **PATHS}, True),
    "paths-user": ({"preset": "strict", **PATHS}, False),
    "direct-user": (
        {
            "preset": "developer",
            "filesystem": {"workspace": "direct"},
            "accept_unenforced": ["workspace_disk"],
        },
        False,
    ),
    "image-root": (IMAGED, True),
    "image-user": (IMAGED, False),
}


IMAGE = ImageRoot(
    path="/state/images/trees/aa/rootfs",
    directories=("usr", "var", "opt/tool"),
    links={"bin": "usr/bin", "lib": "usr/lib"},
    covered={"/etc/skel": True, "/usr/bin/git": False},
)


def facts(*, as_root: bool, image: bool = False) -> HostFacts:
    found = _facts_of_a_host(as_root=as_root)
    return replace(found, image=IMAGE, links=dict(IMAGE.links)) if image else found


def _facts_of_a_host(*, as_root: bool) -> HostFacts:
    return HostFacts(
        as_root=as_root,
        uid=2_000_000 if as_root else 1000,
        tools=Tools(executable="tools/bwrap", copied={"/venv/bwrap": "tools/bwrap"}),
        links={"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"},
        existing={
            "/shared": True,
            "/shared/secret": True,
            "/cache": True,
            "/etc/localtime": False,
            "/etc/alternatives": True,
        },
        ca_file="/etc/ssl/cert.pem",
        ca_bundle="(what follows the trust store)",
        masked={".env": False, ".ssh": True},
        proc_entries=frozenset({"kcore", "fs", "sys", "sysrq-trigger", "keys"}),
        egress_dir="/state/egress/sb",
        claude="/state/claude/digest",
    )


def render(name: str) -> str:
    document, as_root = CASES[name]
    profile = compile_policy(from_mapping(document)).sandbox
    where = facts(as_root=as_root, image=profile.image is not None)
    argv = enclose_options(profile, where, environment={"A": "b"}, cwd="/workspace")
    container = oci.config(
        profile,
        where,
        argv=["true"],
        environment={"A": "b"},
        cwd="/workspace",
        seccomp={"defaultAction": "(of its own golden file)"},
    )
    value = {
        "prepare": prepare_plan(profile, where),
        "bubblewrap": _lines(argv),
        "container": {**container, "mounts": [_mount_line(one) for one in container["mounts"]]},
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _mount_line(mount: dict[str, Any]) -> str:
    words = ",".join(mount["options"])
    return f"{mount['type']} {mount['source']} {mount['destination']} {words}"


def _lines(argv: list[str]) -> list[str]:
    """One option with its values a line."""
    lines: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return [" ".join(line) for line in lines]


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_a_profile_becomes_is_written_down(name: str) -> None:
    assert render(name) == (GOLDEN / f"{name}.json").read_text()


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_no_profile_may_lack(name: str) -> None:
    """The golden files are read by people; these lines are read by this test too."""
    lines = json.loads(render(name))["bubblewrap"]
    for wanted in (
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--disable-userns", "--clearenv"),
        *("--cap-drop ALL", "--die-with-parent", "--new-session", "--seccomp 10"),
        *("--uid 1000", "--gid 1000", "--remount-ro /"),
    ):
        assert wanted in lines, wanted
    assert not any("docker.sock" in line or "--share-net" in line for line in lines)


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_no_container_may_lack(name: str) -> None:
    """The flags of a hardened container, each asked for and each expected of the kernel."""
    document, as_root = CASES[name]
    profile = compile_policy(from_mapping(document)).sandbox
    config = oci.config(
        profile, facts(as_root=as_root), argv=["true"], environment={}, cwd="/", seccomp={}
    )
    process, linux = config["process"], config["linux"]
    assert process["capabilities"] == {key: [] for key in oci.CAPABILITY_SETS}
    assert process["noNewPrivileges"] is True
    assert (process["user"]["uid"], process["user"]["gid"]) == (1000, 1000)
    assert config["root"]["readonly"] is True
    assert {"mount", "ipc", "uts", "cgroup"} == {one["type"] for one in linux["namespaces"]}
    assert "/proc/sys" in linux["readonlyPaths"]
    assert "/proc/kcore" in linux["maskedPaths"]
    places = {one["destination"]: set(one["options"]) for one in config["mounts"]}
    assert places["/tmp"] >= {"nosuid", "nodev", "noexec"}
    assert places["/usr"] >= {"ro", "nosuid", "nodev"}
    assert places["/run/ringfence"] >= {"ro", "nosuid", "nodev", "noexec"}
    assert not any("docker.sock" in one["source"] for one in config["mounts"])
    expected = oci.expectations(config)
    assert set(expected["mounts"]) >= {*places, "/"}
    assert expected["status"] == {
        "Uid": "1000 1000 1000 1000",
        "Gid": "1000 1000 1000 1000",
        "NoNewPrivs": "1",
        "Seccomp": "2",
        **{f"Cap{name}": "0" * 16 for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")},
    }


def test_what_no_program_may_run_from() -> None:
    """`exec_in_workspace` lifts what its absence sets, in the plan and in the container."""
    where = facts(as_root=True)
    for allowed in (True, False):
        document = {"preset": "strict", "filesystem": {"exec_in_workspace": allowed}}
        profile = compile_policy(from_mapping(document)).sandbox
        mounts = {one["destination"]: one["options"] for one in oci.mounts(profile, where)}
        assert ("noexec" in mounts["/workspace"]) is not allowed
        assert prepare_plan(profile, where)["workspace_exec"] is allowed


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_runtime_is_handed_the_whole_configuration(runtime: str) -> None:
    """Its filter's profile is written as text once and put in: it is the same configuration."""
    profile = SandboxProfile()
    where = facts(as_root=True)
    program = Program(["sh", "-c", 'echo "}}"'], {"A": '"linux": {}'}, "/workspace")
    plan = container_plan(Path(f"/usr/bin/{runtime}"), profile, where, program)
    machine = platform.machine()
    expected = oci.config(
        profile,
        where,
        argv=program.argv,
        environment=program.environment,
        cwd=program.cwd,
        seccomp=seccomp.oci(machine),
    )
    handed = json.loads(plan["config"])
    annotations = handed.pop("annotations", {})
    assert handed == expected
    filters = [base64.b64decode(one) for one in annotations.values()]
    assert filters == ([seccomp.build(machine)] if runtime == "crun" else [])


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.json").write_text(render(case))
