"""`hosting: multi_agent` with the official client: real workers, the real claude, a simulator."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic, BadRequestError
from harness import Box, bash, processes_with, script, wait_for
from platform_rig import TOOLS, Watch, kinds, message, up, words

from backends import needs
from ringfence.simulator.server import Simulator

RULES = {
    "filesystem": {"workspace": "direct", "workspace_modes": ["direct"]},
    "hosting": {"pattern": "multi-agent"},
    "isolation": {"backend": "container"},
    "execution": {"max_memory_mb": 3072},
    "accept_unenforced": ["workspace_disk"],
}
pytestmark = [pytest.mark.root, needs("container")]

MEET = (
    "echo canary-$$ > /tmp/mark; echo canary > ~/mark; touch up; "
    "for i in $(seq 600); do [ -e go ] && break; sleep 0.1; done; "
    "id -u; cat /tmp/mark | cut -c1-6; ls /tmp ~ | grep -c mark; "
    "cat /proc/[0-9]*/cmdline | grep -ao 'shell-of-[a-z0-9_][a-z0-9_]*' | sort -u | wc -l; "
    "echo shell-of-NAME > /dev/null; ls"
)
"""Leaves marks, waits until it is told to go on, and says what it then sees."""


def environment(client: Anthropic, **block: Any) -> str:
    body = {"name": "place", "config": {"type": "cloud"}}
    body["ringfence"] = {"hosting": "multi_agent", **block}
    made: Any = client.post("/v1/environments", body=body, cast_to=object)
    return str(made["id"])


def session_in(client: Anthropic, place: str) -> str:
    agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS)
    return client.beta.sessions.create(agent=agent.id, environment_id=place).id


@contextmanager
def watched(client: Anthropic, place: str, number: int) -> Iterator[list[tuple[str, Watch]]]:
    with ExitStack() as stack:
        found = []
        for _ in range(number):
            session = session_in(client, place)
            watch = Watch(client, session)
            stack.callback(watch.close)
            found.append((session, watch))
        yield found


def said(events: list[Any]) -> list[str]:
    (result,) = (event for event in events if event.type == "agent.tool_result")
    return str(result.content[0].text).split()


def meeting(
    box: Box, client: Anthropic, found: list[tuple[str, Watch]], *, look: str = MEET
) -> list[list[Any]]:
    """A turn of each, all at work at one moment; the events of each."""
    places = [box.state / "workspaces" / session for session, _ in found]
    for session, _ in found:
        line = bash(look.replace("NAME", session))
        message(client, session, script(line, {"text": "Done."}))
    assert wait_for(lambda: all((place / "up").exists() for place in places), 300)
    for place in places:
        (place / "go").touch()
    return [watch.until("session.status_idle", seconds=300) for _, watch in found]


def started(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of the sandboxes that are shared, and of their seats."""
    found = [one for one in records if one["type"] == "sandbox.started"]
    return [one for one in found if one["seats"]], [one for one in found if one["within"]]


def gone(box: Box, worker: int, *others: str) -> bool:
    """Whether no group of a worker's sandboxes is left, and nobody's way out but these."""
    groups = list(Path("/sys/fs/cgroup").glob(f"*/ringfence-{worker}-*-sb_*"))
    ways = {each.name for each in (box.state / "egress").glob("sb_*")}
    return not groups and ways <= set(others)


