"""Providers that fail, with the real claude: what it sees of it, and what it does not."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Box, bash
from platform_rig import Watch, message, session_of, up, words

from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator

MODEL = "claude-sonnet-4-5"
QUICK = {"base_seconds": 0.1, "longest_seconds": 1.0, "total_seconds": 20.0}
DOWN = {"error": 529, "times": 1000, "text": "Never said."}


def provider(*steps: dict[str, Any]) -> Simulator:
    return Simulator(Scenario.model_validate({"default": list(steps)}))


def settings(*simulators: Simulator, **retries: Any) -> dict[str, str]:
    """The first is `anthropic`, the next `second`, which wants no credential."""
    env = {
        "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": simulators[0].base_url,
        "RINGFENCE_RETRIES": json.dumps({**QUICK, **retries}),
    }
    if len(simulators) > 1:
        second = {"base_url": simulators[1].base_url, "credential": None}
        env["RINGFENCE_PROVIDERS__SECOND"] = json.dumps(second)
    return env


def asked(simulator: Simulator) -> int:
    return sum(each.path.startswith("/v1/messages") for each in simulator.requests)


def test_an_overload_passes_unseen(box: Box) -> None:
    """Two of three turns are refused first: claude hears of none, and does not ask twice."""
    steps = (bash("echo one", error=529, times=2), {"text": "Said.", "error": 500, "times": 1})
    with provider(*steps) as simulator:
        done = box.run("Do it.", "--model", MODEL, **settings(simulator))
        assert done.code == 0, done.err
        assert done.json["text"] == "Said."
        assert asked(simulator) == 5, "two turns, and three that were refused"
        records = box.records()
        retried = [each for each in records if each["type"] == "model.retried"]
        assert [each["reason"] for each in retried] == ["upstream-529"] * 2 + ["upstream-500"]


def test_a_session_moves_when_its_provider_goes_down(box: Box) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(provider(bash("echo one"), bash("echo two", **DOWN)))
        steps = (bash("echo one"), bash("echo two"), {"text": "Said elsewhere."})
        second = stack.enter_context(provider(*steps))
        box.policy({"preset": "strict", "model": {"failover": [{"provider": "second"}]}})
        done = box.run("Do it.", "--model", MODEL, **settings(first, second))
        assert done.code == 0, done.err
        assert done.json["text"] == "Said elsewhere."
        # one answered, three refused; the other two turns are asked where the session is now
        assert (asked(first), asked(second)) == (4, 2)
        records = box.records()
        (moved,) = [each for each in records if each["type"] == "model.moved"]
        assert (moved["to_provider"], moved["reason"]) == ("second", "failed")
        answered = [each for each in records if each["type"] == "model.answered"]
        assert [each["status"] for each in answered] == [200, 529, 529, 529, 200, 200]
        spent = sum(each["cost_usd"] for each in answered)
        assert done.json["usage"]["cost_usd"] == spent > 0


def test_everything_down_ends_the_run_at_once(box: Box) -> None:
    """The client stops at the first word, and the exit status says who could not."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(provider(DOWN)) for _ in range(2))
        box.policy({"preset": "strict", "model": {"failover": [{"provider": "second"}]}})
        env = settings(first, second, total_seconds=3.0)
        done = box.run("Do it.", "--model", MODEL, **env)
        assert done.code == 4, done.out + done.err
        assert done.json["error"]["code"] == "model-unavailable"
        refused = [each for each in box.records() if each["type"] == "egress.refused"]
        assert [each["reason"] for each in refused] == ["model-unavailable"]
        assert 3 <= asked(first) <= 5, "and again when the other's breaker had opened"
        assert 3 <= asked(second) <= 5, "until its breaker opened"


class Late(Simulator):
    """One that comes up at an address that was told before."""

    def __init__(self, scenario: Scenario, port: int) -> None:
        super().__init__(scenario)
        self._listener.close()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(256)


@pytest.mark.storm
def test_a_turn_waits_in_the_queue_until_its_provider_is_back(box: Box) -> None:
    """Put off without a sandbox while nobody listens there, and done in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": f"http://127.0.0.1:{port}",
        "RINGFENCE_RETRIES": json.dumps({**QUICK, "total_seconds": 1.0}),
        "RINGFENCE_BREAKERS": json.dumps({"open_seconds": 1.0, "wins": 1}),
    }
    with up(box, "--slots", "1", model={"exhausted": "queue"}, **env) as (_, client):
        session = session_of(client)
        watch = Watch(client, session.id)
        message(client, session.id, "Do it.")
        watch.until("session.error", seconds=60)
        played = Scenario.model_validate({"default": [{"text": "Said at last."}]})
        with Late(played, port) as simulator:
            watch.until("session.status_idle", seconds=180)
            watch.close()
            assert asked(simulator) == 1
    assert words(watch.seen)[-1] == "Said at last."
    told = [each.error for each in watch.seen if each.type == "session.error"]
    assert all(error.retry_status.type == "retrying" for error in told)


def test_a_stream_that_tears_in_the_middle_is_the_clients_to_repeat(box: Box) -> None:
    """Twice, and not eleven times: what has begun egress cannot send again."""
    torn = {"text": "Said in many words, and more of them.", "drop_after": 4}
    with provider({**torn, "times": 1}) as simulator:
        done = box.run("Do it.", "--model", MODEL, **settings(simulator))
        assert done.code == 0, done.err
        assert asked(simulator) == 2
    with provider(torn) as simulator:
        done = box.run("Do it.", "--model", MODEL, **settings(simulator))
        assert done.code != 0
        # three of a stream and three of an answer that comes whole; it would be eleven of each
        assert asked(simulator) == 6
