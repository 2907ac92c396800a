"""What becomes possible between two policies, what no longer is, and what one means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringfence.policy.diff import Difference, diff
from ringfence.policy.explain import explain, explain_text
from ringfence.policy.load import PRESETS, from_mapping, load_policy


def difference(before: dict[str, Any], after: dict[str, Any]) -> Difference:
    return diff(from_mapping(before), from_mapping(after))


def net(*hosts: Any, **values: Any) -> dict[str, Any]:
    return {"network": {"allowed_hosts": list(hosts), **values}}


def role(**values: Any) -> dict[str, Any]:
    return {"tools": {"roles": {"a": values}}}


def test_a_policy_differs_from_itself_in_nothing() -> None:
    for name in PRESETS:
        found = diff(load_policy(preset=name), load_policy(preset=name))
        assert found.empty
        assert not found.widens
        assert found.render() == "The two policies permit the same.\n"


WIDENINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (net(), net("a.example.com"), "host: a.example.com:443 every method and path"),
    (
        net("a.example.com"),
        net("a.example.com", "a.example.com:8443"),
        "host: a.example.com:8443 every method and path",
    ),
    (
        net("a.example.com:22", blocked_ports=[22]),
        net("a.example.com:22"),
        "host: a.example.com:22 every method and path",
    ),
    (
        net({"host": "a.example.com", "paths": ["GET /x"]}),
        net({"host": "a.example.com", "paths": ["GET /**"]}),
        "host: a.example.com:443 GET /**",
    ),
    (net("a.example.com"), net("*.example.com"), "host: *.example.com:443 every method and path"),
    (
        net("a.example.com"),
        net({"host": "a.example.com", "opaque": True}),
        "host: a.example.com:443 every method and path (OPAQUE TUNNEL: an exfiltration grant, nothing inside is seen)",
    ),
    (net(), net("api.anthropic.com"), "model: ask any model"),
    (
        net("api.anthropic.com") | {"model": {"models": ["m"]}},
        net("api.anthropic.com"),
        "model: ask any model",
    ),
    (
        net("api.anthropic.com"),
        net("api.anthropic.com") | {"model": {"url_sources": True}},
        "model: the provider fetches content by URL",
    ),
    (role(allow=["Read"]), role(allow=["Read", "Bash"]), "tool: Bash is offered"),
    (
        role(allow=["Bash"]),
        role(allow=["Bash"], preapproved=["Bash(ls:*)"]),
        "tool: Bash(ls:*) asks nobody",
    ),
    (
        {"tools": {"permission_mode": "plan"}},
        {"tools": {"permission_mode": "auto"}},
        "mode: auto when a run does not choose",
    ),
    ({}, {"filesystem": {"readable_paths": ["/data"]}}, "file: /data is read"),
    (
        {"filesystem": {"readable_paths": ["/data"]}},
        {"filesystem": {"writable_paths": ["/workspace", "/data"]}},
        "file: /data is read and written",
    ),
    (
        {"filesystem": {"readable_paths": ["/data"], "blocked_paths": ["/data"]}},
        {"filesystem": {"readable_paths": ["/data"]}},
        "file: /data is read",
    ),
    ({}, {"filesystem": {"workspace": "direct"}}, "workspace: is read and written in place"),
    ({"filesystem": {"workspace": "readonly"}}, {}, "workspace: is read; changes become a patch"),
    ({}, {"accept_unenforced": ["memory"]}, "control: memory may go unenforced"),
]


@pytest.mark.parametrize(("before", "after", "line"), WIDENINGS)
def test_a_widening_is_a_gain_one_way_and_a_loss_the_other(
    before: dict[str, Any], after: dict[str, Any], line: str
) -> None:
    forth, back = difference(before, after), difference(after, before)
    assert line in forth.gained
    assert forth.widens
    assert line in back.lost
    assert line not in back.gained


NARROWINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (net("a.example.com"), net({"host": "a.example.com", "paths": ["GET /x"]})),
    (
        net({"host": "a.example.com", "paths": ["GET /x/**"]}),
        net({"host": "a.example.com", "paths": ["GET /x/y", "GET /x/z/**"]}),
    ),
    (net("*.example.com"), net("a.example.com")),
    (net("api.anthropic.com"), net("api.anthropic.com") | {"model": {"models": ["m"]}}),
    (role(allow=["Bash"], preapproved=["Bash"]), role(allow=["Bash"], preapproved=["Bash(ls:*)"])),
    ({"tools": {"permission_mode": "auto"}}, {"tools": {"permission_mode": "plan"}}),
    (
        {"filesystem": {"writable_paths": ["/workspace", "/data"]}},
        {"filesystem": {"readable_paths": ["/data/docs"]}},
    ),
    ({"filesystem": {"workspace": "direct"}}, {"filesystem": {"workspace": "readonly"}}),
    ({}, {"filesystem": {"hidden": ["x"], "blocked_paths": ["/y"]}}),
    ({}, net(blocked_ports=[22])),
    ({}, {"execution": {"max_memory_mb": 64}}),
    ({}, {"model": {"max_budget_usd": 1}}),
    (role(allow=["Bash"]), role(allow=["Bash"], deny=["Bash(curl *)"])),
]


@pytest.mark.parametrize(("before", "after"), NARROWINGS)
def test_a_narrowing_gains_nothing(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = difference(before, after)
    assert not found.widens, found
    assert not found.empty
    assert difference(after, before).widens


def test_limits_say_which_way_they_went() -> None:
    found = difference(
        {"execution": {"cpus": 1}, "model": {"max_turns": 5}},
        {"execution": {"cpus": 2}, "model": {}},
    )
    assert found.render() == "+ execution.cpus: 1 -> 2\n+ model.max_turns: 5 -> unlimited\n"
    assert found.to_json()["limits"] == [
        {"key": "execution.cpus", "before": 1.0, "after": 2.0, "wider": True},
        {"key": "model.max_turns", "before": 5, "after": None, "wider": True},
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_an_explanation_is_json_and_text(name: str) -> None:
    document = load_policy(preset=name)
    meaning = explain(document)
    assert json.loads(json.dumps(meaning)) == meaning
    text = explain_text(document)
    assert meaning["digest"][:16] in text
    assert "execution.max_memory_mb" in text


def test_an_opaque_tunnel_is_labelled_and_a_ceiling_is_named() -> None:
    document = from_mapping(
        net({"host": "a.example.com", "opaque": True})
        | role(allow=["Bash"])
        | {"execution": {"allow_subprocess": False}}
    )
    text = explain_text(document)
    assert "a.example.com:443 every method and path (OPAQUE TUNNEL: an exfiltration grant" in text
    assert "Bash (execution.allow_subprocess: false)" in text
    assert "nothing: the model cannot be asked" in text
    assert "WITHOUT ENFORCEMENT" not in text
    assert "WITHOUT ENFORCEMENT" in explain_text(from_mapping({"accept_unenforced": ["cpu"]}))


def test_direction_controls_of_a_policy_are_shown_and_not_obeyed() -> None:
    text = explain_text(
        from_mapping({"filesystem": {"hidden": ["a\u202eb"], "readable_paths": ["/x\u2066"]}})
    )
    assert "\u202e" not in text
    assert "a\\u202eb" in text
    assert "/x\\u2066" in text
