"""Each finding has a policy that causes it and a mended twin that does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ringfence.policy.lint import CATALOGUE, Severity, lint
from ringfence.policy.load import PRESETS, from_mapping, load_policy

CLEAN: dict[str, Any] = {
    "network": {"allowed_hosts": ["api.anthropic.com"]},
    "tools": {
        "roles": {"a": {"allow": ["Read", "Edit", "Bash"], "preapproved": ["Read", "Edit", "Bash"]}}
    },
    "execution": {"allow_subprocess": True},
    "model": {"max_budget_usd": 1},
}


def with_(section: str, **values: Any) -> dict[str, Any]:
    document = copy.deepcopy(CLEAN)
    document.setdefault(section, {}).update(values)
    return document


def hosts(*entries: Any, **values: Any) -> dict[str, Any]:
    return with_("network", allowed_hosts=["api.anthropic.com", *entries], **values)


def role(mode: str = "default", **values: Any) -> dict[str, Any]:
    return with_("tools", roles={"a": values}, permission_mode=mode)


def ids(values: dict[str, Any], missing: str = "") -> set[str]:
    return {
        finding.id for finding in lint(from_mapping(values), exists=lambda path: path != missing)
    }


SECRET = {"secrets": {"k": {"hosts": ["a.example.com"]}}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("POL001", with_("network", allowed_hosts=[]), CLEAN),
    ("POL001", with_("network", blocked_ports=[443]), CLEAN),
    (
        "POL002",
        hosts("a.example.com:8443", blocked_ports=[8443]),
        hosts("a.example.com:8443", blocked_ports=[22]),
    ),
    ("POL003", hosts({"host": "a.example.com", "opaque": True}), hosts("a.example.com")),
    ("POL004", hosts("*.example.com"), hosts("a.example.com")),
    (
        "POL005",
        hosts("api.github.com"),
        hosts({"host": "api.github.com", "paths": ["GET /repos/**"]}),
    ),
    ("POL005", hosts("*.github.com"), hosts("a.example.com")),
    ("POL006", hosts("a.example.com:80"), hosts("a.example.com:443")),
    (
        "POL007",
        hosts({"host": "a.example.com", "credential": "k"}) | SECRET,
        hosts({"host": "a.example.com", "credential": "k", "paths": ["GET /x"]}) | SECRET,
    ),
    (
        "POL008",
        CLEAN | SECRET,
        hosts({"host": "a.example.com", "credential": "k", "paths": ["GET /x"]}) | SECRET,
    ),
    ("POL009", hosts("*.example.com", "a.example.com"), hosts("*.example.com", "a.example.org")),
    ("POL010", role(allow=["Bash"], deny=["Bash(curl *)"]), role(allow=["Bash"], deny=["Read"])),
    (
        "POL011",
        role(allow=["Write"], deny=["Write(docs/**)"]),
        role(allow=["Write"], deny=["Edit(docs/**)"]),
    ),
    (
        "POL012",
        role(allow=["Bash", "Read"], deny=["Read(docs/**)"]),
        role(allow=["Read"], deny=["Read(docs/**)"]),
    ),
    ("POL013", with_("execution", allow_subprocess=False), CLEAN),
    (
        "POL014",
        role("bypassPermissions", allow=["Read", "Bash"], preapproved=["Read"]),
        role("dontAsk", allow=["Read", "Bash"], preapproved=["Read"]),
    ),
    ("POL015", role("acceptEdits", allow=["Task"]), role("default", allow=["Task"])),
    ("POL016", role("auto", allow=["Read"]), role("acceptEdits", allow=["Read"])),
    ("POL017", role(allow=["MultiEdit"]), role(allow=["Edit"])),
    ("POL018", role(allow=["Read"], deny=["Read"]), role(allow=["Read"], deny=["Edit"])),
    ("POL019", with_("tools", roles=None), CLEAN),
    (
        "POL020",
        with_("filesystem", readable_paths=["/missing"]),
        with_("filesystem", readable_paths=["/there"]),
    ),
    (
        "POL021",
        with_("filesystem", writable_paths=["/workspace", "/there"]),
        with_("filesystem", readable_paths=["/there"]),
    ),
    (
        "POL022",
        with_("filesystem", readable_paths=["/a/b"], blocked_paths=["/a"]),
        with_("filesystem", readable_paths=["/a/b"], blocked_paths=["/c"]),
    ),
    ("POL023", with_("filesystem", show=["*.pem"]), with_("filesystem", show=["certs/test.pem"])),
    ("POL023", with_("filesystem", show=["certs/*"]), with_("filesystem", show=["certs/test.pem"])),
    ("POL024", with_("filesystem", workspace="direct"), with_("filesystem", workspace="review")),
    ("POL025", with_("filesystem", tmp_exec=True), CLEAN),
    ("POL030", CLEAN | {"accept_unenforced": ["memory"]}, CLEAN),
    (
        "POL031",
        CLEAN | {"accept_unenforced": ["network"]},
        CLEAN | {"accept_unenforced": ["memory"]},
    ),
    (
        "POL032",
        with_("tools", mcp_servers={"x": {"command": ["x"], "environment": {"API_KEY": "v"}}}),
        with_("tools", mcp_servers={"x": {"command": ["x"], "environment": {"LEVEL": "v"}}}),
    ),
    ("POL033", with_("model", url_sources=True), CLEAN),
    (
        "POL034",
        with_("model", server_tools=["web_fetch"]) | {"execution": {"allow_network_tools": False}},
        CLEAN,
    ),
    ("POL035", with_("model", max_budget_usd=None), CLEAN),
    (
        "POL047",
        with_("model", regions=["eu"], url_sources=True),
        with_("model", regions=["eu"]),
    ),
    ("POL036", with_("execution", max_duration_seconds=10, max_tool_seconds=20), CLEAN),
    *(
        (
            "POL039",
            with_("filesystem", readable_paths=[path]),
            with_("filesystem", readable_paths=["/var/lib/data"]),
        )
        for path in ("/var/run/docker.sock", "/run/user/1000", "/var", "/data/x.sock")
    ),
    (
        "POL041",
        with_("isolation", backend="container", threat_model="third_party_input"),
        with_("isolation", backend="gvisor", threat_model="third_party_input"),
    ),
    *(
        (
            "POL040",
            with_("filesystem", readable_paths=[path]),
            with_("filesystem", readable_paths=["/home/u/docs"]),
        )
        for path in ("/root/.ssh", "/home/u/.aws/config", "/srv/tls/server.key")
    ),
    (
        "POL038",
        with_("tools", mcp_servers={"x": {"command": ["x"]}}),
        with_(
            "tools",
            mcp_servers={"x": {"command": ["x"]}},
            roles={"a": {"allow": ["mcp__x__t"], "preapproved": ["mcp__x__t"]}},
        ),
    ),
    ("POL037", CLEAN | {"hosting": {"pattern": "hybrid"}}, CLEAN),
    (
        "POL046",
        with_("model", failover=[{"model": "claude-haiku-4-5"}]),
        with_("model", failover=[{"provider": "second"}]),
    ),
    (
        "POL045",
        CLEAN | {"isolation": {"backend": "microvm", "emulation": "allow"}},
        CLEAN | {"isolation": {"backend": "microvm"}},
    ),
]


@pytest.mark.parametrize(("id_", "causes", "mended"), CASES)
def test_a_finding_has_a_cause_and_a_mend(
    id_: str, causes: dict[str, Any], mended: dict[str, Any]
) -> None:
    assert id_ in ids(causes, missing="/missing")
    assert id_ not in ids(mended, missing="/missing")


def test_every_finding_of_the_catalogue_is_tested() -> None:
    assert {id_ for id_, _, _ in CASES} == set(CATALOGUE)


def test_filters_of_commands_are_one_finding_a_list() -> None:
    many = role(allow=["Bash"], deny=["Read", "Bash(curl *)", "Bash(wget *)", "Bash(nc *)"])
    found = [f for f in lint(from_mapping(many)) if f.id == "POL010"]
    assert [f.path for f in found] == ["tools.roles.a.deny[1]"]
    assert "Bash(curl *) and 2 more read text" in found[0].message


def test_a_clean_policy_has_no_findings() -> None:
    assert lint(from_mapping(CLEAN)) == ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_errors(name: str) -> None:
    findings = lint(load_policy(preset=name))
    assert not [finding for finding in findings if finding.severity is Severity.ERROR]


def test_errors_come_first_and_every_finding_says_what_to_do() -> None:
    findings = lint(from_mapping(hosts("a.example.com:80", "*.example.com:81", blocked_ports=[81])))
    assert [finding.severity for finding in findings] == sorted(
        (f.severity for f in findings), key=list(Severity).index
    )
    assert all(
        finding.mend and finding.path and "\n" not in finding.message for finding in findings
    )
    assert findings[0].to_json()["id"] == "POL002"
