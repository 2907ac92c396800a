"""What this version of `claude` really sends, beside what egress admits (requirement O).

A newer CLI that adds a header, a beta, a body key or a block type fails here by name, before a
user meets a refusal; and the private builder of the SDK that we borrow is held to its shape.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient
from harness import bash, script

from ringfence.agent.command_line import argv, environment
from ringfence.egress.model import body as body_rule
from ringfence.egress.model import headers as header_rule
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import from_mapping
from ringfence.sandbox.protocol import INSIDE_CLAUDE
from ringfence.simulator.server import Recorded, Simulator
from ringfence.worker.launch import bundled_claude

# set by egress itself, or by the connection
OWN = {"host", "connection", "content-length", "accept-encoding", "x-api-key", "authorization"}
TOOLS = ["Bash", "Read", "Write", "Edit", "Glob", "Grep", "Agent"]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Recorded]]:
    """Every model request of a session with tools, thinking, a subagent and two turns."""
    place = tmp_path_factory.mktemp("wire")
    prompt = script(
        {"thinking": "hm", "tool": "Write", "input": {"file_path": "a.txt", "content": "x\n"}},
        {"tools": [bash("cat a.txt"), {"tool": "Read", "input": {"file_path": "a.txt"}}]},
        {
            "tool": "Agent",
            "input": {
                "description": "look",
                "subagent_type": "general-purpose",
                "prompt": script(bash("ls"), {"text": "sub"}),
            },
        },
        {"text": "done"},
    )
    with Simulator() as simulator:
        asyncio.run(_session(simulator.base_url, place, [prompt, script({"text": "again"})]))
        yield [r for r in simulator.requests if r.path.startswith("/v1/messages")]


async def _session(base_url: str, place: Path, prompts: list[str]) -> None:
    inside = environment(compile_policy(from_mapping({"preset": "strict"})).tools)
    kept = {
        name: value
        for name, value in inside.items()
        if name not in {"ANTHROPIC_UNIX_SOCKET", "CLAUDE_CODE_TMPDIR"}
        and "roxy" not in name.lower()
    }
    options = ClaudeAgentOptions(
        tools=TOOLS,
        allowed_tools=TOOLS,
        cwd=place,
        cli_path=bundled_claude(),
        setting_sources=[],
        permission_mode="dontAsk",
        env={**kept, "ANTHROPIC_BASE_URL": base_url, "CLAUDE_CONFIG_DIR": str(place / "config")},
    )
    async with ClaudeSDKClient(options) as client:
        for prompt in prompts:
            await client.query(prompt)
            async for _ in client.receive_response():
                pass


def _new(seen: set[str], known: frozenset[str] | set[str]) -> str:
    added = sorted(seen - known)
    return f"claude {header_rule.CLI_VERSION} is pinned; new on the wire: {added}" if added else ""


def _blocks(value: Any) -> set[str]:
    found: set[str] = set()
    for item in value if isinstance(value, list) else []:
        found.add(item["type"])
        if item["type"] == "tool_result":
            found |= _blocks(item.get("content"))
    return found


def test_the_session_was_a_real_one(sent: list[Recorded]) -> None:
    kinds = set().union(*(_blocks(m["content"]) for r in sent for m in r.body["messages"]))
    assert {"text", "tool_use", "tool_result"} <= kinds
    agents = {r.headers.get("x-claude-code-agent-id") for r in sent}
    assert len(agents) == 2, "the main agent, which has no id, and the subagent"


def test_every_header_is_known(sent: list[Recorded]) -> None:
    known = {name.decode() for name in header_rule.REQUEST} | OWN
    assert not _new(set().union(*(r.headers for r in sent)), known)


def test_every_beta_is_known(sent: list[Recorded]) -> None:
    flags = {f.strip() for r in sent for f in r.headers.get("anthropic-beta", "").split(",") if f}
    assert flags, "it sends some"
    assert not _new(flags, header_rule.BETAS)


def test_every_body_key_and_block_is_known(sent: list[Recorded]) -> None:
    assert not _new(set().union(*(r.body for r in sent)), body_rule.TOP_LEVEL)
    blocks = set().union(
        *(_blocks(m["content"]) for r in sent for m in r.body["messages"]),
        *(_blocks(r.body.get("system")) for r in sent),
    )
    assert not _new(blocks, body_rule.BLOCKS)


def test_what_is_new_is_named() -> None:
    assert "x-evil" in _new({"x-evil", "accept"}, {"accept"})


def test_the_pinned_version_is_the_installed_one() -> None:
    done = subprocess.run(
        [bundled_claude(), "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split()[0] == header_rule.CLI_VERSION


def test_the_borrowed_builder_has_its_shape() -> None:
    """`SubprocessCLITransport._build_command` is private: a new SDK may change it."""
    options = ClaudeAgentOptions(
        tools=["Read"],
        disallowed_tools=["Bash"],
        setting_sources=[],
        permission_mode="plan",
        strict_mcp_config=True,
        model="claude-sonnet-5",
        max_turns=3,
        session_id="11111111-2222-4333-8444-555555555555",
    )
    line = argv(options)
    assert line[0] == INSIDE_CLAUDE
    pairs = dict(itertools.pairwise(line))
    assert pairs["--output-format"] == "stream-json"
    assert pairs["--input-format"] == "stream-json"
    assert pairs["--tools"] == "Read"
    assert pairs["--disallowedTools"] == "Bash"
    assert pairs["--permission-mode"] == "plan"
    assert pairs["--model"] == "claude-sonnet-5"
    assert pairs["--max-turns"] == "3"
    assert f"--session-id={options.session_id}" in line
    assert "--strict-mcp-config" in line
    assert "--setting-sources=" in line
    assert json.dumps(line), f"every argument is text in SDK {version('claude-agent-sdk')}"
