"""The documents are true: their commands run, their policies load, their reference is the code."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from harness import ACCEPT, Box, script
from pydantic import BaseModel

from ringfence.config import Config
from ringfence.control.agent_shapes import AgentDefinition
from ringfence.control.environment_shapes import EnvironmentDefinition
from ringfence.images.definition import loads as image_definition
from ringfence.policy.document import PolicyDocument
from ringfence.policy.load import from_mapping

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "docs" / "reference" / "events.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    found = re.finditer(
        rf"^(`{{3,}}){language}\n(.*?)\n\1$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [match[2] for match in found]


def _play(page: Path, place: Path, policy: str) -> subprocess.CompletedProcess[str]:
    """All `sh` blocks of a page, as one shell reads them; ports are replaced by free ones."""
    (place / "policy.yaml").write_text(policy)
    text = "\n".join(_blocks(page, "sh"))
    for port in sorted(set(re.findall(r"\b87\d\d\b", text))):
        with socket.create_server(("127.0.0.1", 0)) as free:
            text = text.replace(port, str(free.getsockname()[1]))
    binaries = place / "bin"
    binaries.mkdir()
    (binaries / "ringfence").write_text(f'#!/bin/sh\nexec {sys.executable} -m ringfence "$@"\n')
    (binaries / "ringfence").chmod(0o755)
    return subprocess.run(
        ["bash", "-c", f"set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{text}"],
        cwd=place,
        env={
            "PATH": f"{binaries}:/usr/bin:/bin",
            "HOME": str(place),
            "RINGFENCE_STATE_DIR": str(place / "state"),
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(300)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorial.md"
    (policy,) = [text for text in _blocks(page, "yaml") if text.startswith("# policy.yaml")]
    done = _play(page, tmp_path, policy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "do-not-look" not in done.stdout + done.stderr
    assert "post-checkout" in done.stdout


def test_the_page_on_secrets_runs(tmp_path: Path) -> None:
    done = _play(ROOT / "docs" / "how-to" / "secrets.md", tmp_path, "")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ok  version" in done.stdout
    assert "ghp_" not in done.stdout + done.stderr


@pytest.mark.timeout(300)  # five runs of the real claude
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page shows the use of curl")
def test_the_page_about_the_simulator_runs(tmp_path: Path) -> None:
    policy = yaml.safe_dump({"preset": "ci", "accept_unenforced": ACCEPT})
    done = _play(ROOT / "docs" / "how-to" / "simulator.md", tmp_path, policy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "tape.jsonl").read_text()


def test_every_policy_of_the_documents_loads() -> None:
    """Parts of a policy too: each is shown as it would stand in one."""
    seen = 0
    for page in PAGES:
        for text in _blocks(page, "yaml"):
            value = yaml.safe_load(text)
            if page.name == "images.md" and not text.startswith("# policy.yaml"):
                image_definition(text)
            elif text.startswith("# agent.yaml"):
                AgentDefinition.model_validate(value)
            elif text.startswith("# place.yaml"):
                EnvironmentDefinition.model_validate(value)
            elif isinstance(value, dict):
                from_mapping({"version": 1, **value})
                seen += 1
    assert seen >= 4


def test_every_settings_file_of_the_documents_loads(tmp_path: Path) -> None:
    for page in PAGES:
        for text in _blocks(page, "toml"):
            for name in re.findall(r'"/etc/ringfence/([^"]+)"', text):
                (tmp_path / name).touch()
            here = text.replace("/etc/ringfence", str(tmp_path))
            Config.model_validate({"state_dir": tmp_path, **tomllib.loads(here)})


def test_every_python_block_of_the_documents_names_what_exists() -> None:
    """Parsed, and what it imports imported; the calls need a key."""
    for page in PAGES:
        for text in _blocks(page, "python"):
            tree = ast.parse(text)
            imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), page.name, "exec"), {})
            for name in re.findall(r"\bringfence\.(\w+)\(", text):
                assert hasattr(__import__("ringfence"), name), f"{page.name}: {name}"


def _policy_with(words: str) -> dict[str, Any]:
    (text,) = [t for t in _blocks(ROOT / "docs" / "how-to" / "README.md", "yaml") if words in t]
    return {"version": 1, **yaml.safe_load(text)}


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    if asked["method"] == "initialize":
        answer = {"protocolVersion": asked["params"]["protocolVersion"],
                  "capabilities": {"tools": {}}, "serverInfo": {"name": "docs", "version": "1"}}
    elif asked["method"] == "tools/list":
        answer = {"tools": [{"name": "search", "inputSchema": {"type": "object"}}]}
    elif asked["method"] == "tools/call":
        open("/workspace/asked.txt", "w").write(json.dumps(asked["params"]["arguments"]))
        answer = {"content": [{"type": "text", "text": "found it"}]}
    else:
        answer = {}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer}), flush=True)
"""


