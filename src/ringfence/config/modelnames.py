"""Names of models, as each provider writes them. PURE.

A cloud's id holds the name that the Messages API gives the model: `us.anthropic.NAME-v1:0` on
Bedrock, `NAME@DATE` on Vertex AI.
"""

from __future__ import annotations

import re

GEOGRAPHIES = ("global", "us-gov", "us", "eu", "apac", "jp", "au", "ca")
"""Of inference profiles, by the prefix of their ids: AWS serves a request anywhere in one."""

_PROFILE = re.compile(rf"(?:({'|'.join(GEOGRAPHIES)})\.)?anthropic\.(claude-[a-z0-9.-]+)")
_ARN = re.compile(r"arn:aws[a-z-]*:bedrock:([a-z0-9-]*):[0-9]*:([a-z-]+)/(.+)", re.DOTALL)
_SERVED = re.compile(
    rf"(?:({'|'.join(GEOGRAPHIES)})\.)?anthropic\.claude-[a-z0-9.-]+(?::\d+(?::[0-9a-z]+)?)?"
)
_REVISION = re.compile(r"-v\d+(?::\d+(?::[0-9a-z]+)?)?\Z")
_DATE = re.compile(r"-\d{8}\Z")
_AT_HOME = frozenset({"foundation-model", "provisioned-model", "imported-model", "custom-model"})
UNKNOWN = "unknown"
"""The place of what has an id that says nothing of where it leads."""


def canonical(model: str) -> str:
    """The Messages API's name in a cloud's id; any other text as it is."""
    arn = _ARN.match(model)
    if arn is not None:
        model = arn.group(3)
    found = _PROFILE.match(model)
    if found is not None:
        return _REVISION.sub("", found.group(2))
    name, at, version = model.partition("@")
    if at and name.startswith("claude-"):
        return f"{name}-{version}" if version.isdigit() else name
    return model


def undated(name: str) -> str:
    """The name without its date, by which clients ask for the latest of a model."""
    return _DATE.sub("", name)


def place(kind: str, model_id: str, region: str) -> str:
    """Where a cloud serves a request for a model: the region, the geography of a profile, or
    UNKNOWN. On Bedrock the region serves what is plainly a model's own id, or the ARN of one that
    lies there; an application's profile, a prompt, an endpoint or a geography that is not known
    here yet may lead anywhere. Vertex AI serves every id where its host is.
    """
    if kind != "bedrock":
        return region or UNKNOWN
    arn = _ARN.fullmatch(model_id)
    if arn is not None:
        if arn.group(2) in _AT_HOME:
            return arn.group(1) or region
        model_id = arn.group(3)
        if arn.group(2) != "inference-profile":
            return UNKNOWN  # an application's own profile hides the geography of its source
    found = _SERVED.fullmatch(model_id)
    if found is None or (arn is not None and not found.group(1)):
        return UNKNOWN
    return found.group(1) or region


def arn_region(model_id: str) -> str:
    """The region that an ARN names; empty for anything else."""
    arn = _ARN.match(model_id)
    return arn.group(1) if arn is not None else ""
