"""What a policy compiles to: neutral values that each enforcement point reads. PURE.

One source, three readers: the sandbox reads `SandboxProfile`, egress reads `EgressRules`, the
agent's driver reads `ToolGrants`. Everything is frozen and JSON-shaped (`to_json`/`from_json` in
`ringfence.policy.compile`), so that the egress process receives exactly what was compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.model import PermissionMode, WorkspaceMode
from ringfence.policy.isolation import ThreatModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Resource limits of one sandbox; each is enforced from outside.

    Attributes:
        wall_seconds: whole run. tool_seconds: one tool call.
        memory_mb: resident memory of all processes together, page cache of tmpfs included.
        cpus: processors' worth of time, 0.5 is half of one.
        pids: processes and threads at once.
        disk_mb: ephemeral storage: /tmp, the home directory, and the changes of review mode.
        file_mb: largest single file (RLIMIT_FSIZE). open_files: descriptors of one process.
    """

    wall_seconds: float = 300.0
    tool_seconds: float = 120.0
    memory_mb: int = 2048
    cpus: float = 2.0
    pids: int = 512
    disk_mb: int = 1024
    file_mb: int = 1024
    open_files: int = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxProfile:
    """The place, without a word about the technology that makes it.

    Paths are absolute and normal (no `.`, `..`, `//` or trailing slash). `/workspace` is always
    the workspace; every other path names the same path of the host.

    Attributes:
        image: name or digest of the image whose files are the system inside; None is the host's.
        workspace_mode: when a run does not choose. workspace_modes: what it may choose.
        readable: host paths visible read-only. writable: host paths visible read-write.
        blocked: host paths that are absent inside, wherever a mount would have shown them.
        hidden: gitignore-like globs below the workspace whose files are masked (requirement E).
        shown: globs of the same kind taken out of the hidden ones.
        masked: globs of the same kind that are masked whatever `shown` says: deny wins.
        tmp_exec: whether programs may be executed from /tmp, /var/tmp, /dev/shm and the home.
        workspace_exec: whether programs may be executed from the workspace.
        accept_unenforced: names of controls (`Control` of ringfence.sandbox.protocol) that may
            go unenforced on this host.
        isolation: name of a backend, or `auto`.
        threat_model: who could attack; always there with `auto`.
        engine: what makes containers, or `auto`.
        emulation: whether a virtual machine may run on a processor emulated in software.
    """

    image: str | None = None
    workspace_mode: WorkspaceMode = WorkspaceMode.REVIEW
    workspace_modes: tuple[WorkspaceMode, ...] = tuple(WorkspaceMode)
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    tmp_exec: bool = False
    workspace_exec: bool = True
    limits: Limits = Limits()
    accept_unenforced: frozenset[str] = frozenset()
    isolation: str = "bubblewrap"
    threat_model: ThreatModel | None = None
    engine: str = "auto"
    emulation: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PathRule:
    """One method on one path of a host. `path` is exact, or ends in `/**` for all below."""

    method: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRule:
    """One host that tools may reach.

    Attributes:
        host: exact name in normal form, or `*.` and a domain below a registrable one.
        port: exactly one.
        paths: rules on method and path; empty allows all, for hosts that are not terminated too.
        credential: name of the secret that egress injects; None injects none.
        opaque: tunnelled without TLS termination (requirement D); excludes paths and credential.
        request_headers, response_headers: names that pass beside the usual ones; only with a
            credential.
        rule: dotted path of the policy's line.
    """

    host: str
    port: int = 443
    paths: tuple[PathRule, ...] = ()
    credential: str | None = None
    opaque: bool = False
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()
    rule: str = "default"

    @property
    def terminated(self) -> bool:
        """Whether egress reads inside the TLS connection."""
        return not self.opaque


