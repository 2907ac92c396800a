"""The policy document: its sections, its defaults, and its refusal of anything vague. PURE.

What a document does not say is denied: no host, no tool that starts a program or reaches the
network, no path beside the workspace. The sections `network`, `filesystem` and `execution` are a
superset of the widely copied `security_config` dictionary, which loads as it stands.

`version` is 1. Keys are only ever added; one that is not known is refused, because a rule that
is silently ignored is a hole.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from ringfence.policy import hosts, paths
from ringfence.policy.fields import (
    Beta,
    HeaderName,
    Host,
    ImageName,
    Items,
    Method,
    ModelName,
    Name,
    Port,
    Positive,
    Region,
    ServerName,
    Text,
    approval,
    blocked,
    exact_host,
    glob,
    grant,
    readable,
    refuse,
    rule,
    url_path,
    whole,
    writable,
)
from ringfence.policy.section import Audit, Execution, Hosting, Isolation, Section

WorkspaceName = Literal["review", "direct", "readonly"]
ModeName = Literal["default", "acceptEdits", "plan", "dontAsk", "bypassPermissions", "auto"]
ControlName = Literal[
    "memory",
    "cpu",
    "pids",
    "disk",
    "workspace_disk",
    "seccomp",
    "network",
    "user_namespace",
    "tmp_noexec",
    "uid_per_sandbox",
    "claude_unreadable",
]
CONTROLS: tuple[str, ...] = get_args(ControlName)
"""What a backend may be unable to enforce: names of `ringfence.sandbox.protocol.Control`, which
stands above this room; a test holds the two equal."""

MODE_WIDTH: tuple[ModeName, ...] = (
    "plan",
    "dontAsk",
    "default",
    "acceptEdits",
    "auto",
    "bypassPermissions",
)
"""Permission modes from the narrowest to the widest."""


class PathGrant(Section):
    """One method on one path; `/**` at the end means all below."""

    method: Method
    path: Annotated[str, AfterValidator(url_path)]

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """`GET /v1/**` as one string."""
        if not isinstance(value, str):
            return value
        method, blank, path = value.partition(" ")
        if not blank:
            raise ValueError("write METHOD and path, such as GET /v1/**")
        return {"method": method, "path": path}


class HostGrant(Section):
    """One host that may be reached, on one port.

    Attributes:
        host: exact name, or one leading-label wildcard under a registrable domain.
        paths: methods and paths; empty allows all. credential: a name under `secrets`.
        opaque: tunnel without looking inside; an exfiltration grant (requirement D).
        request_headers, response_headers: names, in lower case, that pass beside the usual ones
            where a credential is injected; without one all but a few pass already.
    """

    host: Host
    port: Port = 443
    paths: Items[PathGrant] = ()
    credential: Name | None = None
    opaque: bool = False
    request_headers: Items[HeaderName] = ()
    response_headers: Items[HeaderName] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """`host` or `host:port` as one string."""
        if not isinstance(value, (str, dict)):
            raise ValueError("write host, host:port, or a mapping with host")  # noqa: TRY004
        if isinstance(value, dict):
            return value
        match = re.fullmatch(r"([^:/]+):([0-9]{1,16})", value)
        if match:
            refuse(hosts.host_problem(match[1]))
            if not 1 <= int(match[2]) <= 65535 or match[2].startswith("0"):
                raise ValueError("a port is a number from 1 to 65535")
            return {"host": match[1], "port": int(match[2])}
        refuse(hosts.host_problem(value))
        return {"host": value}

    @model_validator(mode="after")
    def _consistent(self) -> HostGrant:
        if self.opaque and (self.paths or self.credential):
            raise ValueError(
                "an opaque tunnel is not looked into; drop opaque, or paths and credential"
            )
        if self.credential and self.host.startswith("*."):
            raise ValueError("a credential goes to named hosts only, not to a wildcard")
        if (self.request_headers or self.response_headers) and not self.credential:
            raise ValueError(
                "without a credential every ordinary header passes; drop the names of headers"
            )
        if self.host == hosts.MODEL_HOST and (
            self.port != 443 or self.paths or self.credential or self.opaque
        ):
            raise ValueError(
                f"{hosts.MODEL_HOST} stands for the model route, whose rules are under `model`; "
                "write the name alone"
            )
        return self


class Network(Section):
    """What may be reached. `none`, or an empty list, reaches nothing, the model included."""

    mode: Literal["restricted", "none"] = "restricted"
    allowed_hosts: Items[HostGrant] = ()
    blocked_ports: Items[Port] = ()
    max_connections: Annotated[int, Field(ge=1, le=4096)] = 64
    max_body_mb: Annotated[int, Field(ge=1, le=1024)] = 32
    max_sent_mb: Annotated[int, Field(ge=1, le=1_000_000)] = 1024


class Filesystem(Section):
    """What is visible. Paths are the host's; `/workspace` is the workspace.

    Attributes:
        image: name or sha256:… digest of an image whose files are the system inside, /usr and its
            like; None is the host's own. A name means what it stands for when a run starts.
        workspace: how it is shown; None is `review`, or `readonly` when `writable_paths` is
            given without /workspace.
        workspace_modes: what a run may choose; None is every mode when nothing is said about
            the workspace, and otherwise those at most as wide as what is.
        writable_paths: None says nothing about the workspace.
        blocked_paths: absent inside, wherever a mount would have shown them; deny wins.
        hidden: globs of workspace files that are masked, beside the built-in list.
        show: globs taken out of the built-in list, never out of `hidden`.
        tmp_exec: whether programs may be executed from /tmp and the home directory.
        exec_in_workspace: whether they may from the workspace, as builds and tests need.
    """

    image: ImageName | None = None
    workspace: WorkspaceName | None = None
    workspace_modes: Items[WorkspaceName] | None = None
    writable_paths: Items[Annotated[str, AfterValidator(writable)]] | None = None
    readable_paths: Items[Annotated[str, AfterValidator(readable)]] = ()
    blocked_paths: Items[Annotated[str, AfterValidator(blocked)]] = ()
    hidden: Items[Annotated[str, AfterValidator(glob)]] = ()
    show: Items[Annotated[str, AfterValidator(glob)]] = ()
    tmp_exec: bool = False
    exec_in_workspace: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Filesystem:
        writable = self.writable_paths
        if writable is None:
            return self
        if self.workspace == "readonly" and paths.WORKSPACE in writable:
            raise ValueError("workspace is readonly: take /workspace out of writable_paths")
        if self.workspace in {"review", "direct"} and paths.WORKSPACE not in writable:
            raise ValueError(f"workspace is {self.workspace}: add /workspace to writable_paths")
        return self


class Role(Section):
    """Tools of one role.

    Attributes:
        allow: tools that are offered, by name. deny: rules that win over everything.
        preapproved: rules that ask nobody; each names an offered tool.
    """

    allow: Items[Annotated[str, AfterValidator(grant)]] = ()
    deny: Items[Annotated[str, AfterValidator(rule)]] = ()
    preapproved: Items[Annotated[str, AfterValidator(approval)]] = ()


class McpServerGrant(Section):
    """An MCP server: a program inside the sandbox, or an https URL reached through egress."""

    command: Items[Text] = ()
    url: str | None = None
    environment: dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], Text
    ] = Field(default_factory=dict)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        match = re.fullmatch(r"https://([^/:?#]+)(?::([1-9][0-9]{0,4}))?(/[^?#]*)?", value)
        if match is None:
            raise ValueError("write https://host[:port][/path]")
        refuse(hosts.host_problem(match[1], wildcards=False))
        url_path(match[3] or "/")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> McpServerGrant:
        if bool(self.command) == (self.url is not None):
            raise ValueError("write either command or url")
        if self.command and not self.command[0]:
            raise ValueError("the first word of command names a program")
        if self.url and self.environment:
            raise ValueError("environment belongs to a command")
        return self

    @property
    def address(self) -> tuple[str, int, str] | None:
        """Host, port and path of the URL."""
        if self.url is None:
            return None
        authority, slash, path = self.url[len("https://") :].partition("/")
        host, _, port = authority.partition(":")
        return host, int(port or 443), slash + path


class Tools(Section):
    """Who may use which tool.

    Attributes:
        role: the role that is compiled; None when there is at most one.
        roles: None offers the default tools (see `ringfence.policy.compile`).
        permission_mode: None is `default`, and `acceptEdits` with the default tools.
        permission_modes: what a run may choose; None is every mode when `permission_mode` is
            not given either, and otherwise those at most as wide as it.
    """

    role: Name | None = None
    roles: dict[Name, Role] | None = None
    permission_mode: ModeName | None = None
    permission_modes: Items[ModeName] | None = None
    mcp_servers: dict[ServerName, McpServerGrant] = Field(default_factory=dict)
    max_subagent_depth: Annotated[int, Field(ge=0, le=8)] = 1
    max_subagents: Annotated[int, Field(ge=0, le=64)] = 4


_FORBIDDEN_HEADERS = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "connection", "keep-alive", "te"),
        *("trailer", "upgrade", "expect", "proxy-authorization", "proxy-connection"),
        *("content-type", "content-encoding", "accept-encoding", "forwarded", "x-forwarded-for"),
    }
)


class Secret(Section):
    """Where one secret of the vault goes: one header or query field, on named hosts (L).

    Attributes:
        hosts: exact names. header: lower case; `authorization` when neither is given.
        template: `{}` is the value; None is `Bearer {}` for authorization, else `{}`.
        user: the value is the password of this user in HTTP's Basic scheme: git, registries.
    """

    hosts: Annotated[Items[Annotated[str, AfterValidator(exact_host)]], Field(min_length=1)]
    header: Annotated[str, StringConstraints(pattern=r"^[a-z0-9!#$&^_`|~.+-]{1,64}$")] | None = None
    template: Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{2,256}$")] | None = None
    query: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@+-]{1,128}$")] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Secret:
        if self.user and (self.query or self.header or self.template):
            raise ValueError("user is HTTP's Basic scheme: drop query, header and template")
        if self.query and (self.header or self.template):
            raise ValueError("write either query, or header and template")
        if self.header in _FORBIDDEN_HEADERS:
            raise ValueError(f"{self.header} frames the request itself; no secret belongs in it")
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError("template holds {} once, for the value")
        return self


class FailoverLeg(Section):
    """Where a model request goes when those before it do not answer; what is not named stays.

    Attributes:
        provider: name of a provider in the operator's settings.
        model: another model than was asked for; what it does not take of a request is left out.
    """

    provider: Name | None = None
    model: ModelName | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> FailoverLeg:
        if self.provider is None and self.model is None:
            raise ValueError("write a provider, a model or both")
        return self


class Model(Section):
    """The model route, open only when `network.allowed_hosts` names api.anthropic.com.

    Attributes:
        provider: name of a provider in the operator's settings.
        providers: those that a request may go to at all; empty leaves it to `provider` and to what
            the policy names beside it.
        regions: where a request may be served, as the clouds write it: `eu-central-1`,
            `europe-west1`, and of what is served anywhere in one `eu`, `us`, `global`. Empty allows
            all. An upstream of no region is denied then.
        models: names that may be asked for; empty allows all. fallback: one to go on with, after
            all of failover.
        failover: where requests go, in order, when the provider does not answer.
        exhausted: what is done when none of them does: `unavailable` fails the run, `queue` puts
            it off, as long waits for a limit do.
        server_tools, url_sources, mcp_servers: what the provider may reach on the agent's
            behalf, past every rule of `network`.
    """

    provider: Name = "anthropic"
    providers: Items[Name] = ()
    regions: Items[Region] = ()
    models: Items[ModelName] = ()
    fallback: ModelName | None = None
    failover: Annotated[Items[FailoverLeg], Field(max_length=8)] = ()
    exhausted: Literal["unavailable", "queue"] = "unavailable"
    max_budget_usd: Positive | None = None
    max_turns: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_requests: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    server_tools: Items[Literal["web_search", "web_fetch", "code_execution", "tool_search"]] = ()
    url_sources: bool = False
    mcp_servers: bool = False
    betas: Items[Beta] = ()


class PolicyDocument(Section):
    """One whole policy, its preset already merged in."""

    version: Annotated[Literal[1], BeforeValidator(whole)] = 1
    preset: Literal["strict", "ci", "review", "developer"] | None = None
    network: Network = Network()
    filesystem: Filesystem = Filesystem()
    tools: Tools = Tools()
    secrets: dict[Name, Secret] = Field(default_factory=dict)
    execution: Execution = Execution()
    audit: Audit = Audit()
    isolation: Isolation = Isolation()
    hosting: Hosting = Hosting()
    model: Model = Model()
    accept_unenforced: Items[ControlName] = ()

    def canonical(self) -> dict[str, Any]:
        """JSON-shaped content that the digest is taken of.

        The preset's name is left out: its lines are in, and a policy that spells them out itself
        is the same policy.
        """
        return self.model_dump(mode="json", exclude={"preset"})


def permission_mode_of(document: PolicyDocument) -> ModeName:
    """The mode in force. A policy that says nothing about tools gets the default ones, and with
    them `acceptEdits`: edits stay in the workspace, and by default in a patch.
    """
    stated = document.tools.permission_mode
    return stated or ("acceptEdits" if document.tools.roles is None else "default")


def workspace_mode_of(document: PolicyDocument) -> WorkspaceName:
    """How the workspace is shown when a run does not choose."""
    stated, writable = document.filesystem.workspace, document.filesystem.writable_paths
    unwritable = writable is not None and paths.WORKSPACE not in writable
    return stated or ("readonly" if unwritable else "review")