def test_the_mcp_server_of_the_how_to_runs(box: Box) -> None:
    (box.workspace / "tools").mkdir()
    (box.workspace / "tools" / "docs_server.py").write_text(MCP_SERVER)
    policy = _policy_with("docs_server")
    assert "mcp__docs__search" in policy["tools"]["roles"]["helper"]["allow"]
    box.policy(policy)
    call = {"tool": "mcp__docs__search", "input": {"query": "fence"}}
    found = {
        "result_contains": "found it",
        "then": [{"text": "yes"}],
        "otherwise": [{"text": "no"}],
    }
    done = box.run(script(call, found), "--permission-mode", "dontAsk")
    assert done.code == 0, done.out + done.err
    assert done.json["text"] == "yes"
    assert done.json["changed_files"] == ["asked.txt"]


def test_the_run_of_the_how_to_for_ci_applies_and_holds_back(box: Box) -> None:
    """What runs by itself later stays out of the checkout; what a build runs is written and named."""
    (block,) = [
        t for t in _blocks(ROOT / "docs" / "how-to" / "README.md", "yaml") if "RUNNER_TEMP" in t
    ]
    (line,) = [text[len("- run: ") :] for text in block.splitlines() if "RUNNER_TEMP" in text]
    (box.workspace / "a.txt").write_text("Helo\n")
    policy = box.policy({"preset": "ci"})
    late = ".github/workflows/x.yml .vscode/tasks.json .envrc conftest.py"
    plant = (
        f"sed -i s/Helo/Hello/ a.txt; for f in {late}; do mkdir -p $(dirname $f); echo x > $f; done"
    )
    prompt = script({"tool": "Bash", "input": {"command": plant}}, {"text": "ok"})
    assert "Fix the failing tests" in line
    # the policy accepts what an ordinary user's host cannot enforce
    line = line.replace('"Fix the failing tests"', '"$PROMPT"').replace(
        "--preset ci", f"--policy {policy}"
    )
    line = line.replace("ringfence ", f"{sys.executable} -m ringfence ")
    more = {"RUNNER_TEMP": str(box.place), "PROMPT": prompt}
    subprocess.run(["bash", "-ec", line], cwd=box.workspace, env=box.environment | more, check=True)
    result = json.loads((box.place / "result.json").read_text())
    held = [".envrc", ".github/workflows/x.yml", ".vscode/tasks.json"]
    assert sorted(result["applied"]["held"]) == held
    assert not [name for name in held if (box.workspace / name).exists()]
    assert "conftest.py" in result["host_files"]
    assert (box.workspace / "a.txt").read_text() == "Hello\n"
    assert (box.workspace / "conftest.py").exists()


def test_the_checkpoints_of_the_how_to_verify(box: Box, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "how-to" / "README.md").read_text()
    block = text.partition("## Keep checkpoints elsewhere")[2].partition("```sh\n")[2]
    commands = block.partition("```")[0].replace("2026-11-24", "$(date +%F)")
    commands = commands.replace("/tmp/", f"{tmp_path}/").replace("/somewhere/else", str(tmp_path))
    commands = commands.replace("ringfence ", f"{sys.executable} -m ringfence ")
    box.execute("true")
    done = subprocess.run(
        ["bash", "-ec", commands], env=box.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "evidence").iterdir())


def _section(title: str) -> str:
    """The `sh` blocks below a heading of the how-to, as one script."""
    text = (ROOT / "docs" / "how-to" / "README.md").read_text()
    below = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```sh\n(.*?)```", below, re.DOTALL))


def _said(box: Box, commands: str) -> subprocess.CompletedProcess[str]:
    commands = re.sub(r"\bringfence (?=[a-z])", f"{sys.executable} -m ringfence ", commands)
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", commands],
        cwd=box.place,
        env=box.environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_review_of_a_policy_in_ci_runs(box: Box) -> None:
    """The same policy passes; one that a pull request widens ends with 3."""
    path, commands = box.place / "policy.yaml", _section("Review a change of policy in CI")
    path.write_text("version: 1\npreset: strict\n")
    git = "git -c user.name=a -c user.email=a@example.com"
    kept = f"git init -q . && git add policy.yaml && {git} commit -qm one"
    done = _said(box, f"{kept} && git update-ref refs/remotes/origin/main HEAD\n{commands}")
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(
        "version: 1\npreset: strict\nnetwork:\n  allowed_hosts: [api.anthropic.com, example.com]\n"
    )
    done = _said(box, commands)
    assert (done.returncode, "+ " in done.stdout) == (3, True), done.stdout + done.stderr


