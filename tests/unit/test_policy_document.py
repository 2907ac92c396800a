"""The document: what loads, what does not, and that every reason is given at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.policy.compile import compile_policy, policy_digest
from ringfence.policy.diff import diff
from ringfence.policy.document import CONTROLS, PolicyDocument
from ringfence.policy.load import DEFAULT, PRESETS, from_mapping, load_policy, loads, preset_text
from ringfence.policy.problems import PolicyInvalidError
from ringfence.policy.schema import policy_schema
from ringfence.policy.yamldoc import parse
from ringfence.sandbox.protocol import Control

ROOT = Path(__file__).parents[2]

SECURITY_CONFIG: dict[str, Any] = {
    "network": {
        "mode": "restricted",
        "allowed_hosts": ["api.anthropic.com"],
        "blocked_ports": [22, 3306, 5432],  # No SSH, no direct DB
    },
    "filesystem": {
        "writable_paths": ["/workspace"],
        "readable_paths": ["/workspace", "/shared/docs"],
        "blocked_paths": ["/etc", "/root", "/var/secrets"],
    },
    "execution": {
        "max_duration_seconds": 300,
        "max_memory_mb": 2048,
        "allow_network_tools": False,
        "allow_subprocess": True,  # For Bash tool
    },
}


def problems(values: object) -> dict[str, str]:
    """Path to message of everything that is wrong."""
    with pytest.raises(PolicyInvalidError) as caught:
        from_mapping(values)  # type: ignore[arg-type]
    error = caught.value
    assert error.code == "policy-invalid"
    assert error.exit_status == 2
    assert "\n" not in error.message
    assert error.message.isprintable()
    return {problem.path: problem.message for problem in error.problems}


def host(value: object) -> dict[str, Any]:
    return {"network": {"allowed_hosts": [value]}}


def test_the_security_config_loads_as_dictionary_json_and_yaml() -> None:
    text = json.dumps(SECURITY_CONFIG)
    documents = [
        from_mapping(SECURITY_CONFIG),
        loads(text),
        loads(text.encode()),
        loads(json.dumps(SECURITY_CONFIG, indent=4)),
        loads((ROOT / "policies" / "security_config.yaml").read_text()),
    ]
    assert len({policy_digest(document) for document in documents}) == 1


def test_the_smallest_policy_permits_nothing() -> None:
    policy = compile_policy(loads("version: 1"))
    assert not policy.egress.model.enabled
    assert policy.egress.hosts == ()
    assert "Bash" not in policy.tools.offered
    assert policy.sandbox.readable == policy.sandbox.writable == ()


def test_every_problem_is_given_at_once_with_its_path_and_mend() -> None:
    found = problems(
        {
            "version": 2,
            "netwrok": {},
            "network": {
                "mode": "open",
                "allowed_hosts": ["*.com", {"host": "a.example.com", "prot": 1}],
                "blocked_ports": ["22", 0],
            },
            "execution": {"max_memory_mb": "2g", "cpus": 0, "allow_subprocess": "no"},
            "tools": {"roles": {"a": {"allow": ["Bsh"]}}},
            "accept_unenforced": ["everything"],
        }
    )
    assert found["netwrok"] == "unknown key; did you mean network?"
    assert found["network.allowed_hosts[1].prot"] == "unknown key; did you mean port?"
    assert "anybody" in found["network.allowed_hosts[0]"]
    assert found["network.blocked_ports[0]"] == "write a whole number"
    assert "did you mean Bash?" in found["tools.roles.a.allow[0]"]
    assert found["execution.allow_subprocess"] == "write true or false"
    assert set(found) == {
        *(
            "version",
            "netwrok",
            "network.mode",
            "network.allowed_hosts[0]",
            "network.blocked_ports[0]",
        ),
        *("network.allowed_hosts[1].prot", "network.blocked_ports[1]", "execution.max_memory_mb"),
        *(
            "execution.cpus",
            "execution.allow_subprocess",
            "tools.roles.a.allow[0]",
            "accept_unenforced[0]",
        ),
    }


def test_words_of_the_sdk_and_keys_at_the_wrong_place_say_where_they_belong() -> None:
    found = problems(
        {
            "version": 1,
            "security_config": {"network": {"mode": "none"}},
            "allowed_tools": ["Read"],
            "permission_mode": "plan",
            "max_duration_seconds": 300,
            "tools": {"disallowed_tools": ["Write"], "cpus": 1},
        }
    )
    assert "at the top" in found["security_config"]
    assert "preapproved" in found["allowed_tools"]
    assert "deny" in found["tools.disallowed_tools"]
    assert found["permission_mode"] == "unknown key; did you mean tools.permission_mode?"
    assert found["max_duration_seconds"].endswith("execution.max_duration_seconds?")
    assert found["tools.cpus"].endswith("did you mean execution.cpus?")


def test_a_problem_reads_as_place_value_reason() -> None:
    with pytest.raises(PolicyInvalidError) as caught:
        from_mapping({"version": 1, "network": {"mode": "open"}})
    (problem,) = caught.value.problems
    assert problem.render() == "network.mode: 'open': write 'restricted' or 'none'"


@pytest.mark.parametrize(
    "values",
    [
        {"version": True},
        {"version": 1.0},
        {"version": "1"},
        {"network": None},
        {"network": []},
        {"network": {"allowed_hosts": "api.anthropic.com"}},
        {"network": {"allowed_hosts": {"api.anthropic.com"}}},
        {"network": {"blocked_ports": [True]}},
        {"execution": {"max_memory_mb": True}},
        {"execution": {"max_memory_mb": 2048.5}},
        {"execution": {"max_duration_seconds": float("nan")}},
        {"execution": {"max_duration_seconds": float("inf")}},
        {"execution": {"max_duration_seconds": 0}},
        {"model": {"max_budget_usd": float("inf")}},
        {"model": {"models": ["*"]}},
        {"tools": {"roles": {"A B": {}}}},
        {"preset": "lax"},
        {"preset": ["strict"]},
        {1: 2},
    ],
)
def test_types_are_strict(values: dict[Any, Any]) -> None:
    assert problems(values)


@pytest.mark.parametrize(
    ("entry", "port"),
    [
        ("a.example.com", 443),
        ("a.example.com:8443", 8443),
        ({"host": "a.example.com", "port": 8443}, 8443),
        ("*.example.com:444", 444),
    ],
)
def test_hosts_are_text_or_mappings(entry: object, port: int) -> None:
    assert from_mapping(host(entry)).network.allowed_hosts[0].port == port


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "a.example.com:0",
            "a.example.com:65536",
            "a.example.com:022",
            "a.example.com:443:443",
            "a.example.com:https",
        ),
        *(":443", "a.example.com:", 1, None, ["a.example.com"], {}, {"port": 443}),
        {"host": "a.example.com", "opaque": True, "paths": ["GET /"]},
        {"host": "a.example.com", "opaque": True, "credential": "x"},
        {"host": "*.example.com", "credential": "x"},
        {"host": "api.anthropic.com", "opaque": True},
        {"host": "api.anthropic.com", "paths": ["POST /v1/files"]},
        {"host": "api.anthropic.com", "port": 8443},
        {"host": "a.example.com", "paths": ["/x"]},
        {"host": "a.example.com", "paths": ["* /x"]},
        {"host": "a.example.com", "paths": ["get /x"]},
        {"host": "a.example.com", "paths": ["CONNECT /x"]},
        {"host": "a.example.com", "paths": ["GET x"]},
        {"host": "a.example.com", "paths": ["GET /**/x"]},
        {"host": "a.example.com", "paths": ["GET /a*"]},
        {"host": "a.example.com", "paths": ["GET /a%2fb"]},
        {"host": "a.example.com", "paths": ["GET /a//b"]},
        {"host": "a.example.com", "paths": ["GET /a/../b"]},
        {"host": "a.example.com", "paths": ["GET /a?x=1"]},
        {"host": "a.example.com", "paths": [{"method": "GET", "path": "/a", "query": "x"}]},
    ],
)
def test_odd_hosts_are_refused(entry: object) -> None:
    assert problems(host(entry))


@pytest.mark.parametrize(
    "path",
    [
        "GET /",
        "GET /**",
        "POST /v1/items",
        "DELETE /v1/items/**",
        {"method": "PUT", "path": "/~a/b-c_d.e"},
    ],
)
def test_path_rules_are_text_or_mappings(path: object) -> None:
    assert from_mapping(host({"host": "a.example.com", "paths": [path]}))


@pytest.mark.parametrize(
    ("filesystem", "words"),
    [
        ({"readable_paths": ["docs"]}, "absolute"),
        ({"readable_paths": ["~/docs"]}, "absolute"),
        ({"readable_paths": ["/a/../b"]}, "normal form: /b"),
        ({"readable_paths": ["/a/"]}, "normal form: /a"),
        ({"readable_paths": ["/a//b"]}, "normal form: /a/b"),
        ({"readable_paths": ["/a/*"]}, "globs"),
        ({"readable_paths": ["/a\nb"]}, "control"),
        ({"readable_paths": ["/"]}, "whole host"),
        ({"readable_paths": ["/proc"]}, "sandbox itself"),
        ({"readable_paths": ["/sys/fs"]}, "sandbox itself"),
        ({"readable_paths": ["/etc"]}, "sandbox itself"),
        ({"readable_paths": ["/workspace/a"]}, "whole or not at all"),
        ({"writable_paths": ["/etc/cron.d"]}, "never writable"),
        ({"writable_paths": ["/usr/local"]}, "never writable"),
        ({"blocked_paths": ["/"]}, "nothing could run"),
        ({"blocked_paths": ["/workspace"]}, "nothing could run"),
        ({"blocked_paths": ["/usr"]}, "nothing could run"),
        ({"blocked_paths": ["/lib64"]}, "nothing could run"),
        ({"hidden": ["/abs"]}, "relative"),
        ({"hidden": ["!x"]}, "relative"),
        ({"hidden": ["a/../b"]}, "parts"),
        ({"show": [""]}, "relative"),
        ({"show": ["**"]}, "everything"),
        ({"hidden": ["*.*"]}, "everything"),
        ({"workspace": "direct", "writable_paths": []}, "add /workspace"),
        ({"workspace": "readonly", "writable_paths": ["/workspace"]}, "out of writable_paths"),
    ],
)
def test_odd_paths_are_refused_with_the_mend(filesystem: dict[str, Any], words: str) -> None:
    assert any(words in message for message in problems({"filesystem": filesystem}).values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("*", "no wildcards"),
        ("mcp__*", "no wildcards"),
        ("mcp__github__*", "no wildcards"),
        ("Bash(*)", "no wildcards"),
        ("Bash(ls)", "a grant names a tool"),
        ("mcp__github", "mcp__server__tool"),
        ("mcp__github__search", "declare the server"),
        ("bash", "did you mean Bash?"),
        ("SendMessage", "never granted"),
        ("CronCreate", "never granted"),
        ("Bash ", "no tool"),
        ("", "no tool"),
    ],
)
def test_grants_are_explicit(name: str, words: str) -> None:
    found = problems({"tools": {"roles": {"a": {"allow": [name]}}}})
    assert words in found["tools.roles.a.allow[0]"]


@pytest.mark.parametrize(
    "rule",
    [
        "Bash(*)",
        "Bash()",
        "Bash(:*)",
        "Edit(**)",
        "Edit(/**)",
        "*",
        "mcp__*",
        "TodoWrite(x)",
        "WebFetch(*)",
        "WebFetch(domain:*)",
        "Foo(x)",
        "Bash(a\nb)",
        "Bash(" + "*a" * 9 + ")",
        *(f"Bash({text})" for text in (" * ", "**", "* *", "***", "*:*", ": *", "?*", "*/*", "''")),
        # look-alikes of a star, and what cannot be seen
        *(
            "Bash(\uff0a)",
            "Bash(curl \u2217)",
            "Bash(*\u200b)",
            "Bash(curl\u200b:*)",
            "Bash(\xa0*)",
        ),
        *(f"Read({text})" for text in ("**/*", "//**/*", "./**", "/*", "/workspace/../**", "/")),
        # at any depth to the Agent SDK, at the top to a shell
        *("Read(.env)", "Edit(*.md)"),
        *("Read(src/{a,b}/**)", "Read(!src/x)", "Read(src/\u200bx)"),
    ],
)
def test_rules_that_narrow_nothing_or_mean_nothing_are_refused(rule: str) -> None:
    assert problems({"tools": {"roles": {"a": {"allow": ["Bash"], "deny": [rule]}}}})


@pytest.mark.parametrize(
    "rule",
    ["Bash(git:*)", "Bash(git *)", "Bash(ls)", "Read(./.env)", "Read(**/.env)", "Read(/etc/**)"],
)
def test_rules_that_name_something_load(rule: str) -> None:
    tools = {"roles": {"a": {"allow": ["Bash", "Read"], "deny": [rule], "preapproved": [rule]}}}
    assert from_mapping({"tools": tools})


@pytest.mark.parametrize("rule", ["Bash(git*)", "Bash(* --version)", "Bash(gi? x)", "Bash(*x:*)"])
def test_an_approval_names_its_program_and_a_deny_need_not(rule: str) -> None:
    role: dict[str, Any] = {"allow": ["Bash"], "deny": [rule]}
    assert from_mapping({"tools": {"roles": {"a": role}}})
    role["preapproved"] = role.pop("deny")
    found = problems({"tools": {"roles": {"a": role}}})
    assert "programs yet to come" in found["tools.roles.a.preapproved[0]"]


def test_rules_have_one_spelling() -> None:
    role = {
        "allow": ["Edit", "Agent"],
        "deny": ["Edit(docs/**)", "Edit(//workspace/x)", "Edit(/workspace/y)", "Read(~/.ssh/**)"],
    }
    loaded = from_mapping({"tools": {"roles": {"a": role}}}).tools.roles
    assert loaded is not None
    assert loaded["a"].allow == ("Edit", "Task")
    assert loaded["a"].deny == (
        "Edit(//workspace/docs/**)",
        "Edit(//workspace/x)",
        "Edit(//workspace/y)",
        "Read(//home/agent/.ssh/**)",
    )
    again = from_mapping(
        {"tools": {"roles": {"a": {"allow": ["Edit"], "deny": list(loaded["a"].deny)}}}}
    ).tools.roles
    assert again is not None
    assert again["a"].deny == loaded["a"].deny


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"network": {"mode": "none", "allowed_hosts": ["a.example.com"]}}, "network.mode"),
        (
            {"network": {"allowed_hosts": ["a.example.com", {"host": "a.example.com"}]}},
            "network.allowed_hosts[1]",
        ),
        (host({"host": "a.example.com", "credential": "x"}), "network.allowed_hosts[0].credential"),
        (
            {
                **host({"host": "a.example.com", "credential": "x"}),
                "secrets": {"x": {"hosts": ["b.example.com"]}},
            },
            "network.allowed_hosts[0].credential",
        ),
        ({"tools": {"role": "b", "roles": {"a": {}}}}, "tools.role"),
        ({"tools": {"roles": {"a": {}, "b": {}}}}, "tools.role"),
        ({"tools": {"role": "a"}}, "tools.role"),
        (
            {"tools": {"roles": {"a": {"allow": ["Read"], "preapproved": ["Bash"]}}}},
            "tools.roles.a.preapproved[0]",
        ),
        (
            {"tools": {"permission_mode": "auto", "permission_modes": ["plan"]}},
            "tools.permission_modes",
        ),
        (
            {"tools": {"mcp_servers": {"x": {"url": "https://mcp.example.com/sse"}}}},
            "tools.mcp_servers.x.url",
        ),
        ({"model": {"models": ["claude-a"], "fallback": "claude-b"}}, "model.fallback"),
        ({"filesystem": {"workspace_modes": ["direct"]}}, "filesystem.workspace_modes"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], path: str) -> None:
    assert path in problems(values)


@pytest.mark.parametrize(
    "secret",
    [
        {"hosts": []},
        {"hosts": ["*.example.com"]},
        {"hosts": ["api.anthropic.com"]},
        {"hosts": ["a.example.com"], "header": "Authorization"},
        {"hosts": ["a.example.com"], "header": "host"},
        {"hosts": ["a.example.com"], "header": "x y"},
        {"hosts": ["a.example.com"], "template": "Bearer"},
        {"hosts": ["a.example.com"], "template": "{} {}"},
        {"hosts": ["a.example.com"], "template": "{}\r\nx: y"},
        {"hosts": ["a.example.com"], "template": "{}\n"},
        {"hosts": ["a.example.com"], "query": "key", "header": "x-key"},
        {"hosts": ["a.example.com"], "query": "a&b"},
        {"hosts": ["a.example.com"], "user": "a", "header": "x-key"},
        {"hosts": ["a.example.com"], "user": "a", "template": "Bearer {}"},
        {"hosts": ["a.example.com"], "user": "a:b"},
        {},
    ],
)
def test_a_secret_goes_to_one_named_place(secret: dict[str, Any]) -> None:
    assert problems({"secrets": {"x": secret}})


@pytest.mark.parametrize(
    "server",
    [
        {},
        {"command": ["x"], "url": "https://a.example.com"},
        {"url": "http://a.example.com"},
        {"url": "https://user@a.example.com"},
        {"url": "https://a.example.com?x=1"},
        {"url": "https://127.0.0.1/"},
        {"command": ["x"], "environment": {"A=B": "c"}},
        {"command": ["x\0"]},
        {"command": ["", "x"]},
    ],
)
def test_mcp_servers_are_a_program_or_an_https_url(server: dict[str, Any]) -> None:
    assert problems({"tools": {"mcp_servers": {"x": server}}})


def test_an_error_shows_the_value_shortened_and_in_ascii() -> None:
    with pytest.raises(PolicyInvalidError) as caught:
        from_mapping({"network": {"mode": "\x1b[31m" + "\u202e" + "x" * 5000}})
    assert len(caught.value.message) < 400
    assert caught.value.message.isascii()
    assert "\x1b" not in caught.value.message


def test_a_thousand_problems_are_kept_and_twenty_repeated() -> None:
    with pytest.raises(PolicyInvalidError) as caught:
        from_mapping({"network": {"allowed_hosts": ["*"] * 1000}})
    assert len(caught.value.problems) == 1000
    assert caught.value.message.endswith("; and 980 more")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"tools": {"permission_modes": ["lax"]}}, "tools.permission_modes[0]"),
        ({"filesystem": {"writable_paths": ["x"]}}, "filesystem.writable_paths[0]"),
        ({"tools": {"mcp_servers": {"a": {"url": "ftp://x"}}}}, "tools.mcp_servers.a.url"),
        ({"tools": {"mcp_servers": {"a b": {"command": ["x"]}}}}, "tools.mcp_servers.'a b'"),
        ({"secrets": {"k": {"hosts": ["*"]}}}, "secrets.k.hosts[0]"),
        (
            {"network": {"allowed_hosts": [{"host": "a.example.com", "paths": ["x"]}]}},
            "network.allowed_hosts[0].paths[0]",
        ),
        ({"model": {"max_budget_usd": "5"}}, "model.max_budget_usd"),
    ],
)
def test_a_problem_names_its_line(values: dict[str, Any], path: str) -> None:
    assert set(problems(values)) == {path}


def test_controls_are_those_of_the_sandbox() -> None:
    assert set(CONTROLS) == {control.value for control in Control}


# --- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_fit_the_schema(name: str) -> None:
    document = load_policy(preset=name)
    assert document.preset == name
    jsonschema.validate(parse(preset_text(name)), policy_schema())
    assert compile_policy(document).egress.model.enabled


def test_the_default_is_strict() -> None:
    assert load_policy() == DEFAULT == load_policy(preset="strict")


def test_a_policy_is_laid_over_its_preset() -> None:
    document = loads("preset: ci\nexecution: {cpus: 1}\nnetwork: {allowed_hosts: []}\n")
    base = load_policy(preset="ci")
    assert document.execution.cpus == 1
    assert document.execution.max_memory_mb == base.execution.max_memory_mb
    assert document.network.allowed_hosts == ()
    assert document.network.blocked_ports == base.network.blocked_ports
    assert not compile_policy(document).egress.model.enabled


@pytest.mark.parametrize("name", PRESETS)
def test_a_line_that_denies_more_lifts_nothing_of_the_preset(name: str) -> None:
    base = load_policy(preset=name)
    values = {
        "preset": name,
        "network": {"blocked_ports": [9, 22]},
        "filesystem": {"blocked_paths": ["/data"], "hidden": ["x"]},
        "tools": {"roles": {base.tools.role: {"deny": ["Read"]}}},
    }
    document = from_mapping(values)
    role, base_role = document.tools.roles[base.tools.role], base.tools.roles[base.tools.role]  # type: ignore[index]
    assert set(base.network.blocked_ports) | {9} == set(document.network.blocked_ports)
    assert document.network.blocked_ports[:2] == (9, 22)
    assert set(base.filesystem.blocked_paths) | {"/data"} == set(document.filesystem.blocked_paths)
    assert document.filesystem.hidden == ("x", *base.filesystem.hidden)
    assert role.deny == ("Read", *base_role.deny)
    assert not diff(base, document).widens
    # and a problem in such a line is named by its own index
    values["network"] = {"blocked_ports": [9, 0]}
    assert set(problems(values)) == {"network.blocked_ports[1]"}


def test_a_role_beside_the_presets_is_chosen_by_name() -> None:
    roles = {"reader": {"allow": ["Read"]}}
    found = problems({"preset": "strict", "tools": {"roles": roles}})
    assert found == {"tools.role": "name one of the roles: engineer, reader"}
    chosen = from_mapping({"preset": "strict", "tools": {"role": "reader", "roles": roles}})
    assert compile_policy(chosen).tools.offered == ("Read",)
    narrowed = {"preset": "strict", "tools": {"roles": {"engineer": {"allow": ["Read"]}}}}
    narrowed["tools"]["roles"]["engineer"]["preapproved"] = []  # type: ignore[index]
    assert compile_policy(from_mapping(narrowed)).tools.offered == ("Read",)


@pytest.mark.parametrize("name", PRESETS)
def test_a_role_of_the_presets_name_takes_over_no_approval(name: str) -> None:
    """Its author need not know that there is one of that name."""
    base = load_policy(preset=name)
    role = str(base.tools.role)
    taken = from_mapping({"preset": name, "tools": {"roles": {role: {"allow": ["Read", "Bash"]}}}})
    (made,) = (taken.tools.roles or {}).values()
    assert (made.allow, made.preapproved) == (("Read", "Bash"), ())
    assert made.deny == (base.tools.roles or {})[role].deny
    assert taken.tools.role == role
    # the twin: one that adds to the preset's, and so names no tool of its own
    added = {role: {"preapproved": ["Read"]}}
    narrowed = from_mapping({"preset": name, "tools": {"roles": added}})
    assert (narrowed.tools.roles or {})[role].allow == (base.tools.roles or {})[role].allow
    assert (narrowed.tools.roles or {})[role].preapproved == ("Read",)


def test_a_mapping_that_nobody_can_change_is_a_role_as_any_other() -> None:
    said = {"mine": {"allow": ["Read"]}}
    frozen = {name: MappingProxyType(role) for name, role in said.items()}
    made = [
        from_mapping({"preset": "strict", "tools": {"role": "mine", "roles": roles}})
        for roles in (said, frozen)
    ]
    assert made[0] == made[1]


def test_an_argument_names_the_base_of_a_policy_that_names_none() -> None:
    assert from_mapping({}, preset="review").execution.allow_subprocess is False


def test_a_spelled_out_preset_is_the_same_policy() -> None:
    assert policy_digest(loads(preset_text("strict"))) == policy_digest(DEFAULT)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, Path("a\0b")):
        with pytest.raises(CallerError) as caught:
            load_policy(path)
        assert caught.value.code == "policy-unreadable"
    good = tmp_path / "p.yaml"
    good.write_text("preset: review\n")
    assert load_policy(good) == load_policy(str(good)) == load_policy(preset="review")


def test_a_policy_is_a_mapping() -> None:
    for text in ("[]", "1", "text"):
        with pytest.raises(PolicyInvalidError):
            loads(text)


# --- properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=10,
)
KEYS = st.sampled_from(
    [
        *PolicyDocument.model_fields,
        *(
            name
            for field in PolicyDocument.model_fields.values()
            for name in getattr(field.annotation, "model_fields", {})
        ),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, JSON, max_size=3) | JSON, max_size=3))
def test_any_mapping_loads_or_is_one_error(values: dict[str, Any]) -> None:
    error = _error(values)
    assert error is None or (error.code == "policy-invalid" and "\n" not in error.message)


def _error(values: dict[str, Any]) -> CallerError | None:
    try:
        compile_policy(from_mapping(values))
    except CallerError as error:
        return error
    return None


def test_a_document_survives_its_own_json() -> None:
    for document in (DEFAULT, from_mapping(SECURITY_CONFIG)):
        again = loads(json.dumps(document.model_dump(mode="json", exclude_none=True)))
        assert policy_digest(again) == policy_digest(document)


def test_the_schema_refuses_what_is_unknown_and_takes_examples() -> None:
    schema = policy_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(SECURITY_CONFIG, schema)
    for path in sorted((ROOT / "policies").glob("*.yaml")):
        jsonschema.validate(parse(path.read_bytes()), schema)
        load_policy(path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"netwrok": {}}, schema)


def _with_headers(**grant: Any) -> dict[str, Any]:
    host = {"host": "api.example.com", "credential": "c", **grant}
    return {
        "network": {"allowed_hosts": [host]},
        "secrets": {"c": {"hosts": ["api.example.com"]}},
    }


def test_headers_are_granted_by_name_beside_a_credential() -> None:
    (grant,) = from_mapping(
        _with_headers(request_headers=["x-github-api-version"], response_headers=["x-total"])
    ).network.allowed_hosts
    assert grant.request_headers == ("x-github-api-version",)
    assert grant.response_headers == ("x-total",)


@pytest.mark.parametrize(
    "grant",
    [
        {"request_headers": ["X-Upper"]},
        {"request_headers": ["x-*"]},
        {"request_headers": ["cookie"]},
        {"request_headers": ["private-token"]},
        {"request_headers": ["x-forwarded-for"]},
        {"request_headers": ["x-http-method-override"]},
        {"response_headers": ["set-cookie"]},
        {"response_headers": ["transfer-encoding"]},
        {"request_headers": ["x-a"], "credential": None},
    ],
)
def test_a_header_that_would_undo_the_injection_does_not_load(grant: dict[str, Any]) -> None:
    with pytest.raises(CallerError):
        from_mapping(_with_headers(**grant))


def test_a_preset_that_the_file_contradicts_is_an_error() -> None:
    assert loads("preset: ci", preset="ci").preset == "ci"
    assert loads("version: 1", preset="ci").preset == "ci"
    assert loads("preset: ci").preset == "ci"
    with pytest.raises(CallerError, match="--preset review was asked for") as refused:
        loads("preset: ci", preset="review")
    assert refused.value.code == "policy-invalid"
