"""Findings about a policy that loads: what it permits that its author may not have meant. PURE.

An error is a line that cannot do what it says; a warning is a line that opens something; an info
is a fact worth knowing. Ids are stable and listed in `CATALOGUE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from ringfence.policy.compile import (
    DEFAULT_HIDDEN,
    isolation_of,
    model_route_open,
    role_of,
    used_servers,
    withheld,
)
from ringfence.policy.document import HostGrant, PolicyDocument, permission_mode_of
from ringfence.policy.hosts import MODEL_HOST, matches
from ringfence.policy.isolation import THREATS, enough
from ringfence.policy.paths import WORKSPACE, below, listens
from ringfence.policy.rules import SHELL_TOOLS, parse_rule
from ringfence.policy.tools import EDIT_TOOLS, KNOWN


class Severity(StrEnum):
    """How much a finding matters; `lint` fails on errors."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


CATALOGUE: dict[str, tuple[Severity, str]] = {
    "POL001": (Severity.WARNING, "The model route is closed: no agent can run."),
    "POL002": (Severity.ERROR, "A host is allowed on a port that is blocked; deny wins."),
    "POL003": (Severity.WARNING, "An opaque tunnel: an exfiltration grant."),
    "POL004": (Severity.WARNING, "A wildcard grants every host below a domain."),
    "POL005": (Severity.WARNING, "A host where anybody can store data, open for writing."),
    "POL006": (Severity.WARNING, "Port 80 is not encrypted."),
    "POL007": (Severity.WARNING, "A credential is sent with every method and path of a host."),
    "POL008": (Severity.WARNING, "A secret that no host carries is never sent."),
    "POL009": (Severity.WARNING, "An exact host stands below a wildcard: its own rule decides."),
    "POL010": (Severity.INFO, "Filters on a command's text are advice, not a boundary."),
    "POL011": (Severity.ERROR, "The Agent SDK never matches a path rule of this tool."),
    "POL012": (Severity.WARNING, "A path rule does not bind Bash."),
    "POL013": (Severity.ERROR, "A tool is granted that a ceiling takes away."),
    "POL014": (Severity.WARNING, "bypassPermissions runs offered tools that are not preapproved."),
    "POL015": (Severity.WARNING, "Subagents inherit a mode that asks less."),
    "POL016": (Severity.INFO, "Mode auto asks where the Agent SDK would ask the provider."),
    "POL017": (Severity.WARNING, "The pinned CLI has no tool of this name."),
    "POL018": (Severity.ERROR, "A tool is granted and denied whole; deny wins."),
    "POL019": (Severity.INFO, "No tools section: the default tools are offered."),
    "POL020": (Severity.WARNING, "A path does not exist on this host."),
    "POL021": (Severity.WARNING, "A host directory is written directly, not as a patch."),
    "POL022": (Severity.ERROR, "A path is shown and blocked; deny wins."),
    "POL023": (Severity.WARNING, "Files that usually hold credentials are shown."),
    "POL024": (Severity.WARNING, "The workspace is written directly: changes are not reviewed."),
    "POL025": (Severity.WARNING, "Programs may be executed from /tmp and the home directory."),
    "POL030": (Severity.WARNING, "A control may go unenforced."),
    "POL031": (Severity.ERROR, "A control of the fence itself may go unenforced."),
    "POL032": (Severity.ERROR, "A credential stands in the environment of an MCP server."),
    "POL033": (Severity.WARNING, "The provider reaches out on the agent's behalf."),
    "POL034": (Severity.ERROR, "A server-side right is granted that a ceiling takes away."),
    "POL035": (Severity.INFO, "A run has no limit in dollars."),
    "POL047": (
        Severity.WARNING,
        "A region is named for models, and the provider may reach past it.",
    ),
    "POL036": (Severity.INFO, "The tool limit is longer than the run's."),
    "POL037": (Severity.INFO, "A single run is always ephemeral."),
    "POL038": (Severity.WARNING, "An MCP server of which no tool is granted is not started."),
    "POL039": (Severity.WARNING, "A place where daemons of the host listen is shown."),
    "POL040": (Severity.WARNING, "A host path that usually holds credentials is shown."),
    "POL041": (Severity.ERROR, "The isolation named is weaker than the threat model asks for."),
    "POL045": (Severity.WARNING, "A virtual machine may be emulated: slow, and a weaker boundary."),
    "POL046": (Severity.WARNING, "All ways to the model end at one provider."),
}
"""Every finding: severity and title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        id: stable, listed in CATALOGUE. path: dotted path of the line.
        message: what the line does. mend: what to write instead.
    """

    id: str
    severity: Severity
    path: str
    message: str
    mend: str

    def to_json(self) -> dict[str, str]:
        """Shape of a finding in JSON output."""
        return {
            "id": self.id,
            "severity": self.severity.value,
            "path": self.path,
            "message": self.message,
            "mend": self.mend,
        }


