"""The seed's own examples of running an agent, in the product's words, and what they promise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import Box, bash, script

READ = {"tool": "Read", "input": {"file_path": "/workspace/a.txt"}}
GREP = {"tool": "Grep", "input": {"pattern": "TODO", "path": "/workspace"}}
GLOB = {"tool": "Glob", "input": {"pattern": "*.txt"}}
WRITE = {"tool": "Write", "input": {"file_path": "/workspace/new.txt", "content": "x\n"}}
EDIT = {
    "tool": "Edit",
    "input": {"file_path": "/workspace/a.txt", "old_string": "TODO", "new_string": "done"},
}
EVERY = (READ, GREP, GLOB, EDIT, WRITE, bash("python3 -c 'print(1)'"))
NAMES = ("Read", "Grep", "Glob", "Edit", "Write", "Bash")
LOOK = {"Read", "Grep", "Glob"}

# mode, tools that the role allows, those that ask nobody, denied ones, and what may run
EXAMPLES = {
    "interactive_agent": ("default", NAMES, sorted(LOOK), (), LOOK),
    "developer_agent": ("acceptEdits", NAMES, sorted(LOOK), (), {*LOOK, "Edit", "Write"}),
    "planning_agent": ("plan", NAMES, sorted(LOOK), (), LOOK),
    "ci_agent": ("bypassPermissions", NAMES, (), ("Write", "Edit"), {*LOOK, "Bash"}),
    "strict_agent": ("dontAsk", NAMES, sorted(LOOK), (), LOOK),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_section_6_0(box: Box, name: str) -> None:
    mode, allow, preapproved, deny, expected = EXAMPLES[name]
    (box.workspace / "a.txt").write_text("TODO\n")
    role = {"allow": list(allow), "preapproved": list(preapproved), "deny": []}
    # what is denied by name is not offered, and asking for it on the wire ends the answer; a deny
    # with a place is the one that a call can run into
    role["deny"] = [f"{tool}(//workspace/**)" for tool in deny]
    box.policy(
        {
            "preset": "strict",
            "tools": {
                "role": "r",
                "roles": {"r": role},
                "permission_mode": mode,
                "permission_modes": [mode],
            },
        }
    )
    done = box.run(script(*EVERY, {"text": "ok"}))
    assert done.code == 0, done.out + done.err
    decided = {r["name"]: r["outcome"] for r in box.records() if r["type"] == "tool.decided"}
    # a path that is denied by name is refused by claude itself before any hook hears of the call
    assert set(NAMES) - set(decided) <= set(deny)
    assert {tool for tool, outcome in decided.items() if outcome == "allow"} == expected
    changed = {"Edit": "a.txt", "Write": "new.txt"}
    assert set(done.json["changed_files"]) == {f for t, f in changed.items() if t in expected}


def test_section_5_1_ephemeral_review(box: Box, simulator: Any) -> None:
    """A review of one directory: twenty turns, three tools, mode plan, nothing left behind."""
    (box.workspace / "a.txt").write_text("TODO\n")
    box.policy(
        {
            "preset": "review",
            "tools": {"role": "r", "roles": {"r": {"allow": sorted(LOOK)}}},
            "model": {"max_turns": 20},
        }
    )
    steps = [READ, GREP, GLOB, *[READ] * 30]
    endless = box.run(script(*steps, {"text": "never"}), "--permission-mode", "plan")
    assert endless.code == 5
    assert "max_turns" in endless.json["error"]["message"]
    assert len(simulator.requests) == 20
    words = "Review this pull request for security issues."
    done = box.run(script(READ, GREP, {"text": "none"}, words=words), "--permission-mode", "plan")
    assert (done.code, done.json["text"], done.json["patch"]) == (0, "none", "")
    assert {t["name"] for t in simulator.requests[-1].body["tools"]} <= {
        *LOOK,
        "DeferredToolPlaceholder",
    }
    assert [path.name for path in box.workspace.iterdir()] == ["a.txt"]


def _agent(*steps: dict[str, Any]) -> dict[str, Any]:
    # JSON keeps a script within a script on one line, and its fences with it
    inner = f"Do it.\n```ringfence-script\n{json.dumps(list(steps))}\n```\n"
    what = {"description": "d", "prompt": inner, "subagent_type": "general-purpose"}
    return {"tool": "Agent", "input": what}


def _with_agents(box: Box, **caps: int) -> None:
    role = {"allow": ["Read", "Bash", "Task"], "preapproved": ["Task", "Bash"]}
    box.policy({"preset": "strict", "tools": {"role": "r", "roles": {"r": role}, **caps}})


def _nested(*steps: dict[str, Any]) -> str:
    return f"Do it.\n```ringfence-script\n{json.dumps(list(steps))}\n```\n"


def test_a_run_waits_for_its_subagents(box: Box) -> None:
    """Their calls are decided and recorded as any other, and their work is in the patch."""
    _with_agents(box)
    done = box.run(
        _nested(_agent(bash("sleep 1; touch of-the-sub"), {"text": "s"}), {"text": "ok"})
    )
    assert done.code == 0, done.out
    assert done.json["changed_files"] == ["of-the-sub"]
    finished = [(r["name"], r["outcome"]) for r in box.records() if r["type"] == "tool.finished"]
    assert finished == [("Bash", "success"), ("Agent", "success")]


def test_subagents_are_capped(box: Box, simulator: Any) -> None:
    two = {"tools": [_agent(bash(f"sleep 1; touch {n}"), {"text": "s"}) for n in "ab"]}
    _with_agents(box, max_subagents=1)
    done = box.run(_nested(two, {"text": "ok"}))
    decided = [(r["name"], r["rule"]) for r in box.records() if r["type"] == "tool.decided"]
    assert ("Agent", "max_subagents") in decided
    assert done.json["changed_files"] == ["a"]
    _with_agents(box, max_subagents=2)  # the allowed twin
    assert sorted(box.run(_nested(two, {"text": "ok"})).json["changed_files"]) == ["a", "b"]


@pytest.mark.parametrize(("depth", "agents"), [(0, 0), (1, 1), (2, 2)])
def test_subagents_go_as_deep_as_the_policy_says(box: Box, depth: int, agents: int) -> None:
    _with_agents(box, max_subagent_depth=depth)
    box.run(_nested(_agent(_agent({"text": "deep"}), {"text": "s"}), {"text": "ok"}))
    decided = [r for r in box.records() if r["type"] == "tool.decided" and r["name"] == "Agent"]
    assert len([r for r in decided if r["outcome"] == "allow"]) == agents


INSIDE = {
    *("AI_AGENT", "ALL_PROXY", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_UNIX_SOCKET"),
    *("CURL_CA_BUNDLE", "DISABLE_AUTOUPDATER", "DISABLE_BUG_COMMAND", "DISABLE_ERROR_REPORTING"),
    *("DISABLE_TELEMETRY", "GIT_EDITOR", "GIT_SSL_CAINFO", "GIT_TERMINAL_PROMPT", "HOME", "LANG"),
    *("HTTPS_PROXY", "HTTP_PROXY", "NODE_EXTRA_CA_CERTS", "NODE_USE_ENV_PROXY", "NO_PROXY", "PATH"),
    *("NoDefaultCurrentDirectoryInExePath", "PIP_CERT", "PWD", "PYTHONDONTWRITEBYTECODE"),
    *("REQUESTS_CA_BUNDLE", "SHELL", "SHLVL", "SSL_CERT_FILE", "TERM", "TMPDIR", "USER", "_"),
    *("COREPACK_ENABLE_AUTO_PIN", "OLDPWD", "all_proxy", "http_proxy", "https_proxy", "no_proxy"),
}


def test_the_environment_inside_is_a_list(box: Box, simulator: Any) -> None:
    """Nothing of the host's, whatever its name; what `claude` itself adds begins with its own."""
    host = {"FOO_TOKEN": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "PS1": "canary"}
    done = box.run(script(bash("env | cut -d= -f1; env | grep -c canary"), {"text": "ok"}), **host)
    assert done.code == 0, done.out
    told = simulator.requests[-1].body["messages"][-1]["content"][0]["content"]
    words = told.split()
    assert "ANTHROPIC_API_KEY" in words, told
    names = {w for w in words if not w.startswith("CLAUDE") and w not in {"0", "Exit", "code", "1"}}
    assert names - INSIDE == set()
    assert "0" in words, "no canary"
    command = box.execute("env", TASK="host's", **host)
    assert "canary" not in command.json["output"]
    own = {line.partition("=")[0] for line in command.json["output"].splitlines()}
    assert own - INSIDE == {"TASK"}
