"""The operator's policy and an environment → the policy of a run. PURE.

The operator's policy is the ceiling. Every line of an environment is held against it: what is at
most as wide takes its place, what is wider is refused by name, and nothing is cut down in
silence. At the end the two policies are compared as `ringfence policy diff` does, by code that
knows nothing of this file: a defect here stops the start, and does not open a hole.

A session resumed tomorrow is compiled anew, so that today's policy holds for it (requirement H).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.control.environment_shapes import (
    EnvironmentDefinition,
    ExecutionBlock,
    FilesystemBlock,
    Limited,
    RingfenceBlock,
    Unrestricted,
)
from ringfence.control.shapes import Way
from ringfence.errors import CallerError, DeniedError
from ringfence.model import WorkspaceMode
from ringfence.policy.compile import WORKSPACE_WIDTH, compile_policy, failover_of
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.diff import diff
from ringfence.policy.document import HostGrant, PolicyDocument
from ringfence.policy.hosts import MODEL_HOST, matches
from ringfence.policy.isolation import SEATS, THREAT_MODELS, ThreatModel, floor
from ringfence.policy.paths import WORKSPACE, below
from ringfence.policy.validate import build


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRules:
    """What the operator has settled about networks beside the policy.

    Attributes:
        unrestricted: whether an environment may ask for every host of the policy at once.
        package_hosts: what `allow_package_managers` stands for; empty refuses it.
    """

    unrestricted: bool = False
    package_hosts: tuple[str, ...] = ()


def narrow(
    ceiling: PolicyDocument,
    environment: EnvironmentDefinition,
    rules: NetworkRules,
    *,
    mcp_hosts: Iterable[str] = (),
) -> PolicyDocument:
    """The policy of runs in this environment. `mcp_hosts`: those of the agent's MCP servers.

    Raises:
        DeniedError: `unrestricted-denied`, `environment-denied`: a line is wider than the ceiling.
        CallerError: `policy-invalid`: lines that are each narrow and contradict each other;
            `hosting-unsupported`: several agents in a sandbox that cannot keep them apart.
    """
    block = environment.ringfence or RingfenceBlock()
    values: dict[str, Any] = ceiling.canonical()
    _network(values, ceiling, environment, rules, tuple(mcp_hosts))
    _filesystem(values, ceiling, block.filesystem or FilesystemBlock())
    _execution(values["execution"], block.execution or ExecutionBlock())
    _isolation(values, ceiling, block)
    _hosting(values["hosting"], ceiling, block)
    ways = block.failover
    if ways is not None and (strange := _failover(values["model"], ceiling, ways)):
        raise _wider(strange, "a way that the operator's policy does not name")
    narrowed = build(values)
    _hold(ceiling, narrowed)
    if block.agents > 1:
        _seats(compile_policy(narrowed).sandbox, block.agents)
    return narrowed


def approval_seconds(most: float, environment: EnvironmentDefinition) -> float:
    """How long a call in this environment may wait for its answer; `most` is the operator's.

    Raises:
        DeniedError: `environment-denied`.
    """
    wanted = environment.ringfence.approval_seconds if environment.ringfence else None
    if wanted is not None and wanted > most:
        raise _wider(f"approval_seconds: {wanted:g}", f"more than the operator's {most:g}")
    return most if wanted is None else wanted


HOSTING: dict[str, tuple[str, ...]] = {
    "ephemeral": ("ephemeral",),
    "hybrid": ("ephemeral", "hybrid"),
    "long-running": ("ephemeral", "hybrid", "long-running"),
    "multi-agent": ("ephemeral", "multi-agent"),
}
"""What each pattern of the operator's permits: a sandbox that lives less long. Several agents in
one sandbox are another thing than one agent for long, and neither stands for the other."""


def _hosting(section: dict[str, Any], ceiling: PolicyDocument, block: RingfenceBlock) -> None:
    if block.hosting is None:
        return
    pattern, own = block.hosting.replace("_", "-"), ceiling.hosting.pattern
    if pattern not in HOSTING[own]:
        raise _wider(f"hosting: {block.hosting}", f"more than the policy's {own}")
    section["pattern"] = pattern


def with_ways(policy: PolicyDocument, ways: Sequence[Way]) -> PolicyDocument:
    """An agent's choice among the ways that are left of the operator's, as an environment has it.

    Raises:
        DeniedError: `agent-denied`.
    """
    values: dict[str, Any] = policy.canonical()
    if strange := _failover(values["model"], policy, ways):
        raise DeniedError(
            "agent-denied",
            f"{strange} asks for a way that the operator's policy does not name, or that the "
            "environment has left out",
            hint="name fewer, or have the operator add it to model.failover of the policy",
        )
    chosen = build(values)
    _hold(policy, chosen)
    return chosen


def _failover(section: dict[str, Any], ceiling: PolicyDocument, named: Sequence[Way]) -> str:
    """The operator's ways that are named, in the order that they are named in; or the first that
    is not one. A way is a provider and a model together: that each of them stands somewhere in the
    list is not enough.
    """
    home = ceiling.model.provider
    own = {(leg.provider or home, leg.model): leg for leg in failover_of(ceiling)}
    ways = [(way.provider or home, way.model) for way in named]
    for provider, model in ways:
        if (provider, model) not in own:
            return f"failover: {model or 'the same model'} at {provider}"
    section["failover"] = [own[way].model_dump(mode="json") for way in ways]
    if ceiling.model.fallback not in {model for _, model in ways}:
        # it would be a way again, the last: what is not named is left out
        section["fallback"] = None
    return ""


_LEAST = {"memory_mb": 192, "pids": 32, "disk_mb": 1}
"""Of one agent's share: what a `claude` needs that answers once, its threads, and a runtime's that
starts it. With less it would be refused by the kernel, in a turn that was taken.
"""


def _seats(rules: SandboxProfile, agents: int) -> None:
    """Raise CallerError `hosting-unsupported` where so many agents cannot share a sandbox."""
    name = rules.isolation
    # of `auto` the host decides, later: a session that was taken would have no place then
    why = "what it comes to is known at the start only" if name == "auto" else SEATS[name]
    hint = "isolation: container, or hosting: ephemeral, a sandbox each"
    written = [path for path in rules.writable if not below(path, WORKSPACE)]
    if not why and written:
        why, hint = f"all of them would write to {written[0]}", "take that path out"
    small = [key for key, least in _LEAST.items() if getattr(rules.limits, key) < least * agents]
    if not why and small:
        why = f"{small[0]} is too small to be shared by {agents}"
        hint = f"max_agents, or {small[0].removesuffix('_mb')} of at least {_LEAST[small[0]]} each"
    if why:
        raise CallerError(
            "hosting-unsupported", f"hosting multi_agent with isolation {name}: {why}", hint=hint
        )


def _hold(ceiling: PolicyDocument, narrowed: PolicyDocument) -> None:
    """The second look, by the code that compares policies."""
    difference = diff(ceiling, narrowed)
    if difference.widens:
        gained = [*difference.gained, *difference.no_longer_denied]
        gained += [change.key for change in difference.limits if change.wider]
        raise _wider("the environment", f"more than the operator's policy: {'; '.join(gained)}")


def _wider(what: str, why: str) -> DeniedError:
    return DeniedError(
        "environment-denied",
        f"{what} asks for {why}",
        hint="ask for less, or have the operator widen the policy of the gateway",
    )


def _network(
    values: dict[str, Any],
    ceiling: PolicyDocument,
    environment: EnvironmentDefinition,
    rules: NetworkRules,
    mcp_hosts: tuple[str, ...],
) -> None:
    networking = environment.config.networking if environment.config else None
    if isinstance(networking, Unrestricted):
        if not rules.unrestricted:
            raise DeniedError(
                "unrestricted-denied",
                "networking `unrestricted` is refused: the operator has not allowed it",
                hint="use `limited` and name allowed_hosts; for the operator: "
                "RINGFENCE_GATEWAY__UNRESTRICTED=policy makes it stand for the policy's hosts",
            )
        return
    wanted = _wanted(networking or Limited(type="limited"), rules, mcp_hosts)
    grants = _grants(ceiling, wanted)
    kept = {grant.credential for grant in grants}
    values["network"]["allowed_hosts"] = [grant.model_dump(mode="json") for grant in grants]
    values["secrets"] = {name: secret for name, secret in values["secrets"].items() if name in kept}
    reachable = {(grant.host, grant.port) for grant in grants}
    _drop_servers(values["tools"], ceiling, reachable)


def _wanted(
    networking: Limited, rules: NetworkRules, mcp_hosts: tuple[str, ...]
) -> tuple[str, ...]:
    wanted = list(networking.allowed_hosts or ())
    if networking.allow_mcp_servers:
        wanted += mcp_hosts
    if networking.allow_package_managers:
        if not rules.package_hosts:
            raise DeniedError(
                "environment-denied",
                "allow_package_managers: the operator has named no package registries",
                hint="for the operator: name their hosts in the setting gateway.package_hosts",
            )
        wanted += rules.package_hosts
    return tuple(dict.fromkeys(wanted))


def _grants(ceiling: PolicyDocument, wanted: tuple[str, ...]) -> list[HostGrant]:
    """The ceiling's lines that hold for the wanted hosts; the model's own stays as it is."""
    found = {
        (grant.host, grant.port): grant
        for grant in ceiling.network.allowed_hosts
        if grant.host == MODEL_HOST
    }
    for host in wanted:
        if host == MODEL_HOST:
            continue
        own = list(_lines_for(ceiling.network.allowed_hosts, host))
        if not any(grant.host == host for grant in own):
            raise _wider(
                f"allowed_hosts: {host}", "a host that the operator's policy does not name"
            )
        for grant in own:
            found.setdefault((grant.host, grant.port), grant)
    return list(found.values())


def _lines_for(grants: tuple[HostGrant, ...], host: str) -> Iterator[HostGrant]:
    """Lines by which `host` may be reached, exact before wildcard at each port, as egress decides.

    For a wildcard also the exact lines below it: left out, the wildcard would hold for those
    hosts too, and their own lines may say less.
    """
    if host.startswith("*."):
        for grant in grants:
            if grant.host == host or matches(host, grant.host):
                yield grant
        return
    exact = [grant for grant in grants if grant.host == host]
    ports = {grant.port for grant in exact}
    yield from exact
    for grant in grants:
        if grant.host.startswith("*.") and matches(grant.host, host) and grant.port not in ports:
            yield grant.model_copy(update={"host": host})


def _drop_servers(
    tools: dict[str, Any], ceiling: PolicyDocument, reachable: set[tuple[str, int]]
) -> None:
    """Without its host an MCP server of the policy is not there, nor is any grant of its tools."""
    gone = [
        name
        for name, server in ceiling.tools.mcp_servers.items()
        if server.address is not None
        and not any(
            matches(host, server.address[0]) and port == server.address[1]
            for host, port in reachable
        )
    ]
    for name in gone:
        del tools["mcp_servers"][name]
        for role in (tools["roles"] or {}).values():
            for key in ("allow", "preapproved"):
                role[key] = [line for line in role[key] if not _of_server(line, name)]


def _of_server(line: str, server: str) -> bool:
    tool = line.partition("(")[0]
    return tool == f"mcp__{server}" or tool.startswith(f"mcp__{server}__")


def _filesystem(values: dict[str, Any], ceiling: PolicyDocument, block: FilesystemBlock) -> None:
    section = values["filesystem"]
    allowed = ceiling.filesystem
    for key in ("blocked_paths", "hidden"):
        stated = getattr(block, key) or ()
        section[key] = list(dict.fromkeys([*section[key], *stated]))
    for key in ("tmp_exec", "exec_in_workspace"):
        if getattr(block, key) is False:
            section[key] = False
    writable = tuple(allowed.writable_paths or ())
    _paths(section, "writable_paths", block.writable_paths, (*writable, WORKSPACE))
    _paths(
        section,
        "readable_paths",
        block.readable_paths,
        (*allowed.readable_paths, *writable, WORKSPACE),
    )
    if block.workspace is None and block.writable_paths is None:
        return
    _workspace(section, ceiling, block)


def _paths(
    section: dict[str, Any], key: str, stated: list[str] | None, allowed: tuple[str, ...]
) -> None:
    if stated is None:
        return
    for path in stated:
        # below a directory of the host a link may lead anywhere, and the mount would follow it
        if path not in allowed and not below(path, WORKSPACE):
            raise _wider(
                f"filesystem.{key}: {path}", "a path that the operator's policy does not name"
            )
    section[key] = list(dict.fromkeys(stated))


def _workspace(section: dict[str, Any], ceiling: PolicyDocument, block: FilesystemBlock) -> None:
    """The mode that is asked for, and no other; without one the ceiling's own, or narrower."""
    profile = compile_policy(ceiling).sandbox
    usual = profile.workspace_mode
    if block.writable_paths is not None and WORKSPACE not in block.writable_paths:
        usual = WorkspaceMode.READONLY
    mode = WorkspaceMode(block.workspace) if block.workspace else usual
    modes = {profile.workspace_mode, *profile.workspace_modes}
    if WORKSPACE_WIDTH.index(mode) > max(WORKSPACE_WIDTH.index(one) for one in modes):
        raise _wider(f"filesystem.workspace: {mode.value}", "a wider view than the policy's")
    if mode is WorkspaceMode.READONLY and WORKSPACE in (block.writable_paths or ()):
        raise _wider("filesystem.writable_paths: /workspace", "a workspace that is read-only")
    section["workspace"] = mode.value
    section["workspace_modes"] = [mode.value]
    listed = section["writable_paths"]
    if listed is not None:
        own = [path for path in listed if path != WORKSPACE]
        section["writable_paths"] = own if mode is WorkspaceMode.READONLY else [WORKSPACE, *own]


