"""The real claude behind each dialect: the demo's task, and what it does when one says no."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Box, script

from providers_rig import Issuer, in_base64
from ringfence.simulator.clouds import Clouds
from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator

pytest.importorskip("botocore")
pytest.importorskip("google.auth")

STORY = yaml.safe_load(
    (resources.files("ringfence.simulator") / "scenarios" / "demo.yaml").read_text()
)
NAMES = (
    *(f"claude-opus-{version}" for version in ("4-6", "4-7", "4-8", "5", "5-5")),
    *(f"claude-sonnet-{version}" for version in ("4-5", "4-6", "5", "5-5")),
    *(f"claude-haiku-{version}" for version in ("4-5", "4-5-20251001", "5", "5-5")),
)
KEY, SECRET = "AKIASTATIC0123456789", "static-secret-key-0123456789"


@pytest.fixture
def played() -> Iterator[Simulator]:
    scenario = Scenario.model_validate({"default": STORY["steps"]})
    clouds = Clouds(keys={KEY: (SECRET, None)}, region="eu-central-1")
    with Simulator(scenario, clouds) as simulator:
        yield simulator


def repository(place: Path) -> None:
    for name, text in STORY["files"].items():
        (place / name).write_text(text)


def aws(box: Box, base_url: str, **more: Any) -> dict[str, str]:
    sealed = box.call("vault", "set", "aws-keys", stdin=f"{KEY}:{SECRET}\n")
    assert sealed.code == 0, sealed.err
    provider = {
        "kind": "bedrock",
        "region": "eu-central-1",
        "base_url": base_url,
        "models": {name: f"eu.anthropic.{name}-v1:0" for name in NAMES},
        "aws": {"credential": "aws-keys"},
        **more,
    }
    return {"RINGFENCE_PROVIDERS__AWS": json.dumps(provider)}


def mended(box: Box, done: Any) -> None:
    asked = {one["model"] for one in box.records() if one["type"] == "model.requested"}
    assert done.code == 0, f"{asked} {done.out} {done.err}"
    assert "len(self.prices) >= 3" in done.json["patch"]
    assert done.json["usage"]["cost_usd"] > 0


def test_the_demos_task_is_done_on_bedrock(box: Box, played: Simulator) -> None:
    repository(box.workspace)
    box.policy({"preset": "strict", "model": {"provider": "aws", "regions": ["eu"]}})
    environment = aws(box, played.base_url)
    mended(box, box.run(STORY["prompt"], **environment))
    assert played.requests
    assert all(request.path.startswith("/model/") for request in played.requests)
    asked = [one for one in box.records() if one["type"] == "model.requested"]
    assert {one["provider"] for one in asked} == {"aws"}
    box.policy({"preset": "strict", "model": {"provider": "aws", "regions": ["eu-central-1"]}})
    denied = box.run(STORY["prompt"], **environment)
    assert (denied.code, denied.json["error"]["code"]) == (3, "provider-denied")


def test_the_demos_task_is_done_on_vertex(box: Box, played: Simulator) -> None:
    repository(box.workspace)
    box.policy({"preset": "strict", "model": {"provider": "gcp", "providers": ["gcp"]}})
    with Issuer() as issuer:
        sealed = box.call("vault", "set", "sa", stdin=in_base64(issuer.key()) + "\n")
        assert sealed.code == 0, sealed.err
        provider = {
            "kind": "vertex",
            "region": "europe-west1",
            "base_url": f"{played.base_url}/v1",
            "models": {name: name for name in NAMES},
            "google": {"credential": "sa", "token_endpoint": issuer.url},
        }
        done = box.run(STORY["prompt"], RINGFENCE_PROVIDERS__GCP=json.dumps(provider))
        mended(box, done)
        assert issuer.given
    assert all("/publishers/anthropic/models/" in request.path for request in played.requests)


@pytest.mark.storm
def test_claude_lives_with_errors_of_bedrock_and_without_counting(
    box: Box, played: Simulator
) -> None:
    box.policy({"preset": "strict", "model": {"provider": "aws"}})
    environment = aws(box, played.base_url)
    steps = [
        {"error": 529, "times": 2},
        {"error": 429, "retry_after": 0.1, "times": 1},
        {"text": "Cut.", "drop_after": 3, "times": 1},
        {"text": "Done."},
    ]
    done = box.run(script(*steps), **environment)
    assert done.code == 0, done.out + done.err
    count = (
        "python3 - <<'PY'\nimport http.client, json, socket\n"
        "link = socket.socket(socket.AF_UNIX); link.connect('/run/ringfence/egress.sock')\n"
        "c = http.client.HTTPConnection('model.internal'); c.sock = link\n"
        "c.request('POST', '/v1/messages/count_tokens', json.dumps({'model': 'claude-sonnet-5',"
        " 'messages': [{'role': 'user', 'content': 'x'}]}), {'content-type': 'application/json'})\n"
        "print(c.getresponse().headers['x-ringfence-reason'])\nPY"
    )
    asked = box.execute(count, **environment)
    assert "count-not-at-provider" in asked.out
    done = box.run("/context", **environment)
    assert done.code == 0, done.out + done.err


@pytest.mark.storm
def test_keys_that_bedrock_does_not_know_end_the_run_at_once(box: Box, played: Simulator) -> None:
    box.policy({"preset": "strict", "model": {"provider": "aws"}})
    environment = aws(box, played.base_url, region="us-east-1")
    done = box.run("Hello", seconds=40, **environment)
    assert done.code == 5
    assert "provider-credential-refused" in done.out
    assert SECRET not in done.out + done.err
    doctor = box.call("doctor", "--policy", str(box.place / "policy.yaml"), "--json", **environment)
    assert {line["name"]: line["state"] for line in doctor.json["checks"]}["login"] == "ok"