def test_what_a_siem_and_an_accountant_read_is_as_the_how_to_says(box: Box) -> None:
    box.policy({"preset": "ci"})
    run = box.run(script({"text": "ok"})).json["run_id"]
    spool = box.place / "siem"
    siem = _section("Feed a SIEM").replace("/var/spool/siem", str(spool))
    done = _said(box, siem.replace("41999", "2").replace("| collector", "| tee collected"))
    assert done.returncode == 0, done.stderr
    lines = (spool / "ocsf.jsonl").read_text().splitlines()
    later = (box.place / "collected").read_text().splitlines()
    assert later == lines[3:] != []
    done = _said(box, _section("See what was spent").replace("run_…", run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(run) == 1
    assert "total  " in done.stdout


def test_the_probe_of_the_page_about_check_finds_the_fence_closed(box: Box) -> None:
    """Both its blocks as they stand; the second is a line with other words that gets out."""
    page = ROOT / "docs" / "how-to" / "check.md"
    (own,) = _blocks(page, "json")
    (command,) = [text for text in _blocks(page, "sh") if "own.json" in text]
    policy = box.policy({"preset": "strict"})
    command = command.strip() + f" --policy {policy}"
    (box.place / "own.json").write_text(own)
    done = _said(box, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 pass, 0 fail" in done.stdout
    allowed = 'import os; esc(conn(os.environ[\\"ALLOW_HOST\\"] + \\":443\\"))'
    (box.place / "own.json").write_text(own.replace('esc(conn(\\"evil.example:443\\"))', allowed))
    done = _said(box, command)
    assert done.returncode == 1, done.stdout + done.stderr


def _resolves(model: Any, parts: list[str]) -> bool:
    """Whether settings of pydantic have such a path; a key of a mapping may be any."""
    field = model.model_fields.get(parts[0])
    if field is None or len(parts) == 1:
        return field is not None
    inner = str(field.annotation)
    rest = parts[2:] if "dict[" in inner.lower() else parts[1:]
    return not rest or any(_resolves(one, rest) for one in _models(field.annotation))


def _models(kind: Any) -> Iterator[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for below in get_args(kind):
        yield from _models(below)


def test_every_setting_that_the_documents_name_exists() -> None:
    """Variables of the environment, and `section.key` of settings or of a policy."""
    events = {row for row in re.findall(r"`([a-z_.]+)`", EVENTS.read_text()) if "." in row}
    events |= {"slo.alert_fired", "slo.alert_resolved"}  # kinds of webhooks
    clients = {"API_KEY", "URL", "PLAIN_HTTP"}  # of commands that talk to a gateway
    seen = 0
    for page in (one for one in PAGES if "reference" not in one.parts):
        text = page.read_text()
        for name in set(re.findall(r"\bRINGFENCE_([A-Z0-9_]+)\b(?!…)", text)) - clients:
            assert _resolves(Config, name.lower().split("__")), f"{page.name}: RINGFENCE_{name}"
            seen += 1
        for name in set(re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`", text)) - events:
            parts = name.split(".")
            if parts[0] in {*Config.model_fields, *PolicyDocument.model_fields}:
                known = _resolves(Config, parts) or _resolves(PolicyDocument, parts)
                assert known, f"{page.name}: {name}"
                seen += 1
    assert seen > 40


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def _commands() -> dict[str, str]:
    """`run`, `audit verify`, … to their help, from the generated reference."""
    text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    return dict(
        re.findall(
            r"^## `ringfence ?([\w ]*)`\n\n```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )
    )


def test_the_documents_name_real_commands_and_options() -> None:
    """Every `ringfence …` of a command block or of code in a line: the command, and its options."""
    known = _commands()
    groups = {name.split()[0] for name in known if name}
    seen = set()
    for page in [page for page in PAGES if page.name != "cli.md"]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^|[`(| ])ringfence ([a-z][^`\n|)#]*)", text, re.MULTILINE):
            words = line.split()
            if words[0] not in groups:
                continue
            name = words[0]
            if len(words) > 1 and f"{name} {words[1]}" in known:
                name = f"{name} {words[1]}"
            seen.add(name)
            ours = line.partition(" -- ")[0]
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", ours):
                assert option in known[name], f"{page.name}: ringfence {line}: {option}"
    assert {"run", "exec", "demo", "audit verify", "patch apply", "vault set"} <= seen


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_exit_statuses_of_the_page_about_ci() -> None:
    from ringfence.errors import AgentError, CallerError, DeniedError, UnavailableError

    text = (ROOT / "docs" / "how-to" / "README.md").read_text()
    families = {CallerError: "your input", DeniedError: "denied", AgentError: "the agent failed"}
    for family, words in {**families, UnavailableError: "this host cannot"}.items():
        assert f"{family.exit_status} {words}" in text


def test_an_agent_under_a_policy_without_a_model_is_refused_before_it_starts(box: Box) -> None:
    box.policy({"version": 1})
    done = box.run("hi")
    assert (done.code, done.json["error"]["code"]) == (3, "model-denied")
    assert "api.anthropic.com" in done.json["error"]["hint"]
    assert box.execute("echo yes").json["output"] == "yes\n", "a command needs none"
