"""The hosting patterns, with the official client: real workers, the real claude, a simulator."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import Box, bash, processes_with, script, wait_for
from platform_rig import TOOLS, Watch, ended, kinds, message, policy, up, words

from gateway_rig import postgres_place
from ringfence.simulator.server import Simulator

DIRECT = {
    "filesystem": {"workspace": "direct", "workspace_modes": ["direct"]},
    "hosting": {"pattern": "long-running"},
    "accept_unenforced": ["workspace_disk"],
}
"""Changes are the directory's at once, and every pattern but several agents may be asked for."""


ASKING: Any = {
    "type": "agent_toolset_20260401",
    "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}],
}


def session_in(client: Anthropic, *, tools: Any = TOOLS, **block: Any) -> str:
    agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=tools)
    body = {"name": "place", "config": {"type": "cloud"}, "ringfence": block}
    made: Any = client.post("/v1/environments", body=body, cast_to=object)
    return client.beta.sessions.create(agent=agent.id, environment_id=made["id"]).id


@contextmanager
def watched(client: Anthropic, **block: Any) -> Iterator[tuple[str, Watch]]:
    session = session_in(client, **block)
    watch = Watch(client, session)
    try:
        yield session, watch
    finally:
        watch.close()


def turn(client: Anthropic, session: str, watch: Watch, *steps: dict[str, Any]) -> list[Any]:
    message(client, session, script(*steps))
    return watch.until("session.status_idle")


def starts(box: Box) -> list[dict[str, Any]]:
    return [one for one in box.records() if one["type"] == "sandbox.started"]


def said(events: list[Any]) -> list[str]:
    (result,) = (event for event in events if event.type == "agent.tool_result")
    return str(result.content[0].text).split()


LOOK = "test -e /tmp/mark && echo same || echo new; touch /tmp/mark; echo x >> log; cat log"
"""Says whether this sandbox has been here before; /tmp is its own and dies with it."""


def frozen(*boxes: Box) -> list[str]:
    """Sandboxes of these state directories that stand still."""
    own = {path.name for box in boxes for path in (box.state / "egress").glob("sb_*")}
    found = []
    # not by glob, which minds a group that goes while it looks
    for place, _, _ in os.walk("/sys/fs/cgroup"):
        group = Path(place)
        name = group.name.rpartition("-")[2]
        for file, still in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
            with contextlib.suppress(OSError):
                if name in own and (group / file).read_text().strip() == still:
                    found.append(name)
    return found


