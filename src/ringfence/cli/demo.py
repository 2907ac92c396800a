"""`ringfence demo`: the main job, offline, in under a minute, and five attacks on the fence.

The model is simulated, and so says what its script says; everything that is claimed beside it is
looked at from outside: the tests run again on the patched files, and what reached the upstream.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from ringfence.cli.context import AppContext
from ringfence.cli.live import LiveView, silent
from ringfence.cli.output import clear_errors, print_json
from ringfence.config import Provider
from ringfence.model import RunRequest, RunResult, RunStatus
from ringfence.policy.isolation import Technology
from ringfence.record.safe_text import printable

if TYPE_CHECKING:
    from ringfence.simulator.server import Recorded

_CANARY = "sk-ant-demo-CANARY-never-inside-the-fence"
_INTRODUCTION = (
    "A small shop has a bug. The real claude, in a real sandbox without a network, is asked to fix "
    "it; only the model's answers are simulated, so this needs no key and no network."
)


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(
        "demo",
        short_help="Watch an agent work in the fence, and the fence attacked.",
        epilog="Examples: ringfence demo · ringfence demo --isolation gvisor",
    )(demo)


def demo(
    context: typer.Context,
    *,
    isolation: Annotated[
        Technology, typer.Option("--isolation", help="The fence; see `isolation list`.")
    ] = "bubblewrap",
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Let a (simulated) agent fix a failing test in a real fence, then attack the fence."""
    with clear_errors(as_json=json), tempfile.TemporaryDirectory(prefix="ringfence-demo-") as name:
        story = yaml.safe_load(
            (resources.files("ringfence.simulator") / "scenarios" / "demo.yaml").read_text()
        )
        work = _play(context.obj, story, Path(name), isolation=isolation, quiet=json)
        outcome = asyncio.run(work)
        if json:
            print_json(outcome)
        raise typer.Exit(0 if outcome["held"] else 1)


async def _play(
    context: AppContext,
    story: dict[str, Any],
    place: Path,
    *,
    isolation: Technology = "bubblewrap",
    quiet: bool,
) -> dict[str, Any]:
    from ringfence.agent.permissions import DenyApprover
    from ringfence.cli.patch import apply_run
    from ringfence.policy.compile import compile_policy
    from ringfence.policy.load import from_mapping
    from ringfence.simulator.script import Scenario
    from ringfence.simulator.server import Simulator

    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    workspace = _repository(place / "basket", story["files"])
    scenario = Scenario.model_validate({"default": story["steps"]})
    with Simulator(scenario) as simulator:
        launcher = context.launcher()
        config = launcher.config.model_copy(
            update={
                "state_dir": place / "state",
                "providers": {"anthropic": Provider(base_url=simulator.base_url)},
            }
        )
        launcher = replace(launcher, config=config, environment_key=_CANARY)
        policy = compile_policy(from_mapping(_policy(isolation)))
        async with launcher.station(DenyApprover(), policy.sandbox.isolation) as station:
            console.print(_INTRODUCTION, soft_wrap=False)
            console.rule("an agent fixes a failing test, inside the fence")
            before = await _tests(console, station, policy, workspace, "before")
            view = silent() if quiet else LiveView(command=False)
            request = RunRequest(prompt=story["prompt"], workspace=str(workspace))
            result = await _attempt(station, policy, request, view)
            _show(console, result)
            untouched = _texts(workspace) == story["files"]
            if result.patch:
                apply_run(config.state_dir, result.run_id, include=())
            after = await _tests(console, station, policy, workspace, "after the patch")
            attacks = await _attack(console, station, policy, story["attacks"], workspace)
        reached = _reached(console, simulator.requests)
        verified = _verify(console, place / "state")
    fixed = result.status is RunStatus.SUCCEEDED and untouched and not before and after
    held = verified and not reached and all(attack["held"] for attack in attacks)
    return {
        "held": held and fixed,
        "status": result.status.value,
        "tests_pass": {"before": before, "after": after},
        "workspace_untouched": untouched,
        "reached_upstream": reached,
        "changed_files": result.changed_files,
        "cost_usd": result.usage.cost_usd,
        "attacks": attacks,
        "audit_verified": verified,
    }