def lint(
    document: PolicyDocument, *, exists: Callable[[str], bool] = lambda _: True
) -> tuple[Finding, ...]:
    """All findings, errors first.

    Args:
        document: a policy that loads.
        exists: whether an absolute path exists on the host that would run it.
    """
    findings = [
        *_hosts(document),
        *_secrets(document),
        *_grants(document),
        *_servers(document),
        *_rules(document),
        *_modes(document),
        *_paths(document, exists),
        *_workspace(document),
        *_model(document),
        *_unenforced(document),
        *_isolation(document),
        *_hosting(document),
    ]
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _found(id_: str, path: str, detail: str, mend: str) -> Finding:
    severity, title = CATALOGUE[id_]
    message = f"{title[:-1]}: {detail}" if detail else title
    return Finding(id=id_, severity=severity, path=path, message=message, mend=mend)


_HUBS = (
    *("github.com", "api.github.com", "gist.github.com", "raw.githubusercontent.com"),
    *("uploads.github.com", "gitlab.com", "bitbucket.org", "huggingface.co", "pastebin.com"),
    *("upload.pypi.org", "registry.npmjs.org", "storage.googleapis.com", "s3.amazonaws.com"),
    *("dropbox.com", "api.dropboxapi.com", "content.dropboxapi.com", "discord.com", "slack.com"),
    *("hooks.slack.com", "api.telegram.org", "transfer.sh", "webhook.site", "file.io"),
    *("api.notion.com", "docs.google.com", "www.googleapis.com", "dpaste.com", "paste.rs"),
)
_WRITING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def _hosts(document: PolicyDocument) -> Iterator[Finding]:
    network = document.network
    if not model_route_open(document):
        yield _found(
            "POL001",
            "network.allowed_hosts",
            "only `ringfence exec` can use this policy",
            f"name {MODEL_HOST} under network.allowed_hosts, or take a preset",
        )
    for index, grant in enumerate(network.allowed_hosts):
        path = f"network.allowed_hosts[{index}]"
        if grant.port in network.blocked_ports:
            yield _found(
                "POL002",
                path,
                f"{grant.host}:{grant.port} is never reached",
                f"take {grant.port} out of network.blocked_ports, or the host out of the list",
            )
        if grant.host != MODEL_HOST:
            yield from _host(grant, path)
        covering = next((o for o in network.allowed_hosts if _stands_above(o, grant)), None)
        if covering:
            yield _found(
                "POL009",
                path,
                f"what {covering.host} permits does not hold for {grant.host}",
                "name the hosts in place of the wildcard",
            )


def _stands_above(other: HostGrant, grant: HostGrant) -> bool:
    return other.host != grant.host and other.port == grant.port and matches(other.host, grant.host)


def _host(grant: HostGrant, path: str) -> Iterator[Finding]:
    if grant.opaque:
        yield _found(
            "POL003",
            path,
            f"whatever the agent reads can leave through {grant.host}, unseen",
            "drop opaque; egress then looks inside and the record names each request",
        )
    if grant.host.startswith("*."):
        yield _found("POL004", path, grant.host, "name the hosts that are needed")
    writing = not grant.paths or any(rule.method in _WRITING for rule in grant.paths)
    hub = next((name for name in _HUBS if matches(grant.host, name)), None)
    if hub and writing:
        yield _found(
            "POL005",
            path,
            f"{hub} is a dead drop: data can be left there for a stranger's account",
            "add paths with the methods and paths that are needed, such as GET /owner/repo/**",
        )
    if grant.port == 80:
        yield _found("POL006", path, grant.host, "use port 443")
    if grant.credential and not grant.paths:
        yield _found(
            "POL007",
            path,
            f"{grant.credential} at {grant.host}",
            "add paths with the methods and paths that are needed",
        )


