"""Policies from files, text, mappings and presets. Not PURE: the one file here that reads.

A preset is an ordinary policy shipped with the package. Where a policy names one, its own lines
are laid over the preset's: mappings merge key by key, lists that deny are joined (a line that
denies more must not lift what the preset denies), and everything else replaces. A role that says
`allow` is its own, though the preset has one of that name: of that one it keeps `deny` alone.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from ringfence.errors import CallerError
from ringfence.policy import yamldoc
from ringfence.policy.document import PolicyDocument
from ringfence.policy.problems import Place, PolicyInvalidError, refuse
from ringfence.policy.validate import build

PRESETS: tuple[str, ...] = ("strict", "ci", "review", "developer")
"""Names of the built-in presets; `strict` stands when nothing is said."""


class PathLike(Protocol):
    """A path as `pathlib` has it; this room imports neither `os` nor `pathlib`."""

    def __fspath__(self) -> str:
        """Its text."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A policy and where its lines stand.

    Attributes:
        document: the policy, its preset merged in.
        source: name of the file; empty for a preset.
        places: dotted path to line and column, for the file's own lines.
    """

    document: PolicyDocument
    source: str = ""
    places: Mapping[str, Place] = field(default_factory=dict)


def load_policy(path: str | PathLike | None = None, *, preset: str | None = None) -> PolicyDocument:
    """The policy in the file at `path`; without one, the preset, `strict` by default.

    With both, `preset` is the base of a file that names none itself, and an error where it names
    another: neither may be ignored without a word.

    Raises:
        CallerError: `policy-unreadable`; `policy-invalid` with every problem and its place.
    """
    if path is None:
        return from_mapping({"preset": preset or "strict"})
    return read(_bytes(path), preset=preset, source=_name(path)).document


def read_file(path: str | PathLike) -> Loaded:
    """The policy in a file, with the places of its lines. Raises as `load_policy` does."""
    return read(_bytes(path), source=_name(path))


def loads(text: str | bytes, *, preset: str | None = None) -> PolicyDocument:
    """The policy that YAML or JSON `text` says.

    Raises:
        CallerError: `policy-invalid` with every problem and its place.
    """
    return read(text, preset=preset).document


def read(text: str | bytes, *, preset: str | None = None, source: str = "") -> Loaded:
    """The policy that `text`, known as `source`, says. Raises as `loads` does."""
    places: Mapping[str, Place] = {}
    try:
        parsed = yamldoc.parse_with_places(text)
        places = parsed.places
        if not isinstance(parsed.value, dict):
            refuse("", "a policy is a mapping of sections", parsed.value)
        document = from_mapping(parsed.value, preset=preset)
    except PolicyInvalidError as error:
        raise error.located(places, source) from None
    return Loaded(document=document, source=source, places=places)


def from_mapping(values: Mapping[str, Any], *, preset: str | None = None) -> PolicyDocument:
    """The policy that a mapping says, such as a `security_config` dictionary.

    Raises:
        CallerError: `policy-invalid` with every problem.
    """
    values = dict(values)
    if preset is not None and values.setdefault("preset", preset) != preset:
        refuse("preset", f"--preset {preset} was asked for; drop one of the two", values["preset"])
    base = values.get("preset")
    if base is None:
        return build(values)
    if base not in PRESETS:
        refuse("preset", f"no such preset; there are: {', '.join(PRESETS)}", base)
    return build({**_laid_over(_preset(base), values), "preset": base})


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


_DENYING = frozenset({"blocked_ports", "blocked_paths", "hidden", "deny"})
"""Keys of lists whose entries take something away; no other list is called so."""


def _laid_over(preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = _merge(preset, values)
    below, above = preset.get("tools", {}), values.get("tools")
    if isinstance(above, Mapping) and isinstance(above.get("roles"), Mapping):
        # the preset's role would stay in force, and with it more than the author has read: with
        # a role of their own and no choice, the document has two and says so
        own = [name for name in above["roles"] if name not in below["roles"]]
        if own and "role" not in above:
            del merged["tools"]["role"]
        for name, role in above["roles"].items():
            # the name may be chance: what it preapproves is not to come from a file that its
            # author has not read
            if isinstance(role, Mapping) and "allow" in role and "preapproved" not in role:
                kept = merged["tools"]["roles"][name].items()
                merged["tools"]["roles"][name] = {
                    key: value for key, value in kept if key != "preapproved"
                }
    return merged


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        elif key in _DENYING and isinstance(below, list) and isinstance(value, (list, tuple)):
            # its own lines first: an error names them by their index
            merged[key] = [*value, *(item for item in below if item not in value)]
        else:
            merged[key] = value
    return merged


def _name(path: str | PathLike) -> str:
    return path if isinstance(path, str) else path.__fspath__()


def _bytes(path: str | PathLike) -> bytes:
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
