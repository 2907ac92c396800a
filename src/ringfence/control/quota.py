"""What a tenant may keep: how many of a kind, and how large one may be."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.config import GatewaySettings
from ringfence.control.tenancy import Quota
from ringfence.errors import CallerError, DeniedError
from ringfence.store import counts
from ringfence.store.tables import canonical


def quota_of(settings: GatewaySettings) -> Quota:
    """The bounds in the operator's settings."""
    return Quota(
        agents=settings.agents,
        versions=settings.agent_versions,
        environments=settings.environments,
        sessions=settings.sessions,
        vaults=settings.vaults,
        definition_bytes=settings.definition_kb * 1024,
        page_bytes=settings.page_kb * 1024,
        session_file_bytes=settings.session_files_mb << 20,
    )


def fitting(quota: Quota, body: dict[str, Any]) -> dict[str, Any]:
    """A definition that is small enough to be kept. Raises CallerError `request-too-large`."""
    size = len(canonical(body).encode())
    if size > quota.definition_bytes:
        raise CallerError(
            "request-too-large",
            f"the definition is {size} bytes, more than {quota.definition_bytes}",
            hint="a shorter system prompt, fewer tools, or files beside it",
        )
    return body


async def one_more(connection: AsyncConnection, tenant: str, kind: str, most: int) -> None:
    """Count a new row of a kind. Raises DeniedError `tenant-full`."""
    if not await counts.take(connection, tenant, kind, most):
        raise full(kind, most)


def full(kind: str, most: int) -> DeniedError:
    """There is no room for another."""
    return DeniedError(
        "tenant-full",
        f"there are {most} {kind} already, as many as there may be",
        hint="for the operator: the settings of the gateway say how many",
    )
