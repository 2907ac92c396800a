"""What sessions cost: one count on the wire, the same in every place that shows it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from harness import Box, bash, script
from platform_rig import TOOLS, Watch, message, up

from gateway_rig import postgres_place
from ringfence.egress.model.pricing import cost
from ringfence.model import Usage
from ringfence.simulator import wire
from ringfence.simulator.script import Step
from telemetry_rig import page, samples, targets, total

KINDS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """The usage of each answer that the simulator gave, as it stood on the wire."""
    found: list[dict[str, int]] = []
    made = wire.message

    def answer(step: Step, body: dict[str, Any], seed: str) -> dict[str, Any]:
        whole = made(step, body, seed)
        found.append(whole["usage"])
        return whole

    monkeypatch.setattr(wire, "message", answer)
    return found


def summed(said: list[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(one[kind] for one in said) for kind in KINDS}


CACHED = {"cache_creation_input_tokens": 1234, "cache_read_input_tokens": 56_789}
INNER = [bash("echo inner", cache_read_input_tokens=77), {"text": "sub done"}]


def _agent() -> dict[str, Any]:
    inner = f"Do it.\n```ringfence-script\n{json.dumps(INNER)}\n```\n"
    what = {"description": "d", "prompt": inner, "subagent_type": "general-purpose"}
    return {"tool": "Agent", "input": what, "output_tokens": 17}


def test_a_run_with_caches_parallel_tools_and_a_subagent(
    box: Box, said: list[dict[str, int]]
) -> None:
    """Requests, run, and `claude`'s own word: the same to the token."""
    role = {"allow": ["Read", "Bash", "Task"], "preapproved": ["Task", "Bash"]}
    box.policy({"preset": "strict", "tools": {"role": "r", "roles": {"r": role}}})
    together = [bash("echo one"), bash("echo two"), bash("echo three")]
    steps = [
        {"tools": together, **CACHED},
        _agent(),
        {"text": "ok", "cache_read_input_tokens": 99, "input_tokens": 3},
    ]
    done = box.run(f"Do it.\n```ringfence-script\n{json.dumps(steps)}\n```\n")
    assert done.code == 0, done.out
    records = box.records()
    answered = [one for one in records if one["type"] == "model.answered" and one["billed"]]
    (ended,) = (one for one in records if one["type"] == "run.ended")
    assert len(answered) == len(said) >= 5
    for of in (ended, done.json["usage"], {k: sum(one[k] for one in answered) for k in KINDS}):
        assert {kind: of[kind] for kind in KINDS} == summed(said)
    assert summed(said)["cache_read_input_tokens"] == 56_789 + 77 + 99
    dollars = sum(one["cost_usd"] for one in answered)
    assert ended["cost_usd"] == pytest.approx(dollars, abs=1e-12)
    by_hand = cost(answered[0]["model"], Usage(**summed(said)))
    assert ended["cost_usd"] == pytest.approx(by_hand, abs=1e-12)
    assert not [one for one in records if one["type"] == "usage.differed"]


@pytest.mark.storm
def test_who_asks_the_model_beside_claude_is_on_the_bill(
    box: Box, said: list[dict[str, int]]
) -> None:
    """A program inside uses the same socket: the wire has it, `claude`'s own count has not."""
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 10,
        "messages": [{"role": "user", "content": "hi"}],
    }
    ask = (
        "curl -sS --unix-socket $ANTHROPIC_UNIX_SOCKET -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}' http://model.internal/v1/messages >answer || true"
    )
    done = box.run(script(bash(ask), {"text": "ok"}), "--model", "claude-sonnet-4-5")
    assert done.code == 0, done.out
    records = box.records()
    (ended,) = (one for one in records if one["type"] == "run.ended")
    assert len(said) == 3
    assert {kind: ended[kind] for kind in KINDS} == summed(said)
    (differed,) = (one for one in records if one["type"] == "usage.differed")
    assert {kind: differed[kind] for kind in KINDS} == summed(said)
    claimed = {kind: differed[f"claimed_{kind}"] for kind in KINDS}
    assert all(claimed[kind] <= differed[kind] for kind in KINDS)
    assert claimed["output_tokens"] < differed["output_tokens"]


@pytest.mark.storm
@pytest.mark.parametrize(
    ("hosting", "store"),
    [("ephemeral", "sqlite"), ("long_running", "sqlite"), ("ephemeral", "postgresql")],
)
def test_a_session_of_several_turns(
    box: Box,
    said: list[dict[str, int]],
    hosting: str,
    store: str,
    request: pytest.FixtureRequest,
) -> None:
    """Its `usage`, the page of metrics and the records agree, turn by turn; also where one
    `claude` stays, which says what it has used over all of them.
    """
    place = box.place / "targets"
    settings = {"RINGFENCE_TELEMETRY__METRICS": json.dumps({"targets": str(place)})}
    if store == "postgresql":
        database = postgres_place(request.getfixturevalue("postgres_server"))
        settings["RINGFENCE_DATABASE"] = database.server.url(database.name)
    rules = {"hosting": {"pattern": hosting.replace("_", "-")}}
    with up(box, "--slots", "1", **settings, **rules) as (_, client):
        agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS)
        environment = client.beta.environments.create(
            name="place", config={"type": "cloud"}, extra_body={"ringfence": {"hosting": hosting}}
        )
        session = client.beta.sessions.create(agent=agent.id, environment_id=environment.id).id
        watch = Watch(client, session)
        for turn in range(3):
            step = bash(f"echo {turn}", cache_creation_input_tokens=100 + turn)
            message(client, session, script(step, {"text": "ok", "cache_read_input_tokens": 1000}))
            watch.until("session.status_idle")
            usage = client.beta.sessions.retrieve(session).usage
            wanted = summed(said)
            assert (usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens) == (
                wanted["input_tokens"],
                wanted["output_tokens"],
                wanted["cache_read_input_tokens"],
            )
            dollars = cost("claude-sonnet-4-5", Usage(**wanted))
            assert dollars is not None
            # in cents, rounded up
            cents = math.ceil(round(dollars * 100, 6))
            assert (usage.list_cost.amount, usage.list_cost.currency) == (str(cents), "USD")
        found = samples(page(targets(place)["up"]))
        watch.close()
    for kind in KINDS:
        label = kind.removesuffix("_input_tokens").removesuffix("_tokens")
        label = {"input": "input", "output": "output"}.get(label, label)
        assert total(found, "ringfence_model_tokens_total", kind=label) == wanted[kind], kind
    records = box.records()
    ended = [one for one in records if one["type"] == "run.ended"]
    assert {kind: sum(one[kind] for one in ended) for kind in KINDS} == wanted
    assert sum(one["cost_usd"] for one in ended) == pytest.approx(dollars, abs=1e-12)
    assert total(found, "ringfence_model_cost_usd_total") == pytest.approx(dollars, abs=1e-12)
    assert not [one for one in records if one["type"] == "usage.differed"]
    assert total(found, "ringfence_usage_differences_total") == 0
