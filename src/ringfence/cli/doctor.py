"""`ringfence doctor`: will a run start on this host, and with what of the policy enforced."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.run import PolicyFile, Preset
from ringfence.errors import RingfenceError
from ringfence.policy.compiled import CompiledPolicy

if TYPE_CHECKING:
    from ringfence.limits.store import LimitStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One answer.

    Attributes:
        state: `stops` a start; `missing` does not, or not yet; `accepted` by the policy.
    """

    name: str
    state: Literal["ok", "accepted", "missing", "stops"]
    how: str
    mend: str = ""


_MARKS = {"ok": "✓", "accepted": "!", "missing": "-", "stops": "✗"}


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(
        "doctor",
        short_help="Say whether a run would start here, and what would mend it.",
        epilog="Example: ringfence doctor --policy policy.yaml",
    )(doctor)


def doctor(
    context: typer.Context,
    *,
    policy: PolicyFile = None,
    preset: Preset = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether a run would start on this host, and what would mend it; changes nothing.

    Tries what a start needs: bubblewrap, user namespaces, control groups, the claude binary, the
    state directory, a credential and, where the settings name one, its source. Fails (4) when a
    start would be refused, or the run would lack a credential that its policy names.
    """
    with clear_errors(as_json=as_json):
        from ringfence.policy.compile import compile_policy
        from ringfence.policy.load import load_policy

        lines = list(_examine(context.obj, compile_policy(load_policy(policy, preset=preset))))
        ready = not any(line.state == "stops" for line in lines)
        if as_json:
            print_json({"ready": ready, "checks": [asdict(line) for line in lines]})
        else:
            _print(lines, ready=ready)
        raise typer.Exit(0 if ready else 4)


def _print(lines: list[Line], *, ready: bool) -> None:
    for line in lines:
        typer.echo(f"{_MARKS[line.state]} {line.name:<18} {line.how}")
        if line.mend:
            typer.echo(f"  {'':<18} {line.mend}")
    typer.echo("A run would start here." if ready else "A run would not start: mend what has a ✗.")


def _examine(context: AppContext, policy: CompiledPolicy) -> Iterator[Line]:
    yield Line(name="python", state="ok", how=platform.python_version())
    yield _state_directory(context.state_dir)
    yield from _isolation(context, policy)
    yield _claude(context)
    yield from _provider(context, policy)
    yield from _sources(context, policy)
    yield from _limits(context)


def _state_directory(path: Path) -> Line:
    """Looked at, not made: a doctor leaves nothing behind."""
    there = next(place for place in (path, *path.parents) if place.exists())
    own = there != path or path.stat().st_uid == os.geteuid()
    if there.is_dir() and own and os.access(there, os.W_OK | os.X_OK):
        return Line(name="state directory", state="ok", how=str(path))
    mend = "set RINGFENCE_STATE_DIR to a directory of your own"
    return Line(name="state directory", state="stops", how=f"{there} is not ours", mend=mend)


def _isolation(context: AppContext, policy: CompiledPolicy) -> Iterator[Line]:
    from ringfence.sandbox.protocol import not_held, stopping

    launcher = context.launcher()
    try:
        picked = launcher.make_backends(launcher.config).pick(policy.sandbox)
        backend = picked.backend
        states = backend.probe(policy.sandbox)
    except RingfenceError as error:
        name = policy.sandbox.isolation
        yield Line(name=name, state="stops", how=error.message, mend=error.hint)
        return
    how = f"it can start a sandbox; {picked.reason}" if picked.reason else "it can start a sandbox"
    yield Line(name=backend.name, state="ok", how=how)
    for clause, instead in not_held(backend).items():
        name = clause.replace("_", " ")
        yield Line(name="not held", state="missing", how=f"{name}: {instead}")
    accepted = policy.sandbox.accept_unenforced
    stops = stopping(states, accepted)
    for state in states:
        name = state.control.value
        if state.enforced:
            yield Line(name=name, state="ok", how=state.how)
        elif name in accepted:
            yield Line(name=name, state="accepted", how=f"{state.how}; the policy accepts it")
        elif state in stops:
            mend = f"{state.mend}; or in the policy: accept_unenforced: [{name}]"
            yield Line(name=name, state="stops", how=state.how, mend=mend)
        else:
            yield Line(name=name, state="missing", how=state.how, mend=state.mend)


def _claude(context: AppContext) -> Line:
    from ringfence.worker.launch import bundled_claude

    try:
        path = context.config.claude or bundled_claude()
    except RingfenceError as error:
        return Line(name="claude", state="stops", how=error.message, mend=error.hint)
    if not os.access(path, os.X_OK):
        return Line(name="claude", state="stops", how=f"{path} cannot be executed")
    return Line(name="claude", state="ok", how=str(path))


def _provider(context: AppContext, policy: CompiledPolicy) -> Iterator[Line]:
    """Whether it is there, may be asked, and knows us."""
    from ringfence.worker.providers import denied, known

    rules, config = policy.egress.model, context.config
    if not rules.enabled:
        yield Line(
            name="model",
            state="missing",
            how="the policy allows none; `exec` needs none",
            mend="network.allowed_hosts: [api.anthropic.com], wherever the provider is",
        )
    elif not known(config, rules.provider):
        how = f"the settings name no provider {rules.provider}"
        mend = f"set providers.{rules.provider} in the settings, or model.provider in the policy"
        yield Line(name="provider", state="stops", how=how, mend=mend)
    elif refused := denied(config, rules):
        mend = "model.provider, providers and regions in the policy"
        yield Line(name="provider", state="stops", how=refused, mend=mend)
    else:
        found = config.providers[rules.provider]
        where = f" in {found.region}" if found.region else ""
        yield Line(name="provider", state="ok", how=f"{rules.provider}: {found.kind}{where}")
        yield _credential(context, policy)
        names = [rules.provider, *(leg.provider for leg in rules.failover if leg.provider)]
        for name in dict.fromkeys(names):
            if known(config, name) and config.providers[name].login is not None:
                yield _login(context, name, first=name == rules.provider)


def _login(context: AppContext, provider: str, *, first: bool) -> Line:
    """Tried now: a role that cannot be assumed stops every request that goes there."""
    import asyncio

    from ringfence.config.providers import LOGIN
    from ringfence.egress.sources import look
    from ringfence.worker.launch import logins

    config, named = context.config, "login" if first else f"login of {provider}"
    asked = {LOGIN + provider: logins(config)[LOGIN + provider]}
    states = asyncio.run(look(config.secrets, config.state_dir, asked))
    state = next(one for one in states if one.name == LOGIN + provider)
    if not state.good:
        how = f"{state.code}: {state.message}"
        return Line(name=named, state="stops", how=how, mend=state.hint)
    lasts = "" if state.lease_seconds is None else f", for {state.lease_seconds:.0f} s"
    return Line(name=named, state="ok", how=f"{state.source} gives what it is asked with{lasts}")


def _credential(context: AppContext, policy: CompiledPolicy) -> Line:
    provider = policy.egress.model.provider
    url = context.config.providers[provider].base_url
    try:
        missing = context.launcher().missing_credential(*policy.egress.model.reached)
    except RingfenceError as error:
        mend = error.hint or "a whole key there, or ringfence vault set anthropic"
        return Line(name="credential", state="stops", how=error.message, mend=mend)
    if missing is None:
        return Line(name="credential", state="ok", how=f"there is one for {url}")
    how, mend = f"none for {url}; `exec` needs none", f"ringfence vault set {missing}"
    return Line(name="credential", state="missing", how=how, mend=mend)


def _limits(context: AppContext) -> Iterator[Line]:
    """A store that is not this host's is asked now: without it nothing is let through."""
    if context.config.limits.store is None and context.config.database is None:
        return
    try:
        store = context.limits() if context.limits is not None else None
        if store is None:
            return
        asyncio.run(_looked_at(store))
    except RingfenceError as error:
        yield Line(name="limits", state="stops", how=error.message, mend=error.hint)
    else:
        yield Line(name="limits", state="ok", how="their store answers")


async def _looked_at(store: LimitStore) -> None:
    try:
        await store.breakers()
    finally:
        await store.close()


def _sources(context: AppContext, policy: CompiledPolicy) -> Iterator[Line]:
    """Each is asked now. What this policy does not use stops no run of it."""
    from ringfence.egress.sources import look

    config = context.config
    used = {rule.name for rule in policy.egress.credentials}
    if policy.egress.model.enabled:
        asked = (config.providers.get(name) for name in policy.egress.model.reached)
        used |= {one.credential for one in asked if one is not None and one.credential}
    for one in asyncio.run(look(config.secrets, context.state_dir)):
        if one.good:
            yield Line(name="secret", state="ok", how=f"{one.name}: {one.source}")
        else:
            how = f"{one.name}: {one.code}, {one.message}"
            state: Literal["missing", "stops"] = "stops" if one.name in used else "missing"
            yield Line(name="secret", state=state, how=how, mend=one.hint)