def test_two_sessions_at_once_in_one_sandbox(box: Box, simulator: Simulator) -> None:
    with up(box, "--slots", "2", **RULES) as (process, client):
        with pytest.raises(BadRequestError, match="gvisor") as refused:
            environment(client, isolation="gvisor")
        assert "hosting multi_agent" in str(refused.value)
        place = environment(client, idle_seconds=1)
        with watched(client, place, 2) as found:
            ends = meeting(box, client, found)
        uids = []
        for events in ends:
            assert "session.error" not in kinds(events)
            assert words(events) == ["Done."]
            uid, mark, count, shells, *names = said(events)
            uids.append(int(uid))
            # its own shell is the only one that it sees
            assert (mark, count, shells) == ("canary", "2", "1")
            assert {"go", "up"} <= set(names)
        assert sorted(uids) == [1000, 1001]
        # the idle time, and then it is gone with its groups and directories
        assert wait_for(lambda: gone(box, process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        records = box.records()
        (shared,), seats = started(records)
        name = shared["sandbox_id"]
        assert (shared["seats"], shared["run_id"], shared["isolation"]) == (4, "", "container")
        assert [one["within"] for one in seats] == [name, name]
        assert len({one["session_id"] for one in seats}) == 2
        assert len({one["sandbox_id"] for one in seats} | {name}) == 3
        stops = {one["sandbox_id"]: one for one in records if one["type"] == "sandbox.stopped"}
        assert len(stops) == 3
        assert stops[name]["reason"] == "idle"
    assert not processes_with(str(box.state))


@pytest.mark.storm
@pytest.mark.timeout(1500)
def test_who_sits_where(box: Box, simulator: Simulator) -> None:
    """Three sessions and two seats; another environment; another tenant; the next turn."""
    with up(box, "--slots", "4", **RULES) as (process, client):
        place = environment(client, max_agents=2, idle_seconds=300)
        with watched(client, place, 3) as found:
            ends = meeting(box, client, found)
            assert sorted(said(events)[0] for events in ends) == ["1000", "1000", "1001"]
            houses, seats = started(box.records())
            assert len(houses) == 2
            assert {one["within"] for one in seats} == {one["sandbox_id"] for one in houses}
            # a turn finds its files and nothing else of the one before, in a sandbox that waits
            session, watch = found[0]
            look = "ls /tmp ~ | grep -c mark; ls"
            message(client, session, script(bash(look), {"text": "Again."}))
            again = watch.until("session.status_idle", seconds=300)
            assert {"0", "go", "up"} <= set(said(again))
            assert len(started(box.records())[0]) == 2
        other = environment(client, max_agents=2, idle_seconds=300)
        made = box.call("keys", "create", "--tenant", "another", "--json")
        key = json.loads(made.out)["key"]
        with Anthropic(base_url=client.base_url, api_key=key, timeout=120) as second:
            theirs = environment(second, max_agents=2, idle_seconds=300)
            with watched(client, other, 1) as mine, watched(second, theirs, 1) as foreign:
                for (session, watch), caller in ((mine[0], client), (foreign[0], second)):
                    message(caller, session, script(bash("id -u"), {"text": "Alone."}))
                    assert said(watch.until("session.status_idle", seconds=300)) == ["1000"]
        houses, seats = started(box.records())
        assert len(houses) == 4
        assert len({one["within"] for one in seats[-2:]}) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert gone(box, process.pid)
    assert box.call("audit", "verify").code == 0


@pytest.mark.storm
@pytest.mark.timeout(1500)
def test_a_killed_worker_leaves_nobody(box: Box, simulator: Simulator) -> None:
    """Both sessions go on in another sandbox; what the dead worker left is swept."""
    with up(box, "--slots", "2", **RULES) as (process, client):
        place = environment(client)
        with watched(client, place, 2) as found:
            for session, _ in found:
                message(client, session, script(bash("touch up; sleep 300"), {"text": "never"}))
            marks = [box.state / "workspaces" / session / "up" for session, _ in found]
            assert wait_for(lambda: all(mark.exists() for mark in marks), 300)
            before = [each["sandbox_id"] for kind in started(box.records()) for each in kind]
            assert before
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        assert wait_for(lambda: not processes_with(str(box.state)))
    with up(box, "--slots", "2", **RULES):
        # the sessions go on meanwhile, in a sandbox of the new worker
        def after() -> list[str]:
            every = [each["sandbox_id"] for kind in started(box.records()) for each in kind]
            return [name for name in every if name not in before]

        # a directory that is young at the first look may be somebody's: the next is a minute later
        assert wait_for(lambda: gone(box, process.pid, *after()), 150)
