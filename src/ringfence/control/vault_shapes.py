"""Vaults and credentials in the public shapes.

Held: `static_bearer`, and `mcp_oauth` without `refresh`, which is good until it expires. Refused by
name: `refresh`, because whoever refreshes must be able to read the refresh token and to write the
next one, and egress, which alone can read, has no way to the store; and `environment_variable`,
whose value would replace a placeholder anywhere in a request, where a credential here sets one
named header on its host and nothing else.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, SecretStr, model_validator
from pydantic.types import StringConstraints

from ringfence.control.shapes import Metadata, MetadataPatch, Shape, unsupported
from ringfence.errors import CallerError
from ringfence.policy.hosts import host_problem
from ringfence.vault.store import check_value

DisplayName = Annotated[str, StringConstraints(min_length=1, max_length=255)]


def _secret(value: SecretStr) -> SecretStr:
    try:
        check_value(value.get_secret_value(), "it")
    except CallerError as error:
        raise ValueError(error.message) from None
    return value


def _url(value: str) -> str:
    match = re.fullmatch(r"https://([^/:?#@\s]+)(?::443)?(/[!-~]*)?", value)
    if match is None:
        raise ValueError("write https://host[/path], at port 443 and without user or password")
    if problem := host_problem(match[1], wildcards=False):
        raise ValueError(problem)
    return value


Secret = Annotated[SecretStr, AfterValidator(_secret)]
ServerUrl = Annotated[str, StringConstraints(max_length=2048), AfterValidator(_url)]
Moment = Annotated[datetime, Field(strict=False)]


def host_of(url: str) -> str:
    """The host of a `ServerUrl`: where alone the credential goes."""
    return url.removeprefix("https://").partition("/")[0].removesuffix(":443")


class StaticBearer(Shape):
    """A token that does not change by itself."""

    type: Literal["static_bearer"]
    token: Secret
    mcp_server_url: ServerUrl

    @property
    def value(self) -> SecretStr:
        """The token."""
        return self.token


class McpOauth(Shape):
    """An access token; past `expires_at` it goes nowhere."""

    type: Literal["mcp_oauth"]
    access_token: Secret
    mcp_server_url: ServerUrl
    expires_at: Moment | None = None
    refresh: None = None

    @property
    def value(self) -> SecretStr:
        """The access token."""
        return self.access_token

    @model_validator(mode="before")
    @classmethod
    def _no_refresh(cls, value: Any) -> Any:
        return _refuse_refresh(value)


class StaticBearerUpdate(Shape):
    """Another token in the place of one; the server's URL stays."""

    type: Literal["static_bearer"]
    token: Secret | None = None

    @property
    def value(self) -> SecretStr | None:
        """The token."""
        return self.token


class McpOauthUpdate(Shape):
    """Another access token in the place of one; the server's URL stays."""

    type: Literal["mcp_oauth"]
    access_token: Secret | None = None
    expires_at: Moment | None = None
    refresh: None = None

    @property
    def value(self) -> SecretStr | None:
        """The access token."""
        return self.access_token

    @model_validator(mode="before")
    @classmethod
    def _no_refresh(cls, value: Any) -> Any:
        return _refuse_refresh(value)


def _refuse_refresh(value: Any) -> Any:
    if isinstance(value, dict) and value.get("refresh") is not None:
        raise unsupported("refresh of an mcp_oauth credential (update access_token instead)")
    return value


def _refuse_kinds(value: Any) -> Any:
    auth = value.get("auth") if isinstance(value, dict) else None
    if isinstance(auth, dict) and auth.get("type") == "environment_variable":
        raise unsupported("a credential of type `environment_variable`")
    return value


class VaultDefinition(Shape):
    """The body of a vault's creation."""

    display_name: DisplayName
    metadata: Metadata = Field(default_factory=dict)


class VaultPatch(Shape):
    """The body of an update: what is left out or null stays."""

    display_name: DisplayName | None = None
    metadata: MetadataPatch | None = None


class CredentialDefinition(Shape):
    """The body of a credential's creation."""

    auth: Annotated[StaticBearer | McpOauth, Discriminator("type")]
    display_name: Annotated[str, StringConstraints(max_length=255)] | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        return _refuse_kinds(value)


class CredentialPatch(Shape):
    """The body of an update: what is left out stays."""

    auth: Annotated[StaticBearerUpdate | McpOauthUpdate, Discriminator("type")] | None = None
    display_name: DisplayName | None = None
    metadata: MetadataPatch | None = None

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        return _refuse_kinds(value)
