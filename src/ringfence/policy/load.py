"""Policies from files, text, mappings and presets. Not PURE: the one file here that reads.

A preset is an ordinary policy shipped with the package. Where a policy names one, its own lines
are laid over the preset's: mappings merge key by key, everything else replaces.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from ringfence.errors import CallerError
from ringfence.policy import yamldoc
from ringfence.policy.document import PolicyDocument
from ringfence.policy.validate import build, refuse

PRESETS: tuple[str, ...] = ("strict", "ci", "review", "developer")
"""Names of the built-in presets; `strict` stands when nothing is said."""


class PathLike(Protocol):
    """A path as `pathlib` has it; this room imports neither `os` nor `pathlib`."""

    def __fspath__(self) -> str:
        """Its text."""
        ...


def load_policy(path: str | PathLike | None = None, *, preset: str | None = None) -> PolicyDocument:
    """The policy in the file at `path`; without one, the preset, `strict` by default.

    With both, `preset` is the base of a file that names none itself.

    Raises:
        CallerError: `policy-unreadable`; `policy-invalid` with every problem.
    """
    if path is None:
        return from_mapping({"preset": preset or "strict"})
    return loads(_read(path), preset=preset)


def loads(text: str | bytes, *, preset: str | None = None) -> PolicyDocument:
    """The policy that YAML or JSON `text` says.

    Raises:
        CallerError: `policy-invalid` with every problem.
    """
    value = yamldoc.parse(text)
    if not isinstance(value, dict):
        refuse("", "a policy is a mapping of sections", value)
    return from_mapping(value, preset=preset)


def from_mapping(values: Mapping[str, Any], *, preset: str | None = None) -> PolicyDocument:
    """The policy that a mapping says, such as a `security_config` dictionary.

    Raises:
        CallerError: `policy-invalid` with every problem.
    """
    values = dict(values)
    if preset is not None:
        values.setdefault("preset", preset)
    base = values.get("preset")
    if base is None:
        return build(values)
    if base not in PRESETS:
        refuse("preset", f"no such preset; there are: {', '.join(PRESETS)}", base)
    return build({**_merge(_preset(base), values), "preset": base})


def preset_text(name: str) -> str:
    """The YAML of a preset, comments included.

    Raises:
        CallerError: `policy-invalid` when there is none of that name.
    """
    if name not in PRESETS:
        refuse("preset", f"no such preset; there are: {', '.join(PRESETS)}", name)
    folder = importlib.resources.files("ringfence.policy") / "presets"
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def _preset(name: str) -> Mapping[str, Any]:
    value = yamldoc.parse(preset_text(name))
    assert isinstance(value, dict)  # noqa: S101  shipped with the package, and tested
    return value


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _read(path: str | PathLike) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  no pathlib in this room
            return file.read(yamldoc.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CallerError(
            "policy-unreadable",
            f"{path}: {reason}",
            hint="name a YAML file, or leave it out for the preset `strict`",
        ) from None


DEFAULT = load_policy()
"""The preset `strict`."""
