"""Shapes of answers, for the OpenAPI document: as the official client's types have them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from ringfence.model import SessionStatus


class Model(BaseModel):
    """A model, spelled out."""

    id: str
    effort: dict[str, str]
    inference_geo: None
    speed: Literal["standard"]


class Agent(BaseModel):
    """One version of an agent."""

    id: str
    type: Literal["agent"]
    name: str
    description: str | None
    model: Model
    system: str | None
    tools: list[dict[str, Any]]
    mcp_servers: list[dict[str, str]]
    skills: list[None]
    multiagent: None
    metadata: dict[str, str]
    execution_identity: dict[str, str]
    version: int
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class AgentPage(BaseModel):
    """A page of agents, or of versions of one."""

    data: list[Agent]
    next_page: str | None


class Environment(BaseModel):
    """An environment; `ringfence` is ours."""

    id: str
    type: Literal["environment"]
    name: str
    description: str | None
    config: dict[str, Any]
    metadata: dict[str, str]
    scope: Literal["organization"]
    ringfence: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class EnvironmentPage(BaseModel):
    """A page of environments."""

    data: list[Environment]
    next_page: str | None


class EnvironmentDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["environment_deleted"]


class Session(BaseModel):
    """A session; `ringfence` is ours."""

    id: str
    type: Literal["session"]
    agent: dict[str, Any]
    environment_id: str
    title: str | None
    metadata: dict[str, str]
    resources: list[dict[str, Any]]
    vault_ids: list[str]
    budget: dict[str, Any] | None
    status: SessionStatus
    stats: dict[str, float]
    usage: dict[str, Any]
    outcome_evaluations: list[None]
    deployment_id: None
    ringfence: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class SessionPage(BaseModel):
    """A page of sessions."""

    data: list[Session]
    next_page: str | None


class SessionDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["session_deleted"]


class FileResource(BaseModel):
    """A file of a session."""

    id: str
    type: Literal["file"]
    file_id: str
    mount_path: str
    created_at: datetime
    updated_at: datetime


class FileResourcePage(BaseModel):
    """A page of them."""

    data: list[FileResource]
    next_page: str | None


class FileResourceDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["session_resource_deleted"]


class Event(BaseModel, extra="allow"):
    """An event; each type has fields of its own. processed_at: null while it waits."""

    id: str
    type: str
    processed_at: datetime | None


class EventPage(BaseModel):
    """A page of events."""

    data: list[Event]
    next_page: str | None


class SentEvents(BaseModel):
    """Events that were sent, as they are kept."""

    data: list[Event]


class FileScope(BaseModel):
    """The session that made a file."""

    id: str
    type: Literal["session"]


class File(BaseModel):
    """A file's metadata."""

    id: str
    type: Literal["file"]
    filename: str
    mime_type: str
    size_bytes: int
    downloadable: bool
    scope: FileScope | None
    created_at: datetime
    expires_at: datetime | None


class FilePage(BaseModel):
    """A page of files."""

    data: list[File]
    next_page: str | None


class FileDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["file_deleted"]


class Vault(BaseModel):
    """A vault, without what it holds."""

    id: str
    type: Literal["vault"]
    display_name: str
    metadata: dict[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class VaultPage(BaseModel):
    """A page of vaults."""

    data: list[Vault]
    next_page: str | None


class VaultDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["vault_deleted"]


class Credential(BaseModel):
    """A credential, without its value, which nothing gives back."""

    id: str
    type: Literal["vault_credential"]
    vault_id: str
    display_name: str | None
    metadata: dict[str, str]
    auth: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class CredentialPage(BaseModel):
    """A page of credentials."""

    data: list[Credential]
    next_page: str | None


class CredentialDeleted(BaseModel):
    """What is left of one."""

    id: str
    type: Literal["vault_credential_deleted"]


class ErrorDetails(BaseModel):
    """What a program branches on."""

    error_code: str


class ErrorObject(BaseModel):
    """The error itself."""

    type: str
    message: str
    details: ErrorDetails


class Error(BaseModel):
    """Every answer that is no success."""

    type: Literal["error"]
    error: ErrorObject
    request_id: str


class Health(BaseModel):
    """Whether the process lives, or is ready."""

    status: Literal["ok"]
