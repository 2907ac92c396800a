"""The quickstart with the official client: a real `ringfence up`, the real claude, a simulator."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic, APIStatusError
from harness import Box, bash, processes_with, script, wait_for
from platform_rig import Watch, kinds, message, policy, session_of, started, up, words

from ringfence.simulator.server import Simulator


def test_the_quickstart(box: Box, simulator: Simulator) -> None:
    with up(box, "--slots", "2") as (process, client):
        session = session_of(client, system="Be brief.")
        assert session.status == "idle"
        watch = Watch(client, session.id)
        message(
            client,
            session.id,
            script(
                bash("echo 42 > answer.txt; cat answer.txt"), {"text": "Written.", "thinking": "so"}
            ),
        )
        first = watch.until("session.status_idle")
        assert kinds(first)[:2] == ["user.message", "session.status_running"]
        use = next(event for event in first if event.type == "agent.tool_use")
        result = next(event for event in first if event.type == "agent.tool_result")
        assert (use.name, use.evaluated_permission) == ("bash", "allow")
        assert (result.tool_use_id, result.is_error) == (use.id, False)
        assert "42" in result.content[0].text
        assert words(first) == ["Written."]
        assert "agent.thinking" in kinds(first)
        assert first[-1].stop_reason.type == "end_turn"
        ends = [event for event in first if event.type == "span.model_request_end"]
        assert len(ends) == 2
        assert all(end.model_usage.output_tokens > 0 for end in ends)

        # the second turn: a fresh sandbox, the same files, the same conversation
        message(client, session.id, script(bash("cat answer.txt"), {"text": "Still there."}))
        second = watch.until("session.status_idle")
        result = next(event for event in second if event.type == "agent.tool_result")
        assert "42" in result.content[0].text
        asked = json.dumps(simulator.requests[-1].body["messages"])
        assert "Written." in asked
        used = client.beta.sessions.retrieve(session.id).usage
        assert used.output_tokens == sum(
            event.model_usage.output_tokens
            for event in [*first, *second]
            if event.type == "span.model_request_end"
        )

        # an interrupt ends the turn and not the session
        message(client, session.id, script(bash("sleep 300"), {"text": "never"}))
        watch.until("agent.tool_use")
        client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        third = watch.until("session.status_idle", seconds=90)
        assert "never" not in words(third)
        assert "agent.tool_result" in kinds(third)
        listed = list(client.beta.sessions.events.list(session.id, order="asc"))
        assert [event.id for event in listed] == [event.id for event in watch.seen]
        watch.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    assert not processes_with(str(box.state))


def test_the_commands_of_the_quickstart(box: Box) -> None:
    agent, place = box.place / "agent.yaml", box.place / "place.yaml"
    agent.write_text(
        "name: coder\nmodel: claude-sonnet-4-5\ntools:\n  - type: agent_toolset_20260401\n"
    )
    place.write_text("name: place\nconfig: { type: cloud }\n")
    with up(box, "--slots", "1") as (_, client):
        there = {"RINGFENCE_URL": str(client.base_url), "RINGFENCE_API_KEY": str(client.api_key)}

        def call(*arguments: str, code: int = 0, **env: str) -> str:
            done = box.call(*arguments, **there | env)
            assert done.code == code, done.err
            return done.out

        made = json.loads(call("agents", "apply", "-f", str(agent), "--json"))
        assert (made["applied"], made["version"]) == ("created", 1)
        assert "unchanged" in call("agents", "apply", "-f", str(agent))
        agent.write_text(agent.read_text() + "system: Be brief.\n")
        assert "version 2  updated" in call("agents", "apply", "-f", str(agent))
        assert "created" in call("environments", "apply", "-f", str(place))
        agent.write_text(agent.read_text() + "skill: x\n")
        call("agents", "apply", "-f", str(agent), code=2)
        prompt = script(bash("echo hello"), {"text": "Said."})
        who = ("--agent", "coder", "--environment", "place")
        out = call("submit", prompt, *who, "--follow")
        assert "→ bash" in out
        assert "Said." in out
        assert "idle: end_turn" in out
        (session,) = list(client.beta.sessions.list())
        lines = call("sessions", "remote", "events", session.id, "--json").splitlines()
        assert json.loads(lines[-1])["type"] == "session.status_idle"
        assert session.id in call("sessions", "remote", "list")
        call("sessions", "remote", "delete", session.id)
        assert list(client.beta.sessions.list()) == []
        call("submit", "x", *who, code=3, RINGFENCE_API_KEY="rfk_wrong")
        call("submit", "x", "--agent", "nobody", "--environment", "place", code=2)


WEATHER = {
    "type": "custom",
    "name": "get_weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}
ASKING = {
    "type": "agent_toolset_20260401",
    "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}],
}


def stopped_at(events: list[Any], kind: str) -> Any:
    """The call that a turn stopped at: told, and named by the idle that follows."""
    (use,) = (event for event in events if event.type == kind)
    reason = events[-1].stop_reason
    assert (reason.type, reason.event_ids) == ("requires_action", [use.id])
    return use


def test_calls_that_wait_for_the_caller(box: Box, simulator: Simulator) -> None:
    """A yes, a no with words, and the result of a tool that the caller executes; one `up`."""
    with up(box, "--slots", "1") as (_, client):
        place = client.beta.environments.create(name="place", config={"type": "cloud"})
        agent = client.beta.agents.create(
            name="asks", model="claude-sonnet-4-5", tools=[ASKING, WEATHER]
        )

        def begin(*steps: dict[str, Any]) -> tuple[str, Watch, list[Any]]:
            session = client.beta.sessions.create(agent=agent.id, environment_id=place.id).id
            watch = Watch(client, session)
            message(client, session, script(*steps))
            return session, watch, watch.until("session.status_idle")

        def answer(session: str, watch: Watch, *sent: dict[str, Any]) -> list[Any]:
            client.beta.sessions.events.send(session, events=list(sent))
            return watch.until("session.status_idle")

        # allowed: it runs once, and a message beside the answer is said after it
        session, watch, first = begin(bash("echo ran >> log; cat log"), {"text": "Ran."})
        use = stopped_at(first, "agent.tool_use")
        assert (use.name, use.evaluated_permission) == ("bash", "ask")
        assert use.input == {"command": "echo ran >> log; cat log"}
        assert "agent.tool_result" not in kinds(first)
        yes = {"type": "user.tool_confirmation", "tool_use_id": use.id, "result": "allow"}
        more = {
            "type": "user.message",
            "content": [{"type": "text", "text": script({"text": "And more."})}],
        }
        second = answer(session, watch, more, yes)
        (result,) = (event for event in second if event.type == "agent.tool_result")
        assert (result.tool_use_id, result.is_error) == (use.id, False)
        assert result.content[0].text.strip() == "ran"
        assert "agent.tool_use" not in kinds(second)
        assert words(second) == ["Ran.", "And more."]
        assert second[-1].stop_reason.type == "end_turn"
        with pytest.raises(APIStatusError):
            client.beta.sessions.events.send(session, events=[yes])
        watch.close()

        # denied, with words
        session, watch, first = begin(bash("echo ran > never"), {"text": "So be it."})
        use = stopped_at(first, "agent.tool_use")
        there = {"RINGFENCE_URL": str(client.base_url), "RINGFENCE_API_KEY": str(client.api_key)}
        listed = box.call("approvals", "list", **there)
        assert f"{session}  {use.id}  bash" in listed.out, listed.err
        assert '{"command": "echo ran > never"}' in listed.out
        assert listed.out.count("sevt_") == 1, "what was answered, or is over, does not wait"
        no = {"type": "user.tool_confirmation", "result": "deny", "deny_message": "no"}
        why = ("-m", "not on a Friday")
        assert box.call("approvals", "deny", session, use.id, *why, **there).code == 0
        second = watch.until("session.status_idle")
        assert box.call("approvals", "allow", session, use.id, **there).code == 2
        assert box.call("approvals", "list", **there).out == ""
        assert "not on a Friday" in json.dumps(simulator.requests[-1].body["messages"])
        assert words(second) == ["So be it."]
        (result,) = (event for event in second if event.type == "agent.tool_result")
        assert (result.tool_use_id, result.is_error) == (use.id, True)
        watch.close()
        assert [path.name for path in box.state.glob("workspaces/*/*")] == ["log"]

        # a second call in the turn that goes on with the first: each has its own word
        session, watch, first = begin(bash("echo 1 > one"), bash("echo 2 > two"), {"text": "Ok."})
        use = stopped_at(first, "agent.tool_use")
        second = answer(session, watch, {**yes, "tool_use_id": use.id})
        other = stopped_at(second, "agent.tool_use")
        assert other.id != use.id
        third = answer(session, watch, {**no, "tool_use_id": other.id})
        (result,) = (event for event in third if event.type == "agent.tool_result")
        assert (result.tool_use_id, result.is_error) == (other.id, True)
        assert words(third) == ["Ok."]
        watch.close()
        assert {path.name for path in box.state.glob("workspaces/*/*")} == {"log", "one"}

        # a tool of the caller's own
        call = {"tool": "mcp__caller__get_weather", "input": {"place": "Oslo"}}
        session, watch, first = begin(call, {"text": "Nice."})
        use = stopped_at(first, "agent.custom_tool_use")
        assert (use.name, use.input) == ("get_weather", {"place": "Oslo"})
        sunny = {
            "type": "user.custom_tool_result",
            "custom_tool_use_id": use.id,
            "content": [{"type": "text", "text": "SUNNY-41"}],
        }
        second = answer(session, watch, sunny)
        assert "SUNNY-41" in json.dumps(simulator.requests[-1].body["messages"])
        assert words(second) == ["Nice."]
        assert [kind for kind in kinds(second) if "tool" in kind] == ["user.custom_tool_result"]
        watch.close()


@pytest.mark.storm
def test_a_worker_that_is_killed_in_a_turn(box: Box, simulator: Simulator) -> None:
    """The turn ends once; the call that was answered is not made again, the other is told of."""
    rules = policy(box)
    made = json.loads(box.call("keys", "create", "--tenant", "acme", "--json").out)
    with started(box, "serve", "--policy", rules, "--port", "0") as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with Anthropic(base_url=url, api_key=made["key"], timeout=120) as client:
            session = session_of(client)
            watch = Watch(client, session.id)
            message(
                client,
                session.id,
                script(bash("echo first"), bash("sleep 20; echo second"), {"text": "never"}),
            )
            with started(box, "worker", "--policy", rules, "--slots", "1") as first:
                watch.until("agent.tool_result")
                watch.until("agent.tool_use")
                first.send_signal(signal.SIGKILL)
                first.wait(30)
            with started(box, "worker", "--policy", rules, "--slots", "1") as second:
                rest = watch.until("session.status_idle", seconds=240)
                # once: the dead attempt's lease on the transcript is no reason to wait
                assert kinds(rest).count("session.status_rescheduled") == 1
                seen = watch.seen
                uses = [event for event in seen if event.type == "agent.tool_use"]
                results = [event for event in seen if event.type == "agent.tool_result"]
                assert [use.id for use in uses] == [result.tool_use_id for result in results]
                assert [result.is_error for result in results] == [False, True]
                assert "not known" in results[1].content[0].text
                assert kinds(seen).count("session.status_idle") == 1
                assert len(uses) == 2
                time.sleep(2)
                assert client.beta.sessions.retrieve(session.id).status == "idle"
                watch.close()
                second.send_signal(signal.SIGTERM)
                assert second.wait(90) == 0
    assert wait_for(lambda: not processes_with(str(box.state)))


def test_the_first_key_is_printed_once(box: Box) -> None:
    with up(box) as (process, client):
        assert client.api_key
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    arguments = ("up", "--policy", policy(box), "--port", "0", "--json")
    with started(box, *arguments) as process:
        assert process.stdout is not None
        again = json.loads(process.stdout.readline())
        assert again["key"] is None
        with Anthropic(base_url=again["url"], api_key=client.api_key, timeout=60) as known:
            assert list(known.beta.sessions.list()) == []
    files = [
        path for path in box.state.rglob("*") if path.is_file() and path.stat().st_size < 1 << 24
    ]
    assert not any(str(client.api_key).encode() in path.read_bytes() for path in files)
    assert os.stat(box.state).st_mode & 0o777 == 0o700
