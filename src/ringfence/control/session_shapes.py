"""Sessions in the public shapes: what may be asked of one. PURE.

What nothing here keeps its word about is refused by name: memory stores, repositories, outcomes,
threads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from ringfence.control.agent_shapes import ModelConfig, Servers, Skills, System, Tools
from ringfence.control.event_shapes import UserMessage, refuse_events
from ringfence.control.shapes import Metadata, MetadataPatch, Shape, unsupported

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
Version = Annotated[int, Field(ge=1, le=2_147_483_647)]
Title = Annotated[str, StringConstraints(max_length=512)]

MOUNTED: frozenset[str] = frozenset({"file"})
"""Types of resources that a worker mounts."""


class AgentReference(Shape):
    """An agent, in its newest version unless one is named."""

    type: Literal["agent"]
    id: Identifier
    version: Version | None = None


class AgentWithOverrides(Shape):
    """An agent of which the session has some parts otherwise; each part is replaced whole."""

    type: Literal["agent_with_overrides"]
    id: Identifier
    version: Version | None = None
    model: ModelConfig | None = None
    system: System | None = None
    tools: Tools | None = None
    mcp_servers: Servers | None = None
    skills: Skills = None


def _agent_kind(value: Any) -> str:
    if isinstance(value, str):
        return "plain"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "overrides" if kind == "agent_with_overrides" else "reference"


AgentChoice = Annotated[
    Annotated[Identifier, Tag("plain")]
    | Annotated[AgentReference, Tag("reference")]
    | Annotated[AgentWithOverrides, Tag("overrides")],
    Discriminator(_agent_kind),
]


class Money(Shape):
    """An amount in cents, as text: no float touches it."""

    amount: Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,11})$")]
    currency: Literal["USD"]


class Budget(Shape):
    """What the session may cost at list prices, all its turns together."""

    type: Literal["limit"]
    max_list_cost: Money


class FileResource(Shape):
    """A file that was uploaded."""

    type: Literal["file"]
    file_id: Identifier
    mount_path: Annotated[str, StringConstraints(max_length=4096)] | None = None


class NewResource(FileResource):
    """The body of an addition."""

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        _refuse_resources([value])
        return value


class ResourcePatch(Shape):
    """The body of an update of one: the token of a repository."""

    authorization_token: Annotated[str, StringConstraints(min_length=1, max_length=8192)]


MOST_RESOURCES = 100
"""Of one session."""

RESOURCES = frozenset({"file", "github_repository", "memory_store"})


def _refuse_resources(value: Any) -> None:
    for item in value if isinstance(value, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind in RESOURCES - MOUNTED:
            raise unsupported(f"a resource of type `{kind}`")


class SessionBlock(Shape):
    """Ours: how its turns are served. `batch`: nobody waits for them, and others go first."""

    batch: bool | None = None


class SessionDefinition(Shape):
    """The body of a creation."""

    agent: AgentChoice
    environment_id: Identifier
    budget: Budget | None = None
    initial_events: Annotated[list[UserMessage], Field(max_length=50)] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)
    resources: Annotated[list[FileResource], Field(max_length=MOST_RESOURCES)] = Field(
        default_factory=list
    )
    title: Title | None = None
    vault_ids: Annotated[list[Identifier], Field(max_length=20)] = Field(default_factory=list)
    ringfence: SessionBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        if isinstance(value, dict):
            _refuse_resources(value.get("resources"))
            refuse_events(value.get("initial_events"))
        return value


class AgentChanges(Shape):
    """What of a session's agent can be changed; each list is replaced whole."""

    tools: Tools = Field(default_factory=list)
    mcp_servers: Servers = Field(default_factory=list)


class SessionPatch(Shape):
    """The body of an update: what is left out stays; null takes away what can be."""

    agent: AgentChanges = Field(default_factory=AgentChanges)
    budget: Budget | None = None
    metadata: MetadataPatch | None = None
    title: Title | None = None
    ringfence: SessionBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        if isinstance(value, dict) and "vault_ids" in value:
            # the client's type says the same of the service
            raise unsupported("changing vault_ids")
        return value


def overridden(body: dict[str, Any], choice: AgentWithOverrides) -> dict[str, Any]:
    """A definition in which the parts that were given take the place of the agent's.

    `body` is resolved; what comes back is to be validated as a whole.
    """
    given = choice.model_fields_set - {"id", "type", "version"}
    changes = choice.model_dump(mode="json", include=given, exclude_unset=True)
    # null clears the system prompt, and no other field has it in the client's types
    kept = {name: part for name, part in changes.items() if part is not None or name == "system"}
    return {**body, **kept}


def changed_agent(body: dict[str, Any], patch: AgentChanges) -> dict[str, Any]:
    """A definition with other tools or servers, to be validated as a whole."""
    given = patch.model_fields_set
    return {**body, **patch.model_dump(mode="json", include=given, exclude_unset=True)}
