"""A compiled policy as a set of rights: what `explain` prints and `diff` compares. PURE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringfence.model import PermissionMode, WorkspaceMode
from ringfence.policy.compiled import (
    CompiledPolicy,
    EgressRules,
    HostRule,
    McpServer,
    ModelRules,
    PathRule,
    SandboxProfile,
)
from ringfence.policy.document import MODE_WIDTH
from ringfence.policy.hosts import matches, spelled
from ringfence.policy.isolation import BOUNDARIES, floor
from ringfence.policy.paths import below
from ringfence.policy.rules import parse_rule

Named = frozenset[tuple[str, int]]
"""Exact hosts, each with a port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Right:
    """One thing that a policy permits.

    Attributes:
        area: `host`, `model`, `tool`, `mode`, `workspace`, `system`, `file`, `isolation` or
            `control`; of a denial `port`, `path`, `glob` or `rule`.
        text: one line for people, the same for the same right.
        subject: what coverage is decided by; empty when only the same text covers it.
        rank: among rights of one area and subject, a higher one covers a lower; -1 is unranked.
    """

    area: str
    text: str
    subject: tuple[str, ...] = ()
    rank: int = -1


def rights(policy: CompiledPolicy, named: Named = frozenset()) -> tuple[Right, ...]:
    """Everything that is permitted, blocked ports and denied tools already taken off.

    A wildcard's right is about the hosts that no line names. What it means for those of `named`
    is said apart, because another policy may have a narrower line for one of them.
    """
    return (
        *_host_rights(policy.egress, named),
        *_model_rights(policy.egress.model),
        *_tool_rights(policy),
        _system(policy.sandbox),
        *_file_rights(policy),
        _isolation(policy.sandbox),
        *_engine(policy.sandbox.engine),
        *([_EMULATION] if policy.sandbox.emulation else ()),
        *(
            Right(area="control", text=f"{name} may go unenforced")
            for name in sorted(policy.sandbox.accept_unenforced)
        ),
    )


def named_hosts(policy: CompiledPolicy) -> Named:
    """The exact hosts that a policy has a line for."""
    return frozenset(
        (rule.host, rule.port) for rule in policy.egress.hosts if not rule.host.startswith("*.")
    )


def covers(wider: Right, narrower: Right) -> bool:
    """Whether whoever holds `wider` gains nothing by `narrower`.

    Of denials: whether what `narrower` denies is denied by `wider` too.
    """
    if wider == narrower:
        return True
    if wider.area != narrower.area or not (wider.subject and narrower.subject):
        return False
    if wider.rank >= 0:
        return wider.subject == narrower.subject and wider.rank >= narrower.rank
    return _COVERS.get(wider.area, _subject_covers)(wider.subject, narrower.subject)


def _subject_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    """A subject of one word stands for all that begin with it."""
    return len(wider) == 1 and wider[0] == narrower[0]


def limits(policy: CompiledPolicy) -> dict[str, float | None]:
    """Every number that bounds a run, by its key in the policy; None is unbounded."""
    bounds, egress, model = policy.sandbox.limits, policy.egress, policy.egress.model
    return {
        "execution.max_duration_seconds": bounds.wall_seconds,
        "execution.max_tool_seconds": bounds.tool_seconds,
        "execution.max_memory_mb": bounds.memory_mb,
        "execution.max_disk_mb": bounds.disk_mb,
        "execution.max_file_mb": bounds.file_mb,
        "execution.cpus": bounds.cpus,
        "execution.pids": bounds.pids,
        "execution.open_files": bounds.open_files,
        "network.max_connections": egress.max_connections,
        "network.max_body_mb": egress.max_body_mb,
        "network.max_sent_mb": egress.max_bytes_mb,
        "audit.max_records": egress.max_audit_records,
        "model.max_budget_usd": model.max_budget_usd,
        "model.max_turns": policy.tools.max_turns,
        "model.max_requests": model.max_requests,
        "model.max_output_tokens": model.max_output_tokens,
        "tools.max_subagents": policy.tools.max_subagents,
        "tools.max_subagent_depth": policy.tools.max_subagent_depth,
    }


