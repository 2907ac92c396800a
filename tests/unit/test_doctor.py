"""`ringfence doctor` says before a start what a start would say, and changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import load_config
from ringfence.errors import CallerError, UnavailableError
from ringfence.sandbox.protocol import Control, ControlState
from ringfence.sandbox.registry import Backends
from ringfence.worker.launch import Launcher


class Host:
    """A backend whose host lacks what it is told to lack."""

    name = "host"

    def __init__(self, *missing: str, broken: bool = False) -> None:
        self.missing, self.broken = missing, broken

    def probe(self, _: Any) -> Sequence[ControlState]:
        if self.broken:
            raise UnavailableError("isolation-unavailable", "no namespaces", hint="sysctl x=1")
        return [
            ControlState(
                control=c, enforced=c not in self.missing, how=f"how {c}", mend=f"mend {c}"
            )
            for c in Control
        ]


def doctor(
    place: Path,
    host: Host,
    *arguments: str,
    key: str | None = "sk-ant-any-key",
    claude: bool = True,
    limits: Any = None,
    **more: str,
) -> Any:
    binary = place / "claude"
    binary.touch(mode=0o755 if claude else 0o644)
    state = place / "state"
    own = {"HOME": str(place), "RINGFENCE_STATE_DIR": str(state), "RINGFENCE_CLAUDE": str(binary)}
    config = load_config({**own, **more})
    launcher = Launcher(
        config=config,
        make_backends=lambda _: Backends({"bubblewrap": lambda: host}),  # type: ignore[dict-item,return-value]
        environment_key=key,
    )
    context = AppContext(
        config=config, launcher=lambda: launcher, run=lambda _: None, limits=limits
    )
    return CliRunner().invoke(app, ["doctor", *arguments], obj=context)


def checks(result: Any) -> dict[str, dict[str, str]]:
    return {line["name"]: line for line in json.loads(result.stdout)["checks"]}


def test_a_host_that_has_everything(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host(), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ready"] is True
    assert {line["state"] for line in checks(result).values()} == {"ok"}
    assert not (tmp_path / "state").exists(), "it only looks"


def test_what_stops_a_start_is_named_with_its_mend(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host("memory", "uid_per_sandbox"))
    assert result.exit_code == 4
    assert "✗ memory" in result.stdout
    assert "mend memory; or in the policy: accept_unenforced: [memory]" in result.stdout
    assert "- uid_per_sandbox" in result.stdout
    assert "A run would not start" in result.stdout


def test_what_the_policy_accepts_does_not_stop_it(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\naccept_unenforced: [memory]\n")
    result = doctor(tmp_path, Host("memory"), "--json", "--policy", str(policy))
    assert (result.exit_code, checks(result)["memory"]["state"]) == (0, "accepted")
    result = doctor(tmp_path, Host("memory", "cpu"), "--json", "--policy", str(policy))
    assert (result.exit_code, checks(result)["cpu"]["state"]) == (4, "stops")


def test_isolation_that_cannot_run(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host(broken=True), "--json")
    assert result.exit_code == 4
    assert (checks(result)["bubblewrap"]["state"], checks(result)["bubblewrap"]["mend"]) == (
        "stops",
        "sysctl x=1",
    )


def test_a_missing_key_is_said_and_does_not_stop_it(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host(), "--json", key=None)
    assert result.exit_code == 0
    assert checks(result)["credential"]["mend"] == "ringfence vault set anthropic"


def test_a_key_that_no_header_can_carry_stops_it_and_is_not_shown(tmp_path: Path) -> None:
    for key in ("short", "sk-ant-two words", "sk-ant-ü-12345"):
        result = doctor(tmp_path, Host(), "--json", key=key)
        found = checks(result)["credential"]
        assert (result.exit_code, found["state"]) == (4, "stops")
        assert "ANTHROPIC_API_KEY" in found["how"]
        assert key not in result.output


def test_a_policy_without_a_model_is_no_hook_beside_a_credential(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\n")
    result = doctor(tmp_path, Host(), "--json", "--policy", str(policy))
    assert (result.exit_code, checks(result)["model"]["state"]) == (0, "missing"), "exec needs none"
    assert "api.anthropic.com" in checks(result)["model"]["mend"]
    assert "model" not in checks(doctor(tmp_path, Host(), "--json"))


def test_a_store_of_limits_that_does_not_answer_stops_a_start(tmp_path: Path) -> None:
    class Store:
        async def breakers(self) -> tuple[dict[str, Any], float]:
            if away:
                raise UnavailableError("store-unavailable", "it is away", hint="start it")
            return {}, 0.0

        async def close(self) -> None:
            closed.append(away)

    closed: list[bool] = []
    store = {"RINGFENCE_LIMITS__STORE": "rediss://limits.example.com/0"}
    for away in (True, False):
        result = doctor(tmp_path, Host(), "--json", limits=Store, **store)
        line = checks(result)["limits"]
        assert (result.exit_code, line["state"]) == ((4, "stops") if away else (0, "ok"))
        assert line["mend"] == ("start it" if away else "")
    assert closed == [True, False]
    assert "limits" not in checks(doctor(tmp_path, Host(), "--json", limits=Store)), "its own file"


def test_a_provider_is_named_by_its_name_its_region_and_its_login(tmp_path: Path) -> None:
    policy, missing = tmp_path / "policy.yaml", tmp_path / "not-there"
    provider = {
        "kind": "bedrock",
        "region": "eu-central-1",
        "models": {"claude-sonnet-5": "anthropic.claude-sonnet-5-v1:0"},
        "aws": {"credentials_file": str(missing)},
    }
    settings = {"RINGFENCE_PROVIDERS__AWS": json.dumps(provider)}

    def found(model: dict[str, object]) -> dict[str, dict[str, str]]:
        hosts = {"allowed_hosts": ["api.anthropic.com"]}
        policy.write_text(json.dumps({"version": 1, "network": hosts, "model": model}))
        result = doctor(tmp_path, Host(), "--json", "--policy", str(policy), **settings)
        return checks(result)

    unknown = found({"provider": "nobody"})["provider"]
    assert (unknown["state"], unknown["how"]) == ("stops", "the settings name no provider nobody")
    far = found({"provider": "aws", "regions": ["us-east-1"]})["provider"]
    assert far["state"] == "stops"
    assert far["how"] == "aws serves from eu-central-1; the policy allows us-east-1"
    pytest.importorskip("botocore")
    lines = found({"provider": "aws", "regions": ["eu-central-1"]})
    assert lines["provider"]["how"] == "aws: bedrock in eu-central-1"
    assert lines["login"]["state"] == "stops"
    assert lines["login"]["how"].startswith("secret-absent: ")
    missing.write_text(
        "[default]\naws_access_key_id = AKIAX\naws_secret_access_key = not-shown-1\n"
    )
    missing.chmod(0o600)
    lines = found({"provider": "aws", "providers": ["aws"]})
    assert lines["login"]["state"] == "ok"
    assert "not-shown-1" not in json.dumps(lines)


def test_a_claude_that_cannot_be_executed(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host(), "--json", claude=False)
    assert (result.exit_code, checks(result)["claude"]["state"]) == (4, "stops")


def test_a_credential_that_its_source_does_not_give_stops_the_runs_that_use_it(
    tmp_path: Path,
) -> None:
    there = tmp_path / "there"
    there.touch(0o600)
    there.write_text("a-value-of-a-file")
    places = {"anthropic": "file:///nowhere/at/all", "other": "credential://x", "good": f"file://{there}"}  # fmt: skip
    settings = {
        f"RINGFENCE_SECRETS__CREDENTIALS__{name.upper()}__SOURCE": source
        for name, source in places.items()
    }
    result = doctor(tmp_path, Host(), "--json", **settings)
    assert result.exit_code == 4
    lines = [line for line in json.loads(result.stdout)["checks"] if line["name"] == "secret"]
    said = {line["how"].partition(":")[0]: line for line in lines}
    assert {name: line["state"] for name, line in said.items()} == {
        "anthropic": "stops",
        "other": "missing",  # no rule of this policy uses it
        "good": "ok",
    }
    assert "secret-absent" in said["anthropic"]["how"]
    assert "secrets.credentials.NAME.source" in said["anthropic"]["mend"]
    assert "LoadCredential=" in said["other"]["mend"]
    assert "a-value-of-a-file" not in result.output
    assert not (tmp_path / "state").exists(), "it only looks"
    with pytest.raises(CallerError, match=r"credentials\.other\.source: write vault://") as caught:
        doctor(tmp_path, Host(), RINGFENCE_SECRETS__CREDENTIALS__OTHER__SOURCE="vault://kv/../x#y")
    assert caught.value.code == "settings-invalid"


@pytest.mark.user
def test_a_state_directory_of_another_user(tmp_path: Path) -> None:
    os.symlink("/etc", tmp_path / "state")
    result = doctor(tmp_path, Host(), "--json")
    assert (result.exit_code, checks(result)["state directory"]["state"]) == (4, "stops")


def test_a_bad_policy_is_one_line(tmp_path: Path) -> None:
    result = doctor(tmp_path, Host(), "--preset", "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("ringfence: policy-invalid: ")
