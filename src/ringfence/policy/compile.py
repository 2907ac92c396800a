"""One policy → the rules of all enforcement points, from one source. PURE.

Neither the Agent SDK nor a sandbox is known here. What is derived, and where a ceiling takes a
grant away again (deny wins), is decided in this file and nowhere else.
"""

from __future__ import annotations

import hashlib
import json

from ringfence.model import PermissionMode, WorkspaceMode
from ringfence.policy.codec import (
    egress_from_json,
    egress_to_json,
    sandbox_from_json,
    sandbox_to_json,
    tools_from_json,
    tools_to_json,
)
from ringfence.policy.compiled import (
    CompiledPolicy,
    CredentialRule,
    EgressRules,
    Failover,
    HostRule,
    Limits,
    McpServer,
    ModelRules,
    PathRule,
    SandboxProfile,
    ToolGrants,
)
from ringfence.policy.document import (
    MODE_WIDTH,
    FailoverLeg,
    PolicyDocument,
    Role,
    permission_mode_of,
    workspace_mode_of,
)
from ringfence.policy.hosts import MODEL_HOST
from ringfence.policy.paths import WORKSPACE
from ringfence.policy.rules import parse_rule, tool_facts
from ringfence.policy.tools import (
    DEFAULT_OFFERED,
    DEFAULT_PREAPPROVED,
    KNOWN,
    SERVER_TOOLS,
    WIRE_HELPERS,
    mcp_parts,
)

__all__ = [
    "DEFAULT_HIDDEN",
    "DEFAULT_SHOWN",
    "canonical_json",
    "compile_policy",
    "egress_from_json",
    "egress_to_json",
    "policy_digest",
    "sandbox_from_json",
    "sandbox_to_json",
    "tools_from_json",
    "tools_to_json",
]

DEFAULT_HIDDEN = (
    *(".env", ".env.*", "*.env", ".envrc", ".envrc.*", ".netrc", "_netrc", ".npmrc"),
    *(".pypirc", ".yarnrc.yml", ".git-credentials", ".pgpass", ".my.cnf", ".htpasswd"),
    ".vault-token",
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.asc"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(".ssh", ".aws", ".azure", ".gnupg", ".kube", "kubeconfig", "kubeconfig.*", "*.kubeconfig"),
    *("service-account*.json", "service_account*.json", "*-credentials.json", "credentials.json"),
    *("application_default_credentials.json", "client_secret*.json", "**/.docker/config.json"),
    *("**/.config/gcloud/**", "**/.config/gh/**", "*.tfstate", "*.tfstate.*", "*.tfvars"),
    *("secrets.yml", "secrets.yaml", "**/.cargo/credentials*", "**/.gem/credentials"),
)
"""Files of a workspace that are masked unless `filesystem.show` names them (requirement E).
A credential-bearing `.git/config` is found by its content, by the sandbox; `.envrc` exports what
a shell needs, and that is tokens as often as paths, so a name decides and not its content."""

DEFAULT_SHOWN = (".env.example", ".env.sample", ".env.template", ".env.dist", "*.pub", "cacert.pem")
"""Masked by a pattern above and known to hold no secret; without cacert.pem, the trust store of
certifi, nothing in a virtual environment of the workspace could speak TLS."""


WORKSPACE_WIDTH = (WorkspaceMode.READONLY, WorkspaceMode.REVIEW, WorkspaceMode.DIRECT)
"""Workspace modes from the narrowest to the widest."""


