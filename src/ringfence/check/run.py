"""One whole check: what is asked, of which isolations, and everything that was found."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.check import promised, providers, secrets, static, versions
from ringfence.check.catalogue import EVERYTHING, Selection
from ringfence.check.finding import Finding
from ringfence.check.live import Attack
from ringfence.check.probes.definition import Probe, built_in
from ringfence.check.report import Result, Tried
from ringfence.config import Config
from ringfence.config.secrets import SecretSettings
from ringfence.errors import CallerError, RingfenceError
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.document import PolicyDocument
from ringfence.sandbox.protocol import Backend, ControlState, engine_of, not_held, stopping

if TYPE_CHECKING:
    from ringfence.control.platform import Platform

Factories = Mapping[str, Callable[[Config], Backend]]
Tell = Callable[[Finding], None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be checked.

    Attributes:
        isolation: a name, `all` or `auto`. own: an operator's probes beside the built-in ones.
        platform: makes what reads the platform's database; None where nothing can.
    """

    config: Config
    backends: Factories
    document: PolicyDocument
    source: str
    isolation: str = "auto"
    selection: Selection = EVERYTHING
    own: tuple[Probe, ...] = ()
    platform: Callable[[], Platform] | None = None


async def check(question: Question, tell: Tell) -> Result:
    """Ask everything; findings are told as they come.

    Raises:
        CallerError: `isolation-unknown`.
        UnavailableError: `isolation-unavailable` for one that was named and cannot run here.
    """
    policy = compile_policy(question.document)
    began, now = time.monotonic(), datetime.now(UTC)
    names = resolve(question, policy)
    found: list[Finding] = []

    def keep(finding: Finding) -> None:
        if question.selection.takes(finding.check.id):
            found.append(finding)
            tell(finding)

    async for finding in _without_a_sandbox(question, policy, names):
        keep(finding)
    tried = [await _isolation(question, policy, name, keep) for name in names]
    return Result(
        time=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        seconds=time.monotonic() - began,
        policy=policy.digest,
        policy_source=question.source,
        isolations=tuple(tried),
        findings=tuple(found),
    )


async def _without_a_sandbox(
    question: Question, policy: CompiledPolicy, names: Sequence[str]
) -> AsyncIterator[Finding]:
    config, takes = question.config, question.selection.takes
    found = [
        *static.policy_findings(question.document, exists=os.path.exists),
        *static.feature_findings(policy),
        *await promised.asked(config, policy.egress.model, question.platform, takes=takes),
        *providers.findings(config, policy),
    ]
    for finding in found:
        yield finding
    if any(takes(check.id) for check in secrets.checks()):
        for finding in await secrets.findings(config):
            yield finding
    if any(takes(check.id) for check in versions.checks()):
        for finding in versions.findings(
            names, engine=policy.sandbox.engine, runtime=config.runtime
        ):
            yield finding


def resolve(question: Question, policy: CompiledPolicy) -> Sequence[str]:
    """Names of the isolations to check; `auto` takes the policy's, or the first that can run."""
    known = question.backends
    if question.isolation == "all":
        return tuple(known)
    name = question.isolation
    if name == "auto":
        name = policy.sandbox.isolation
    if name == "auto":
        usable = (one for one in known if not _unavailable(question, policy, one))
        name = next(usable, next(iter(known)))
    if name not in known:
        raise CallerError(
            "isolation-unknown",
            f"there is no isolation {name!r}",
            hint=f"one of {', '.join(known)}, or all, or auto",
        )
    return (name,)


def _unavailable(question: Question, policy: CompiledPolicy, name: str) -> RingfenceError | None:
    try:
        question.backends[name](question.config).probe(policy.sandbox)
    except RingfenceError as error:
        return error
    return None


async def _isolation(question: Question, policy: CompiledPolicy, name: str, tell: Tell) -> Tried:
    began = time.monotonic()
    missing = _unavailable(question, policy, name)
    if missing is not None:
        if question.isolation != "all":
            raise missing
        for finding in static.absent_controls(name, str(missing)):
            tell(finding)
        why = f"{missing.message}. {missing.hint}".strip()
        return Tried(name=name, available=False, why=why)
    backend, accepted = question.backends[name](question.config), policy.sandbox.accept_unenforced
    states = backend.probe(policy.sandbox)
    stops = stopping(states, accepted)
    if stops:
        # no run starts under this policy, so that there is nothing to attack: the controls say it
        for finding in static.control_findings(name, states, accepted):
            tell(finding)
        return Tried(name=name, available=False, why=_stopped(stops))
    attack = _attack(question, policy, name, tell, declared=not_held(backend))
    if attack.probes:
        await attack.run()
    for finding in static.control_findings(name, attack.controls or states, accepted):
        tell(finding)
    return Tried(
        name=name,
        available=True,
        engine=engine_of(backend, policy.sandbox),
        start_seconds=attack.start_seconds,
        seconds=time.monotonic() - began,
    )


def _apart(config: Config, state: Path) -> Config:
    """The same with a state directory of the check's own, and no way to the operator's secrets.
    What guests boot is not state: the operator's own is what is attacked.
    """
    machines = config.machines or config.state_dir / "microvm"
    return config.model_copy(
        update={"state_dir": state, "machines": machines, "secrets": SecretSettings()}
    )


def _stopped(stops: Sequence[ControlState]) -> str:
    names = ", ".join(state.control.value for state in stops)
    return (
        f"nothing starts under this policy, since this host cannot enforce {names}. "
        f"{stops[0].mend}; or name them under accept_unenforced to attack what there is"
    )


def _attack(
    question: Question,
    policy: CompiledPolicy,
    name: str,
    tell: Tell,
    *,
    declared: Mapping[str, str],
) -> Attack:
    probes = [
        probe for probe in (*built_in(), *question.own) if question.selection.takes(probe.check.id)
    ]
    factory = question.backends[name]
    return Attack(
        name,
        lambda state: factory(_apart(question.config, state)),
        policy.sandbox,
        probes,
        tell,
        claude=question.config.claude,
        declared=declared,
    )
