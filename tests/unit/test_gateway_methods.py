"""Every method that the official client has for what the gateway serves is called, and what it sends
is looked up in the gateway's table: one that a new version brings is here without being written down.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic
from anthropic._resource import SyncAPIResource

from ringfence.gateway.app import create_app
from ringfence.gateway.support import public_routes, refusal, served

RESOURCES = ("agents", "environments", "sessions", "files", "vaults")
ALWAYS = frozenset(
    {"extra_headers", "extra_query", "extra_body", "timeout", "betas", "workspace_id"}
)
"""What all methods have; the workspace is a header, which the guard compares with the key's."""


class _SentError(Exception):
    """The request is known; nobody answers it."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a method asks for: the route's template, and names in the query."""

    method: str
    path: str
    query: frozenset[str]


def _methods(resource: Any, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for attribute, value in inspect.getmembers(type(resource)):
        if attribute.startswith(("_", "with_")):
            continue
        if inspect.isfunction(value):
            yield f"{name}.{attribute}", getattr(resource, attribute)
        elif isinstance(child := getattr(resource, attribute), SyncAPIResource):
            yield from _methods(child, f"{name}.{attribute}")


def _client(requests: list[httpx2.Request]) -> Anthropic:
    def note(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        raise _SentError

    return Anthropic(
        base_url="http://gateway.test",
        api_key="rfk_x",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(note)),
    )


REQUESTS: list[httpx2.Request] = []
CLIENT = _client(REQUESTS)
METHODS = {
    name: method
    for resource in RESOURCES
    for name, method in _methods(getattr(CLIENT.beta, resource), resource)
}


def _value(parameter: inspect.Parameter) -> Any:
    """What the client can put into a path, a query or a body: it checks no types."""
    return b"x" if parameter.name == "file" else "x"


def _sent(name: str, *, optional: bool) -> Sent:
    """What a method sends, with what it must be given or with all that it takes."""
    given = {
        one.name: _value(one)
        for one in inspect.signature(METHODS[name]).parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
        and one.name not in ALWAYS
        and (optional or one.default is inspect.Parameter.empty)
    }
    del REQUESTS[:]
    # the client wraps what its transport raises
    with pytest.raises(Exception) as caught:
        METHODS[name](**given)
    assert REQUESTS, f"{name} sent nothing: {caught.value!r}"
    request = REQUESTS[-1]
    path = request.url.path
    (template,) = (
        template
        for method, template in public_routes()
        if method == request.method and re.fullmatch(re.sub(r"\{[a-z_]+\}", "x", template), path)
    )
    return Sent(request.method, template, frozenset(request.url.params.keys()) - {"beta"})


APP = create_app(None, None)
"""One for all: FastAPI keeps its document, which takes longer to make than all that is asked."""


def test_the_walk_finds_the_methods() -> None:
    assert len(METHODS) > 50
    assert {name.partition(".")[0] for name in METHODS} == set(RESOURCES)
    assert "sessions.events.stream" in METHODS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_served_or_refused_by_its_name(name: str) -> None:
    sent = _sent(name, optional=False)
    if (sent.method, sent.path) in served(APP):
        return
    error = refusal(sent.method, re.sub(r"\{[a-z_]+\}", "x", sent.path))
    assert error.code == "not-supported"
    assert f"{sent.method} {sent.path} " in error.message


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_method_can_ask_for_is_known_to_the_gateway(name: str) -> None:
    """Names of the query: one that it does not know it refuses, and here it would be forgotten."""
    sent = _sent(name, optional=True)
    if (sent.method, sent.path) not in served(APP):
        return
    operation = APP.openapi()["paths"][sent.path][sent.method.lower()]
    known = {
        # a list is sent with brackets, and a single value without
        one["name"].removesuffix("[]")
        for one in operation.get("parameters", ())
        if one["in"] == "query"
    }
    assert sent.query <= known
