"""The official client, unmodified: only base_url and key are ours. On SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from gateway_rig import Rig


@pytest.fixture(scope="module")
def rig(place: Any) -> Rig:
    return Rig(place=place)


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    with rig.serving() as url:
        yield url


@pytest.fixture
def client(rig: Rig, base: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=base, api_key=rig.key().text) as made:
        yield made


def test_an_agent_is_created_changed_listed_and_archived(client: Anthropic) -> None:
    made = client.beta.agents.create(
        name="Coding Assistant",
        model="claude-opus-5-5",
        system="You help.",
        tools=[
            {
                "type": "agent_toolset_20260401",
                "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}],
            },
            {"type": "mcp_toolset", "mcp_server_name": "github"},
            {
                "type": "custom",
                "name": "ticket",
                "description": "Makes a ticket",
                "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
            },
        ],
        mcp_servers=[{"type": "url", "name": "github", "url": "https://mcp.example.com/github"}],
        metadata={"team": "a", "drop": "me"},
    )
    assert (made.version, made.type, made.archived_at) == (1, "agent", None)
    assert made.model.id == "claude-opus-5-5"
    assert made.model.effort
    assert made.model.effort.type == "high"
    builtin, remote, custom = made.tools
    assert builtin.type == "agent_toolset_20260401"
    assert builtin.default_config.permission_policy.type == "always_allow"
    assert builtin.configs[0].permission_policy.type == "always_ask"
    assert remote.type == "mcp_toolset"
    assert remote.default_config.permission_policy.type == "always_ask"
    assert custom.type == "custom"
    assert custom.input_schema.properties == {"a": {"type": "string"}}

    changed = client.beta.agents.update(
        made.id, version=1, system="You test.", metadata={"drop": None, "new": "x"}
    )
    assert (changed.version, changed.system) == (2, "You test.")
    assert changed.metadata == {"team": "a", "new": "x"}
    assert changed.tools == made.tools
    # no change, no version
    assert client.beta.agents.update(made.id, system="You test.").version == 2
    assert client.beta.agents.retrieve(made.id, version=1).system == "You help."
    assert client.beta.agents.retrieve(made.id) == changed
    assert [one.version for one in client.beta.agents.versions.list(made.id, limit=1)] == [2, 1]

    archived = client.beta.agents.archive(made.id)
    assert archived.archived_at is not None
    assert client.beta.agents.archive(made.id).archived_at == archived.archived_at
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.agents.update(made.id, name="other")
    assert caught.value.error_code == "agent_archived"
    assert client.beta.agents.retrieve(made.id).name == "Coding Assistant"
    listed = [one.id for one in client.beta.agents.list()]
    assert made.id not in listed
    assert made.id in [one.id for one in client.beta.agents.list(include_archived=True)]


def test_an_update_for_another_version_is_a_conflict_and_changes_nothing(
    client: Anthropic,
) -> None:
    made = client.beta.agents.create(name="x", model="claude-opus-5-5")
    client.beta.agents.update(made.id, version=1, name="y")
    with pytest.raises(anthropic.ConflictError) as caught:
        client.beta.agents.update(made.id, version=1, name="z")
    assert (caught.value.type, caught.value.error_code) == ("conflict_error", "version_conflict")
    assert client.beta.agents.retrieve(made.id).name == "y"


def test_pages_hold_every_agent_once_newest_first(client: Anthropic) -> None:
    made = [client.beta.agents.create(name=f"page {n}", model="m").id for n in range(7)]
    pages = client.beta.agents.list(limit=3)
    assert len(pages.data) == 3
    listed = [one.id for one in pages]
    assert listed[:7] == made[::-1]
    assert len(set(listed)) == len(listed)
    middle = client.beta.agents.retrieve(made[3]).created_at
    young = [one.id for one in client.beta.agents.list(created_at_gte=middle)]
    assert made[3] in young
    assert made[2] not in young
    old = [one.id for one in client.beta.agents.list(created_at_lte=middle)]
    assert made[3] in old
    assert made[4] not in old


def test_an_environment_is_created_changed_archived_and_deleted(client: Anthropic) -> None:
    made = client.beta.environments.create(
        name="build",
        config={
            "type": "cloud",
            "networking": {"type": "limited", "allowed_hosts": ["docs.example.com"]},
        },
        metadata={"a": "1", "b": "2"},
        extra_body={"ringfence": {"execution": {"max_memory_mb": 512}, "hosting": "hybrid"}},
    )
    assert made.config.type == "cloud"
    assert made.config.networking.type == "limited"
    assert made.config.networking.allowed_hosts == ["docs.example.com"]
    assert made.config.packages.pip == []
    assert made.model_extra
    assert made.model_extra["ringfence"] == {
        "execution": {"max_memory_mb": 512},
        "hosting": "hybrid",
    }
    changed = client.beta.environments.update(
        made.id,
        description="d",
        metadata={"a": None, "b": ""},
        config={"type": "cloud", "networking": {"type": "limited", "allow_mcp_servers": True}},
    )
    assert (changed.description, changed.metadata) == ("d", {})
    assert changed.config.type == "cloud"
    assert changed.config.networking.type == "limited"
    assert changed.config.networking.allowed_hosts == ["docs.example.com"]
    assert changed.config.networking.allow_mcp_servers is True
    assert client.beta.environments.retrieve(made.id) == changed
    assert made.id in [one.id for one in client.beta.environments.list(limit=1)]
    assert client.beta.environments.archive(made.id).archived_at is not None
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.environments.update(made.id, name="other")
    assert caught.value.error_code == "environment_archived"
    gone = client.beta.environments.delete(made.id)
    assert (gone.id, gone.type) == (made.id, "environment_deleted")
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.beta.environments.retrieve(made.id)
    assert (missing.value.type, missing.value.error_code) == (
        "not_found_error",
        "environment_not_found",
    )


def test_an_environment_that_asks_for_more_than_the_policy_is_refused_and_not_kept(
    client: Anthropic,
) -> None:
    before = {one.id for one in client.beta.environments.list()}
    wide: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "cloud", "networking": {"type": "unrestricted"}}, {}),
        (
            {
                "type": "cloud",
                "networking": {"type": "limited", "allowed_hosts": ["evil.example.org"]},
            },
            {},
        ),
        ({"type": "cloud"}, {"execution": {"max_memory_mb": 1_000_000}}),
        ({"type": "cloud"}, {"isolation": "runtime"}),
        ({"type": "cloud"}, {"approval_seconds": 86_401}),
        ({"type": "cloud"}, {"filesystem": {"readable_paths": ["/etc"]}}),
        ({"type": "cloud"}, {"failover": [{"provider": "elsewhere"}]}),
    ]
    for config, block in wide:
        with pytest.raises(anthropic.PermissionDeniedError) as caught:
            client.beta.environments.create(
                name="wide",
                config=config,
                extra_body={"ringfence": block},  # type: ignore[arg-type]
            )
        assert caught.value.type == "permission_error"
        assert caught.value.error_code in {"unrestricted_denied", "environment_denied"}
    assert {one.id for one in client.beta.environments.list()} == before
    # the allowed twin
    made = client.beta.environments.create(
        name="narrow",
        config={
            "type": "cloud",
            "networking": {"type": "limited", "allowed_hosts": ["a.build.example.com"]},
        },
        extra_body={
            "ringfence": {
                "isolation": "gvisor",
                "execution": {"pids": 64},
                "approval_seconds": 86_400,
                "failover": [],
            }
        },
    )
    with pytest.raises(anthropic.PermissionDeniedError):
        client.beta.environments.update(
            made.id, config={"type": "cloud", "networking": {"type": "unrestricted"}}
        )
    assert client.beta.environments.retrieve(made.id) == made


def test_packages_that_nobody_would_install_are_refused(client: Anthropic) -> None:
    for packages in ({"pip": ["requests"]}, {"apt": ["jq"]}):
        with pytest.raises(anthropic.BadRequestError, match=rf"packages\.{next(iter(packages))}"):
            client.beta.environments.create(
                name="x", config={"type": "cloud", "packages": {"type": "packages", **packages}}
            )
    empty: Any = {"type": "packages", "pip": []}
    client.beta.environments.create(name="x", config={"type": "cloud", "packages": empty})


def test_what_is_not_supported_is_named(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="GET /v1/skills is not supported") as no:
        client.beta.skills.list()
    assert no.value.error_code == "not_supported"
    with pytest.raises(anthropic.BadRequestError, match="skill is not supported"):
        client.beta.agents.create(
            name="x", model="m", skills=[{"type": "anthropic", "skill_id": "xlsx"}]
        )


@pytest.mark.parametrize("header", ["api_key", "auth_token"])
def test_both_ways_of_a_key(rig: Rig, base: str, header: str) -> None:
    key = rig.key().text
    with Anthropic(base_url=base, **{header: key}) as client:  # type: ignore[arg-type]
        assert client.beta.agents.list().data is not None
    with Anthropic(
        base_url=base, **{header: key[:-1] + ("A" if key[-1] != "A" else "B")}
    ) as client:  # type: ignore[arg-type]
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.beta.agents.list()
        assert caught.value.type == "authentication_error"
        assert caught.value.request_id
        assert caught.value.request_id.startswith("req_")
