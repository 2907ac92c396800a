"""The `ringfence` command as a user runs it: real claude, real fence, simulated model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from zygote import Zygote

from ringfence.sandbox.hostfacts import execute_only
from ringfence.worker.launch import bundled_claude

KEY = "sk-ant-CANARY-e2e-0123456789"
ACCEPT = [] if os.geteuid() == 0 else ["memory", "cpu", "pids"]


PATIENCE = 3
"""A process that is given up ends a test, and what is asked is never how busy the host is."""


def script(*steps: dict[str, Any], words: str = "Do it.") -> str:
    """A prompt that carries its own script."""
    return f"{words}\n```ringfence-script\n{yaml.safe_dump(list(steps))}\n```\n"


def bash(command: str, **more: Any) -> dict[str, Any]:
    return {"tool": "Bash", "input": {"command": command}, **more}


def _lend_claude(state: Path, shared: Path) -> None:
    """Link the copy of claude that a first start would make: 381 MB a test otherwise."""
    copy = execute_only(bundled_claude(), shared)
    (state / "claude").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    os.link(copy, state / "claude" / copy.name)


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Box:
    """A workspace, a state directory, a policy, a simulator, and who starts the commands."""

    def __init__(self, place: Path, base_url: str, zygote: Zygote) -> None:
        self.place = place
        self.zygote = zygote
        self.workspace = place / "workspace"
        self.workspace.mkdir()
        self.state = place / "state"
        _lend_claude(self.state, place.parent)
        self.base_url = base_url
        self.policy({"preset": "strict"})

    def policy(self, value: dict[str, Any]) -> Path:
        path = self.place / "policy.yaml"
        accepted = sorted({*ACCEPT, *value.get("accept_unenforced", [])})
        path.write_text(yaml.safe_dump({**value, "accept_unenforced": accepted}))
        return path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "RINGFENCE_STATE_DIR": str(self.state),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": self.base_url,
            "ANTHROPIC_API_KEY": KEY,
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ringfence", *arguments]

    def call(self, *arguments: str, seconds: float = 90, stdin: str = "", **env: str) -> Done:
        done = self.zygote.run(
            arguments,
            env=self.environment | env,
            cwd=str(self.place),
            given=stdin,
            seconds=seconds * PATIENCE,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, prompt: str, *more: str, **options: Any) -> Done:
        """`ringfence run --output json` on the workspace."""
        return self.call(
            *("run", prompt, "--workspace", str(self.workspace), "--output", "json"),
            *("--policy", str(self.place / "policy.yaml"), *more),
            **options,
        )

    def execute(self, command: str, *more: str, **options: Any) -> Done:
        return self.call(
            *("exec", "--workspace", str(self.workspace), "--output", "json"),
            *("--policy", str(self.place / "policy.yaml"), *more, "--", "bash", "-c", command),
            **options,
        )

    def spawn(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment | env,
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def records(self) -> list[dict[str, Any]]:
        done = self.call("audit", "show", "--json", "--last", "1000")
        assert done.code == 0, done.err
        return [json.loads(line) for line in done.out.splitlines()]


def processes_with(marker: str) -> list[int]:
    """Host pids whose command line holds a marker; the tests' own are left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in line and b"pytest" not in line and b"ringfence\0run" not in line:
            found.append(int(entry.name))
    return found


def wait_for(condition: Any, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


__all__ = [
    "ACCEPT",
    "KEY",
    "Box",
    "Done",
    "bash",
    "processes_with",
    "script",
    "signal",
    "wait_for",
]