def canonical_json(document: PolicyDocument) -> str:
    """One spelling of a policy: sorted keys, no blanks, every default written out."""
    return json.dumps(
        document.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


def policy_digest(document: PolicyDocument) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def compile_policy(document: PolicyDocument) -> CompiledPolicy:
    """Everything that `document` means. Total: a document that loads compiles."""
    grants = _tools(document)
    return CompiledPolicy(
        digest=policy_digest(document),
        sandbox=_sandbox(document),
        egress=_egress(document, grants),
        tools=grants,
    )


def role_of(document: PolicyDocument) -> tuple[str, Role]:
    """Name and content of the role in force; the default one when a policy has no roles."""
    roles = document.tools.roles
    if roles is None:
        return "default", _default_role(document)
    if not roles:
        return "default", Role()
    name = document.tools.role or next(iter(roles))
    return name, roles[name]


def withheld(document: PolicyDocument, tool: str) -> str | None:
    """The ceiling that takes a granted tool away, as a dotted path; None when it is offered."""
    facts = tool_facts(tool)
    server = mcp_parts(tool)
    if server is not None:
        command = document.tools.mcp_servers[server[0]].command
        if command and document.execution.allow_subprocess is False:
            return "execution.allow_subprocess"
        if not command and document.execution.allow_network_tools is False:
            return "execution.allow_network_tools"
        return None
    if facts.runs_programs and document.execution.allow_subprocess is False:
        return "execution.allow_subprocess"
    if facts.network and document.execution.allow_network_tools is False:
        return "execution.allow_network_tools"
    return None


def model_route_open(document: PolicyDocument) -> bool:
    """Whether the model may be asked: api.anthropic.com is named, and nothing wins over it."""
    network = document.network
    return (
        network.mode != "none"
        and 443 not in network.blocked_ports
        and any(grant.host == MODEL_HOST for grant in network.allowed_hosts)
    )


def _default_role(document: PolicyDocument) -> Role:
    offered, preapproved = list(DEFAULT_OFFERED), list(DEFAULT_PREAPPROVED)
    if document.execution.allow_subprocess:
        # the sandbox bounds what a command can do; its text never could
        offered.append("Bash")
        preapproved.append("Bash")
    if document.execution.allow_network_tools:
        offered += ["WebFetch", "WebSearch"]
    return Role(allow=tuple(offered), preapproved=tuple(preapproved))


def _tools(document: PolicyDocument) -> ToolGrants:
    name, role = role_of(document)
    whole_denied = {rule.tool for rule in map(parse_rule, role.deny) if rule.specifier is None}
    offered = tuple(
        tool
        for tool in dict.fromkeys(role.allow)
        if tool not in whole_denied and withheld(document, tool) is None
    )
    mode = permission_mode_of(document)
    return ToolGrants(
        role=name,
        offered=offered,
        preapproved=tuple(
            text for text in dict.fromkeys(role.preapproved) if parse_rule(text).tool in offered
        ),
        denied=_denied(document, role),
        permission_mode=PermissionMode(mode),
        permission_modes=_modes(document),
        mcp_servers=_mcp_servers(document, offered),
        max_turns=document.model.max_turns,
        max_subagent_depth=document.tools.max_subagent_depth,
        max_subagents=document.tools.max_subagents,
        fallback_model=document.model.fallback,
    )


def _denied(document: PolicyDocument, role: Role) -> tuple[str, ...]:
    """What a role denies, and by name all that a ceiling takes away or that is never granted.

    The hook denies whatever is not offered; the names are for the SDK's own deny list, a second
    wall that costs nothing.
    """
    ceilings = [
        tool.name
        for tool in KNOWN.values()
        if tool.dangerous or withheld(document, tool.name) is not None
    ]
    withheld_mcp = [tool for tool in role.allow if mcp_parts(tool) and withheld(document, tool)]
    return tuple(dict.fromkeys([*role.deny, *ceilings, *withheld_mcp]))


def _modes(document: PolicyDocument) -> tuple[PermissionMode, ...]:
    tools = document.tools
    if tools.permission_modes is not None:
        return tuple(PermissionMode(mode) for mode in dict.fromkeys(tools.permission_modes))
    if tools.permission_mode is None:
        return tuple(PermissionMode)
    widest = MODE_WIDTH.index(tools.permission_mode)
    return tuple(PermissionMode(mode) for mode in MODE_WIDTH[: widest + 1])


_RESOURCE_TOOLS = frozenset({"ListMcpResourcesTool", "ReadMcpResourceTool"})


def used_servers(document: PolicyDocument, offered: tuple[str, ...]) -> frozenset[str]:
    """MCP servers that the offered tools need; no other is started or reached."""
    if not _RESOURCE_TOOLS.isdisjoint(offered):
        return frozenset(document.tools.mcp_servers)
    return frozenset(parts[0] for tool in offered if (parts := mcp_parts(tool)))


def _mcp_servers(document: PolicyDocument, offered: tuple[str, ...]) -> tuple[McpServer, ...]:
    execution, used = document.execution, used_servers(document, offered)
    return tuple(
        McpServer(
            name=name,
            command=server.command,
            url=server.url,
            environment=tuple(sorted(server.environment.items())),
        )
        for name, server in sorted(document.tools.mcp_servers.items())
        if name in used
        and (
            (server.url and execution.allow_network_tools is not False)
            or (server.command and execution.allow_subprocess is not False)
        )
    )


def _sandbox(document: PolicyDocument) -> SandboxProfile:
    filesystem, execution = document.filesystem, document.execution
    writable = filesystem.writable_paths or ()
    return SandboxProfile(
        image=filesystem.image,
        workspace_mode=WorkspaceMode(workspace_mode_of(document)),
        workspace_modes=_workspace_modes(document),
        readable=tuple(dict.fromkeys(p for p in filesystem.readable_paths if p != WORKSPACE)),
        writable=tuple(dict.fromkeys(p for p in writable if p != WORKSPACE)),
        blocked=tuple(dict.fromkeys(filesystem.blocked_paths)),
        hidden=tuple(pattern for pattern in DEFAULT_HIDDEN if pattern not in filesystem.show),
        shown=tuple(dict.fromkeys([*DEFAULT_SHOWN, *filesystem.show])),
        masked=tuple(dict.fromkeys(filesystem.hidden)),
        tmp_exec=filesystem.tmp_exec,
        workspace_exec=filesystem.exec_in_workspace,
        limits=Limits(
            wall_seconds=execution.max_duration_seconds,
            tool_seconds=min(execution.max_tool_seconds, execution.max_duration_seconds),
            memory_mb=execution.max_memory_mb,
            cpus=execution.cpus,
            pids=execution.pids,
            disk_mb=execution.max_disk_mb,
            file_mb=execution.max_file_mb,
            open_files=execution.open_files,
        ),
        accept_unenforced=frozenset(document.accept_unenforced),
        isolation=isolation_of(document),
        threat_model=document.isolation.threat_model,
        engine=document.isolation.engine,
        emulation=document.isolation.emulation == "allow",
    )


def isolation_of(document: PolicyDocument) -> str:
    """The technology in force, or `auto`."""
    isolation = document.isolation
    return isolation.backend or ("auto" if isolation.threat_model else "bubblewrap")


def _workspace_modes(document: PolicyDocument) -> tuple[WorkspaceMode, ...]:
    filesystem, mode = document.filesystem, WorkspaceMode(workspace_mode_of(document))
    if filesystem.workspace_modes is not None:
        return tuple(WorkspaceMode(name) for name in dict.fromkeys(filesystem.workspace_modes))
    if filesystem.workspace is None and mode is not WorkspaceMode.READONLY:
        return WORKSPACE_WIDTH
    return WORKSPACE_WIDTH[: WORKSPACE_WIDTH.index(mode) + 1]


def _egress(document: PolicyDocument, grants: ToolGrants) -> EgressRules:
    network = document.network
    named = [
        HostRule(
            host=grant.host,
            port=grant.port,
            paths=tuple(PathRule(method=path.method, path=path.path) for path in grant.paths),
            credential=grant.credential,
            opaque=grant.opaque,
            request_headers=grant.request_headers,
            response_headers=grant.response_headers,
            rule=f"network.allowed_hosts[{index}]",
        )
        for index, grant in enumerate(network.allowed_hosts)
        if grant.host != MODEL_HOST and network.mode != "none"
    ]
    # first match wins in every reader, so the exact name stands before the wildcard that covers it
    hosts = tuple(sorted(named, key=lambda rule: rule.host.startswith("*.")))
    used = {rule.credential for rule in hosts}
    return EgressRules(
        model=_model(document, grants),
        hosts=hosts,
        credentials=tuple(
            _credential(document, name) for name in sorted(document.secrets) if name in used
        ),
        mcp_servers=tuple(
            sorted(
                f"{address[0]}:{address[1]}{address[2]}"
                for server in grants.mcp_servers
                if (address := document.tools.mcp_servers[server.name].address)
            )
        ),
        blocked_ports=tuple(sorted(set(network.blocked_ports))),
        max_connections=network.max_connections,
        max_body_mb=network.max_body_mb,
        max_bytes_mb=network.max_sent_mb,
        max_audit_records=document.audit.max_records,
    )


def _credential(document: PolicyDocument, name: str) -> CredentialRule:
    secret = document.secrets[name]
    header = None if secret.query else secret.header or "authorization"
    scheme = "Basic" if secret.user else "Bearer"
    template = secret.template or (f"{scheme} {{}}" if header == "authorization" else "{}")
    return CredentialRule(
        name=name,
        hosts=secret.hosts,
        header=header,
        template=template,
        query=secret.query,
        user=secret.user,
    )


def failover_of(document: PolicyDocument) -> tuple[FailoverLeg, ...]:
    """Where requests go in order, after the provider itself. The driver's fallback is the last: it
    would ask for it when it is told of an overload, of which it hears nothing any more.
    """
    model, legs = document.model, document.model.failover
    if model.fallback is None or any(leg.model == model.fallback for leg in legs):
        return legs
    return (*legs, FailoverLeg(model=model.fallback))


def _model(document: PolicyDocument, grants: ToolGrants) -> ModelRules:
    model = document.model
    remote = document.execution.allow_network_tools is not False
    wire = [name for tool in grants.offered for name in tool_facts(tool).wire_names]
    server_tools = [SERVER_TOOLS[name] for name in model.server_tools]
    server_tools += [prefix for tool in grants.offered if (prefix := tool_facts(tool).server_tool)]
    return ModelRules(
        enabled=model_route_open(document),
        provider=model.provider,
        failover=tuple(
            Failover(provider=leg.provider, model=leg.model) for leg in failover_of(document)
        ),
        exhausted=model.exhausted,
        tools=tuple(dict.fromkeys([*wire, *(WIRE_HELPERS if wire else ())])),
        server_tools=tuple(dict.fromkeys(server_tools)) if remote else (),
        url_sources=model.url_sources and remote,
        mcp_servers=model.mcp_servers and remote,
        betas=tuple(dict.fromkeys(model.betas)),
        models=tuple(dict.fromkeys(model.models)),
        providers=tuple(dict.fromkeys(model.providers)),
        regions=tuple(dict.fromkeys(model.regions)),
        max_budget_usd=model.max_budget_usd,
        max_requests=model.max_requests,
        max_output_tokens=model.max_output_tokens,
    )