def _host_rights(egress: EgressRules, named: Named) -> list[Right]:
    own = {(rule.host, rule.port) for rule in egress.hosts}
    found: list[Right] = []
    for rule in egress.hosts:
        if rule.port in egress.blocked_ports:
            continue
        below_it = [
            host
            for host, port in sorted(own | named)
            if port == rule.port and host != rule.host and matches(rule.host, host)
        ]
        shadowed = [host for host in below_it if (host, rule.port) in own]
        found += _rights_of(rule, rule.host, egress, shadowed)
        for host in below_it:
            if host not in shadowed:
                found += _rights_of(rule, host, egress, [])
    return found


def _rights_of(
    rule: HostRule, host: str, egress: EgressRules, shadowed: list[str]
) -> Iterator[Right]:
    """What a rule permits at `host`, which it names or covers."""
    kind = _kind(rule, egress)
    but = f" (but for {', '.join(shadowed)})" if shadowed else ""
    for path in rule.paths or (_ANY,):
        yield Right(
            area="host",
            text=f"{spelled(host)}:{rule.port} {_request(path)}{kind}{but}",
            subject=(host, str(rule.port), path.method, path.path, kind),
        )


_ANY = PathRule(method="*", path="/**")
_OPAQUE = " (OPAQUE TUNNEL: an exfiltration grant, nothing inside is seen)"


def _request(path: PathRule) -> str:
    return "every method and path" if path == _ANY else f"{path.method} {path.path}"


def _kind(rule: HostRule, egress: EgressRules) -> str:
    if rule.opaque:
        return _OPAQUE
    if rule.credential is None:
        return ""
    where = next(
        f"query field {secret.query}"
        if secret.query
        else f"{secret.header}: {secret.template}"
        + (f" for user {secret.user}" if secret.user else "")
        for secret in egress.credentials
        if secret.name == rule.credential
    )
    more = "".join(
        f", {way} headers {' '.join(names)}"
        for way, names in (("request", rule.request_headers), ("response", rule.response_headers))
        if names
    )
    return f" (with credential {rule.credential} as {where}{more})"


def _host_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    host, port, method, path, kind = wider
    host_, port_, method_, path_, kind_ = narrower
    same_method = method in {"*", method_}
    stem = path[:-2] if path.endswith("/**") else None
    same_path = path == path_ or (stem is not None and path_.startswith(stem))
    # through a tunnel goes whatever a terminated connection would let through
    same_kind = kind == kind_ or (kind == _OPAQUE and not kind_)
    return host == host_ and port == port_ and same_method and same_path and same_kind


def _model_rights(model: ModelRules) -> list[Right]:
    if not model.enabled:
        return []
    texts = [f"provider {name}" for name in model.reached]
    texts += [f"served in {name}" for name in model.regions] or [_ANYWHERE]
    texts += [f"ask {name}" for name in model.models] or ["ask any model"]
    texts += [f"server-side tools {prefix}*" for prefix in model.server_tools]
    texts += [f"beta {name}" for name in model.betas]
    if model.url_sources:
        texts.append("the provider fetches content by URL")
    if model.mcp_servers:
        texts.append("the provider calls MCP servers by URL")
    return [
        Right(area="model", text=text, subject=_WHOLE.get(text) or _split(text))
        for text in dict.fromkeys(texts)
    ]


_ANYWHERE = "served in any region"
_WHOLE = {"ask any model": ("ask",), _ANYWHERE: ("served",)}


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(" ", 1))


def _tool_rights(policy: CompiledPolicy) -> list[Right]:
    grants = policy.tools
    found = [Right(area="tool", text=f"{name} is offered") for name in grants.offered]
    found += [
        Right(area="tool", text=f"{text} asks nobody", subject=_approval(text))
        for text in grants.preapproved
    ]
    found += [_mode(mode, "may be chosen") for mode in grants.permission_modes]
    found.append(_mode(grants.permission_mode, "when a run does not choose"))
    found += [_mcp_server(server) for server in grants.mcp_servers]
    return found


def _mcp_server(server: McpServer) -> Right:
    """Variables by name alone: a value may be what should have been a secret."""
    names = ", ".join(name for name, _ in server.environment)
    return Right(
        area="tool",
        text=f"MCP server {server.name}: {server.url or ' '.join(server.command)}"
        + (f" (environment: {names})" if names else ""),
        subject=(
            *("mcp", server.name, server.url or "", *server.command),
            *(f"{name}={value}" for name, value in server.environment),
        ),
    )


