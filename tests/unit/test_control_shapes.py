"""Definitions: spelled out once and for all; cursors and buckets that cannot be misread."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ringfence.control import agent_shapes, environment_shapes
from ringfence.control.agent_shapes import AgentDefinition, AgentPatch
from ringfence.control.lists import cursor, position
from ringfence.errors import CallerError
from ringfence.limits.buckets import Buckets

configs = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.none() | st.booleans(),
        "permission_policy": st.none()
        | st.sampled_from([{"type": "always_allow"}, {"type": "always_ask"}]),
    },
)
builtin = st.builds(
    lambda default, names, config: {
        "type": "agent_toolset_20260401",
        "default_config": default,
        "configs": [{"name": name, **config} for name in names],
    },
    st.none() | configs,
    st.lists(st.sampled_from(["bash", "read", "web_fetch"]), unique=True),
    configs,
)
agents = st.fixed_dictionaries(
    {"name": st.text(min_size=1, max_size=20), "model": st.sampled_from(["m", {"id": "m"}])},
    optional={
        "description": st.none() | st.text(max_size=20),
        "system": st.none() | st.text(max_size=20),
        "tools": st.lists(builtin, max_size=1),
        "metadata": st.dictionaries(
            st.text(min_size=1, max_size=9), st.text(max_size=9), max_size=3
        ),
        "skills": st.just([]),
        "multiagent": st.none(),
        "execution_identity": st.none() | st.just({"type": "service_account"}),
    },
)


@given(agents)
def test_what_is_spelled_out_stays_so(values: dict[str, Any]) -> None:
    once = agent_shapes.resolved(AgentDefinition.model_validate(values))
    assert agent_shapes.resolved(AgentDefinition.model_validate(once)) == once
    # a patch that says what is there already changes nothing
    said = AgentPatch.model_validate({**once, "metadata": once["metadata"]})
    whole = AgentDefinition.model_validate(agent_shapes.merged(once, said))
    assert agent_shapes.resolved(whole) == once


def test_an_update_without_an_effort_keeps_it() -> None:
    stored = agent_shapes.resolved(
        AgentDefinition.model_validate({"name": "x", "model": {"id": "m", "effort": "max"}})
    )
    patch = AgentPatch.model_validate({"model": "other"})
    assert agent_shapes.merged(stored, patch)["model"]["effort"] == {"type": "max"}


@pytest.mark.parametrize(
    ("patch", "key", "value"),
    [
        ({"system": None}, "system", None),
        ({"tools": None}, "tools", []),
        ({"metadata": {"a": None, "b": "2"}}, "metadata", {"b": "2"}),
        ({}, "system", "s"),
    ],
)
def test_what_null_and_nothing_mean(patch: dict[str, Any], key: str, value: object) -> None:
    stored = agent_shapes.resolved(
        AgentDefinition.model_validate(
            {
                "name": "x",
                "model": "m",
                "system": "s",
                "metadata": {"a": "1"},
                "tools": [{"type": "agent_toolset_20260401"}],
            }
        )
    )
    assert agent_shapes.merged(stored, AgentPatch.model_validate(patch))[key] == value


@pytest.mark.parametrize("key", ["name", "model"])
def test_what_cannot_be_cleared(key: str) -> None:
    with pytest.raises(ValidationError):
        AgentPatch.model_validate({key: None})


@pytest.mark.parametrize("package", ["--index-url=x", "a b", "a;b", "", "a\nb", "-e."])
def test_a_package_is_no_option_and_no_second_word(package: str) -> None:
    with pytest.raises(ValidationError):
        environment_shapes.Packages.model_validate({"pip": [package]})
    assert environment_shapes.Packages.model_validate({"pip": ["a[b]>=1,<2", "@s/a"]})


@given(st.integers(0, 2**63 - 1), st.from_regex(r"\A[a-z]+_[0-9a-f]{24}\Z"))
def test_a_cursor_is_its_position(moment: int, identity: str) -> None:
    assert position(cursor(moment, identity), int, str) == [moment, identity]


@given(st.text(max_size=60) | st.text(max_size=60).map("page_".__add__))
def test_any_other_text_is_no_cursor(text: str) -> None:
    try:
        moment, identity = position(text, int, str)
    except CallerError as error:
        assert error.code == "page-invalid"
    else:
        assert type(moment) is int
        assert type(identity) is str


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 10))
def test_a_bucket_never_gives_more_than_its_rate(steps: list[float], burst: int) -> None:
    buckets, now, given_ = Buckets(per_minute=60, burst=burst), 0.0, 0
    for step in steps:
        now += step
        wait = buckets.take("a", now)
        given_ += wait == 0
        assert wait == 0 or buckets.take("a", now + wait + 1e-6) == 0 or wait < 0
        given_ += wait > 0
        now += wait + 1e-6 if wait else 0
    assert given_ <= burst + now * 1.0 + 1
