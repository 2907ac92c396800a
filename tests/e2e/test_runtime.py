"""The real claude in the sandbox runtime: the model and allowed hosts by egress, and no other way."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Box, bash, script

from backends import needs, settings

pytestmark = needs("runtime")


@pytest.fixture
def runtime(box: Box) -> dict[str, str]:
    box.policy({"preset": "ci", "isolation": {"backend": "runtime"}})
    return {k: v for k, v in settings(box.state).items() if k == "RINGFENCE_RUNTIME"}


def test_claude_works_in_it(box: Box, runtime: dict[str, Any]) -> None:
    done = box.run(script(bash("echo made > new.txt; id -u"), {"text": "Done."}), **runtime)
    assert done.code == 0, done.err
    assert done.json["status"] == "succeeded"
    assert "+made" in done.json["patch"]
    (started,) = [r for r in box.records() if r["type"] == "sandbox.started"]
    assert started["isolation"] == "runtime"
    assert "the_egress_directory" in started["not_held"]
    kinds = {r["type"] for r in box.records()}
    assert "model.requested" in kinds, "the model was asked through egress"


def test_the_way_out_is_egress_and_it_decides(box: Box, runtime: dict[str, Any]) -> None:
    ask = "curl -sS -o /dev/null -w '%{http_connect}' https://denied.example.com/; echo"
    done = box.execute(ask, **runtime)
    assert "403" in done.json["output"], done.json
    denied = [r for r in box.records() if r["type"] == "egress.refused"]
    assert any(r["target"].startswith("denied.example.com") for r in denied), (
        "egress itself said so"
    )
    direct = "curl -sS --noproxy '*' -m 3 https://192.0.2.1/; echo status $?"
    assert "status 0" not in box.execute(direct, **runtime).json["output"]


def test_the_declaration_is_printed_at_the_start_and_by_the_doctor(
    box: Box, runtime: dict[str, Any]
) -> None:
    policy = str(box.place / "policy.yaml")
    done = box.call("exec", "-w", str(box.workspace), "-p", policy, "--", "true", **runtime)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "not: uid 1000 without capabilities" in said
    assert "the root is read only" not in said
    assert "tmp_noexec" not in said
    doctor = box.call("doctor", "--policy", policy, "--json", **runtime)
    assert any(line["name"] == "not held" for line in doctor.json["checks"])