@pytest.mark.root
def test_each_pattern_keeps_what_it_says(box: Box, simulator: Simulator) -> None:
    """`long_running`: sandbox, claude and files; `hybrid`: the files, wherever it goes on."""
    with up(box, "--slots", "2", **DIRECT) as (process, client):
        with watched(client, hosting="long_running") as (session, watch):
            first = turn(client, session, watch, bash(LOOK), {"text": "One."})
            assert (said(first), words(first)) == (["new", "x"], ["One."])
            assert wait_for(lambda: len(frozen(box)) > 0)
            began = len(simulator.requests)
            second = turn(client, session, watch, bash(LOOK), {"text": "Two."})
            assert (said(second), words(second)) == (["same", "x", "x"], ["Two."])
            assert "session.error" not in kinds(second)
            assert len(simulator.requests) == began + 2, "nothing is asked twice"
            client.beta.sessions.delete(session)
            assert wait_for(lambda: not frozen(box)), "nobody's sandbox is left"
        with watched(client, hosting="hybrid") as (session, watch):
            assert said(turn(client, session, watch, bash(LOOK), {"text": "One."}))[0] == "new"
            # as on a host that never had the session
            shutil.rmtree(box.state / "workspaces" / session)
            again = turn(client, session, watch, bash(LOOK), {"text": "Two."})
            assert said(again) == ["new", "x", "x"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    one, two, three, four = starts(box)
    assert one["sandbox_id"] == two["sandbox_id"]
    assert len({each["run_id"] for each in (one, two, three, four)}) == 4
    assert [each["warm"] for each in (one, two, three, four)] == [False, True, False, False]
    assert three["sandbox_id"] != four["sandbox_id"]
    taken = json.loads((box.state / "sandbox-memory.json").read_text())
    # a turn that is over between two looks is not measured
    assert 1 <= len(taken) <= 4
    assert all(50 < megabytes < 1000 for megabytes in taken), taken
    assert box.call("audit", "verify").code == 0
    assert not processes_with(str(box.state))
    assert not list((box.state / "egress").iterdir())


@pytest.mark.root
@pytest.mark.storm
def test_what_ends_a_sandbox_that_rests(box: Box, simulator: Simulator) -> None:
    with up(box, "--slots", "1", **DIRECT) as (_, client):
        with watched(client, hosting="long_running") as (session, watch):
            for _turn in range(3):
                last = turn(client, session, watch, bash(LOOK), {"text": "Done."})
            assert said(last) == ["same", "x", "x", "x"]

            # an interrupt ends the turn and the sandbox, not the session
            message(client, session, script(bash("sleep 300"), {"text": "never"}))
            watch.until("agent.tool_use")
            client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])
            watch.until("session.status_idle", seconds=90)
            again = turn(client, session, watch, bash(LOOK), {"text": "Done."})
            assert said(again) == ["new", "x", "x", "x", "x"]

            # another session's turn needs the only place
            with watched(client, hosting="long_running", idle_seconds=1) as (other, second):
                assert said(turn(client, other, second, bash(LOOK), {"text": "1"}))[0] == "new"
                assert wait_for(lambda: len(frozen(box)) > 0)
                assert wait_for(lambda: not frozen(box)), "its own idle time is over soon"
                assert said(turn(client, other, second, bash(LOOK), {"text": "2"}))[0] == "new"
            assert said(turn(client, session, watch, bash(LOOK), {"text": "3"}))[0] == "new"
            assert wait_for(lambda: len(frozen(box)) > 0)

            # an archived session keeps nothing
            client.beta.sessions.archive(session)
            assert wait_for(lambda: not frozen(box))

        # a call that waits is taken up by a claude that starts
        with watched(client, tools=[ASKING], hosting="long_running") as (session, watch):
            turn(client, session, watch, {"text": "Hello."})
            assert wait_for(lambda: len(frozen(box)) > 0)
            (use,) = (
                event
                for event in turn(client, session, watch, bash(LOOK), {"text": "Asked."})
                if event.type == "agent.tool_use"
            )
            assert not frozen(box)
            yes = {"type": "user.tool_confirmation", "tool_use_id": use.id, "result": "allow"}
            client.beta.sessions.events.send(session, events=[yes])
            answered = watch.until("session.status_idle")
            assert (said(answered), words(answered)) == (["new", "x"], ["Asked."])

        # in review mode nothing stays, and the session goes on all the same
        block = {"hosting": "long_running", "filesystem": {"workspace": "readonly"}}
        with watched(client, **block) as (session, watch):
            look = bash("test -e /tmp/mark && echo same || echo new; touch /tmp/mark")
            assert said(turn(client, session, watch, look, {"text": "1"})) == ["new"]
            assert said(turn(client, session, watch, look, {"text": "2"})) == ["same"]
    reasons = [one["reason"] for one in box.records() if one["type"] == "sandbox.stopped"]
    assert {"rests", "displaced", "idle", "session", "stopped"} <= set(reasons)
    assert box.call("audit", "verify").code == 0


class Farm:
    """A gateway, and workers that each have a state directory of their own: the database and the
    transcripts are PostgreSQL's, snapshots lie in a directory; the queue is a file of this host, or
    `temporal` at an address.
    """

    def __init__(self, box: Box, server: Any, temporal: str = "") -> None:
        self.box, self._policy = box, policy(box, **DIRECT)
        database = postgres_place(server)
        url = database.server.url(database.name)
        self.env = {
            "RINGFENCE_DATABASE": url,
            "RINGFENCE_SESSION_STORE": url,
            "RINGFENCE_BLOB_STORE": str(box.place / "blobs"),
        }
        if temporal:
            self.env["RINGFENCE_QUEUE__ENGINE"] = "temporal"
            self.env["RINGFENCE_QUEUE__ADDRESS"] = temporal
            self.env["RINGFENCE_QUEUE__NAME"] = f"farm-{database.name}"
        (box.state / "queue").mkdir(mode=0o700)
        made = box.call("keys", "create", "--tenant", "acme", "--json", **self.env)
        self.key = json.loads(made.out)["key"]

    def elsewhere(self, name: str) -> Box:
        place = self.box.place / name
        place.mkdir()
        other = Box(place, self.box.base_url, self.box.zygote)
        (other.state / "queue").symlink_to(self.box.state / "queue")
        return other

    @contextmanager
    def serving(self) -> Iterator[Anthropic]:
        server = self.box.spawn("serve", "--policy", self._policy, "--port", "0", **self.env)
        with ended(server):
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with Anthropic(base_url=url, api_key=self.key, timeout=120) as client:
                yield client

    @contextmanager
    def worker(self, box: Box) -> Iterator[subprocess.Popen[str]]:
        process = box.spawn("worker", "--policy", self._policy, "--slots", "2", **self.env)
        with ended(process):
            yield process


