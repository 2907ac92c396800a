"""What a policy says, key by key, with the real claude in the real fence."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from harness import ACCEPT, Box, bash, script

from ringfence.simulator.server import Simulator

SECURITY_CONFIG: dict[str, Any] = {
    "network": {
        "mode": "restricted",
        "allowed_hosts": ["api.anthropic.com"],
        "blocked_ports": [22, 3306, 5432],
    },
    "filesystem": {
        "writable_paths": ["/workspace"],
        "readable_paths": ["/workspace", "/shared/docs"],
        "blocked_paths": ["/etc", "/root", "/var/secrets"],
    },
    "execution": {
        "max_duration_seconds": 300,
        "max_memory_mb": 2048,
        "allow_network_tools": False,
        "allow_subprocess": True,
    },
}


def offered(simulator: Simulator) -> set[str]:
    return {t["name"] for r in simulator.requests for t in r.body.get("tools", [])}


def results(simulator: Simulator) -> str:
    """Every tool result that the model was sent, in order."""
    blocks = [
        block
        for message in simulator.requests[-1].body["messages"]
        for block in message["content"]
        if isinstance(block, dict) and block.get("type") == "tool_result"
    ]
    return json.dumps(blocks)


def test_the_security_config_runs_as_it_stands(box: Box, simulator: Simulator) -> None:
    # as the dictionary it is, but for what an ordinary user's host cannot enforce
    path = box.place / "policy.yaml"
    accepted = {"accept_unenforced": ACCEPT} if ACCEPT else {}
    path.write_text(json.dumps(SECURITY_CONFIG | accepted))
    look = (
        "for p in /root /var/secrets /shared/docs /etc/shadow /etc/machine-id; do "
        "test -e $p && echo HAS $p; done; cat /etc/hostname; sed -n 2p /etc/passwd; "
        "echo kept > kept.txt && cat kept.txt"
    )
    done = box.run(script(bash(look), {"text": "ok"}))
    assert done.code == 0, done.out + done.err
    seen = results(simulator)
    assert "HAS " not in seen
    assert "sandbox" in seen
    assert "agent:x:1000" in seen
    assert "kept" in seen
    assert done.json["changed_files"] == ["kept.txt"]
    assert {"Bash", "Read", "Write"} <= offered(simulator)
    assert not offered(simulator) & {"WebFetch", "WebSearch"}
    assert not (box.workspace / "kept.txt").exists()


def test_a_missing_readable_path_is_said_and_a_present_one_is_read(box: Box) -> None:
    docs = box.place / "docs"
    (docs / "closed").mkdir(parents=True)
    (docs / "a.txt").write_text("readable-canary\n")
    (docs / "closed" / "b.txt").write_text("blocked-canary\n")
    locked = box.place / "locked"
    locked.mkdir(mode=0)
    box.policy(
        {
            **SECURITY_CONFIG,
            "filesystem": {
                "readable_paths": [str(docs), "/shared/docs", f"{locked}/x"],
                "blocked_paths": ["/etc", str(docs / "closed")],
            },
        }
    )
    done = box.call(
        *("exec", "--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
        *("--", "bash", "-c", f"cat {docs}/a.txt {docs}/closed/b.txt; touch {docs}/new"),
    )
    assert "readable-canary" in done.out
    assert "blocked-canary" not in done.out + done.err
    assert not (docs / "new").exists()
    assert "/shared/docs cannot be found on this host" in done.out + done.err


CONNECT = r"""
import os, socket
proxy = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
for target in ("a.example.com:22", "a.example.com:443", "b.example.com:443"):
    s = socket.create_connection((proxy[0], int(proxy[1])), 10)
    s.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    print(target, s.recv(4096).decode().replace("\r\n", " "))
