"""What podman is asked for: every flag of a hardened container, and nothing that it cannot say."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.errors import CallerError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import oci, podman, seccomp
from ringfence.sandbox.profile import HostFacts, Tools

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
