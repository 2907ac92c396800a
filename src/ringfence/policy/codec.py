"""Compiled rules ↔ JSON, exactly. PURE.

The egress process receives what was compiled and nothing else: reading refuses unknown keys,
missing keys and wrong types, so that two versions of ringfence never half understand each other.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ringfence.errors import CallerError
from ringfence.policy.compiled import EgressRules, SandboxProfile, ToolGrants

T = TypeVar("T")


def egress_to_json(rules: EgressRules) -> dict[str, Any]:
    """JSON-shaped value of `EgressRules`; `egress_from_json` gives an equal one back."""
    return _to_json(rules)


def egress_from_json(value: object) -> EgressRules:
    """Inverse of `egress_to_json`.

    Raises:
        CallerError: `policy-invalid` for anything that `egress_to_json` did not write.
    """
    return _from_json(_EGRESS, value, EgressRules)


def sandbox_to_json(profile: SandboxProfile) -> dict[str, Any]:
    """JSON-shaped value of `SandboxProfile`."""
    return _to_json(profile)


def sandbox_from_json(value: object) -> SandboxProfile:
    """Inverse of `sandbox_to_json`.

    Raises:
        CallerError: `policy-invalid` for anything that `sandbox_to_json` did not write.
    """
    return _from_json(_SANDBOX, value, SandboxProfile)


def tools_to_json(grants: ToolGrants) -> dict[str, Any]:
    """JSON-shaped value of `ToolGrants`."""
    return _to_json(grants)


def tools_from_json(value: object) -> ToolGrants:
    """Inverse of `tools_to_json`.

    Raises:
        CallerError: `policy-invalid` for anything that `tools_to_json` did not write.
    """
    return _from_json(_TOOLS, value, ToolGrants)


_EGRESS = TypeAdapter(EgressRules)
_SANDBOX = TypeAdapter(SandboxProfile)
_TOOLS = TypeAdapter(ToolGrants)


def _to_json(value: Any) -> dict[str, Any]:
    result = _plain(asdict(value))
    assert isinstance(result, dict)  # noqa: S101  a dataclass is a mapping
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    if isinstance(value, frozenset):
        return sorted(_plain(inner) for inner in value)
    return str(value) if isinstance(value, str) else value  # an enum is its value


def _from_json(adapter: TypeAdapter[T], value: object, kind: type[T]) -> T:
    try:
        result = adapter.validate_python(value)
    except (ValidationError, RecursionError):
        raise _foreign(kind) from None
    # types were read leniently (a list for a tuple); only an exact way back proves the shape
    if not _same(_to_json(result), value):
        raise _foreign(kind)
    return result


def _same(ours: Any, theirs: Any) -> bool:
    """Equality as JSON has it: `True` is not 1, though Python says so."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return isinstance(ours, bool) == isinstance(theirs, bool) and bool(ours == theirs)


def _foreign(kind: type) -> CallerError:
    return CallerError(
        "policy-invalid",
        f"not the JSON of {kind.__name__} as this version writes it",
        hint="compile the policy again with the ringfence that reads it",
    )
