"""Who asks, and the platform that answers: what every rule of this room is handed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ringfence.config import SloSettings
from ringfence.control.narrowing import NetworkRules
from ringfence.errors import CallerError
from ringfence.policy.document import PolicyDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """The operator's bounds, for each tenant.

    Attributes:
        agents, environments, sessions, vaults: rows at most. versions: of one agent.
        definition_bytes: of one, as it is stored. page_bytes: of what a page shows.
        session_file_bytes: of one session's files together.
    """

    agents: int = 10_000
    versions: int = 10_000
    environments: int = 1_000
    sessions: int = 100_000
    vaults: int = 1_000
    definition_bytes: int = 128 * 1024
    page_bytes: int = 2048 * 1024
    session_file_bytes: int = 2048 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """An authenticated caller. Everything it sees or makes is its tenant's."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    quota: Quota = field(default_factory=Quota)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """What the operator allows to all tenants together with their environments.

    Attributes:
        approval_seconds: how long a call may wait for somebody's answer.
        slo: what is promised of runs at most.
    """

    policy: PolicyDocument
    network: NetworkRules = field(default_factory=NetworkRules)
    approval_seconds: float = 86_400.0
    slo: SloSettings = field(default_factory=SloSettings)


def new_id(prefix: str) -> str:
    """A name that cannot be guessed: 96 random bits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def moment(microseconds: int | None) -> str | None:
    """RFC 3339, UTC, to the microsecond."""
    if microseconds is None:
        return None
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"


def invalid(error: ValidationError) -> CallerError:
    """What pydantic found, as the service words it: `place: reason`, all of it on one line."""
    return CallerError("request-invalid", "; ".join(problems(error.errors(include_url=False))))


def problems(found: Sequence[Any]) -> list[str]:
    """One line for each problem of a validation, at most eight. Values are not repeated."""
    lines = []
    for item in found[:8]:
        place = ".".join(str(part) for part in item["loc"])
        words = str(item["msg"]).removeprefix("Value error, ")
        lines.append(f"{place}: {words}" if place else words)
    return lines


T = TypeVar("T", bound=BaseModel)


def validated(kind: type[T], values: object) -> T:
    """A merged definition, whole.

    Raises:
        CallerError: `request-invalid`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None
