"""The platform with the official client: a real `ringfence up`, the real claude, a simulator."""

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
from platform_rig import Hook, Watch, kinds, message, policy, session_of, started, up, words
from typer.testing import CliRunner

from ringfence.cli.main import app
from ringfence.simulator.server import Simulator


def _the_key_is_printed_once(box: Box, key: str) -> None:
    """By the first `up` alone; the next one knows it, and what was said."""
    arguments = ("up", "--policy", policy(box), "--port", "0", "--json")
    with started(box, *arguments) as process:
        assert process.stdout is not None
        again = json.loads(process.stdout.readline())
        assert again["key"] is None
        with Anthropic(base_url=again["url"], api_key=key, timeout=60) as known:
            assert [one.name for one in known.beta.agents.list()] == ["coder"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    files = [
        path for path in box.state.rglob("*") if path.is_file() and path.stat().st_size < 1 << 24
    ]
    assert not any(key.encode() in path.read_bytes() for path in files)
    assert os.stat(box.state).st_mode & 0o777 == 0o700


def typed(*arguments: str, **env: str) -> Any:
    """A command in this process: another interpreter for each costs more than all that they do."""
    return CliRunner().invoke(app, list(arguments), env=env)


def test_the_commands_of_the_quickstart(box: Box) -> None:
    agent, place = box.place / "agent.yaml", box.place / "place.yaml"
    agent.write_text(
        "name: coder\nmodel: claude-sonnet-4-5\ntools:\n  - type: agent_toolset_20260401\n"
    )
    place.write_text("name: place\nconfig: { type: cloud }\n")
    with up(box, "--slots", "1") as (process, client):
        there = {"RINGFENCE_URL": str(client.base_url), "RINGFENCE_API_KEY": str(client.api_key)}

        def call(*arguments: str, code: int = 0, **env: str) -> str:
            done = typed(*arguments, **there | env)
            assert done.exit_code == code, done.output
            return done.stdout

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
        # one of them as a program
        submitted = box.call("submit", prompt, *who, "--follow", **there)
        assert submitted.code == 0, submitted.err
        out = submitted.out
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
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    _the_key_is_printed_once(box, str(client.api_key))


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
    """A yes, a no with words, no answer, and a second call of one turn; one `up`, whose operator's
    server is told.
    """
    with Hook() as hook, up(box, "--slots", "1", RINGFENCE_WEBHOOKS=hook.settings()) as (_, client):
        place = client.beta.environments.create(name="place", config={"type": "cloud"})
        agent = client.beta.agents.create(name="asks", model="claude-sonnet-4-5", tools=[ASKING])

        hasty = client.beta.environments.create(
            name="hasty",
            config={"type": "cloud"},
            extra_body={"ringfence": {"approval_seconds": 1}},
        )

        def begin(*steps: dict[str, Any], where: Any = place) -> tuple[str, Watch, list[Any]]:
            session = client.beta.sessions.create(agent=agent.id, environment_id=where.id).id
            watch = Watch(client, session)
            message(client, session, script(*steps))
            return session, watch, watch.until("session.status_idle")

        def answer(session: str, watch: Watch, *sent: dict[str, Any]) -> list[Any]:
            client.beta.sessions.events.send(session, events=list(sent))
            return watch.until("session.status_idle")

        # allowed: it runs once, and a message beside the answer is said after it
        session, watch, first = begin(bash("echo ran >> log; cat log"), {"text": "Ran."})
        use = stopped_at(first, "agent.tool_use")
        told = hook.next()
        assert (told.data.type, told.data.id) == ("session.requires_action", session)
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
        assert hook.next().data.type == "session.status_idled"
        with pytest.raises(APIStatusError):
            client.beta.sessions.events.send(session, events=[yes])
        watch.close()

        # denied, with words
        session, watch, first = begin(bash("echo ran > never"), {"text": "So be it."})
        use = stopped_at(first, "agent.tool_use")
        there = {"RINGFENCE_URL": str(client.base_url), "RINGFENCE_API_KEY": str(client.api_key)}
        listed = typed("approvals", "list", **there)
        assert f"{session}  {use.id}  bash" in listed.stdout, listed.output
        assert '{"command": "echo ran > never"}' in listed.stdout
        assert listed.stdout.count("sevt_") == 1, "what was answered, or is over, does not wait"
        no = {"type": "user.tool_confirmation", "result": "deny", "deny_message": "no"}
        why = ("-m", "not on a Friday")
        assert box.call("approvals", "deny", session, use.id, *why, **there).code == 0
        second = watch.until("session.status_idle")
        assert typed("approvals", "allow", session, use.id, **there).exit_code == 2
        assert typed("approvals", "list", **there).stdout == ""
        assert "not on a Friday" in json.dumps(simulator.requests[-1].body["messages"])
        assert words(second) == ["So be it."]
        (result,) = (event for event in second if event.type == "agent.tool_result")
        assert (result.tool_use_id, result.is_error) == (use.id, True)
        watch.close()
        assert {path.name for path in box.state.glob("workspaces/*/*")} == {"log", "outputs"}

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
        here = {path.name for path in box.state.glob("workspaces/*/*")}
        assert here == {"log", "one", "outputs"}

        # nobody answers in the environment's time, shorter than the operator's: it is a no
        session, watch, first = begin(bash("echo > late"), {"text": "Too late."}, where=hasty)
        use = stopped_at(first, "agent.tool_use")
        time.sleep(1.1)
        message(client, session, "Well?")
        second = watch.until("session.status_idle")
        (result,) = (event for event in second if event.type == "agent.tool_result")
        assert (result.tool_use_id, result.is_error) == (use.id, True)
        assert words(second)[0] == "Too late."
        watch.close()
        here = {path.name for path in box.state.glob("workspaces/*/*")}
        assert here == {"log", "one", "outputs"}


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
