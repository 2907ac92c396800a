"""`ringfence policy`: one line an error, JSON on request, exit status by family."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from ringfence.cli.policy import app
from ringfence.policy.load import PRESETS, preset_text


def run(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def risky(tmp_path: Path) -> str:
    path = tmp_path / "risky.yaml"
    path.write_text(
        "preset: strict\nnetwork:\n  allowed_hosts: [api.anthropic.com, '*.example.com']\n"
    )
    return str(path)


def test_lint_passes_a_preset_and_names_findings(risky: str) -> None:
    assert run("lint").exit_code == 0
    result = run("lint", risky)
    assert result.exit_code == 0
    assert f"warning POL004 {risky}:3:38: network.allowed_hosts[1]: " in result.stdout
    assert run("lint", "--strict", risky).exit_code == 2
    findings = json.loads(run("lint", "--json", risky).stdout)["findings"]
    keys = ["id", "severity", "path", "message", "mend", "file", "line", "column"]
    assert list(findings[0]) == keys
    assert [findings[0][key] for key in keys[-3:]] == [risky, 3, 38]
    # a line of the preset stands in no file
    assert [json.loads(run("lint", "--json", "strict").stdout)["findings"][0][k] for k in keys[-3:]] == ["", None, None]  # fmt: skip


def test_lint_fails_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("accept_unenforced: [network]\n")
    result = run("lint", str(path))
    assert result.exit_code == 2
    assert "POL031" in result.stdout


def test_a_missing_path_is_a_finding_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        f"preset: strict\nfilesystem: {{readable_paths: [{tmp_path}, {tmp_path}/absent]}}\n"
    )
    result = run("lint", str(path))
    assert result.exit_code == 0
    assert result.stdout.count("POL020") == 1
    assert "absent" in result.stdout


def test_lint_prints_every_problem_on_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("version: 2\nnetwork: {allowed_hosts: ['*', '*.com']}\n")
    result = run("lint", str(path))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 3
    assert [line.split(": ")[2] for line in result.stderr.splitlines()] == [
        f"{path}:1:1",
        f"{path}:2:27",
        f"{path}:2:32",
    ]
    for command in (["explain", str(path)], ["diff", "strict", str(path)]):
        assert run(*command).stderr == result.stderr
    as_json = json.loads(run("lint", "--json", str(path)).stdout)
    assert as_json["loads"] is False
    assert [(found["path"], found["line"], found["column"]) for found in as_json["problems"]] == [
        ("version", 1, 1),
        ("network.allowed_hosts[0]", 2, 27),
        ("network.allowed_hosts[1]", 2, 32),
    ]


def test_errors_have_a_code_and_a_status(tmp_path: Path) -> None:
    for arguments in (
        ["explain", str(tmp_path / "no")],
        ["diff", "strict", str(tmp_path)],
        ["lint", str(tmp_path / "no")],
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("ringfence: policy-unreadable: ")
    assert (
        json.loads(run("explain", "--json", "/no").stdout)["error"]["code"] == "policy-unreadable"
    )
    assert run("presets", "lax").exit_code == 2


def test_explain_speaks_both_ways() -> None:
    assert "The model route permits:" in run("explain", "ci").stdout
    assert json.loads(run("explain", "--json", "ci").stdout)["role"] == "ci"


def test_diff_compares_presets_and_files(risky: str) -> None:
    result = run("diff", "strict", risky)
    assert result.exit_code == 0
    assert "+ host: *.example.com:443 every method and path" in result.stdout
    assert run("diff", "--exit-code", "strict", risky).exit_code == 3
    assert run("diff", "--exit-code", risky, "strict").exit_code == 0
    assert json.loads(run("diff", "--json", "strict", risky).stdout)["widens"] is True


def test_a_policy_may_come_from_standard_input() -> None:
    text = preset_text("strict")
    assert run("explain", "-", stdin=text).stdout == run("explain", "strict").stdout
    assert run("diff", "--exit-code", "strict", "-", stdin=text).exit_code == 0
    assert run("diff", "--exit-code", "review", "-", stdin=text).exit_code == 3
    assert run("lint", "-", stdin="version: 2\n").stderr.startswith(
        "ringfence: policy-invalid: -:1:1: version: "
    )
    twice = run("diff", "-", "-", stdin=text)
    assert twice.exit_code == 2
    assert twice.stderr.startswith("ringfence: usage: standard input is one policy")


@pytest.mark.parametrize("command", ["lint", "explain", "schema", "diff", "presets"])
def test_every_command_helps_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: " in result.stdout
    assert f"ringfence policy {command}" in result.stdout


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(run("schema").stdout))


def test_presets_are_listed_and_printed() -> None:
    listed = run("presets").stdout.splitlines()
    assert [line.partition(":")[0] for line in listed] == list(PRESETS)
    assert run("presets", "strict").stdout == preset_text("strict")
    as_json = json.loads(run("presets", "--json").stdout)["presets"]
    assert [f"{found['name']}: {found['summary']}" for found in as_json] == listed
    assert json.loads(run("presets", "ci", "--json").stdout)["text"] == preset_text("ci")


def test_a_path_that_may_not_be_looked_at_is_a_finding_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "p.yaml"
    path.write_text("preset: strict\nfilesystem: {readable_paths: [/data/closed]}\n")
    with monkeypatch.context() as patched:
        patched.setattr("os.stat", refused)
        result = run("lint", str(path))
    assert result.exit_code == 0
    assert "POL020" in result.stdout
