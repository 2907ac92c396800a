"""A settings file of the sandbox runtime becomes a policy that is never wider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringfence.cli.main import app
from ringfence.errors import CallerError
from ringfence.policy.compile import compile_policy
from ringfence.policy.import_srt import import_srt
from ringfence.policy.load import from_mapping


def policy(**settings: Any) -> tuple[Any, dict[str, list[str]]]:
    found = import_srt(settings)
    notes: dict[str, list[str]] = {}
    for name, text in found.notes:
        notes.setdefault(name, []).append(text)
    return compile_policy(from_mapping(found.policy)), notes


def hosts(compiled: Any) -> set[str]:
    return {rule.host for rule in compiled.egress.hosts}


def test_hosts_and_paths_come_over() -> None:
    compiled, _ = policy(
        network={"allowedDomains": ["pypi.org", "*.example.com"], "deniedDomains": []},
        filesystem={
            "denyRead": ["/data/private", "/elsewhere"],
            "allowRead": ["/data"],
            "allowWrite": [".", "/out"],
            "denyWrite": [],
        },
    )
    assert hosts(compiled) == {"pypi.org", "*.example.com"}
    assert compiled.sandbox.readable == ("/data",)
    assert compiled.sandbox.writable == ("/out",)
    assert compiled.sandbox.blocked == ("/data/private",)
    assert compiled.sandbox.isolation == "runtime"


@pytest.mark.parametrize(
    ("allowed", "denied", "left"),
    [
        (["a.example.com"], ["a.example.com"], set()),
        (["a.example.com", "b.example.org"], ["*.example.com"], {"b.example.org"}),
        (["*.example.com"], ["secret.example.com"], set()),
        (["*.example.com"], ["*.internal.example.com"], set()),
        (["*.example.com"], ["SECRET.example.com"], set()),
        (["a.example.com"], ["*"], set()),
        (["*"], [], set()),
        (["a.example.com"], ["b.example.com"], {"a.example.com"}),
    ],
)
def test_a_denial_is_never_lost(allowed: list[str], denied: list[str], left: set[str]) -> None:
    compiled, notes = policy(network={"allowedDomains": allowed, "deniedDomains": denied})
    assert hosts(compiled) == left
    assert notes


def test_a_writable_path_with_an_exception_is_left_out() -> None:
    files = {"allowWrite": ["/out", "/other"], "denyWrite": ["/out/keep"]}
    compiled, notes = policy(filesystem=files)
    assert compiled.sandbox.writable == ("/other",)
    assert any("denyWrite has a path in it" in text for text in notes["filesystem.allowWrite"])


def test_what_has_no_equivalent_is_named() -> None:
    _, notes = policy(
        network={"allowedDomains": [], "allowAllUnixSockets": True, "newSetting": 1},
        filesystem={"allowRead": ["~/x", "/a/*"], "denyWrite": ["/etc"]},
        credentials={"files": []},
        enableWeakerNestedSandbox=True,
    )
    assert "ever shown" in notes["network.allowAllUnixSockets"][0]
    assert notes["network.newSetting"] == ["no equivalent; left out"]
    assert len(notes["filesystem.allowRead"]) == 2
    assert "vault" in notes["credentials"][0]
    assert "never weaker" in notes["enableWeakerNestedSandbox"][0]


@pytest.mark.parametrize("value", [[], "x", {"network": []}, {"network": {"allowedDomains": "x"}}])
def test_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(CallerError):
        import_srt(value)


def test_the_command_prints_a_policy_that_loads(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"network": {"allowedDomains": ["pypi.org"], "mitmProxy": {}}}))
    done = CliRunner().invoke(app, ["policy", "import-srt", str(file)])
    assert done.exit_code == 0
    assert "backend: runtime" in done.stdout
    assert "network.mitmProxy: egress takes its place" in done.stderr
    file.write_text("{")
    assert CliRunner().invoke(app, ["policy", "import-srt", str(file)]).exit_code == 2