@dataclass(frozen=True, kw_only=True, slots=True)
class CredentialRule:
    """Where a secret goes (requirement L): one named header, on its named hosts, nothing else.

    Attributes:
        name: of the secret in the vault. hosts: normal names it may be sent to.
        header: lower-case header name that is overwritten. template: `{}` is the value.
        query: name of a query field instead of a header; at most one of the two is set.
        user: `{}` is the base64 of user, colon and value then, as HTTP's Basic scheme has it.
    """

    name: str
    hosts: tuple[str, ...]
    header: str | None = "authorization"
    template: str = "Bearer {}"
    query: str | None = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failover:
    """Where a request goes when those before do not answer; None is what was asked for."""

    provider: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRules:
    """What the model route lets through (requirements B and C).

    Attributes:
        enabled: False refuses every model request.
        provider: name of a provider in the operator's settings.
        failover: where else a request may go, in order.
        exhausted: what is done when nothing of that answers: `unavailable` or `queue`.
        tools: names that a request's `tools` and an answer's `tool_use` may hold. A name that
            ends in `*` is never here.
        server_tools: server-side tool type prefixes granted, such as `web_search_`.
        url_sources: whether `source.type == "url"` may appear in content.
        mcp_servers: whether the body may carry `mcp_servers`.
        betas: beta flags granted beside those pinned for the CLI version.
        models: model names that may be asked for; empty allows all.
        providers, regions: where a request may go at all; empty leaves it to the settings.
        max_budget_usd, max_requests, max_output_tokens: of the run; None is unlimited. A
            request that counts tokens is one of max_requests.
    """

    enabled: bool = True
    provider: str = "anthropic"
    failover: tuple[Failover, ...] = ()
    exhausted: Literal["unavailable", "queue"] = "unavailable"
    tools: tuple[str, ...] = ()
    server_tools: tuple[str, ...] = ()
    url_sources: bool = False
    mcp_servers: bool = False
    betas: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    max_budget_usd: float | None = None
    max_requests: int | None = None
    max_output_tokens: int | None = None

    @property
    def reached(self) -> tuple[str, ...]:
        """All that a request may go to, the first first."""
        others = (leg.provider for leg in self.failover if leg.provider is not None)
        named = dict.fromkeys([self.provider, *others])
        return tuple(one for one in named if not self.providers or one in self.providers)


@dataclass(frozen=True, kw_only=True, slots=True)
class EgressRules:
    """All that one sandbox may reach. Empty reaches nothing.

    Attributes:
        blocked_ports: denied whatever `hosts` says: deny wins.
        mcp_servers: `host:port/path` of those that are reached, the path as their URL has it: each
            has a breaker.
        max_connections: at once. max_body_mb: of one request. max_bytes_mb: sent out per run.
        max_audit_records: quota of requirement K; past it, denials are coalesced.
    """

    model: ModelRules = ModelRules()
    hosts: tuple[HostRule, ...] = ()
    credentials: tuple[CredentialRule, ...] = ()
    mcp_servers: tuple[str, ...] = ()
    blocked_ports: tuple[int, ...] = ()
    max_connections: int = 64
    max_body_mb: int = 32
    max_bytes_mb: int = 1024
    max_audit_records: int = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class McpServer:
    """An MCP server that runs inside the sandbox (stdio) or is reached through egress (http)."""

    name: str
    command: tuple[str, ...] = ()
    url: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolGrants:
    """What the agent's driver offers and denies.

    Attributes:
        role: name of the role in the policy.
        offered: tool names the model is offered (`mcp__server__tool` included), in order.
        preapproved: offered tools that need no question in mode `default` and `dontAsk`;
            entries may carry a specifier such as `Bash(git status:*)` that narrows them.
        fallback_model: what the driver goes on with when the model is overloaded.
        denied: names and specifiers denied whatever else says; deny wins.
        asked: offered tools about which a person is asked whatever the mode or a preapproval
            says; where the mode asks nobody they are denied.
        permission_mode: the policy's mode; a run may only choose a mode in `permission_modes`.
    """

    role: str = "default"
    offered: tuple[str, ...] = ()
    preapproved: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    permission_mode: PermissionMode = PermissionMode.DEFAULT
    permission_modes: tuple[PermissionMode, ...] = tuple(PermissionMode)
    mcp_servers: tuple[McpServer, ...] = ()
    max_turns: int | None = None
    max_subagent_depth: int = 1
    max_subagents: int = 4
    fallback_model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledPolicy:
    """Everything one policy means.

    Attributes:
        digest: SHA-256 (hex) of the canonical JSON of the policy; names it in the audit log.
    """

    digest: str
    sandbox: SandboxProfile
    egress: EgressRules
    tools: ToolGrants
