"""A mapping → a `PolicyDocument`, or every reason why not, at once. PURE."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ringfence.policy.document import (
    Model,
    PolicyDocument,
    permission_mode_of,
    workspace_mode_of,
)
from ringfence.policy.hosts import matches
from ringfence.policy.problems import PolicyInvalidError, Problem, dotted, show
from ringfence.policy.rules import parse_rule
from ringfence.policy.tools import mcp_parts


def build(values: Mapping[str, Any]) -> PolicyDocument:
    """Validate one merged mapping.

    Raises:
        PolicyInvalidError: with every problem of types and values; and when there is none, with
            every contradiction between sections.
    """
    try:
        document = PolicyDocument.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise PolicyInvalidError(tuple(_from_pydantic(item) for item in details)) from None
    problems = tuple(contradictions(document))
    if problems:
        raise PolicyInvalidError(problems)
    return document


def contradictions(document: PolicyDocument) -> Iterator[Problem]:
    """Lines that are each well formed and cannot be meant together."""
    yield from _network(document)
    yield from _tools(document)
    yield from _modes(document)
    model = document.model
    if model.providers and model.provider not in model.providers:
        yield Problem(
            path="model.provider",
            message="is not among model.providers; add it there, or name another",
            value=show(model.provider),
        )
    if model.models and model.fallback is not None and model.fallback not in model.models:
        yield Problem(
            path="model.fallback",
            message="is not among model.models; add it there",
            value=show(model.fallback),
        )
    yield from _failover(model)


def _failover(model: Model) -> Iterator[Problem]:
    seen: list[tuple[str | None, str | None]] = [(model.provider, None)]
    for index, leg in enumerate(model.failover):
        path = f"model.failover[{index}]"
        if leg.model is not None and model.models and leg.model not in model.models:
            yield Problem(
                path=f"{path}.model",
                message="is not among model.models; add it there",
                value=show(leg.model),
            )
        place = leg.provider or model.provider, leg.model
        if place in seen:
            yield Problem(path=path, message="a way that stands before it already; drop it")
        seen.append(place)


def _network(document: PolicyDocument) -> Iterator[Problem]:
    network = document.network
    if network.mode == "none" and network.allowed_hosts:
        yield Problem(
            path="network.mode",
            message="reaches nothing, and allowed_hosts names hosts; drop one of the two",
            value=show("none"),
        )
    seen: dict[tuple[str, int], int] = {}
    for index, grant in enumerate(network.allowed_hosts):
        path = f"network.allowed_hosts[{index}]"
        first = seen.setdefault((grant.host, grant.port), index)
        if first != index:
            yield Problem(
                path=path,
                message=f"the same host and port as allowed_hosts[{first}]; write one rule",
                value=show(f"{grant.host}:{grant.port}"),
            )
        if grant.credential is None:
            continue
        secret = document.secrets.get(grant.credential)
        if secret is None or grant.host not in secret.hosts:
            yield Problem(
                path=f"{path}.credential",
                message=f"declare it: secrets.{grant.credential}.hosts: [{grant.host}]",
                value=show(grant.credential),
            )


def _tools(document: PolicyDocument) -> Iterator[Problem]:
    tools = document.tools
    roles = tools.roles or {}
    if tools.role is not None and tools.role not in roles:
        known = ", ".join(roles) or "none"
        yield Problem(
            path="tools.role",
            message=f"no such role; tools.roles has: {known}",
            value=show(tools.role),
        )
    if tools.role is None and len(roles) > 1:
        yield Problem(path="tools.role", message=f"name one of the roles: {', '.join(roles)}")
    for name, role in roles.items():
        for index, grant in enumerate(role.allow):
            server = mcp_parts(grant)
            if server and server[0] not in tools.mcp_servers:
                yield Problem(
                    path=f"tools.roles.{name}.allow[{index}]",
                    message=f"declare the server: tools.mcp_servers.{server[0]}",
                    value=show(grant),
                )
        for index, text in enumerate(role.preapproved):
            if parse_rule(text).tool not in role.allow:
                yield Problem(
                    path=f"tools.roles.{name}.preapproved[{index}]",
                    message="approves a tool that is not offered; add it to allow",
                    value=show(text),
                )
    for name, server_grant in tools.mcp_servers.items():
        address = server_grant.address
        if address and not any(
            matches(grant.host, address[0]) and grant.port == address[1]
            for grant in document.network.allowed_hosts
        ):
            yield Problem(
                path=f"tools.mcp_servers.{name}.url",
                message=f"its host is not reachable; add {address[0]}:{address[1]} to "
                "network.allowed_hosts",
                value=show(server_grant.url),
            )


def _modes(document: PolicyDocument) -> Iterator[Problem]:
    filesystem, tools = document.filesystem, document.tools
    view = workspace_mode_of(document)
    if filesystem.workspace_modes is not None and view not in filesystem.workspace_modes:
        yield Problem(
            path="filesystem.workspace_modes",
            message=f"lacks the mode in force; add {view}, or set workspace",
            value=show(list(filesystem.workspace_modes)),
        )
    if tools.permission_modes is None:
        return
    mode = permission_mode_of(document)
    if mode not in tools.permission_modes:
        yield Problem(
            path="tools.permission_modes",
            message=f"lacks the mode in force; add {mode}, or set permission_mode",
            value=show(list(tools.permission_modes)),
        )


def _from_pydantic(error: ErrorDetails) -> Problem:
    kind, value = error["type"], error.get("input")
    location = list(error["loc"])
    if kind == "extra_forbidden":
        return Problem(path=dotted(location), message=_unknown_key(location))
    message = _MESSAGES.get(kind)
    if kind == "value_error":
        message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    elif kind == "literal_error":
        message = f"write {error['ctx']['expected']}"
    elif kind == "string_pattern_mismatch":
        message = f"does not have the form {error['ctx']['pattern']}"
    shown = "" if kind == "missing" or isinstance(value, (dict, BaseModel)) else show(value)
    return Problem(path=dotted(location), message=message or _plain(error), value=shown)


_MESSAGES = {
    "missing": "is missing",
    "model_type": "write a mapping of keys",
    "dict_type": "write a mapping of keys",
    "string_type": "write text; quote it if YAML reads it as something else",
    "int_type": "write a whole number",
    "float_type": "write a number",
    "bool_type": "write true or false",
    "tuple_type": "write a list",
    "recursion_loop": "holds itself",
}


def _plain(error: ErrorDetails) -> str:
    return error["msg"].replace("Input should be", "must be")


# what the Agent SDK and copied examples call what a policy says elsewhere, or leaves to the run
_ROLE = "write tools.role: NAME and tools.roles.NAME"
_ELSEWHERE = {
    "security_config": "write its sections at the top of the document",
    "allowed_tools": f"{_ROLE} with allow (what is offered) and preapproved (what asks nobody)",
    "disallowed_tools": f"{_ROLE} with deny",
    "cwd": "a run names its directory: --workspace",
}


def _unknown_key(location: list[int | str]) -> str:
    model: Any = PolicyDocument
    for part in location[:-1]:
        model = _field_model(model, part)
    fields = list(model.model_fields) if model else []
    key = str(location[-1])
    if key in _ELSEWHERE:
        return f"unknown key; {_ELSEWHERE[key]}"
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    homes = [f"{name}.{key}" for name, section in _sections() if key in section.model_fields]
    if homes or near:
        return f"unknown key; did you mean {' or '.join(homes or near)}?"
    return "unknown key" + (f"; known are: {', '.join(fields)}" if fields else "")


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in PolicyDocument.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None:
            yield name, section


def _field_model(model: Any, part: int | str) -> Any:
    """The section behind one step of an error's location; None when it is no section."""
    if model is None or isinstance(part, int):
        return model
    if part not in getattr(model, "model_fields", {}):
        return model  # a name chosen by the author, such as a role's
    return _section_in(model.model_fields[part].annotation)


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