def _mode(mode: PermissionMode, when: str) -> Right:
    rank = MODE_WIDTH.index(mode.value)
    return Right(area="mode", text=f"{mode.value} {when}", subject=(when,), rank=rank)


def _approval(text: str) -> tuple[str, ...]:
    rule = parse_rule(text)
    return (rule.tool,) if rule.specifier is None else (rule.tool, rule.specifier)


def _file_rights(policy: CompiledPolicy) -> list[Right]:
    sandbox = policy.sandbox
    found = [_view(sandbox.workspace_mode, "when a run does not choose")]
    found += [_view(mode, "may be chosen") for mode in sandbox.workspace_modes]
    found += [
        Right(area="file", text=f"{path} is {words}", subject=(access, path))
        for access, words, listed in (
            ("read", "read", sandbox.readable),
            ("write", "read and written", sandbox.writable),
        )
        for path in listed
        if not _blocked(policy, path)
    ]
    found += [Right(area="file", text=f"{glob} is shown") for glob in sandbox.shown]
    if sandbox.tmp_exec:
        found.append(Right(area="file", text="programs run from /tmp and the home directory"))
    if sandbox.workspace_exec:
        found.append(Right(area="file", text="programs run from the workspace"))
    return found


def _system(sandbox: SandboxProfile) -> Right:
    image = sandbox.image
    text = "the host's /usr and its like" if image is None else f"the files of image {image}"
    return Right(area="system", text=f"{text}, and an /etc made for the sandbox, are read")


_WORKSPACE = {
    WorkspaceMode.READONLY: (0, "is read"),
    WorkspaceMode.REVIEW: (1, "is read and changes become a patch"),
    WorkspaceMode.DIRECT: (2, "is read and written in place"),
}


def _view(mode: WorkspaceMode, when: str) -> Right:
    rank, text = _WORKSPACE[mode]
    return Right(area="workspace", text=f"{text}, {when}", subject=(when,), rank=rank)


def _blocked(policy: CompiledPolicy, path: str) -> bool:
    return any(below(path, blocked) for blocked in policy.sandbox.blocked)


def _file_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    access, path = wider
    access_, path_ = narrower
    return below(path_, path) and access in {access_, "write"}


def _path_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    return below(narrower[0], wider[0])


_COVERS = {"host": _host_covers, "file": _file_covers, "path": _path_covers}


_EMULATION = Right(area="isolation", text="a virtual machine may be emulated in software")


def _isolation(sandbox: SandboxProfile) -> Right:
    """The weaker the boundary that is enough, the wider the right."""
    name, threat_model = sandbox.isolation, sandbox.threat_model
    what = f"what threat model {threat_model} asks for" if name == "auto" else name
    least = floor(name, threat_model, emulation=sandbox.emulation)
    if name == "microvm" and sandbox.emulation:
        what = "an emulated microvm"
    strongest = max(boundary.strength for boundary in BOUNDARIES.values())
    return Right(
        area="isolation",
        text=f"{what} is boundary enough",
        subject=("isolation",),
        rank=strongest - least,
    )


def _engine(name: str) -> list[Right]:
    if name == "auto":
        return []
    return [Right(area="isolation", text=f"{name} makes containers", subject=("engine", name))]


def denials(policy: CompiledPolicy) -> tuple[Right, ...]:
    """What is denied by name, so that taking one away is seen as a gain."""
    sandbox, egress, grants = policy.sandbox, policy.egress, policy.tools
    return (
        *(Right(area="port", text=f"port {port} is blocked") for port in egress.blocked_ports),
        *(
            Right(area="path", text=f"the host's {path} is absent", subject=(path,))
            for path in sandbox.blocked
        ),
        *(
            Right(area="glob", text=f"{glob} is masked in the workspace")
            for glob in dict.fromkeys([*sandbox.hidden, *sandbox.masked])
        ),
        # a tool denied whole is simply not offered, which its right says
        *(
            Right(area="rule", text=f"{text} is denied")
            for text in grants.denied
            if parse_rule(text).specifier
        ),
    )


def printable(text: str) -> str:
    """Text for a terminal: escapes and direction controls of a policy shown, not obeyed (K)."""
    return "".join(
        character if character.isprintable() else f"\\u{ord(character):04x}" for character in text
    )
