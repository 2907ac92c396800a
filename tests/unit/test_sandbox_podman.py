"""What podman is asked for: every flag of a hardened container, and nothing that it cannot say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import CallerError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import oci, podman, seccomp
from ringfence.sandbox.gvisor import gvisor_config
from ringfence.sandbox.profile import HostFacts, Tools
from ringfence.sandbox.staging import Program

sys.path.append(str(Path(podman.__file__).parent))
from launch_gvisor import verify
from launch_gvisor_podman import compare

FACTS = HostFacts(
    as_root=True,
    uid=2_066_536,
    tools=Tools(executable="/usr/bin/bwrap"),
    links={"bin": "usr/bin"},
    existing={"/usr/share/secret": True},
    proc_entries=frozenset({"kcore", "sys"}),
)


def options(
    environment: dict[str, str] | None = None,
    *,
    facts: HostFacts = FACTS,
    one_id: bool = False,
    **profile: Any,
) -> tuple[list[str], dict[str, str]]:
    settings = oci.config(
        SandboxProfile(workspace_mode=WorkspaceMode.READONLY, **profile),
        facts,
        argv=["prog", "--detach"],
        environment=environment or {},
        cwd="/workspace",
        seccomp=seccomp.oci("x86_64"),
        one_id=one_id,
    )
    return podman.run_options(settings, "/mnt/bundle", environment or {})


def values(words: list[str], flag: str) -> list[str]:
    return [words[number + 1] for number, word in enumerate(words) if word == flag]


def test_every_flag_of_a_hardened_container() -> None:
    words, _ = options()
    assert values(words, "--cap-drop") == ["ALL"]
    assert values(words, "--user") == ["1000:1000"]
    assert values(words, "--security-opt") == [
        "no-new-privileges",
        "seccomp=/mnt/bundle/seccomp.json",
        "mask=/proc/kcore",
    ]
    assert {"--read-only", "--read-only-tmpfs=false", "--no-hosts"} <= set(words)
    volumes = values(words, "--volume")
    assert "/mnt/tmp:/tmp:rbind,rprivate,rw,nosuid,nodev,noexec" in volumes
    assert "/usr:/usr:rbind,rprivate,ro,nosuid,nodev" in volumes
    assert not {"--privileged", "--cap-add", "--device", "--init"} & set(words)


def test_the_program_is_what_comes_last() -> None:
    """So that no word of it can be an option of podman's."""
    words, _ = options()
    assert words[-4:] == ["--rootfs", "/mnt/bundle/rootfs", "prog", "--detach"]


def test_what_covers_is_not_filled_with_what_it_covers() -> None:
    words, _ = options(blocked=("/usr/share/secret",))
    (cover,) = [one for one in values(words, "--tmpfs") if one.startswith("/usr/share/secret:")]
    assert "notmpcopyup" in cover.split(",")
    assert "mode=000" in cover


def test_values_of_the_environment_are_on_no_command_line() -> None:
    """Less those that podman or its loader would take for their own: they would work outside."""
    words, inherited = options({"TASK": "canary\nline", "LD_PRELOAD": "/x.so", "PATH": "/usr/bin"})
    assert inherited == {"TASK": "canary\nline"}
    assert values(words, "--env") == ["TASK", "LD_PRELOAD=/x.so", "PATH=/usr/bin"]
    assert "canary" not in " ".join(words)


def test_what_podman_adds_to_an_environment_is_taken_out() -> None:
    words, _ = options({"TERM": "dumb"})
    assert values(words, "--unsetenv") == ["HOSTNAME", "container", "HOME", "PATH"]


@pytest.mark.parametrize("path", ["/data/a:b", "/data/a,b"])
def test_a_path_that_podman_would_misread_is_refused(path: str) -> None:
    facts = HostFacts(
        as_root=True, uid=2_066_536, tools=FACTS.tools, existing={path: True}, links={}
    )
    with pytest.raises(CallerError) as caught:
        options(facts=facts, readable=(path,))
    assert caught.value.code == "profile-path-refused"
    plain = HostFacts(
        as_root=True, uid=2_066_536, tools=FACTS.tools, existing={"/data/ab": True}, links={}
    )
    words, _ = options(facts=plain, readable=("/data/ab",))
    assert any(":/data/ab:" in one for one in values(words, "--volume"))