def _secrets(document: PolicyDocument) -> Iterator[Finding]:
    used = {grant.credential for grant in document.network.allowed_hosts}
    for name in document.secrets:
        if name not in used:
            yield _found(
                "POL008",
                f"secrets.{name}",
                name,
                f"write credential: {name} at its host under network.allowed_hosts",
            )
    for name, server in document.tools.mcp_servers.items():
        for variable in server.environment:
            if re.search(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", variable, re.IGNORECASE):
                yield _found(
                    "POL032",
                    f"tools.mcp_servers.{name}.environment.{variable}",
                    "every process inside can read it",
                    "declare it under secrets, so that egress injects it at its host",
                )


def _grants(document: PolicyDocument) -> Iterator[Finding]:
    if document.tools.roles is None:
        _, role = role_of(document)
        yield _found(
            "POL019", "tools", ", ".join(role.allow), "write tools.roles to choose them yourself"
        )
        return
    for name, role in document.tools.roles.items():
        denied = {rule.tool for rule in map(parse_rule, role.deny) if rule.specifier is None}
        for index, tool in enumerate(role.allow):
            path = f"tools.roles.{name}.allow[{index}]"
            ceiling = withheld(document, tool)
            if ceiling:
                yield _found(
                    "POL013", path, f"{tool} by {ceiling}: false", f"drop {tool}, or the ceiling"
                )
            if tool in denied:
                yield _found("POL018", path, tool, "write it once")
            if tool in KNOWN and not KNOWN[tool].present:
                yield _found("POL017", path, tool, "drop it; nothing offers it")


def _servers(document: PolicyDocument) -> Iterator[Finding]:
    roles = (document.tools.roles or {}).values()
    used = used_servers(document, tuple(tool for role in roles for tool in role.allow))
    for name in document.tools.mcp_servers:
        if name not in used:
            yield _found(
                "POL038",
                f"tools.mcp_servers.{name}",
                name,
                f"grant mcp__{name}__TOOL to a role, or take the server away",
            )


def _rules(document: PolicyDocument) -> Iterator[Finding]:
    for name, role in (document.tools.roles or {}).items():
        for key, texts in (("deny", role.deny), ("preapproved", role.preapproved)):
            yield from _filters(f"tools.roles.{name}.{key}", texts)
            for index, text in enumerate(texts):
                rule, path = parse_rule(text), f"tools.roles.{name}.{key}[{index}]"
                if rule.specifier is None:
                    continue
                if rule.tool in EDIT_TOOLS - {"Edit"}:
                    yield _found(
                        "POL011",
                        path,
                        f"{text} holds here, and nowhere else",
                        f"write Edit({rule.specifier}), which covers every tool that writes",
                    )
                if key == "deny" and rule.specifier.startswith("/") and "Bash" in role.allow:
                    yield _found(
                        "POL012",
                        path,
                        f"{text} leaves the file in reach of any program",
                        "name the path under filesystem.blocked_paths, or under hidden",
                    )


def _filters(path: str, texts: tuple[str, ...]) -> Iterator[Finding]:
    """One finding a list: of twenty rules each would say the same."""
    rules = [(index, text, parse_rule(text)) for index, text in enumerate(texts)]
    found = [(i, text) for i, text, rule in rules if rule.specifier and rule.tool in SHELL_TOOLS]
    if found:
        more = f" and {len(found) - 1} more read text" if len(found) > 1 else " reads text"
        yield _found(
            "POL010",
            f"{path}[{found[0][0]}]",
            f"{found[0][1]}{more}, and a program can be started in other words",
            "rely on network, filesystem and execution for what must hold",
        )


def _modes(document: PolicyDocument) -> Iterator[Finding]:
    mode = permission_mode_of(document)
    _, role = role_of(document)
    approved = {parse_rule(text).tool for text in role.preapproved if "(" not in text}
    unasked = [tool for tool in role.allow if tool not in approved]
    if mode == "bypassPermissions" and unasked:
        yield _found(
            "POL014",
            "tools.permission_mode",
            ", ".join(unasked),
            "take them out of allow, deny them, or use dontAsk",
        )
    if mode in {"acceptEdits", "auto", "bypassPermissions"} and "Task" in role.allow:
        yield _found(
            "POL015",
            "tools.permission_mode",
            f"each subagent runs in {mode} too",
            "use default, or take Task out of allow",
        )
    if mode == "auto":
        yield _found(
            "POL016",
            "tools.permission_mode",
            "it accepts edits and asks a person for the rest",
            "write acceptEdits, which means the same here",
        )


def _paths(document: PolicyDocument, exists: Callable[[str], bool]) -> Iterator[Finding]:
    filesystem = document.filesystem
    shown = {
        "readable_paths": filesystem.readable_paths,
        "writable_paths": filesystem.writable_paths,
    }
    for key, values in shown.items():
        for index, value in enumerate(values or ()):
            path = f"filesystem.{key}[{index}]"
            if value == WORKSPACE:
                continue
            blocked = next((b for b in filesystem.blocked_paths if below(value, b)), None)
            if blocked:
                yield _found(
                    "POL022", path, f"{value} lies in {blocked}", "take one of the two away"
                )
            elif not exists(value):
                yield _found(
                    "POL020", path, f"{value} is left out", "make it, or take the line away"
                )
            if key == "writable_paths":
                yield _found("POL021", path, value, "write it under readable_paths")
            if not blocked:
                yield from _shown(path, value)


def _shown(path: str, value: str) -> Iterator[Finding]:
    if listens(value):
        yield _found(
            "POL039",
            path,
            f"{value}: a socket can be connected to, read-only or not",
            "name the files that are needed, in a place where nothing listens",
        )
    names = [pattern for pattern in DEFAULT_HIDDEN if "/" not in pattern]
    if any(fnmatchcase(part, name) for part in value.split("/")[1:] for name in names):
        yield _found(
            "POL040",
            path,
            f"{value}: what is masked in the workspace is not masked there",
            "declare the secret under secrets, so that egress injects it at its host",
        )


def _workspace(document: PolicyDocument) -> Iterator[Finding]:
    filesystem = document.filesystem
    if filesystem.workspace == "direct":
        yield _found("POL024", "filesystem.workspace", "", "write review: the result is a patch")
    for index, pattern in enumerate(filesystem.show):
        if pattern in DEFAULT_HIDDEN or set("*?[") & set(pattern):
            yield _found(
                "POL023",
                f"filesystem.show[{index}]",
                f"all that matches {pattern}",
                "name the one file that is needed",
            )
    if filesystem.tmp_exec:
        yield _found(
            "POL025", "filesystem.tmp_exec", "", "build and run below the workspace instead"
        )


def _model(document: PolicyDocument) -> Iterator[Finding]:
    model = document.model
    rights = {
        "server_tools": ", ".join(model.server_tools),
        "url_sources": "content by URL" if model.url_sources else "",
        "mcp_servers": "MCP servers by URL" if model.mcp_servers else "",
    }
    for key, detail in rights.items():
        if not detail:
            continue
        if document.execution.allow_network_tools is False:
            yield _found(
                "POL034",
                f"model.{key}",
                f"{detail} by execution.allow_network_tools: false",
                "drop the right, or the ceiling",
            )
        else:
            yield _found(
                "POL033",
                f"model.{key}",
                f"{detail}: no rule of network binds it, and a URL can carry data out",
                f"drop model.{key}",
            )
    elsewhere = {leg.provider for leg in model.failover} - {None, model.provider}
    if model.failover and not elsewhere:
        yield _found(
            "POL046",
            "model.failover",
            f"an outage of {model.provider} takes them all",
            "name a provider of the settings in one of them",
        )
    reaches = [key for key, detail in rights.items() if detail]
    if model.regions and reaches and document.execution.allow_network_tools is not False:
        yield _found(
            "POL047",
            "model.regions",
            f"{', '.join(reaches)}: what the provider fetches or asks lies anywhere",
            f"drop model.{reaches[0]}",
        )
    if model.max_budget_usd is None and model_route_open(document):
        yield _found("POL035", "model.max_budget_usd", "", "write model.max_budget_usd")


_FENCE = frozenset({"network", "seccomp", "user_namespace"})


def _unenforced(document: PolicyDocument) -> Iterator[Finding]:
    for index, control in enumerate(document.accept_unenforced):
        yield _found(
            "POL031" if control in _FENCE else "POL030",
            f"accept_unenforced[{index}]",
            control,
            "run on a host that can enforce it; `ringfence run` prints this at every start",
        )


def _isolation(document: PolicyDocument) -> Iterator[Finding]:
    name, threat_model = isolation_of(document), document.isolation.threat_model
    if threat_model and name != "auto" and not enough(name, threat_model):
        threat = THREATS[threat_model]
        yield _found(
            "POL041",
            "isolation.backend",
            f"{name} for {threat_model} ({threat.meaning})",
            f"write {' or '.join(threat.order)}, or auto",
        )


def _hosting(document: PolicyDocument) -> Iterator[Finding]:
    execution = document.execution
    if execution.max_tool_seconds > execution.max_duration_seconds:
        yield _found(
            "POL036",
            "execution.max_tool_seconds",
            f"{execution.max_tool_seconds:g} s of {execution.max_duration_seconds:g} s",
            "shorten it",
        )
    if document.isolation.emulation == "allow":
        yield _found(
            "POL045",
            "isolation.emulation",
            "claude starts in about 15 s instead of under 1 s, and never counts as fit for "
            "hostile tenants",
            "leave the line out where the host has hardware virtualisation",
        )
    if document.hosting.pattern != "ephemeral":
        yield _found(
            "POL037",
            "hosting.pattern",
            f"{document.hosting.pattern} is read by services that host sessions",
            "nothing, when this policy is for such a service",
        )
