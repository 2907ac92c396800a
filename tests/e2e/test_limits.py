"""Limits with the real claude: a run gives its sandbox back, and goes on where it was."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Box, bash, script, wait_for
from platform_rig import Watch, message, session_of, up, words

from ringfence.config import LimitSettings
from ringfence.limits.lane import Amount
from ringfence.limits.plan import lanes
from ringfence.limits.sqlite import SqliteLimits
from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator

LIMITS = {"requests": 2, "window_seconds": 10.0}
SETTINGS = {"rates": {"all": LIMITS}, "hold_seconds": 1.0}


def test_a_turn_that_would_wait_too_long_waits_without_a_sandbox(box: Box) -> None:
    """One request at once, and the next five seconds later: longer than one is held here."""
    # what is put off after its call is told to go on
    goes_on = {"match": "Go on from there", "steps": [{"text": "Said."}]}
    played = Scenario.model_validate({"limits": LIMITS, "scenes": [goes_on]})
    with Simulator(played) as simulator:
        env = {
            "RINGFENCE_LIMITS": json.dumps(SETTINGS),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.base_url,
        }
        with up(box, "--slots", "1", **env) as (_, client):
            session = session_of(client)
            watch = Watch(client, session.id)
            message(client, session.id, script(bash("echo hello"), {"text": "Said."}))
            watch.until("session.status_idle", seconds=120)
            watch.close()
            assert words(watch.seen)[-1] == "Said."
            assert [each.type for each in watch.seen].count("agent.tool_use") == 1
            told = [each.error for each in watch.seen if each.type == "session.error"]
            assert told, "it was put off"
            for error in told:
                assert error.type == "model_rate_limited_error"
                assert error.retry_status.type == "retrying"
                assert "turn comes in about" in error.message
        assert simulator.refused == 0, "the provider saw no more than it grants"
        found = box.call("limits", "status", "--json", **env)
        assert found.code == 0, found.err
        (lane,) = found.json["lanes"]
        assert lane["name"] == "default/anthropic/all"
        assert (lane["waiting"], lane["parked"]) == ([], 0)
        assert lane["buckets"][0]["limit"] == 2


SCARCE = {"requests": 2, "window_seconds": 15.0}
RATE = 2 / 15 * 0.96
HELD = {"rates": {"all": SCARCE}, "hold_seconds": 200.0}


class Lane:
    """The lane of a host, for whoever holds it up: a debt that is paid back when a test says so."""

    def __init__(self, box: Box) -> None:
        (self._spec,) = lanes(LimitSettings.model_validate(HELD))
        self._path = box.state / "limits" / "limits.sqlite"

    def owe(self, requests: float) -> None:
        async def settle() -> None:
            store = SqliteLimits(self._path)
            # a bucket that nobody has asked has no level yet
            await store.take(self._spec, [])
            await store.settle(self._spec, "*", Amount(requests=-requests))
            await store.close()

        asyncio.run(settle())


def waiting(box: Box, count: int, **env: str) -> list[Any]:
    """Who waits in the lane, once so many do."""

    seen: list[Any] = []

    def enough() -> bool:
        found = box.call("limits", "status", "--json", **env)
        assert found.code == 0, found.err
        seen[:] = found.json["lanes"][0]["waiting"]
        return len(seen) == count

    assert wait_for(enough, seconds=90), seen
    return seen


def test_who_waits_for_nobody_lets_others_go_first(box: Box) -> None:
    """A session of the public API, and one that `submit --batch` makes before it."""
    with Simulator() as simulator:
        env = {
            "RINGFENCE_LIMITS": json.dumps(HELD),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.base_url,
        }
        with up(box, "--slots", "2", **env) as (_, client):
            session, lane = session_of(client), Lane(box)
            lane.owe(20)
            there = {"RINGFENCE_URL": str(client.base_url), "RINGFENCE_API_KEY": client.api_key}
            said = script({"text": "Later."}, words="The batch.")
            about = ("--agent", session.agent.id, "--environment", session.environment_id)
            batch = box.call("submit", said, *about, "--batch", **there)
            assert batch.code == 0, batch.err
            (first,) = waiting(box, 1, **env)
            assert (first["position"], first["batch"]) == (1, True)
            message(client, session.id, script({"text": "Now."}, words="The caller."))
            both = waiting(box, 2, **env)
            assert [(each["position"], each["batch"]) for each in both] == [(1, False), (2, True)]
            assert 0 < both[0]["expected_seconds"] < both[1]["expected_seconds"]
            assert simulator.requests == []
            lane.owe(-20)
            assert wait_for(lambda: len(simulator.requests) == 2, seconds=90)
        order = [json.dumps(each.body["messages"]) for each in simulator.requests]
        assert "The caller." in order[0]
        assert "The batch." in order[1]


def test_a_run_that_lets_others_go_first(box: Box) -> None:
    with Simulator() as simulator, ThreadPoolExecutor(1) as pool:
        env = {
            "RINGFENCE_LIMITS": json.dumps(HELD),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.base_url,
        }
        lane = Lane(box)
        lane.owe(20)
        done = pool.submit(box.run, script({"text": "Said."}), "--batch", **env)
        (found,) = waiting(box, 1, **env)
        assert found["batch"] is True
        lane.owe(-20)
        assert done.result().code == 0


@pytest.mark.storm
@pytest.mark.timeout(900)
def test_claude_waits_for_a_request_that_is_held(box: Box) -> None:
    """For as long as requests are held at most, but for the slack that clients leave: `claude` asks
    once, waits in silence, and takes the answer. Nothing is sent before the provider's own.
    """
    held = 200.0
    with Simulator() as simulator, ThreadPoolExecutor(1) as pool:
        env = {
            "RINGFENCE_LIMITS": json.dumps({**HELD, "hold_seconds": 240.0}),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.base_url,
        }
        lane = Lane(box)
        # a debt of which the fleet knows that it is paid in time: who must wait longer is put off
        lane.owe(held * RATE + 5)
        done = pool.submit(box.run, script({"text": "Said."}), seconds=800, **env)
        (found,) = waiting(box, 1, **env)
        began = time.monotonic()
        while time.monotonic() - began < held - found["waited_seconds"]:
            assert simulator.requests == []
            assert not done.done()
            time.sleep(1)
        result = done.result()
        assert result.code == 0, result.err
        assert len(simulator.requests) == 1, "it did not ask again meanwhile"


@pytest.mark.storm
@pytest.mark.timeout(600)
def test_agents_under_a_limit_see_nothing_of_it(box: Box) -> None:
    """Twelve sessions of the real `claude`, six at once, of three requests each; one a second passes.
    They end as without a limit, none is told of it, and the provider never says no.
    """
    limits = {"requests": 15, "window_seconds": 15.0}
    sessions, steps = 12, 2
    with Simulator(Scenario.model_validate({"limits": limits})) as simulator:
        env = {
            "RINGFENCE_LIMITS": json.dumps({"rates": {"all": limits}}),
            "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulator.base_url,
        }
        with up(box, "--slots", "6", **env) as (_, client):
            made = [session_of(client).id for _ in range(sessions)]
            watches = [Watch(client, each) for each in made]
            calls = [bash(f"echo {number}") for number in range(steps)]
            began = time.monotonic()
            for each in made:
                message(client, each, script(*calls, {"text": "Said."}))
            for watch in watches:
                watch.until("session.status_idle", seconds=500)
                watch.close()
                assert words(watch.seen)[-1] == "Said."
                kinds = [each.type for each in watch.seen]
                assert kinds.count("agent.tool_use") == steps
                assert "session.error" not in kinds
            took = time.monotonic() - began
        assert simulator.refused == 0
        sent = len(simulator.requests)
        used = sent / took
        sys.stderr.write(
            f"\nreal claude: {sent} requests in {took:.1f} s, {used:.2f} of 1 a second\n"
        )
        assert sent >= sessions * (steps + 1)
