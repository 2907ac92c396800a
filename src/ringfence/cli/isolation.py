"""`ringfence isolation`: the technologies, what they are worth, and what this host lacks."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.run import PolicyFile, Preset
from ringfence.errors import RingfenceError
from ringfence.policy.isolation import (
    BOUNDARIES,
    EMULATED_BOUNDARY,
    THREATS,
    Availability,
    strength,
)
from ringfence.record.safe_text import printable

if TYPE_CHECKING:
    from ringfence.policy.compiled import SandboxProfile
    from ringfence.sandbox.registry import Backends

app = group("What agents can be isolated with on this host.")
_COSTLY = {"microvm"}
"""Not measured unasked: a cold start may take seconds."""


@app.callback()
def _group() -> None:
    """What agents can be isolated with on this host."""


@app.command("list", epilog="Example: ringfence isolation list --measure --policy policy.yaml")
def list_(
    context: typer.Context,
    *,
    policy: PolicyFile = None,
    preset: Preset = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the start-up of each anew.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List each technology: whether it can run here or what would mend it, what it is worth, what
    it needs, and its start-up (start a sandbox, run `true`) as measured on this host.
    """
    with clear_errors(as_json=as_json):
        from ringfence.policy.compile import compile_policy
        from ringfence.policy.load import load_policy

        profile = compile_policy(load_policy(policy, preset=preset)).sandbox
        found = asyncio.run(_survey(context.obj, profile, measure=measure))
        if as_json:
            print_json(found)
        else:
            _print(found)


async def _survey(context: AppContext, profile: SandboxProfile, *, measure: bool) -> dict[str, Any]:
    from ringfence.worker.launch import private_directory

    launcher = context.launcher()
    private_directory(context.state_dir)
    backends = launcher.make_backends(launcher.config)
    try:
        rows = [
            await _row(context, backends, name, profile, measure=measure) for name in BOUNDARIES
        ]
        takes, reason = _takes(backends, profile)
    finally:
        await backends.close()
    return {
        "threat_model": profile.threat_model,
        "policy": profile.isolation,
        "takes": takes,
        "reason": reason,
        "technologies": rows,
    }


def _takes(backends: Backends, profile: SandboxProfile) -> tuple[str | None, str]:
    try:
        picked = backends.pick(profile)
    except RingfenceError as error:
        return None, error.message
    return picked.backend.name, picked.reason or "the policy names it"


async def _row(
    context: AppContext, backends: Backends, name: str, profile: SandboxProfile, *, measure: bool
) -> dict[str, Any]:
    from ringfence.sandbox.protocol import not_held

    state = backends.availability(name, profile)
    boundary = BOUNDARIES[name]  # type: ignore[index]
    clauses = not_held(backends.get(name)) if name in backends.names else {}
    return {
        "name": name,
        "available": not state.problem,
        "problem": state.problem,
        "mend": state.mend if state.problem else "",
        "emulated": state.emulated,
        **asdict(boundary),
        "strength": strength(name, emulated=state.emulated),
        "not_held": dict(clauses),
        "start_up": await _start_up(context, backends, name, state, profile, anew=measure),
    }


async def _start_up(
    context: AppContext,
    backends: Backends,
    name: str,
    state: Availability,
    profile: SandboxProfile,
    *,
    anew: bool,
) -> dict[str, Any] | None:
    from ringfence.sandbox.measure import Measured, measure

    kept = Measured(context.state_dir)
    known = kept.get(name)
    if not state.problem and (anew or (known is None and name not in _COSTLY)):
        try:
            backend = backends.get(name)
            known = await measure(backend, context.state_dir, emulation=profile.emulation)
        except RingfenceError as error:
            return {"error": error.message}
        kept.keep(name, known)
    return asdict(known) if known is not None else None


def _print(found: dict[str, Any]) -> None:
    for row in found["technologies"]:
        mark = "✓" if row["available"] else "✗"
        emulated = ", emulated" if row["emulated"] else ""
        lines = [
            f"{mark} {row['name']:<11} strength {row['strength']}{emulated}; {_time(row)}",
            f"  {row['summary']}",
            f"  a kernel bug: {row['kernel_bug']}",
        ]
        if row["emulated"]:
            lines += [f"  emulated here: {EMULATED_BOUNDARY}"]
        if not row["available"]:
            lines += [f"  here: {row['problem']}"]
            lines += [f"  mend: {row['mend']}"] if row["mend"] else [f"  needs: {row['needs']}"]
        else:
            lines += [f"  needs: {row['needs']}"]
        for clause, instead in row["not_held"].items():
            lines += [f"  does not hold: {clause.replace('_', ' ')} ({instead})"]
        typer.echo("\n".join(printable(line) for line in lines))
    threat = found["threat_model"]
    if threat:
        typer.echo(f"threat model {threat}: {THREATS[threat].meaning}")
    typer.echo(printable(f"this policy takes: {found['takes'] or 'none'} ({found['reason']})"))


def _time(row: dict[str, Any]) -> str:
    start_up = row["start_up"]
    if start_up is None:
        return "start-up not measured" + (" (--measure does)" if row["available"] else "")
    if "error" in start_up:
        return f"start-up not measured: {start_up['error']}"
    return f"start-up {start_up['seconds'] * 1000:.0f} ms ({start_up['at'][:10]})"
