"""A tool that keeps failing is kept from an agent for a while: the platform, the real claude, and a
real MCP server whose tool fails and comes back.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from harness import Box, script
from platform_rig import Watch, message, up, words
from test_mcp_http import HOST, SECRET, serving

FIND = "mcp__notes__find"
CALL = {"tool": FIND, "input": {"name": "Ada"}}
OPEN_SECONDS = 20.0
URL = f"https://{HOST}/mcp"


def granted(box: Box) -> dict[str, Any]:
    sealed = box.call("vault", "set", "mcp", "--host", HOST, stdin=f"{SECRET}\n")
    assert sealed.code == 0, sealed.err
    paths = ["GET /mcp", "POST /mcp", "DELETE /mcp"]
    there = {"host": HOST, "paths": paths, "credential": "mcp"}
    return {
        "network": {"allowed_hosts": ["api.anthropic.com", there]},
        "secrets": {"mcp": {"hosts": [HOST]}},
        "execution": {"allow_network_tools": True},
        "tools": {
            "role": "r",
            "roles": {"r": {"allow": ["Read", FIND], "preapproved": [FIND]}},
            "mcp_servers": {"notes": {"url": URL}},
        },
    }


@pytest.mark.storm
def test_calls_are_kept_from_a_tool_until_it_is_well(box: Box, tmp_path: Path) -> None:
    with serving(tmp_path, "find") as (settings, seen):
        _kept_until_it_is_well(box, settings, seen)


def _kept_until_it_is_well(box: Box, settings: dict[str, str], seen: Path) -> None:
    down = Path(f"{seen}.down")
    down.touch()
    settings["RINGFENCE_BREAKERS"] = json.dumps(
        {"tools": ["mcp__notes"], "failures": 2, "open_seconds": OPEN_SECONDS, "wins": 1}
    )
    with up(box, **settings, **granted(box)) as (_, client):
        agent = client.beta.agents.create(
            name="finder",
            model="claude-sonnet-4-5",
            mcp_servers=[{"type": "url", "name": "notes", "url": URL}],
            tools=[
                {
                    "type": "mcp_toolset",
                    "mcp_server_name": "notes",
                    "default_config": {"permission_policy": {"type": "always_allow"}},
                }
            ],
        )
        limited: Any = {"type": "limited", "allowed_hosts": [HOST]}
        place = client.beta.environments.create(
            name="place", config={"type": "cloud", "networking": limited}
        )
        session = client.beta.sessions.create(agent=agent.id, environment_id=place.id)
        watch = Watch(client, session.id)
        message(client, session.id, script(CALL, CALL, CALL, {"text": "without it, then"}))
        first = watch.until("session.status_idle")
        opened = time.monotonic()
        told = [each.to_json() for each in first]
        assert words(first) == ["without it, then"], told
        assert sum("the directory is away" in each for each in told) == 2
        assert sum(f"{FIND} keeps failing: calls of it are held back for" in e for e in told) == 1
        down.unlink()
        time.sleep(max(0.0, opened + OPEN_SECONDS - time.monotonic()))
        message(client, session.id, script(CALL, CALL, {"text": "found"}))
        second = watch.until("session.status_idle")
        assert words(second) == ["found"]
        assert sum("Ada is found" in each.to_json() for each in second) == 2
        watch.close()
    records = box.records()
    decided = [r["outcome"] for r in records if r["type"] == "tool.decided"]
    assert decided == ["allow", "allow", "deny", "allow", "allow"]
    kept = [r for r in records if r["type"] == "tool.decided" and r["outcome"] == "deny"]
    assert [r["rule"] for r in kept] == ["tool-breaker"]
    changes = [(r["breaker"], r["state"]) for r in records if r["type"] == "breaker.changed"]
    (name,) = {name for name, _ in changes}
    assert name.startswith(f"session/tool/{agent.id}/1/{FIND}@")
    assert changes == [(name, "open"), (name, "half-open"), (name, "closed")]
    assert "witness.violated" not in {r["type"] for r in records}
