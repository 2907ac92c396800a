"""A compiled policy as a set of rights: what `explain` prints and `diff` compares. PURE."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.model import PermissionMode, WorkspaceMode
from ringfence.policy.compiled import (
    CompiledPolicy,
    EgressRules,
    HostRule,
    ModelRules,
    PathRule,
)
from ringfence.policy.document import MODE_WIDTH
from ringfence.policy.hosts import matches
from ringfence.policy.rules import parse_rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Right:
    """One thing that a policy permits.

    Attributes:
        area: `host`, `model`, `tool`, `mode`, `workspace`, `file` or `control`.
        text: one line for people, the same for the same right.
        subject: what coverage is decided by; empty when only the same text covers it.
        rank: among rights of one area and subject, a higher one covers a lower; -1 is unranked.
    """

    area: str
    text: str
    subject: tuple[str, ...] = ()
    rank: int = -1


def rights(policy: CompiledPolicy) -> tuple[Right, ...]:
    """Everything that is permitted, blocked ports and denied tools already taken off."""
    return (
        *_host_rights(policy.egress),
        *_model_rights(policy.egress.model),
        *_tool_rights(policy),
        *_file_rights(policy),
        *(
            Right(area="control", text=f"{name} may go unenforced")
            for name in sorted(policy.sandbox.accept_unenforced)
        ),
    )


def covers(wider: Right, narrower: Right) -> bool:
    """Whether whoever holds `wider` gains nothing by `narrower`."""
    if wider == narrower:
        return True
    if wider.area != narrower.area or not (wider.subject and narrower.subject):
        return False
    if wider.rank >= 0:
        return wider.subject == narrower.subject and wider.rank >= narrower.rank
    if wider.area == "host":
        return _host_covers(wider.subject, narrower.subject)
    if wider.area == "file":
        return _file_covers(wider.subject, narrower.subject)
    return len(wider.subject) == 1 and wider.subject[0] == narrower.subject[0]


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


def _host_rights(egress: EgressRules) -> list[Right]:
    return [
        Right(
            area="host",
            text=f"{rule.host}:{rule.port} {_request(path)}{_kind(rule)}",
            subject=(rule.host, str(rule.port), path.method, path.path, _kind(rule)),
        )
        for rule in egress.hosts
        if rule.port not in egress.blocked_ports
        for path in rule.paths or (_ANY,)
    ]


_ANY = PathRule(method="*", path="/**")


def _request(path: PathRule) -> str:
    return "every method and path" if path == _ANY else f"{path.method} {path.path}"


def _kind(rule: HostRule) -> str:
    if rule.opaque:
        return " (OPAQUE TUNNEL: an exfiltration grant, nothing inside is seen)"
    return f" (with credential {rule.credential})" if rule.credential else ""


def _host_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    host, port, method, path, kind = wider
    host_, port_, method_, path_, kind_ = narrower
    same_host = host == host_ or matches(host, host_)
    same_method = method in {"*", method_}
    stem = path[:-2] if path.endswith("/**") else None
    same_path = path == path_ or (stem is not None and path_.startswith(stem))
    return same_host and port == port_ and same_method and same_path and kind == kind_


def _model_rights(model: ModelRules) -> list[Right]:
    if not model.enabled:
        return []
    texts = [f"provider {model.provider}"]
    texts += [f"ask {name}" for name in model.models] or ["ask any model"]
    texts += [f"server-side tools {prefix}*" for prefix in model.server_tools]
    texts += [f"beta {name}" for name in model.betas]
    if model.url_sources:
        texts.append("the provider fetches content by URL")
    if model.mcp_servers:
        texts.append("the provider calls MCP servers by URL")
    return [
        Right(area="model", text=text, subject=_ASK if text == "ask any model" else _split(text))
        for text in texts
    ]


_ASK = ("ask",)


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
    found += [
        Right(
            area="tool", text=f"MCP server {server.name}: {server.url or ' '.join(server.command)}"
        )
        for server in grants.mcp_servers
    ]
    return found


def _mode(mode: PermissionMode, when: str) -> Right:
    rank = MODE_WIDTH.index(mode.value)
    return Right(area="mode", text=f"{mode.value} {when}", subject=(when,), rank=rank)


def _approval(text: str) -> tuple[str, ...]:
    rule = parse_rule(text)
    return (rule.tool,) if rule.specifier is None else (rule.tool, rule.specifier)


def _file_rights(policy: CompiledPolicy) -> list[Right]:
    sandbox = policy.sandbox
    rank, text = _WORKSPACE[sandbox.workspace_mode]
    found = [Right(area="workspace", text=text, subject=("workspace",), rank=rank)]
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
    return found


_WORKSPACE = {
    WorkspaceMode.READONLY: (0, "is read"),
    WorkspaceMode.REVIEW: (1, "is read; changes become a patch"),
    WorkspaceMode.DIRECT: (2, "is read and written in place"),
}


def _blocked(policy: CompiledPolicy, path: str) -> bool:
    return any(
        path == blocked or path.startswith(blocked + "/") for blocked in policy.sandbox.blocked
    )


def _file_covers(wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    access, path = wider
    access_, path_ = narrower
    inside = path == path_ or path_.startswith(path + "/")
    return inside and access in {access_, "write"}


def denials(policy: CompiledPolicy) -> tuple[str, ...]:
    """What is denied by name, so that taking one away is seen as a gain."""
    sandbox, egress, grants = policy.sandbox, policy.egress, policy.tools
    return (
        *(f"port {port} is blocked" for port in egress.blocked_ports),
        *(f"{path} is absent" for path in sandbox.blocked),
        *(f"{glob} is masked in the workspace" for glob in sandbox.hidden),
        # a tool denied whole is simply not offered, which its right says
        *(f"{text} is denied" for text in grants.denied if parse_rule(text).specifier),
    )


def printable(text: str) -> str:
    """Text for a terminal: escapes and direction controls of a policy shown, not obeyed (K)."""
    return "".join(
        character if character.isprintable() else f"\\u{ord(character):04x}" for character in text
    )
