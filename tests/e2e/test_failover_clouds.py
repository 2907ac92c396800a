"""A session that walks from cloud to cloud while they go down, with the real claude: what each of
them was sent, and that the conversation goes on as if there were one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Box, bash
from platform_rig import Watch, message, session_of, up, words

from providers_rig import Issuer, in_base64
from ringfence.egress.model.dialects.features import BETAS
from ringfence.simulator.clouds import Clouds
from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Recorded, Simulator

pytest.importorskip("botocore")
pytest.importorskip("google.auth")

MODEL, OTHER = "claude-sonnet-4-5", "claude-haiku-4-5"
KEY, SECRET = "AKIASTATIC0123456789", "static-secret-key-0123456789"
DOWN = {"error": 529, "times": 1000}
ORDER = ("direct", "aws", "gcp", "last")
QUICK = {"base_seconds": 0.1, "longest_seconds": 0.5, "total_seconds": 30.0}


def scenes(name: str) -> Scenario:
    """Each turn thinks, calls a tool, and thinks again; at turn N the Nth provider goes down, when
    it has asked for the tool. All of them tell one story, and sign their parts of it.
    """
    here = ORDER.index(name)
    found = []
    for number in range(1, len(ORDER) + 1):
        step = bash(f"echo tool-{number}", thinking=f"Plan {number} at {name}.")
        end: dict[str, Any] = {"thinking": f"Look {number}.", "text": f"Said {number} by {name}."}
        if here < number - 1:
            end |= DOWN
        if here < number - 2:
            step |= DOWN
        found.append({"match": f"Turn {number}", "steps": [step, end]})
    return Scenario.model_validate({"scenes": found})


@contextmanager
def providers(box: Box) -> Iterator[tuple[dict[str, Simulator], dict[str, str]]]:
    """The four of them, checking who asks; and what the operator's settings say of them."""
    with ExitStack() as stack:
        issuer = stack.enter_context(Issuer())
        told = Clouds(keys={KEY: (SECRET, None)}, region="eu-central-1")
        issued = Clouds()
        # it checks against what the issuer has given, also later
        issued.tokens = issuer.given  # type: ignore[assignment]
        clouds = {"aws": told, "gcp": issued}
        ran = {n: stack.enter_context(Simulator(scenes(n), clouds.get(n))) for n in ORDER}
        for vault, value in (("aws-keys", f"{KEY}:{SECRET}"), ("sa", in_base64(issuer.key()))):
            sealed = box.call("vault", "set", vault, stdin=value + "\n")
            assert sealed.code == 0, sealed.err
        settings: dict[str, dict[str, Any]] = {
            "aws": {
                "kind": "bedrock",
                "region": "eu-central-1",
                "base_url": ran["aws"].base_url,
                "models": {MODEL: f"eu.anthropic.{MODEL}-20250929-v1:0"},
                "aws": {"credential": "aws-keys"},
            },
            "gcp": {
                "kind": "vertex",
                "region": "europe-west1",
                "base_url": f"{ran['gcp'].base_url}/v1",
                "models": {MODEL: f"{MODEL}@20250929"},
                "google": {"credential": "sa", "token_endpoint": issuer.url},
            },
            "last": {"base_url": ran["last"].base_url, "credential": None},
        }
        env = {f"RINGFENCE_PROVIDERS__{n.upper()}": json.dumps(s) for n, s in settings.items()}
        env["RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL"] = ran["direct"].base_url
        env["RINGFENCE_RETRIES"] = json.dumps(QUICK)
        yield ran, env


def asked(simulator: Simulator) -> list[Recorded]:
    """Of the conversation: what is asked beside it (a title) has no tools."""
    return [one for one in simulator.requests if one.body.get("tools")]


def signed(request: Recorded) -> list[str]:
    """The thinking that goes back to a model."""
    return [
        block["thinking"]
        for turn in request.body["messages"]
        if isinstance(turn["content"], list)
        for block in turn["content"]
        if block["type"] in {"thinking", "redacted_thinking"}
    ]


