"""Questions and answers: total, deny wins, and adding a deny never allows more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringfence.model import Decision, Outcome, PermissionMode
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import EgressRules, HostRule, PathRule, ToolGrants
from ringfence.policy.decide import (
    ToolDecision,
    decide_host,
    decide_request,
    decide_tool,
    mcp_server,
)
from ringfence.policy.load import from_mapping, load_policy
from ringfence.policy.paths import glob_matches, normal
from ringfence.policy.tools import KNOWN

RULES = EgressRules(
    hosts=(
        HostRule(host="*.example.com", rule="network.allowed_hosts[0]"),
        HostRule(host="a.example.com", rule="network.allowed_hosts[1]"),
        HostRule(host="b.example.com", port=8443, rule="network.allowed_hosts[2]"),
        HostRule(host="ssh.example.org", port=22, rule="network.allowed_hosts[3]"),
        HostRule(host="*.anthropic.com", rule="network.allowed_hosts[4]"),
    ),
    blocked_ports=(22,),
)


@pytest.mark.parametrize(
    ("host", "port", "rule"),
    [
        ("x.example.com", 443, "network.allowed_hosts[0]"),
        ("a.example.com", 443, "network.allowed_hosts[1]"),
        ("b.example.com", 8443, "network.allowed_hosts[2]"),
        ("b.example.com", 443, "network.allowed_hosts[0]"),
    ],
)
def test_an_allowed_host_names_its_rule(host: str, port: int, rule: str) -> None:
    assert decide_host(RULES, host, port) == Decision(
        outcome=Outcome.ALLOW, rule=rule, reason="host-allowed"
    )


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("ssh.example.org", 22, "port-blocked"),
        ("a.example.com", 22, "port-blocked"),
        ("a.example.com", 80, "port-not-allowed"),
        ("example.com", 443, "host-not-allowed"),
        ("a.b.example.com", 443, "host-not-allowed"),
        ("evil.com", 443, "host-not-allowed"),
        ("A.example.com", 443, "host-not-normal"),
        ("a.example.com.", 443, "host-not-normal"),
        ("127.0.0.1", 443, "host-not-normal"),
        ("a\0.example.com", 443, "host-not-normal"),
        ("", 443, "host-not-normal"),
        ("api.anthropic.com", 443, "model-route-only"),
    ],
)
def test_everything_else_is_denied_with_the_reason(host: str, port: int, reason: str) -> None:
    decision = decide_host(RULES, host, port)
    assert not decision.allowed
    assert decision.reason == reason


def test_no_rules_reach_nothing() -> None:
    assert not decide_host(EgressRules(), "a.example.com", 443).allowed


PATHS = HostRule(
    host="a.example.com",
    paths=(
        PathRule(method="GET", path="/v1/items"),
        PathRule(method="GET", path="/v1/items/**"),
        PathRule(method="POST", path="/x"),
    ),
    rule="network.allowed_hosts[0]",
)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/items"),
        ("GET", "/v1/items/"),
        ("GET", "/v1/items/1/a"),
        ("POST", "/x"),
        ("GET", "/v1/items/.well-known/x"),
        ("GET", "/v1/items/a.b"),
    ],
)
def test_a_path_rule_permits_its_method_and_path(method: str, path: str) -> None:
    assert decide_request(PATHS, method, path).allowed


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("POST", "/v1/items", "method-not-granted"),
        ("HEAD", "/v1/items", "method-not-granted"),
        ("GET", "/v1/itemsx", "path-not-granted"),
        ("GET", "/x", "method-not-granted"),
        ("GET", "/v1/items/../admin", "path-not-normal"),
        ("GET", "/v1/items/%2e%2e/admin", "path-not-normal"),
        ("GET", "/v1/items//admin", "path-not-normal"),
        ("GET", "/v1/items/.", "path-not-normal"),
        ("GET", "/v1/items/..;x/admin", "path-not-normal"),
        ("GET", "/v1/items/.;/admin", "path-not-normal"),
        ("GET", "/v1/items/...", "path-not-normal"),
        ("GET", "/v1/items?x=\n", "query-not-normal"),
        ("GET", "/v1/items\n", "path-not-normal"),
        ("GET", "/v1/items\\..", "path-not-normal"),
        ("GET", "https://b.example.com/v1/items", "path-not-normal"),
        ("get", "/v1/items", "method-not-allowed"),
        ("CONNECT", "/v1/items", "method-not-allowed"),
        ("TRACE", "/v1/items", "method-not-allowed"),
        ("GET\n", "/v1/items", "method-not-allowed"),
    ],
)
def test_a_path_rule_permits_nothing_else(method: str, path: str, reason: str) -> None:
    assert decide_request(PATHS, method, path).reason == reason


def test_without_path_rules_every_request_fits_and_an_opaque_host_has_none() -> None:
    assert decide_request(HostRule(host="a.example.com"), "DELETE", "/a%20b/c?x=1").allowed
    assert not decide_request(HostRule(host="a.example.com"), "DELETE", "/a%2fb/c").allowed
    assert not decide_request(HostRule(host="a.example.com"), "DELETE", "/a//c").allowed
    assert not decide_request(HostRule(host="a.example.com", opaque=True), "GET", "/").allowed


# --- tools

M = PermissionMode
ALL_TOOLS = tuple(name for name, tool in KNOWN.items() if not tool.dangerous)


def grants(
    *,
    allow: tuple[str, ...] = (
        "Read",
        "Glob",
        "Grep",
        "Edit",
        "Write",
        "TodoWrite",
        "Bash",
        "AskUserQuestion",
        "ExitPlanMode",
    ),
    deny: tuple[str, ...] = (),
    preapproved: tuple[str, ...] = (),
) -> ToolGrants:
    role = {"allow": allow, "deny": deny, "preapproved": preapproved}
    return compile_policy(from_mapping({"tools": {"roles": {"a": role}}})).tools


def answer(decision: ToolDecision) -> str:
    assert not (decision.allowed and decision.ask)
    return "ask" if decision.ask else decision.outcome.value


BASH = {"command": "python3 -c 'x'"}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bash ls": ("Bash", {"command": "ls src"}),
    "bash write in cwd": ("Bash", {"command": "touch a"}),
    "bash write outside": ("Bash", {"command": "touch /etc/a"}),
    "bash python": ("Bash", BASH),
    "write in cwd": ("Write", {"file_path": "/workspace/a"}),
    "write outside": ("Write", {"file_path": "/etc/a"}),
    "write tmp": ("Write", {"file_path": "/tmp/a"}),
    "write settings": ("Write", {"file_path": "/workspace/.claude/settings.json"}),
    "read in cwd": ("Read", {"file_path": "/workspace/a"}),
    "read outside": ("Read", {"file_path": "/etc/passwd"}),
    "grep": ("Grep", {"pattern": "x"}),
    "todo": ("TodoWrite", {"todos": []}),
    "question": ("AskUserQuestion", {}),
    "plan": ("ExitPlanMode", {}),
}
# The order of columns: default, acceptEdits, plan, dontAsk, auto, bypassPermissions.
MODES = (M.DEFAULT, M.ACCEPT_EDITS, M.PLAN, M.DONT_ASK, M.AUTO, M.BYPASS)
MATRIX = {
    "bash ls": ("allow", "allow", "deny", "deny", "allow", "allow"),
    "bash write in cwd": ("ask", "allow", "deny", "deny", "allow", "allow"),
    "bash write outside": ("ask", "ask", "deny", "deny", "ask", "allow"),
    "bash python": ("ask", "ask", "deny", "deny", "ask", "allow"),
    "write in cwd": ("ask", "allow", "deny", "deny", "allow", "allow"),
    "write outside": ("deny", "deny", "deny", "deny", "deny", "deny"),
    "write tmp": ("ask", "ask", "deny", "deny", "ask", "allow"),
    "write settings": ("ask", "ask", "deny", "deny", "ask", "allow"),
    "read in cwd": ("allow", "allow", "allow", "deny", "allow", "allow"),
    "read outside": ("ask", "ask", "ask", "deny", "ask", "allow"),
    "grep": ("allow", "allow", "allow", "deny", "allow", "allow"),
    "todo": ("allow", "allow", "allow", "deny", "allow", "allow"),
    "question": ("ask", "ask", "ask", "deny", "ask", "allow"),
    "plan": ("ask", "ask", "ask", "deny", "ask", "allow"),
}


@pytest.mark.parametrize(
    ("call", "mode", "expected"),
    [
        (call, mode, cell)
        for call, row in MATRIX.items()
        for mode, cell in zip(MODES, row, strict=True)
    ],
)
def test_the_matrix_of_modes(call: str, mode: PermissionMode, expected: str) -> None:
    assert answer(decide_tool(grants(), mode, *CALLS[call])) == expected


@pytest.mark.parametrize("mode", MODES)
def test_what_is_preapproved_runs_unasked_except_a_write_in_plan(mode: PermissionMode) -> None:
    given_ = grants(preapproved=("Bash", "Write", "Read"))
    expected = "deny" if mode is M.PLAN else "allow"
    assert answer(decide_tool(given_, mode, "Bash", BASH)) == expected
    assert answer(decide_tool(given_, mode, "Write", {"file_path": "a"})) == expected
    assert answer(decide_tool(given_, mode, "Read", {"file_path": "/etc/passwd"})) == "allow"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_offered_or_denied_never_runs(mode: PermissionMode) -> None:
    assert answer(decide_tool(grants(allow=("Read",)), mode, "Bash", BASH)) == "deny"
    assert answer(decide_tool(grants(deny=("Bash",)), mode, "Bash", BASH)) == "deny"
    assert answer(decide_tool(grants(), mode, "WebFetch", {"url": "https://x"})) == "deny"
    assert answer(decide_tool(grants(), mode, "mcp__x__y", {})) == "deny"
    assert answer(decide_tool(grants(), mode, "NoSuchTool", {})) == "deny"
    assert (
        answer(
            decide_tool(
                grants(deny=("Bash(curl *)",), preapproved=("Bash",)),
                mode,
                "Bash",
                {"command": "ls; curl x"},
            )
        )
        == "deny"
    )
    assert (
        answer(
            decide_tool(
                grants(deny=("Read(secret/**)",), preapproved=("Read",)),
                mode,
                "Read",
                {"file_path": "secret/x"},
            )
        )
        == "deny"
    )


def test_a_mode_that_the_policy_does_not_permit_denies_everything() -> None:
    narrowed = replace(grants(preapproved=("Read",)), permission_modes=(M.PLAN,))
    assert answer(decide_tool(narrowed, M.BYPASS, "Read", {"file_path": "a"})) == "deny"
    assert answer(decide_tool(narrowed, M.PLAN, "Read", {"file_path": "a"})) == "allow"


def test_a_command_that_only_reads_the_workspace_asks_nobody() -> None:
    for command, expected in {
        "cat a ./b": "allow",
        "ls -la /workspace/src": "allow",
        "echo hello": "allow",
        "cat /etc/passwd": "ask",
        "cat ../x": "ask",
        "wc --files0-from=/etc/passwd": "ask",
        "cat a | sh": "ask",
        "ls; ls": "ask",
        "echo x > a": "ask",
        "cat $x": "ask",
    }.items():
        assert answer(decide_tool(grants(), M.DEFAULT, "Bash", {"command": command})) == expected


def test_a_preapproved_command_is_one_that_is_understood() -> None:
    given_ = grants(preapproved=("Bash(ls:*)", "Bash(wc:*)"))
    for command, expected in {
        "ls | wc -l": "allow",
        "ls > x": "deny",
        "ls; id": "deny",
        "ls $(id)": "deny",
        "wcx": "deny",
    }.items():
        assert answer(decide_tool(given_, M.DONT_ASK, "Bash", {"command": command})) == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("mkdir -p a/b", "allow"),
        ("cp -r a b", "allow"),
        ("mv /workspace/a b", "allow"),
        ("touch a b c", "allow"),
        ("cp a /etc/b", "ask"),
        ("cp a ../b", "ask"),
        ("cp --target-directory=/tmp a", "ask"),
        ("cp -t /tmp a", "ask"),
        ("mv a .git/hooks/pre-commit", "ask"),
        ("mkdir .claude", "ask"),
        ("touch .envrc", "ask"),
        ("cp * b", "ask"),
        ("cp ~/a b", "ask"),
        ("mkdir a && rm -rf b", "ask"),
        ("mkdir $x", "ask"),
        ("touch a > b", "ask"),
        ("rm a", "ask"),
        ("mkdir", "ask"),
        ("X=1 mkdir a", "ask"),
        ("mv a /workspace", "ask"),
    ],
)
def test_accept_edits_takes_plain_file_commands_of_the_workspace(
    command: str, expected: str
) -> None:
    assert answer(decide_tool(grants(), M.ACCEPT_EDITS, "Bash", {"command": command})) == expected
    assert answer(decide_tool(grants(), M.DEFAULT, "Bash", {"command": command})) == "ask"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/x",
        "../x",
        "/workspace/../etc/x",
        "a/../../etc/x",
        "/workspacex/a",
        "/",
        "",
        "a\0b",
        "/proc/self/mem",
        "x" * 5000,
    ],
)
def test_a_write_outside_is_denied_in_every_mode(path: str) -> None:
    for mode in MODES:
        for tool, key in (("Write", "file_path"), ("Edit", "file_path")):
            assert (
                answer(decide_tool(grants(preapproved=("Write", "Edit")), mode, tool, {key: path}))
                == "deny"
            )
    assert (
        answer(decide_tool(grants(), M.BYPASS, "Write", {"file_path": "/workspace/x"})) == "allow"
    )


def test_a_path_rule_speaks_of_the_whole_family() -> None:
    given_ = grants(deny=("Edit(/workspace/docs/**)", "Read(/workspace/keys/**)"))
    for tool in ("Edit", "Write"):
        for path in ("docs/x", "/workspace/docs", "/workspace/a/../docs/x", "./docs//x"):
            assert answer(decide_tool(given_, M.BYPASS, tool, {"file_path": path})) == "deny"
        assert answer(decide_tool(given_, M.BYPASS, tool, {"file_path": "doc/x"})) == "allow"
    assert answer(decide_tool(given_, M.BYPASS, "Read", {"file_path": "docs/x"})) == "allow"
    assert answer(decide_tool(given_, M.BYPASS, "Read", {"file_path": "keys/x"})) == "deny"
    for search in (
        {"pattern": "x"},
        {"pattern": "x", "path": "/"},
        {"pattern": "x", "path": "keys"},
    ):
        assert answer(decide_tool(given_, M.BYPASS, "Grep", search)) == "deny"
    assert answer(decide_tool(given_, M.BYPASS, "Grep", {"pattern": "x", "path": "src"})) == "allow"
    for pattern in ("**/x", "keys/*", "/workspace/keys/a*", "src/../keys/*"):
        assert answer(decide_tool(given_, M.BYPASS, "Glob", {"pattern": pattern})) == "deny"
    assert answer(decide_tool(given_, M.BYPASS, "Glob", {"pattern": "src/**"})) == "allow"


def test_a_bash_rule_binds_the_other_shells() -> None:
    given_ = grants(allow=("Bash", "Monitor"), deny=("Bash(curl:*)",))
    assert answer(decide_tool(given_, M.BYPASS, "Monitor", {"command": "curl x"})) == "deny"
    assert answer(decide_tool(given_, M.BYPASS, "Monitor", {"ws": "wss://x"})) == "deny"
    assert answer(decide_tool(given_, M.BYPASS, "Monitor", {"command": "tail -f x"})) == "allow"


def test_a_web_rule_reads_the_host_of_a_plain_url() -> None:
    given_ = grants(
        allow=("WebFetch",),
        deny=("WebFetch(domain:evil.example.com)",),
        preapproved=("WebFetch(domain:docs.example.com)",),
    )
    cases = {
        "https://docs.example.com/x": "allow",
        "https://other.example.com/x": "deny",
        "https://docs.example.com@evil.example.com/": "deny",
        "https://docs.example.com.evil.net/": "deny",
        "https://evil.example.com/": "deny",
        "HTTPS://DOCS.example.com/": "deny",
    }
    for url, expected in cases.items():
        assert answer(decide_tool(given_, M.DONT_ASK, "WebFetch", {"url": url})) == expected
    assert (
        answer(decide_tool(given_, M.BYPASS, "WebFetch", {"url": "https://x@evil.example.com"}))
        == "deny"
    )
    assert answer(decide_tool(given_, M.BYPASS, "WebFetch", {})) == "deny"


def test_the_wires_name_of_a_tool_is_the_same_tool() -> None:
    given_ = grants(allow=("Task",), preapproved=("Agent",))
    assert answer(decide_tool(given_, M.DONT_ASK, "Agent", {})) == "allow"
    assert answer(decide_tool(given_, M.DONT_ASK, "Task", {})) == "allow"


def test_mcp_tools_are_taken_to_do_everything() -> None:
    role = {"allow": ["mcp__x__y"]}
    given_ = compile_policy(
        from_mapping({"tools": {"mcp_servers": {"x": {"command": ["x"]}}, "roles": {"a": role}}})
    ).tools
    assert [answer(decide_tool(given_, mode, "mcp__x__y", {})) for mode in MODES] == [
        "ask",
        "ask",
        "deny",
        "deny",
        "ask",
        "allow",
    ]


def test_grants_made_by_hand_fail_closed() -> None:
    odd = ToolGrants(
        offered=("Bash", "Read"), preapproved=("Bash(*)", "((", "Nope"), denied=("Read(**)",)
    )
    assert answer(decide_tool(odd, M.DONT_ASK, "Bash", {"command": "ls"})) == "deny"
    assert answer(decide_tool(odd, M.BYPASS, "Read", {"file_path": "a"})) == "deny"


# --- properties

COMMANDS = st.sampled_from(
    [
        "ls",
        "curl x",
        "ls; curl x",
        "mkdir a",
        "git push",
        "python3 x",
        "echo $(curl x)",
        "",
        "touch a && ls",
    ]
) | st.text(max_size=20)
PATH = st.sampled_from(
    ["a", "docs/x", "/etc/passwd", "../x", ".git/config", "/tmp/x", "", "\0"]
) | st.text(max_size=12)
VALUE = COMMANDS | PATH | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)
INPUT = st.dictionaries(
    st.sampled_from(
        [
            "command",
            "file_path",
            "path",
            "pattern",
            "url",
            "notebook_path",
            "run_in_background",
            "x",
        ]
    ),
    VALUE,
    max_size=4,
)
TOOL = st.sampled_from([*KNOWN, "Agent", "mcp__x__y", "", "Bash "])
RULE = st.sampled_from(
    [
        *ALL_TOOLS,
        "Bash(curl *)",
        "Bash(git push:*)",
        "Bash(ls:*)",
        "Bash(mkdir a)",
        "Edit(docs/**)",
        "Edit(./x*)",
        "Read(/etc/**)",
        "Read(**/x)",
        "Write(./a)",
        "WebFetch(domain:a.example.com)",
    ]
)
GRANTS = st.builds(
    ToolGrants,
    offered=st.lists(st.sampled_from([*ALL_TOOLS, "mcp__x__y"]), max_size=12).map(tuple)
    | st.just(ALL_TOOLS),
    preapproved=st.lists(RULE, max_size=4).map(tuple),
    denied=st.lists(RULE, max_size=3).map(tuple),
    permission_modes=st.just(tuple(PermissionMode))
    | st.lists(st.sampled_from(list(PermissionMode)), max_size=3).map(tuple),
)
MODE = st.sampled_from(list(PermissionMode))
RANK = {"deny": 0, "ask": 1, "allow": 2}


@settings(max_examples=500, deadline=None)
@given(GRANTS, MODE, TOOL | st.text(max_size=8), INPUT, RULE)
@example(ToolGrants(offered=("Bash",)), M.BYPASS, "Bash", {"command": "curl x"}, "Bash(curl *)")
def test_deciding_about_a_tool_is_total_and_a_deny_never_allows_more(
    given_: ToolGrants, mode: PermissionMode, name: str, tool_input: dict[str, Any], deny: str
) -> None:
    before = decide_tool(given_, mode, name, tool_input)
    after = decide_tool(replace(given_, denied=(*given_.denied, deny)), mode, name, tool_input)
    assert RANK[answer(after)] <= RANK[answer(before)]
    assert before.rule
    assert before.reason


@settings(max_examples=300, deadline=None)
@given(GRANTS, MODE, TOOL, INPUT)
def test_plan_never_writes_and_dont_ask_never_asks(
    given_: ToolGrants, mode: PermissionMode, name: str, tool_input: dict[str, Any]
) -> None:
    decision = decide_tool(given_, mode, name, tool_input)
    tool = KNOWN.get(name)
    if mode is M.PLAN and (tool is None or not tool.read_only):
        assert answer(decision) == "deny"
    if mode in {M.DONT_ASK, M.BYPASS}:
        assert not decision.ask


@settings(max_examples=300, deadline=None)
@given(GRANTS, MODE, TOOL, INPUT)
def test_only_what_is_offered_runs(
    given_: ToolGrants, mode: PermissionMode, name: str, tool_input: dict[str, Any]
) -> None:
    if decide_tool(given_, mode, name, tool_input).allowed:
        assert {"Agent": "Task"}.get(name, name) in given_.offered


def test_an_input_that_is_no_object_is_denied() -> None:
    for value in (None, [], "x", 1):
        assert answer(decide_tool(grants(), M.BYPASS, "Bash", value)) == "deny"  # type: ignore[arg-type]


HOSTS = st.sampled_from(
    [
        "a.example.com",
        "b.example.com",
        "x.a.example.com",
        "example.com",
        "api.anthropic.com",
        "127.1",
        "",
    ]
) | st.text(max_size=16)
PORTS = st.sampled_from([22, 80, 443]) | st.integers(-1, 70_000)
HOST_RULES = st.builds(
    HostRule,
    host=st.sampled_from(
        ["a.example.com", "*.example.com", "*.a.example.com", "api.anthropic.com"]
    ),
    port=st.sampled_from([22, 443]),
)
EGRESS = st.builds(
    EgressRules,
    hosts=st.lists(HOST_RULES, max_size=4).map(tuple),
    blocked_ports=st.lists(PORTS, max_size=2).map(tuple),
)


@settings(max_examples=400, deadline=None)
@given(EGRESS, HOSTS, PORTS, PORTS)
def test_deciding_about_a_host_is_total_and_blocking_a_port_never_allows_more(
    rules: EgressRules, host: str, port: int, blocked: int
) -> None:
    before = decide_host(rules, host, port)
    after = decide_host(replace(rules, blocked_ports=(*rules.blocked_ports, blocked)), host, port)
    assert before.allowed or not after.allowed
    assert after.allowed == (before.allowed and port != blocked)
    fewer = replace(rules, hosts=rules.hosts[1:])
    assert before.allowed or not decide_host(fewer, host, port).allowed


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        HostRule,
        host=st.just("a.example.com"),
        paths=st.lists(
            st.builds(
                PathRule,
                method=st.sampled_from(["GET", "POST"]),
                path=st.sampled_from(["/", "/**", "/a", "/a/**"]),
            ),
            max_size=3,
        ).map(tuple),
        opaque=st.booleans(),
    ),
    st.sampled_from(["GET", "POST", "get", "TRACE"]) | st.text(max_size=6),
    st.sampled_from(["/", "/a", "/a/b", "/a/../b", "//a", "/%61", "*"]) | st.text(max_size=10),
)
def test_deciding_about_a_request_is_total(rule: HostRule, method: str, path: str) -> None:
    decision = decide_request(rule, method, path)
    if decision.allowed and rule.paths:
        assert not {"..", "."} & set(path.split("/"))
        assert "%" not in path
        assert "//" not in path


CONFIG = {
    "network": {"allowed_hosts": ["api.anthropic.com", "a.example.com"]},
    "filesystem": {"readable_paths": ["/data/docs"], "writable_paths": ["/workspace", "/data/out"]},
    "tools": {"roles": {"a": {"allow": list(ALL_TOOLS)}}},
}


@settings(max_examples=150, deadline=None)
@given(st.lists(RULE, max_size=3), RULE, MODE, TOOL, INPUT)
def test_a_deny_in_the_document_never_allows_more(
    denied: list[str], extra: str, mode: PermissionMode, name: str, tool_input: dict[str, Any]
) -> None:
    def policy(rules: list[str]) -> ToolGrants:
        role = {"allow": list(ALL_TOOLS), "deny": rules, "preapproved": ["Bash", "Read", "Edit"]}
        return compile_policy(from_mapping({**CONFIG, "tools": {"roles": {"a": role}}})).tools

    before = decide_tool(policy(denied), mode, name, tool_input)
    after = decide_tool(policy([*denied, extra]), mode, name, tool_input)
    assert RANK[answer(after)] <= RANK[answer(before)]


@pytest.mark.parametrize("blocked", ["/data", "/data/docs", "/data/docs/x", "/other"])
def test_a_blocked_path_never_shows_more(blocked: str) -> None:
    before = compile_policy(from_mapping(CONFIG)).sandbox
    config = {**CONFIG, "filesystem": {**CONFIG["filesystem"], "blocked_paths": [blocked]}}  # type: ignore[dict-item]
    after = compile_policy(from_mapping(config)).sandbox
    assert (after.readable, after.writable) == (before.readable, before.writable)
    assert set(before.blocked) < set(after.blocked)  # the sandbox lets deny win over what is shown


@given(st.text(max_size=30) | PATH)
def test_normal_paths_are_idempotent_and_have_no_dots(path: str) -> None:
    once = normal(path)
    assert normal(once) == once
    assert not {"", ".", ".."} & set(once.split("/")[1:]) or once == "/"


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("/a/**", "/a", True),
        ("/a/**", "/a/b/c", True),
        ("/a/**", "/ab", False),
        ("/a/**/c", "/a/c", True),
        ("/a/**/c", "/a/b/b/c", True),
        ("/a/**/c", "/a/b/b/d", False),
        ("/a/*", "/a/b", True),
        ("/a/*", "/a/b/c", False),
        ("/a/?.py", "/a/b.py", True),
        ("/**/x/**/y", "/x/x/z/y", True),
        ("/**", "/", True),
    ],
)
def test_globs(pattern: str, path: str, fits: bool) -> None:
    assert glob_matches(pattern, path) is fits


def test_the_developer_preset_asks_before_a_command_may_write() -> None:
    grants = compile_policy(load_policy(preset="developer")).tools
    for command in ("git diff", "git status -s", "ls -l", "cat a | wc -l", "git log --oneline"):
        assert answer(decide_tool(grants, M.DEFAULT, "Bash", {"command": command})) == "allow"
    for command in (
        "git diff --output=.git/hooks/pre-commit",
        "git log --output=x",
        "git -c core.pager=x log",
        "git status; rm x",
        "cat a > b",
        "python3 x",
    ):
        assert answer(decide_tool(grants, M.DEFAULT, "Bash", {"command": command})) == "ask"


@pytest.mark.parametrize(
    ("address", "path", "server"),
    [
        ("a.example:443", "/crm", "a.example:443/crm"),
        ("a.example:443", "/crm/sse", "a.example:443/crm"),
        ("a.example:443", "/crm/eu/x", "a.example:443/crm/eu/"),
        ("a.example:443", "/crm/eu", "a.example:443/crm/eu/"),
        ("a.example:443", "/crmx", "a.example:443/crm"),  # below none: the first of the host
        ("a.example:443", "/register", "a.example:443/crm"),
        ("b.example:8443", "/any", "b.example:8443"),
        ("b.example:443", "/any", None),
        ("a.example:4430", "/crm", None),
        ("c.example:443", "/", None),
    ],
)
def test_a_request_is_one_mcp_servers(address: str, path: str, server: str | None) -> None:
    servers = ("a.example:443/crm", "a.example:443/crm/eu/", "b.example:8443")
    assert mcp_server(EgressRules(mcp_servers=servers), address, path) == server