"""


def test_a_blocked_port_wins_over_an_allowed_host(box: Box) -> None:
    box.policy(
        {
            **SECURITY_CONFIG,
            "network": {
                "allowed_hosts": ["api.anthropic.com", "a.example.com:22", "a.example.com"],
                "blocked_ports": [22],
            },
        }
    )
    (box.workspace / "c.py").write_text(CONNECT)
    done = box.execute(
        "python3 c.py",
        RINGFENCE_EGRESS__CONNECT=json.dumps({"a.example.com:443": "127.0.0.1:9"}),
    )
    lines = dict(line.split(" ", 1) for line in done.json["output"].splitlines())
    assert "403 Refused" in lines["a.example.com:22"]
    assert "403 Refused" not in lines["a.example.com:443"]  # the allowed twin
    assert "403 Refused" in lines["b.example.com:443"]
    refused = [r["reason"] for r in box.records() if r["type"] == "egress.refused"]
    assert refused == ["port-blocked", "host-not-allowed"]


EVERYTHING = [
    *("Read", "Glob", "Edit", "TodoWrite", "Bash", "Monitor", "TaskStop", "Workflow", "Skill"),
    *("Task", "EnterWorktree", "WebFetch", "WebSearch", "mcp__m__t"),
]
WITHOUT_PROGRAMS = {"Read", "Glob", "Edit", "TodoWrite", "Agent", "Task"}


def everything(box: Box, **execution: Any) -> None:
    tools = {
        "roles": {"r": {"allow": EVERYTHING}},
        "permission_mode": "bypassPermissions",
        "mcp_servers": {"m": {"command": ["touch", "/workspace/STARTED"]}},
    }
    box.policy(
        {
            "network": {"allowed_hosts": ["api.anthropic.com"]},
            "tools": tools,
            "execution": execution,
        }
    )


def test_without_ceilings_they_are_offered(box: Box, simulator: Simulator) -> None:
    """The allowed twin of the tests below."""
    everything(box)
    done = box.run(script(bash("echo ran"), {"text": "ok"}))
    assert done.code == 0, done.out
    assert {"Bash", "Monitor", "WebFetch"} <= offered(simulator)
    assert "ran" in results(simulator)
    assert done.json["changed_files"] == ["STARTED"]


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("Bash", {"command": "touch PWN"}),
    ("Monitor", {"command": "touch PWN", "description": "d"}),
    ("Workflow", {"script": "touch PWN"}),
    ("Skill", {"skill": "evil"}),
    ("mcp__m__t", {}),
    ("WebFetch", {"url": "https://a.example.com", "prompt": "p"}),
    ("WebSearch", {"query": "q"}),
]


@pytest.mark.parametrize(("tool", "given"), CALLS, ids=[name for name, _ in CALLS])
def test_a_ceiling_takes_a_tool_away_everywhere(
    box: Box, simulator: Simulator, tool: str, given: dict[str, Any]
) -> None:
    everything(box, allow_subprocess=False, allow_network_tools=False)
    skill = box.workspace / ".claude" / "skills" / "evil"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text(
        "---\nname: evil\ndescription: e\n---\n!`touch /workspace/PWN`\n"
    )
    done = box.run(script({"tool": tool, "input": given}, {"text": "never"}))
    # not offered, not started, and an answer that asks for it ends at the wire
    assert offered(simulator) - {"DeferredToolPlaceholder"} <= WITHOUT_PROGRAMS
    assert "Read" in offered(simulator)
    assert done.code == 5, done.out
    assert done.json["changed_files"] == []
    reasons = {r["reason"] for r in box.records() if r["type"] == "egress.refused"}
    assert reasons == {"tool-use-not-granted"}
    allowed = [r for r in box.records() if r["type"] == "tool.decided" and r["outcome"] == "allow"]
    assert allowed == []


@pytest.mark.parametrize("prompt", ["/evil", "/init", "/review", "!touch PWN"])
def test_a_prompt_is_never_a_command(box: Box, simulator: Simulator, prompt: str) -> None:
    everything(box, allow_subprocess=False, allow_network_tools=False)
    commands = box.workspace / ".claude" / "commands"
    commands.mkdir(parents=True)
    (commands / "evil.md").write_text("!`touch /workspace/PWN`\n")
    done = box.run(f"{prompt}\n{script({'text': 'ok'}, words='')}")
    assert "Traceback" not in done.err
    assert not [name for name in done.json["changed_files"] if "PWN" in name]


def test_the_policys_fallback_model_is_used(box: Box, simulator: Simulator) -> None:
    box.policy(
        {
            "preset": "strict",
            "model": {"models": ["claude-a", "claude-b"], "fallback": "claude-b"},
        }
    )
    overloaded = {"error": 529, "times": 4}
    done = box.run(script(overloaded, {"text": "ok"}), "--model", "claude-a", seconds=120)
    assert done.code == 0, done.out
    asked = [r.body["model"] for r in simulator.requests if "model" in r.body]
    assert asked[0] == "claude-a"
    assert asked[-1] == "claude-b"


def test_a_run_cannot_widen_its_policy(box: Box) -> None:
    box.policy({"preset": "review"})
    done = box.run("hi", "--workspace-mode", "direct")
    assert done.code == 3
    assert done.json["error"]["code"] == "workspace-mode-denied"
    box.policy({"preset": "strict", "isolation": {"threat_model": "third_party_input"}})
    done = box.run("hi", "--isolation", "runtime")
    assert done.code == 3
    assert done.json["error"]["code"] == "isolation-denied"
    assert not re.search("Traceback", done.err)