def others(request: Recorded) -> dict[str, int]:
    """How often the history has a call of a tool, and a result."""
    kinds = Counter(
        block["type"]
        for turn in request.body["messages"]
        if isinstance(turn["content"], list)
        for block in turn["content"]
    )
    return {"calls": kinds["tool_use"], "results": kinds["tool_result"]}


def flags(request: Recorded) -> list[str]:
    named = request.headers.get("anthropic-beta", "")
    return [
        *(request.body.get("anthropic_beta") or ()),
        *(each for each in named.split(",") if each),
    ]


THOUGHT = [
    *("Plan 1 at direct.", "Look 1."),
    *("Plan 2 at direct.", "Look 2."),
    *("Plan 3 at aws.", "Look 3.", "Plan 4 at gcp."),
]
"""All thinking of the session but the last, in order, and who had begun which turn."""


def as_of_bedrock(request: Recorded) -> None:
    model = f"eu.anthropic.{MODEL}-20250929-v1:0"
    assert request.path == f"/model/{model}/invoke-with-response-stream"
    assert request.headers["authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={KEY}/")
    assert request.body["anthropic_version"] == "bedrock-2023-05-31"
    assert "anthropic-beta" not in request.headers
    assert set(flags(request)) <= set(BETAS["bedrock"].values())


def as_of_vertex(request: Recorded) -> None:
    place = "/v1/projects/acme-prod/locations/europe-west1/publishers/anthropic/models"
    assert request.path == f"{place}/{MODEL}@20250929:streamRawPredict"
    assert request.headers["authorization"].startswith("Bearer ya29.given-token-")
    assert request.body["anthropic_version"] == "vertex-2023-10-16"
    assert "anthropic_beta" not in request.body
    assert set(flags(request)) <= set(BETAS["vertex"].values())


def as_of_another_model(request: Recorded) -> None:
    assert (request.path, request.body["model"]) == ("/v1/messages", OTHER)
    assert signed(request) == [], "what one model signed is not another's"
    assert not {"thinking", "context_management"} & set(request.body)
    assert flags(request) == ["claude-code-20250219"]
    assert others(request) == {"calls": 4, "results": 4}, "and nothing else is lost"


@pytest.mark.storm
def test_a_session_walks_over_all_clouds(box: Box) -> None:
    """Each goes down in the middle of a turn, with thinking and a call of a tool just behind."""
    ways = [{"provider": "aws"}, {"provider": "gcp"}, {"provider": "last", "model": OTHER}]
    with ExitStack() as stack:
        ran, env = stack.enter_context(providers(box))
        _, client = stack.enter_context(up(box, "--slots", "1", model={"failover": ways}, **env))
        session = session_of(client)
        watch = Watch(client, session.id)
        for number in range(1, len(ORDER) + 1):
            message(client, session.id, f"Turn {number}: do it.")
            watch.until("session.status_idle", seconds=180)
        watch.close()
    said = [f"Said {number} by {name}." for number, name in enumerate(ORDER, 1)]
    assert words(watch.seen) == said
    assert not [each for each in watch.seen if each.type == "session.error"]
    # one that goes down is asked three times, and whoever is next once, with all that was thought
    saw = {name: [signed(one) for one in asked(ran[name])] for name in ORDER}
    assert saw == {
        "direct": [THOUGHT[:0], THOUGHT[:1], THOUGHT[:2], *[THOUGHT[:3]] * 3],
        "aws": [THOUGHT[:3], THOUGHT[:4], *[THOUGHT[:5]] * 3],
        "gcp": [THOUGHT[:5], THOUGHT[:6], *[THOUGHT[:7]] * 3],
        "last": [[]],
    }
    for one in asked(ran["aws"]):
        as_of_bedrock(one)
    for one in asked(ran["gcp"]):
        as_of_vertex(one)
        assert others(one)["calls"] == others(one)["results"] > 0
    for one in asked(ran["last"]):
        as_of_another_model(one)
    everything = json.dumps([one.body for each in ran.values() for one in each.requests])
    assert SECRET not in everything
    moved = [each for each in box.records() if each["type"] == "model.moved"]
    assert [each["to_provider"] for each in moved] == ["aws", "gcp", "last"]
    assert {each["reason"] for each in moved} == {"failed"}