def _policy(isolation: Technology) -> dict[str, Any]:
    """The strict preset; an ordinary user's demo accepts by name what only root can enforce on
    some hosts, and says so at every start. A machine may be emulated here, and has the time for it.
    """
    accepted = [] if os.geteuid() == 0 else ["memory", "cpu"]
    policy: dict[str, Any] = {
        "preset": "strict",
        "isolation": {"backend": isolation},
        "accept_unenforced": accepted,
    }
    if isolation == "microvm":
        policy["isolation"]["emulation"] = "allow"
        policy["execution"] = {"max_duration_seconds": 1600, "max_tool_seconds": 200}
    return policy


def _texts(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


async def _tests(console: Console, station: Any, policy: Any, workspace: Path, when: str) -> bool:
    """Whether the repository's tests pass, run in a fence of their own."""
    command = ("python3", "-m", "unittest")
    request = RunRequest(prompt="", workspace=str(workspace), command=command)
    result = await _attempt(station, policy, request, silent())
    passed = result.exit_code == 0
    said = (result.text + result.stderr).strip().splitlines() or ["(no answer)"]
    style = "green" if passed else "yellow"
    console.print(f"[{style}]tests {when}: {escape(printable(said[-1]))}[/]")
    return passed


def _reached(console: Console, requests: list[Recorded]) -> list[str]:
    """What came to the upstream that an agent's turn does not ask for; seen from outside."""
    asked = {"/v1/messages", "/v1/messages/count_tokens"}
    reached = sorted({request.path for request in requests} - asked)
    keys = {request.headers.get("x-api-key") for request in requests}
    if keys - {_CANARY}:
        reached.append("a foreign key")
    if reached:
        console.print(f"[bold red]reached the upstream: {escape(', '.join(reached))}[/]")
    else:
        console.print(
            f"[dim]the upstream saw {len(requests)} model requests, each with the platform's key, "
            "and nothing else[/]"
        )
    return reached


def _repository(path: Path, files: dict[str, str]) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


async def _attempt(station: Any, policy: Any, request: RunRequest, view: Any) -> RunResult:
    from ringfence.worker.control import RunControl
    from ringfence.worker.launch import attempt

    return await attempt(station, policy, request, control=RunControl(), on_message=view.show)


def _show(console: Console, result: RunResult) -> None:
    if result.error is not None:
        console.print(f"[bold red]{escape(printable(result.error['message']))}[/]")
    console.rule("the patch it leaves; your files are untouched")
    for line in result.patch.decode("utf-8", "replace").splitlines():
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        console.print(printable(line), style=style, markup=False)
    if result.hidden_files:
        console.print(f"[dim]hidden from the agent: {escape(', '.join(result.hidden_files))}[/]")
    usage = result.usage
    console.print(
        f"[dim]{usage.requests} model requests · {usage.input_tokens + usage.output_tokens} tokens"
        f" · ${usage.cost_usd or 0:.4f} at list price, metered on the wire[/]"
    )


async def _attack(
    console: Console, station: Any, policy: Any, attacks: list[dict[str, str]], workspace: Path
) -> list[dict[str, Any]]:
    console.rule("five attacks from inside")
    outcomes = []
    for attack in attacks:
        request = RunRequest(
            prompt="attack", workspace=str(workspace), command=("bash", "-c", attack["script"])
        )
        result = await _attempt(station, policy, request, silent())
        said = result.text.strip().splitlines()
        held = bool(said) and not any("ESCAPED" in line or _CANARY in line for line in said)
        mark = "[green]blocked[/]" if held else "[bold red]ESCAPED[/]"
        silence = (result.error or {}).get("message", "(no answer)")
        last = escape(printable(said[-1] if said else silence))
        console.print(f"{mark}  {escape(attack['title'])}\n         [dim]{last}[/]")
        outcomes.append({"title": attack["title"], "held": held, "said": said[-1] if said else ""})
    return outcomes


def _verify(console: Console, state_dir: Path) -> bool:
    """The verifier that anyone can run on a copy of the log."""
    from ringfence.record.verify import describe, verify

    console.rule("the audit log verifies")
    key = (state_dir / "audit" / "public.key").read_text()
    report = verify(state_dir / "audit" / "log.sqlite", key, [])
    if report.ok:
        console.print(
            f"[green]{report.records} records[/], each bound to all before it by a Merkle tree, "
            "signed with Ed25519"
        )
    else:
        console.print(f"[bold red]{escape(describe(report))}[/]")
    return report.ok
