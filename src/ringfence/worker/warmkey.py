"""Which waiting `claude` can serve a run: two with one key could have been started as one. PURE.

The key is taken from the very object that spawns `claude`, every field of it, named here or not:
an option that a new SDK brings makes another key, and never a `claude` that differs from what was
asked for. Left out is only what names the session, and who answers; see `PER_RUN`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from ringfence.model import RunRequest
from ringfence.policy.compiled import CompiledPolicy

PER_RUN = frozenset({"session_id", "session_store", "debug_stderr"})
"""Options that do not tell two members apart: the session's id is the member's own and becomes
the run's; the store is lent at the hand-over; nothing is written to debug_stderr, which is this
process's standard error unless somebody sets it, by a transport that is not the SDK's."""


def obstacle(policy: CompiledPolicy, request: RunRequest) -> str | None:
    """Why a run cannot be served by a `claude` that was started before it; None when it can.

    A command is none; a session whose id is given is not the one that waits; a resumed one has
    files that come before the start; a run that waits for people gains nothing by half a second;
    MCP servers start with `claude`, and what they need (a file of the workspace, the way out) is
    not there yet; what is written to other paths of the host belongs to the workspace's owner
    (docs/decisions/0012).
    """
    writable = [path for path in policy.sandbox.writable if not _of_workspace(path)]
    for found, what in (
        (request.command, "a command is no run of claude"),
        (request.session_id, "a session whose id is given is not the one that waits"),
        (request.resume or request.fork, "a session that goes on has files that come first"),
        (request.defer or request.ask_tools, "a run that waits for people gains nothing by it"),
        (policy.tools.mcp_servers, "MCP servers start with claude, and need the run's own way out"),
        (writable, f"{', '.join(writable)}: the host's, and the workspace's owner writes there"),
    ):
        if found:
            return what
    return None


def _of_workspace(path: str) -> bool:
    return path == "/workspace" or path.startswith("/workspace/")


def warm_key(
    options: Any,
    *,
    environment: Mapping[str, str],
    policy: CompiledPolicy,
    isolation: str,
    claude: str,
    ca_certificate: bytes | None,
    workspace: str,
) -> str:
    """SHA-256 (hex) of all that is fixed at spawn.

    Args:
        options: the SDK's options, a dataclass.
        environment: what `claude` finds in its environment.
        policy: narrowed by the request. The run's time is kept outside and is no part of the key.
        isolation: name of the backend.
        claude: names the binary's content, such as device, inode, size and times.
        ca_certificate: what is added to the trust stores inside.
        workspace: what `claude` finds of one as it starts, see `warmplace`.

    Raises:
        TypeError: for a value that has no canonical form; such a run cannot be served warm.
    """
    limits = dataclasses.replace(policy.sandbox.limits, wall_seconds=0.0)
    fixed = {
        "options": {
            field.name: form_of(getattr(options, field.name))
            for field in dataclasses.fields(options)
            if field.name not in PER_RUN
        },
        "environment": dict(environment),
        "policy": policy.digest,
        "tools": form_of(policy.tools),
        "sandbox": form_of(dataclasses.replace(policy.sandbox, limits=limits)),
        "isolation": isolation,
        "claude": claude,
        "workspace": workspace,
        "ca": hashlib.sha256(ca_certificate or b"").hexdigest(),
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def form_of(value: Any) -> Any:
    """JSON that is equal when and only when the values are; a type is part of a value."""
    if value is None or type(value) in _PLAIN:
        return value
    for kind, form in _FORMS:
        if isinstance(value, kind):
            return {kind.__name__: form(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: form_of(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if callable(value):
        return {"called": True}  # that somebody answers is fixed at spawn, and not who
    raise TypeError(f"a {type(value).__name__} has no canonical form")


_PLAIN = (bool, int, float, str)
_FORMS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (Enum, lambda value: form_of(value.value)),
    (bytes, bytes.hex),
    (
        Mapping,
        lambda value: [[form_of(key), form_of(value[key])] for key in sorted(value)],
    ),
    (
        frozenset,
        lambda value: sorted(json.dumps(form_of(one), sort_keys=True) for one in value),
    ),
    (list, lambda value: [form_of(one) for one in value]),
    (tuple, lambda value: [form_of(one) for one in value]),
)
