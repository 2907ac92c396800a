"""What a record may look like, checked cheaply by the recorder.

The recorder must start in a blink and pydantic does not, so the catalogue (`events.py`) is read as
source text: its class bodies are the one definition of every event, and a test holds the two
readings against each other. One of the recorder's clients parses bytes from inside the fence, so
nothing is written that the catalogue does not name.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

MAX_TEXT = 1024
"""Characters of one text field; the rest is cut, and the cut shows."""
MAX_ITEMS = 256

_EGRESS = frozenset({"tool.requested", "witness.disagreed"})
_EGRESS_GROUPS = ("egress.", "model.", "credential.", "keeper.")
_WORKER = frozenset({"model.moved"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Fields of one event: name to check; and those that must be there."""

    fields: Mapping[str, Callable[[Any], bool]]
    required: frozenset[str]


def load_shapes() -> dict[str, Shape]:
    """Read the catalogue: event type to shape. Raises ValueError for what it cannot read."""
    tree = ast.parse(resources.files("ringfence.record").joinpath("events.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    common = _fields(classes["Event"])
    shapes = {}
    for node in classes.values():
        own = _fields(node)
        kind = own.pop("type", None)
        if kind is None:
            continue
        every = common | own
        shapes[_constant(kind)] = Shape(
            fields={name: _check(field.annotation) for name, field in every.items()},
            required=frozenset(name for name, field in every.items() if field.value is None),
        )
    return shapes


def may_write(source: str, kind: str) -> bool:
    """Whether a client may write this type: neither poses as the other, none as the recorder."""
    if source == "egress":
        return kind in _EGRESS or (kind.startswith(_EGRESS_GROUPS) and kind not in _WORKER)
    return kind != "run.lost" and not kind.startswith("log.")


def fault(shapes: Mapping[str, Shape], event: Mapping[str, Any]) -> str:
    """Why the event is not one of the catalogue's; empty when it is."""
    shape = shapes.get(event.get("type", ""))
    if shape is None:
        return "unknown-type"
    if not shape.required <= event.keys():
        return "missing-field"
    checks = shape.fields
    for name, value in event.items():
        check = checks.get(name)
        # most fields are texts and identifiers, and every request waits for this
        if type(value) is str and (
            check is _text
            or (check is _name and len(value) <= 128 and value.isascii() and value.isprintable())
        ):
            continue
        if check is None:
            if name == "type":
                continue
            return "unknown-field"
        if not check(value):
            return "bad-field"
    return ""


def shortened(event: dict[str, Any]) -> dict[str, Any]:
    """Cut over-long texts in place, so that nobody fills the log with one field (CWE-117)."""
    long = [name for name, value in event.items() if type(value) is str and len(value) > MAX_TEXT]
    for name in long:
        event[name] = f"{event[name][:MAX_TEXT]}…[{len(event[name])}]"
    return event


def _fields(node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    return {
        entry.target.id: entry
        for entry in node.body
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
    }


def _constant(field: ast.AnnAssign) -> str:
    if isinstance(field.value, ast.Constant) and isinstance(field.value.value, str):
        return field.value.value
    raise ValueError("an event's type must be a literal default")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    # printable ASCII is [ -~]: two looks in C where a pattern costs more than all other checks
    return isinstance(value, str) and len(value) <= 128 and value.isascii() and value.isprintable()


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _number(value: Any) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _texts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_ITEMS
        and all(isinstance(item, str) and len(item) <= MAX_TEXT for item in value)
    )


def _flags(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_ITEMS
        and all(isinstance(item, bool) and len(name) <= MAX_TEXT for name, item in value.items())
    )


def _one_of(allowed: frozenset[Any], value: Any) -> bool:
    return isinstance(value, str) and value in allowed


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": _text,
    "Name": _name,
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "float | None": _number_or_none,
    "list[str]": _texts,
    "dict[str, bool]": _flags,
}


def _check(annotation: ast.expr) -> Callable[[Any], bool]:
    text = ast.unparse(annotation)
    if text.startswith("Literal["):
        return partial(_one_of, frozenset(ast.literal_eval("(" + text[8:-1] + ",)")))
    if text not in _CHECKS:
        raise ValueError(f"the recorder cannot check a field of type {text}")
    return _CHECKS[text]
