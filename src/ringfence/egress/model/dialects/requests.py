"""A request that was admitted, in the words of the provider that it goes to. PURE.

Paths and bodies are those of the official client's own forms for Bedrock and Vertex AI: the model
goes from the body into the path, the version of the dialect into the body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ringfence.egress.model.dialects import features
from ringfence.egress.model.headers import Headers

BEDROCK_VERSION, VERTEX_VERSION = "bedrock-2023-05-31", "vertex-2023-10-16"
_IDENTITY = (b"accept-encoding", b"identity")
_TYPE = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Call:
    """What goes out, but for host, credential and length."""

    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Unserved:
    """A request that the provider cannot be asked. `reason` is a tag."""

    status: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """An admitted request. model: as the leg names it; own_model: as the body does."""

    path_and_query: str
    headers: Headers
    body: bytes
    model: str
    own_model: str
    streaming: bool
    counts_only: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """The form that a provider wants. project, region: of Vertex AI."""

    kind: str
    models: Mapping[str, str]
    project: str = ""
    region: str = ""


def made(asked: Asked, form: Form) -> Call | Unserved:
    """A request in a provider's form; takes as long as its body is large (`heavy` of aside)."""
    if form.kind == "bedrock":
        return bedrock(asked, form.models)
    if form.kind == "vertex":
        return vertex(asked, form.models, form.project, form.region)
    return anthropic(asked)


def anthropic(asked: Asked) -> Call:
    """As it is, but for a model that is another than the client's."""
    body = asked.body
    if asked.own_model != asked.model:
        body = _json({**json.loads(body), "model": asked.model})
    return Call(asked.path_and_query, tuple(asked.headers), body)


def bedrock(asked: Asked, models: Mapping[str, str]) -> Call | Unserved:
    """`/model/ID/invoke`, or with `-with-response-stream`."""
    if asked.counts_only:
        return Unserved(404, "count-not-at-provider")
    body, flags = _fitted(asked, "bedrock")
    model_id = models.get(asked.model)
    if body is None or model_id is None:
        return _unserved(body)
    if flags:
        body["anthropic_beta"] = flags
    body = {"anthropic_version": BEDROCK_VERSION, **body}
    body.pop("stream", None)
    verb = "invoke-with-response-stream" if asked.streaming else "invoke"
    accept = b"application/vnd.amazon.eventstream" if asked.streaming else b"application/json"
    path = f"/model/{quote(model_id, safe=':')}/{verb}"
    return Call(path, (_TYPE, (b"accept", accept), _IDENTITY), _json(body))


def vertex(asked: Asked, models: Mapping[str, str], project: str, region: str) -> Call | Unserved:
    """`…/models/ID:rawPredict`, `:streamRawPredict`, and one for counting."""
    body, flags = _fitted(asked, "vertex")
    model_id = models.get(asked.model)
    if body is None or model_id is None:
        return _unserved(body)
    body = {"anthropic_version": VERTEX_VERSION, **body}
    place = f"/projects/{quote(project, safe=':')}/locations/{region}/publishers/anthropic/models"
    if asked.counts_only:
        body["model"] = model_id
        path = f"{place}/count-tokens:rawPredict"
    else:
        verb = "streamRawPredict" if asked.streaming else "rawPredict"
        path = f"{place}/{quote(model_id, safe='@')}:{verb}"
    headers = [_TYPE, (b"accept", b"application/json"), _IDENTITY]
    if flags:
        headers.append((b"anthropic-beta", ",".join(flags).encode()))
    return Call(path, tuple(headers), _json(body))


def _unserved(body: dict[str, Any] | None) -> Unserved:
    if body is None:
        return Unserved(400, "feature-not-at-provider")
    return Unserved(403, "model-not-at-provider")


def _fitted(asked: Asked, kind: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The body without its model, and the flags; None for one that the clouds cannot be asked."""
    value = json.loads(asked.body)
    if features.unserved(value):
        return None, []
    given = [v for name, v in asked.headers if name == b"anthropic-beta"]
    wanted = [flag.strip() for v in given for flag in v.decode("latin-1").split(",")]
    flags = features.betas(kind, wanted)
    body = features.fit(value, flags)
    body.pop("model", None)
    return body, flags


def _json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no UTF-8 has it, an escape does
        return json.dumps(value, separators=(",", ":")).encode()
