"""Questions to a compiled policy, and total answers. PURE.

Unknown is denied, deny wins, and adding a deny never allows more. `decide_tool` is what the
worker's hooks enforce, `decide_host` and `decide_request` what egress does. What a Bash
command's text says is advice (`ringfence.policy.shell`); the sandbox is the boundary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from ringfence.model import Decision, Outcome, PermissionMode
from ringfence.policy import shell
from ringfence.policy.compiled import EgressRules, HostRule, PathRule, ToolGrants
from ringfence.policy.headers import names_key
from ringfence.policy.hosts import MODEL_HOST, is_host, matches
from ringfence.policy.paths import WORKSPACE, WRITABLE_INSIDE, below, glob_matches, normal
from ringfence.policy.rules import SHELL_TOOLS, Rule, parse_rule, tool_facts
from ringfence.policy.tools import EDIT_TOOLS, PLAN_TOOLS, canonical_tool, mcp_parts

_TOKEN = re.compile(r"[A-Z]{1,16}")
_PATH_MAX = 4096  # Linux refuses longer ones
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/_.:@~!$&'()*+,;=-]*")
_ENCODED_PATH = re.compile(r"/(?:[A-Za-z0-9/_.:@~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*")
_QUERY = re.compile(r"(?:[A-Za-z0-9/_.:@~!$&'()*+,;=?\[\]-]|%[0-9A-Fa-f]{2})*")
_DANGEROUS = re.compile(r"%(?:2[eEfF5]|5[cC]|0[0-9a-fA-F]|1[0-9a-fA-F]|7[fF])")
"""Escapes that some server decodes to a separator, a dot, an escape or a control character."""

_DOTS = re.compile(r"/\.(?![A-Za-z0-9_-])")
"""A segment that is dots, or becomes them where parameters (`/..;x/`) are cut off. A name that
begins with one, as `/.well-known/` (RFC 8615) does, stays where it is.
"""


def host_rule(rules: EgressRules, host: str, port: int) -> HostRule | None:
    """The rule for a host and port, an exact one before a wildcard; None when none matches."""
    found = [rule for rule in rules.hosts if rule.port == port and matches(rule.host, host)]
    return min(found, key=lambda rule: rule.host.startswith("*."), default=None)


def mcp_server(rules: EgressRules, address: str, path: str) -> str | None:
    """Which of `rules.mcp_servers` a request is for, `address` being `host:port`: that of the
    longest path that `path` is below. One that is below none, as to where a server's logins are, is
    the first's at that address; None where there is none.
    """
    found = [each for each in rules.mcp_servers if each == address or _below(each, address)]
    full = address + path.rstrip("/") + "/"
    longest = [each for each in found if full.startswith(each.rstrip("/") + "/")]
    return max(longest, key=len, default=min(found, default=None))


def _below(server: str, address: str) -> bool:
    return server.startswith(f"{address}/")


def decide_host(rules: EgressRules, host: str, port: int) -> Decision:
    """Whether tools may reach `host` at `port`. The host must be in normal form already.

    The model's own host is never reached through a wildcard: past the model route it is an upload
    service for anybody's key.
    """
    if port in rules.blocked_ports:
        return _deny("network.blocked_ports", "port-blocked")
    if not is_host(host):
        return _deny("default", "host-not-normal")
    rule = host_rule(rules, host, port)
    if host == MODEL_HOST and (rule is None or rule.host != host):
        return _deny("default", "model-route-only")
    if rule is not None:
        return Decision(outcome=Outcome.ALLOW, rule=rule.rule, reason="host-allowed")
    other_port = any(matches(rule.host, host) for rule in rules.hosts)
    return _deny("default", "port-not-allowed" if other_port else "host-not-allowed")


def decide_request(  # noqa: PLR0911  a ladder of refusals reads in order
    rule: HostRule, method: str, target: str, *, own_field: str = ""
) -> Decision:
    """Whether a request of a terminated connection fits the host's rule.

    `target` is path and query as they came, in origin form; `own_field` the query field that
    egress will set itself. With path rules, a path that is encoded is refused, and one that is not
    normal always: an upstream may read it as another.
    """
    if rule.opaque:
        return _deny(rule.rule, "opaque-host")
    if not _TOKEN.fullmatch(method) or method in {"CONNECT", "TRACE"}:
        return _deny(rule.rule, "method-not-allowed")
    path, _, query = target.partition("?")
    form = _PLAIN_PATH if rule.paths else _ENCODED_PATH
    if not form.fullmatch(path) or "//" in path or _DOTS.search(path) or _DANGEROUS.search(path):
        return _deny(rule.rule, "path-not-normal")
    if not _QUERY.fullmatch(query):
        return _deny(rule.rule, "query-not-normal")
    if rule.credential is not None and _carries_key(query, own_field):
        # a key of the agent's own beside ours would act for another account
        return _deny(rule.rule, "foreign-credential")
    if not rule.paths:
        return Decision(outcome=Outcome.ALLOW, rule=rule.rule, reason="host-allowed")
    return _by_path(rule, method, path)


def query_names(query: str) -> list[str]:
    """Names of the fields of a query as a server may read them: `;` separates too."""
    return [unquote_plus(pair.partition("=")[0]) for pair in re.split("[&;]", query) if pair]


def _by_path(rule: HostRule, method: str, path: str) -> Decision:
    fitting = [at for at, grant in enumerate(rule.paths) if _path_fits(grant.path, path)]
    for index in fitting:
        if rule.paths[index].method == method:
            name = f"{rule.rule}.paths[{index}]"
            return Decision(outcome=Outcome.ALLOW, rule=name, reason="path-allowed")
    return _deny(rule.rule, "method-not-granted" if fitting else "path-not-granted")


def path_granted(grants: Sequence[PathRule], method: str, path: str) -> bool:
    """Whether one of the grants names the method and the path."""
    return any(one.method == method and _path_fits(one.path, path) for one in grants)


def _carries_key(query: str, own_field: str) -> bool:
    return any(names_key(name) for name in query_names(query) if name != own_field)


def _path_fits(pattern: str, path: str) -> bool:
    if pattern.endswith("/**"):
        return path.startswith(pattern[:-2])
    return path == pattern


def _deny(rule: str, reason: str) -> Decision:
    return Decision(outcome=Outcome.DENY, rule=rule, reason=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolDecision:
    """The answer about one tool call.

    Attributes:
        outcome: ALLOW or DENY. With `ask` it is DENY: what stands when nobody can be asked.
        ask: whether a person may turn the answer into ALLOW.
        rule: the rule that decided, such as `denied: Bash(curl:*)`, or the mode's name.
        reason: machine-readable tag in kebab-case.
    """

    outcome: Outcome
    ask: bool = False
    rule: str
    reason: str

    @property
    def allowed(self) -> bool:
        """Whether the call may run without asking."""
        return self.outcome is Outcome.ALLOW


PROTECTED = (
    *(".git", ".gitmodules", ".gitattributes", ".github", ".gitlab-ci.yml", ".husky"),
    *(".claude", ".claude.json", ".mcp.json", ".vscode", ".idea", ".devcontainer", ".envrc"),
    *(".pre-commit-config.yaml",),
)
"""First or any component of a workspace path that steers programs of the host or the agent's own
settings: no mode accepts an edit of it unasked, short of bypassPermissions."""

_PERSON_TOOLS = frozenset({"AskUserQuestion", "ExitPlanMode"})
_READ_COMMANDS = frozenset({"ls", "pwd", "cat", "head", "tail", "wc", "stat", "true", "echo"})
_FILE_COMMANDS = frozenset({"mkdir", "touch", "mv", "cp"})
_FILE_FLAGS = re.compile(r"-[afinpRrv]+")  # none takes a value, so none names a path


def decide_tool(  # noqa: PLR0911  a ladder of refusals reads in order
    grants: ToolGrants, mode: PermissionMode, name: str, tool_input: Mapping[str, Any]
) -> ToolDecision:
    """Whether a tool call may run, must be asked about, or is denied. Total.

    The order is the contract: the mode must be permitted, the tool offered, no deny rule may
    match, a write stays where the agent may write; then the mode decides.
    """
    tool = canonical_tool(name)
    if mode not in grants.permission_modes:
        return _no("permission_modes", "mode-not-permitted")
    if tool not in grants.offered:
        return _no("offered", "tool-not-offered")
    if not isinstance(tool_input, Mapping):
        return _no("offered", "input-not-an-object")
    for text in grants.denied:
        if _denied(_deny_rule(text), tool, tool_input):
            return _no(f"denied: {text}", "denied-by-rule")
    if tool in EDIT_TOOLS:
        path = _path(tool, tool_input)
        if path is None:
            return _no("offered", "path-unreadable")
        if not any(below(path, place) for place in WRITABLE_INSIDE):
            return _no("filesystem", "path-outside")
    decision = _by_mode(grants, mode, tool, tool_input)
    if tool in grants.asked and decision.allowed:
        # an agent's own wish, which can take the mode's word back and never go beyond it
        silent = mode in {PermissionMode.DONT_ASK, PermissionMode.PLAN}
        return (_no if silent else _ask)("always_ask", "person-needed")
    return decision


def _by_mode(  # noqa: PLR0911  the modes, one line each
    grants: ToolGrants, mode: PermissionMode, tool: str, tool_input: Mapping[str, Any]
) -> ToolDecision:
    if mode is PermissionMode.PLAN and tool not in PLAN_TOOLS:
        return _no(mode.value, "plan-is-read-only")
    if mode is PermissionMode.BYPASS:
        return _yes(mode.value, "mode-allows")
    if tool in _PERSON_TOOLS:
        if mode is PermissionMode.DONT_ASK:
            return _no(mode.value, "nobody-is-asked")
        return _ask(mode.value, "person-needed")
    approval = _preapproval(grants, tool, tool_input)
    if approval is not None:
        return _yes(f"preapproved: {approval}", "preapproved")
    if mode is PermissionMode.DONT_ASK:
        return _no(mode.value, "not-preapproved")
    if _only_reads(tool, tool_input):
        return _yes(mode.value, "read-only")
    if mode in {PermissionMode.ACCEPT_EDITS, PermissionMode.AUTO} and _edits(tool, tool_input):
        return _yes(mode.value, "edit-in-workspace")
    return _ask(mode.value, "not-preapproved")


def _yes(rule: str, reason: str) -> ToolDecision:
    return ToolDecision(outcome=Outcome.ALLOW, rule=rule, reason=reason)


def _no(rule: str, reason: str) -> ToolDecision:
    return ToolDecision(outcome=Outcome.DENY, rule=rule, reason=reason)


def _ask(rule: str, reason: str) -> ToolDecision:
    return ToolDecision(outcome=Outcome.DENY, ask=True, rule=rule, reason=reason)


def _deny_rule(text: str) -> Rule:
    """A deny that cannot be read denies the whole tool; compiled policies hold none."""
    try:
        return parse_rule(text)
    except ValueError:
        return Rule(tool=canonical_tool(text.partition("(")[0]))


def _denied(rule: Rule, tool: str, tool_input: Mapping[str, Any]) -> bool:
    """Whether a deny rule could mean this call; in doubt it does."""
    if rule.specifier is None:
        return rule.tool == tool
    if not _same_family(rule.tool, tool):
        return False
    if tool in SHELL_TOOLS:
        command = tool_input.get("command")
        return not isinstance(command, str) or shell.denies(rule.specifier, command)
    if tool == "WebFetch":
        return _url_in(rule.specifier, tool_input.get("url")) is not False
    path = _path(tool, tool_input)
    if path is None:
        return True
    glob = rule.specifier[1:]
    # a search that starts above the denied place would read into it
    return glob_matches(glob, path) or (tool in _SEARCHES and below(_stem(glob), path))


_SEARCHES = frozenset({"Glob", "Grep", "LS"})


def _same_family(ruled: str, tool: str) -> bool:
    """`Edit(…)` and `Write(…)` speak of all that writes a file, `Read(…)` of all that reads."""
    for family in (EDIT_TOOLS, SHELL_TOOLS):
        if ruled in family or tool in family:
            return ruled in family and tool in family
    if ruled == tool:
        return True
    return bool(tool_facts(ruled).path_key and tool_facts(tool).path_key)


def _preapproval(grants: ToolGrants, tool: str, tool_input: Mapping[str, Any]) -> str | None:
    """The preapproved rule that covers the whole call; None in any doubt."""
    rules = [rule for text in grants.preapproved if (rule := _approval_rule(text)).tool == tool]
    for rule in rules:
        if rule.specifier is None or _approves(rule, tool, tool_input):
            return rule.text
    command = tool_input.get("command")
    if tool in SHELL_TOOLS and isinstance(command, str):
        specifiers = tuple(rule.specifier for rule in rules if rule.specifier is not None)
        if specifiers and shell.approves(specifiers, command):
            return f"{tool}({specifiers[0]})" if len(specifiers) == 1 else f"{tool}(…)"
    return None


def _approval_rule(text: str) -> Rule:
    """An approval that cannot be read approves nothing."""
    try:
        return parse_rule(text)
    except ValueError:
        return Rule(tool="")


def _approves(rule: Rule, tool: str, tool_input: Mapping[str, Any]) -> bool:
    if rule.specifier is None or tool in SHELL_TOOLS:
        return False  # a shell command needs all specifiers together
    if tool == "WebFetch":
        return _url_in(rule.specifier, tool_input.get("url")) is True
    path = _path(tool, tool_input)
    return path is not None and glob_matches(rule.specifier[1:], path)


def _url_in(specifier: str, url: object) -> bool | None:
    """Whether a URL's host is the specifier's; None when the URL is not plain."""
    if not isinstance(url, str):
        return None
    match = re.fullmatch(r"https?://([a-z0-9.-]+)(?::[0-9]+)?(?:[/?#].*)?", url, re.DOTALL)
    if match is None or not is_host(match[1]):
        return None
    return matches(specifier.removeprefix("domain:"), match[1])


def _path(tool: str, tool_input: Mapping[str, Any]) -> str | None:
    """The normal path that a file tool touches; for a search, where it starts."""
    value = tool_input.get(tool_facts(tool).path_key)
    if value is None and tool not in EDIT_TOOLS and tool in _SEARCHES:
        value = WORKSPACE
    if not isinstance(value, str) or not 0 < len(value) <= _PATH_MAX or "\0" in value:
        return None
    if tool != "Glob":
        return normal(value)
    pattern = tool_input.get("pattern")
    if not isinstance(pattern, str) or len(pattern) > _PATH_MAX or "\0" in pattern:
        return None
    return _stem(normal(pattern if pattern.startswith("/") else f"{normal(value)}/{pattern}"))


def _stem(glob: str) -> str:
    """The deepest directory that a glob names without a wildcard."""
    fixed = re.split(r"[*?\[{]", glob, maxsplit=1)[0]
    if fixed == glob:
        return glob
    return fixed.rpartition("/")[0] or "/"


def _only_reads(tool: str, tool_input: Mapping[str, Any]) -> bool:
    """Whether a call only looks at the workspace."""
    if tool == "Bash":
        simple = _one_command(tool_input)
        return simple is not None and simple[0] in _READ_COMMANDS and _all_inside(simple[1:])
    facts = tool_facts(tool)
    if mcp_parts(tool) or not facts.read_only:
        return False
    if not facts.path_key:
        return True
    path = _path(tool, tool_input)
    return path is not None and below(path, WORKSPACE)


def _edits(tool: str, tool_input: Mapping[str, Any]) -> bool:
    """Whether a call only changes unprotected files of the workspace, as far as text can tell."""
    if tool in EDIT_TOOLS:
        path = _path(tool, tool_input)
        return path is not None and _editable(path)
    simple = _one_command(tool_input) if tool == "Bash" else None
    if simple is None or simple[0] not in _FILE_COMMANDS:
        return False
    flags = [word for word in simple[1:] if word.startswith("-")]
    names = [word for word in simple[1:] if not word.startswith("-")]
    return (
        all(_FILE_FLAGS.fullmatch(flag) for flag in flags)
        and bool(names)
        and all(_editable(normal(name)) for name in names)
    )


def _editable(path: str) -> bool:
    parts = path.split("/")
    return below(path, WORKSPACE) and path != WORKSPACE and not any(p in PROTECTED for p in parts)


def _all_inside(words: tuple[str, ...]) -> bool:
    return all(
        "/" not in word if word.startswith("-") else below(normal(word), WORKSPACE)
        for word in words
    )


def _one_command(tool_input: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The words of a Bash command that is one simple command without expansion; else None."""
    command = tool_input.get("command")
    understood = shell.understand(command) if isinstance(command, str) else None
    if understood is None or len(understood) != 1:
        return None
    simple = understood[0]
    unusual = any(tool_input.get(key) for key in ("run_in_background", "dangerouslyDisableSandbox"))
    return None if simple.expands or simple.assigns or unusual else simple.words
