"""Sandboxes between two turns: what a key holds, who gives way, who may be taken over."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent.claude import ClaudeDriver
from ringfence.channel.messages import SealedCredential
from ringfence.errors import UnavailableError
from ringfence.model import PermissionMode, RunRequest
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import McpServer
from ringfence.policy.load import from_mapping
from ringfence.worker.live import Hold, Live, Withheld
from ringfence.worker.livekey import live_key, live_settings, obstacle
from ringfence.worker.liveplan import Resting, displaced, expired
from ringfence.worker.prepare import claude_settings, narrowed

DIRECT = {"filesystem": {"workspace": "direct", "workspace_modes": ["direct"]}}
SECRET = SealedCredential(vault_id="v", credential_id="c", host="a.example", key_id="k", sealed="s")

resting = st.builds(
    Resting,
    identity=st.uuids().map(str),
    started=st.floats(0, 1e6),
    rested=st.floats(0, 1e6),
    idle_seconds=st.floats(0.1, 1e6),
)
many = st.lists(resting, max_size=12, unique_by=lambda one: one.identity)


@given(many, st.integers(0, 20), st.integers(1, 20))
def test_turns_and_those_that_rest_fit_their_places(
    them: list[Resting], working: int, most: int
) -> None:
    gone = displaced(them, working=working, most=most)
    left = [one for one in them if one.identity not in gone]
    assert len(left) + working <= most or not left
    # nobody gives way for nothing, and nobody before one that has rested for longer
    assert not gone or len(left) + working == most or not left
    assert all(
        one.rested >= other.rested for one in left for other in them if other.identity in gone
    )


@given(many, st.floats(0, 2e6), st.floats(1, 1e6))
def test_who_is_ended_has_rested_or_been_there_too_long(
    them: list[Resting], now: float, most: float
) -> None:
    gone = expired(them, now=now, max_age=most)
    for one in them:
        old = now - one.rested >= one.idle_seconds or now - one.started >= most
        assert (one.identity in gone) is old
    assert set(expired(them, now=now + 1, max_age=most)) >= set(gone)


def key(rules: dict[str, Any] | None = None, request: RunRequest | None = None, **more: Any) -> str:
    policy = compile_policy(from_mapping({"version": 1, "preset": "ci", **(rules or DIRECT)}))
    request = request or RunRequest(prompt="x", workspace="/w", defer=True, model="m")
    policy = narrowed(policy, request)
    settings = claude_settings(policy, request, session_id="s", run_id="r", sandbox_id="b")
    values: dict[str, Any] = {
        "agent": {"id": "a", "version": 1},
        "environment": {"name": "e"},
        "resources": (),
        "credentials": (),
        "workspace": "1:7",
        "claude": "1:2",
        "ca_certificate": b"ca",
    }
    return live_key(settings, policy, **values | more)


def test_the_next_turn_of_a_session_has_the_same_key() -> None:
    """Another prompt, another run, less money, resumed: the same claude."""
    first = RunRequest(
        prompt="x", workspace="/w", defer=True, model="m", session_id="s", max_budget_usd=2.0
    )
    later = RunRequest(
        prompt="y", workspace="/w", defer=True, model="m", resume="s", max_budget_usd=0.5
    )
    assert key(request=first) == key(request=later)
    one = RunRequest(prompt="x", workspace="/w", defer=True, model="m", timeout_seconds=5)
    assert key(request=one) == key()


@pytest.mark.parametrize(
    "more",
    [
        {"agent": {"id": "a", "version": 2}},
        {"environment": {"name": "f"}},
        {"resources": ({"type": "file", "file_id": "f"},)},
        {"credentials": (SECRET,)},
        {"claude": "1:3"},
        {"workspace": "1:8"},
        {"ca_certificate": b"other"},
        {"rules": {**DIRECT, "network": {"allowed_hosts": ["api.anthropic.com", "a.example"]}}},
        {"rules": {**DIRECT, "execution": {"max_memory_mb": 512}}},
        {"request": RunRequest(prompt="x", workspace="/w", defer=True, model="n")},
        {"request": RunRequest(prompt="x", workspace="/w", defer=True, model="m", effort="low")},
        {
            "request": RunRequest(
                prompt="x", workspace="/w", defer=True, model="m", ask_tools=("Bash",)
            )
        },
        {
            "request": RunRequest(
                prompt="x",
                workspace="/w",
                defer=True,
                model="m",
                permission_mode=PermissionMode.PLAN,
            )
        },
    ],
)
def test_what_changes_makes_another_claude(more: dict[str, Any]) -> None:
    assert key(**more) != key()


def test_a_credential_that_was_sealed_anew_is_another() -> None:
    other = SECRET.model_copy(update={"sealed": "t"})
    assert key(credentials=(SECRET,)) != key(credentials=(other,))
    assert key(credentials=(SECRET,)) == key(credentials=(SECRET.model_copy(),))


def test_who_stays_is_held_to_the_budget_by_egress_alone() -> None:
    policy = narrowed(
        compile_policy(from_mapping({"version": 1, "preset": "ci"})),
        request := RunRequest(prompt="x", workspace="/w", max_budget_usd=1.0),
    )
    settings = claude_settings(policy, request, session_id="s", run_id="r", sandbox_id="b")
    assert settings.max_budget_usd == 1.0
    assert live_settings(settings).max_budget_usd is None
    assert policy.egress.model.max_budget_usd == 1.0


def test_what_cannot_stay_says_why() -> None:
    assert obstacle(compile_policy(from_mapping({"version": 1, "preset": "ci", **DIRECT}))) is None
    assert "review" in str(obstacle(compile_policy(from_mapping({"version": 1, "preset": "ci"}))))
    policy = compile_policy(from_mapping({"version": 1, "preset": "ci", **DIRECT}))
    for server, why in (
        (McpServer(name="far", url="https://mcp.example/mcp"), "far"),
        (McpServer(name="near", command=("near",)), "None"),
    ):
        tools = replace(policy.tools, mcp_servers=(server,))
        assert why in str(obstacle(replace(policy, tools=tools)))


def test_a_machine_does_not_stay() -> None:
    policy = compile_policy(from_mapping({"version": 1, "preset": "ci", **DIRECT}))
    machine = replace(policy, sandbox=replace(policy.sandbox, isolation="microvm"))
    assert "machine" in str(obstacle(machine))


class Part:
    """A sandbox, its driver or its directory: what is asked of it to end, one of which fails."""

    proxy_listener = None

    def __init__(self, said: list[str], name: str, fails: str) -> None:
        self._said, self._name, self.fails = said, name, fails

    def _ends(self, step: str) -> None:
        self._said.append(f"{self._name}.{step}")
        if self._said[-1] == self.fails:
            raise OSError(self.fails)

    async def stop(self) -> None:
        self._ends("stop")

    async def close(self) -> None:
        self._ends("close")

    def remove(self) -> None:
        self._ends("remove")


STEPS = ["sandbox.stop", "driver.close", "sandbox.close", "egress.remove"]


@pytest.mark.parametrize("fails", STEPS)
async def test_each_step_of_an_end_is_taken_and_the_lock_is_kept_from_who_may_write(
    fails: str,
) -> None:
    said: list[str] = []
    names = ("sandbox", "driver", "egress")
    parts: dict[str, Any] = {name: Part(said, name, fails) for name in names}
    hold = Hold(live=Live(**parts, ids={}, isolation="bubblewrap", started=0.0))
    resources, free = AsyncExitStack(), []
    resources.callback(free.append, True)
    withheld = Withheld()
    with pytest.raises(OSError, match=fails):
        await hold.close()
    assert said == STEPS
    await withheld.release(resources, hold.unstopped)
    del resources
    assert bool(free) is (fails != "sandbox.stop")
    # tried again, and in vain; then it goes
    await withheld.retry()
    assert bool(free) is (fails != "sandbox.stop")
    for part in parts.values():
        part.fails = ""
    await withheld.retry()
    assert free == [True]
    await withheld.retry()
    assert free == [True]


async def test_whom_an_attempt_has_in_a_sandbox_is_known() -> None:
    said: list[str] = []
    hold = Hold(keeps=False)
    assert hold.unstopped == []
    fails = Part(said, "a", "a.stop")
    first, second = hold.enter(cast("Any", fails)), hold.enter(cast("Any", Part(said, "b", "")))
    assert len(hold.unstopped) == 2
    with pytest.raises(OSError, match="stop"):
        await first.stop()
    await second.stop()
    assert hold.unstopped == [first.close]
    await first.close()
    assert hold.unstopped == []
    # one that rests is its `Live`'s
    third = hold.enter(cast("Any", Part(said, "c", "")))
    hold.leave(third)
    assert hold.unstopped == []


class Standing:
    """What a hold asks of a sandbox that rests."""

    def __init__(self, *, usable: bool = True) -> None:
        self.usable, self.isolation, self.closed = usable, "bubblewrap", 0
        self.stopped = False
        self.ids = {"session_id": "s"}

    async def close(self) -> None:
        self.closed += 1
        self.stopped = True


async def test_only_the_sessions_own_sandbox_is_taken_over_and_every_other_is_ended() -> None:
    for session, isolation, usable, taken in (
        ("s", "bubblewrap", True, True),
        ("t", "bubblewrap", True, False),
        ("s", "gvisor", True, False),
        ("s", "bubblewrap", False, False),
    ):
        live = Standing(usable=usable)
        hold = Hold(live=cast("Any", live))
        assert (hold.take(session, isolation) is live) is taken
        await hold.close()
        await hold.close()
        assert live.closed == (0 if taken else 1)
    left = Standing()
    hold = Hold(left=cast("Any", left))
    await hold.close()
    assert left.closed == 1


async def test_a_claude_that_can_neither_rest_nor_go_on_is_to_be_closed() -> None:
    async def refuses() -> bool:
        raise UnavailableError("sandbox-start-failed", "the monitor ended")

    place = SimpleNamespace(freeze=refuses, thaw=refuses)
    driver: Any = object.__new__(ClaudeDriver)
    driver._sandbox, driver._calls, driver._mirror = place, object(), SimpleNamespace(appending=0)
    driver._transport = SimpleNamespace(silent_for=9.0)
    driver._idle = lambda: True
    assert not await driver.rest()
