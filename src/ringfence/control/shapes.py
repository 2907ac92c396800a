"""What the public shapes have in common. PURE.

The shapes are those of the official client's types; a field that is not theirs, nor ours by name,
is refused, as the service does it: a definition whose misspelt line is ignored says less than its
author thinks.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from ringfence.policy.fields import ModelName
from ringfence.policy.fields import Name as PolicyName
from ringfence.policy.hosts import host_problem


class Shape(BaseModel):
    """Base of all: frozen, strict about types, closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Way(Shape):
    """Where a model request goes when those before do not answer: one of the operator's."""

    provider: PolicyName | None = None
    model: ModelName | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> Way:
        if self.provider is None and self.model is None:
            raise ValueError("write a provider, a model or both")
        return self


Ways = Annotated[list[Way], Field(max_length=8)]


def _metadata(value: dict[str, Any]) -> dict[str, Any]:
    if len(value) > 16:
        raise ValueError("at most 16 pairs")
    return value


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
# limits as the client's types state them
Metadata = Annotated[dict[MetadataKey, MetadataValue], AfterValidator(_metadata)]
# a patch may name more keys than may be kept: it deletes, too
MetadataPatch = Annotated[dict[MetadataKey, MetadataValue | None], Field(max_length=64)]

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Description = Annotated[str, StringConstraints(max_length=2048)]


def _host(text: str) -> str:
    if problem := host_problem(text):
        raise ValueError(problem)
    return text


Host = Annotated[str, AfterValidator(_host)]


def patched(stored: dict[str, str], patch: dict[str, str | None]) -> dict[str, str]:
    """Metadata after a patch: null takes a key away."""
    merged = {**stored, **patch}
    return {key: value for key, value in merged.items() if value is not None}


def unsupported(what: str) -> ValueError:
    """For a part of the public shapes that this version cannot keep its word about."""
    return ValueError(f"{what} is not supported by ringfence")