def test_the_one_id_of_an_ordinary_user() -> None:
    words, _ = options(one_id=True)
    assert values(words, "--uidmap") == values(words, "--gidmap") == ["1000:0:1"]
    assert "--userns" not in words
    assert values(options()[0], "--userns") == ["host"]


# --- gVisor below podman: what podman wrote, beside what it was to write

WANTED = gvisor_config(
    SandboxProfile(workspace_mode=WorkspaceMode.READONLY), FACTS, Program(["prog"], {}, "/")
)
BUNDLE = "/mnt/bundle"


def written() -> dict[str, Any]:
    """As podman writes it: no capability, files of its own, and no word on memory."""
    one = json.loads(json.dumps(WANTED))
    one["process"] |= {"capabilities": {}, "env": ["HOSTNAME=sandbox"], "args": ["x"]}
    one["root"]["path"] = f"{BUNDLE}/rootfs"
    one["mounts"].append(
        {"destination": "/run/.containerenv", "type": "bind", "source": f"{BUNDLE}/run/c/x",
         "options": ["bind", "rprivate", "ro"]}
    )  # fmt: skip
    return one


def test_what_podman_wrote_is_what_was_asked_for() -> None:
    assert compare(written(), WANTED, BUNDLE) == []


def _edit(place: str, **change: Any) -> Any:
    def edit(one: dict[str, Any]) -> None:
        (mount,) = [m for m in one["mounts"] if m["destination"] == place]
        mount.update(change)

    return edit


DIFFERENCES: list[tuple[Any, str]] = [
    (lambda one: one["process"]["user"].update(additionalGids=[5]), "more groups"),
    (lambda one: one["process"]["user"].update(uid=1), "the user is 1:0"),
    (lambda one: one["process"].update(noNewPrivileges=False), "noNewPrivileges is False"),
    (lambda one: one["process"].update(rlimits=[]), "RLIMIT_CORE is not 0"),
    (lambda one: one["process"].update(capabilities={"bounding": ["CAP_CHOWN"]}), "bounding"),
    (lambda one: one["root"].update(readonly=False), "writable"),
    (lambda one: one["root"].update(path="/"), "the root is another"),
    (lambda one: one.update(hooks={"prestart": [{"path": "/x"}]}), "hooks"),
    (lambda one: one.update(annotations={"dev.gvisor.spec.x": "y"}), "words for gVisor"),
    (lambda one: one["linux"].update(devices=[{"path": "/dev/kvm"}]), "devices"),
    (_edit("/usr", options=["rbind", "nosuid", "nodev"]), "/usr is mounted without ro"),
    (_edit("/etc", source="/etc"), "/etc shows /etc"),
    (_edit("/sys/fs/cgroup", type="tmpfs"), "of another kind"),
    (_edit("/run/.containerenv", options=["bind"]), "/run/.containerenv shows"),
    (_edit("/run/.containerenv", source="/root"), "/run/.containerenv shows /root"),
    (_edit("/proc", type="none", options=["rbind"], source="/proc"), "/proc shows /proc"),
    (lambda one: one["mounts"].remove(one["mounts"][0]), "/usr is not mounted"),
]


@pytest.mark.parametrize(("change", "difference"), DIFFERENCES)
def test_what_podman_wrote_beyond_that_is_named(change: Any, difference: str) -> None:
    one = written()
    change(one)
    assert any(difference in word for word in compare(one, WANTED, BUNDLE))


def test_what_podman_is_asked_for_gvisor() -> None:
    """No capability and no seccomp profile of its own, and neither gVisor's /dev nor its groups."""
    words, _ = podman.run_options(WANTED, BUNDLE, {})
    assert values(words, "--security-opt")[:2] == ["no-new-privileges", "seccomp=unconfined"]
    assert values(words, "--ulimit")[0] == "core=0:0"
    assert values(words, "--user") == ["0:0"]
    assert "--cap-add" not in " ".join(words)
    shown = [one.split(":")[1] for one in values(words, "--volume")]
    assert "/dev/fuse" in shown
    assert not {"/dev", "/dev/pts", "/sys/fs/cgroup"} & set(shown)


def test_a_sentry_that_is_gone_is_not_one_that_holds() -> None:
    # the number of one that has just ended may be another's already; and we have children
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text())
    with subprocess.Popen(["sleep", "60"]) as alone:
        try:
            wrong = verify(nobody, "net:[1]", {}, parent=alone.pid)
        finally:
            alone.kill()
    assert "sentry: it is gone" in wrong