def _execution(section: dict[str, Any], block: ExecutionBlock) -> None:
    for key, value in block.model_dump(exclude_none=True).items():
        allowed = section[key]
        if value is not False and value > allowed:
            raise _wider(f"execution.{key}: {value:g}", f"more than the policy's {allowed:g}")
        section[key] = value


def _isolation(values: dict[str, Any], ceiling: PolicyDocument, block: RingfenceBlock) -> None:
    if block.isolation is None and block.threat_model is None:
        return
    section = values["isolation"]
    own = ceiling.isolation
    if block.threat_model and own.threat_model and _below(block.threat_model, own.threat_model):
        # not of the boundary alone: what is asked of the host, and checked, goes by it too
        raise _wider(
            f"threat_model: {block.threat_model}", f"less care than the policy's {own.threat_model}"
        )
    backend = block.isolation or (None if block.threat_model is None else "auto")
    model = block.threat_model or own.threat_model
    # an emulated machine is weaker than what its name says; whoever chooses, chooses a real one
    section.update(backend=backend, threat_model=model, emulation="deny")
    if backend == "auto" and model is None:
        raise _wider("isolation: auto", "a choice without a threat_model to choose by")
    profile = compile_policy(ceiling).sandbox
    # where a machine need not be emulated the policy's own choice is a real one
    least = floor(profile.isolation, profile.threat_model, emulation=False)
    name = backend or "bubblewrap"
    if floor(name, model) < least:
        raise _wider(f"isolation: {name}", f"a weaker boundary than the policy's ({least})")


def _below(one: ThreatModel, other: ThreatModel) -> bool:
    return THREAT_MODELS.index(one) < THREAT_MODELS.index(other)