@pytest.fixture
def farm(box: Box, postgres_server: Any) -> Farm:
    return Farm(box, postgres_server)


@pytest.fixture(params=["embedded", "temporal"])
def either_farm(box: Box, postgres_server: Any, request: pytest.FixtureRequest) -> Farm:
    address = request.getfixturevalue("temporal_server") if request.param == "temporal" else ""
    return Farm(box, postgres_server, address)


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(30)


@pytest.mark.storm
@pytest.mark.timeout(900)
def test_hybrid_goes_on_wherever_it_is(farm: Farm, simulator: Simulator) -> None:
    """Two workers with directories of their own; one is killed between turns, one in a turn."""
    first, second, third = (farm.elsewhere(name) for name in ("one", "two", "three"))
    with farm.serving() as client, watched(client, hosting="hybrid") as (session, watch):
        with farm.worker(first) as process:
            one = turn(client, session, watch, bash("echo 1 >> log; cat log"), {"text": "One."})
            assert said(one) == ["1"]
            killed(process)
        with farm.worker(second) as process:
            two = turn(client, session, watch, bash("echo 2 >> log; cat log"), {"text": "Two."})
            assert said(two) == ["1", "2"]
            assert "One." in json.dumps(simulator.requests[-1].body["messages"])
            # files are there when the turn ends; the call that was answered is not made again
            steps = (bash("echo 3 >> log"), bash("sleep 60; echo lost >> log"), {"text": "Three."})
            message(client, session, script(*steps))
            watch.until("agent.tool_result")
            watch.until("agent.tool_use")
            killed(process)
        with farm.worker(third):
            rest = watch.until("session.status_idle", seconds=240)
            assert kinds(rest).count("session.status_rescheduled") == 1
            results = [event for event in rest if event.type == "agent.tool_result"]
            assert [event.is_error for event in results] == [True]
            four = turn(client, session, watch, bash("cat log"), {"text": "Four."})
            # what the killed turn had done to its files was its host's
            assert said(four) == ["1", "2"]
            asked = json.dumps(simulator.requests[-1].body["messages"])
            assert all(word in asked for word in ("One.", "Two."))
        uses = [event for event in watch.seen if event.type == "agent.tool_use"]
        assert len(uses) == 5
        assert kinds(watch.seen).count("session.status_idle") == 4
    for box in (first, second, third):
        assert wait_for(lambda at=box: not processes_with(str(at.state)))


@pytest.mark.root
@pytest.mark.storm
@pytest.mark.timeout(900)
def test_a_long_running_session_and_its_workers(either_farm: Farm, simulator: Simulator) -> None:
    """Of two workers the one that has the sandbox gets its turns; killed, the other goes on."""
    farm = either_farm
    one, two = farm.elsewhere("one"), farm.elsewhere("two")
    with (
        farm.serving() as client,
        watched(client, hosting="long_running") as (session, watch),
        farm.worker(one) as first,
        farm.worker(two) as second,
    ):
        for number in range(1, 6):
            last = turn(client, session, watch, bash(LOOK), {"text": f"Turn {number}."})
            assert said(last) == ["new" if number == 1 else "same", *["x"] * number]
        assert len(frozen(one, two)) > 0
        has = first if list((one.state / "egress").glob("sb_*")) else second
        killed(has)
        # nobody is left to thaw what it froze, and nothing of it stays
        assert wait_for(lambda: not frozen(one, two))
        gone = one if has is first else two
        assert wait_for(lambda: not processes_with(str(gone.state)))
        last = turn(client, session, watch, bash(LOOK), {"text": "Elsewhere."})
        assert said(last) == ["new", *["x"] * 6]
        assert "Turn 5." in json.dumps(simulator.requests[-1].body["messages"])
        last = turn(client, session, watch, bash(LOOK), {"text": "And on."})
        assert said(last) == ["same", *["x"] * 7]
        assert "session.error" not in kinds(watch.seen)
