"""The catalogue: its golden JSON, and the recorder's reading of it against pydantic's."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from ringfence.record import events as catalogue
from ringfence.record.audit import canonical
from ringfence.record.shapes import MAX_TEXT, fault, load_shapes, may_write, shortened

GOLDEN = Path(__file__).parent / "golden" / "record_events.json"
CLASSES: dict[str, type[BaseModel]] = {
    value.model_fields["type"].default: value
    for value in vars(catalogue).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and "type" in value.model_fields
}
SHAPES = load_shapes()


def sample(kind: str) -> dict[str, object]:
    """An event with every field set, as JSON."""
    values: dict[str, object] = {}
    for name, field in CLASSES[kind].model_fields.items():
        annotation = field.annotation
        options = typing.get_args(annotation)
        if name == "type":
            values[name] = kind
        elif typing.get_origin(annotation) is typing.Literal:
            values[name] = options[0]
        elif annotation is str:
            values[name] = f"a {name}"
        elif annotation is bool:
            values[name] = True
        elif annotation is int:
            values[name] = 7
        elif annotation is float or float in options:
            values[name] = 1.5
        elif annotation == list[str]:
            values[name] = ["one", "two"]
        else:
            assert annotation == dict[str, bool]
            values[name] = {"network": True}
    return values


def test_every_class_is_in_the_union_and_in_the_recorders_reading() -> None:
    union = typing.get_args(typing.get_args(catalogue.AnyEvent)[0])
    assert set(union) == set(CLASSES.values())
    assert set(SHAPES) == set(CLASSES)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_the_recorder_reads_the_catalogue_as_pydantic_does(kind: str) -> None:
    model, shape = CLASSES[kind], SHAPES[kind]
    assert set(shape.fields) | {"type"} == set(model.model_fields)
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert shape.required == required
    full = sample(kind)
    assert catalogue.EVENTS.validate_python(full).model_dump() == full
    assert fault(SHAPES, full) == ""
    assert fault(SHAPES, {**full, "extra": ""}) == "unknown-field"
    for name in required:
        assert fault(SHAPES, {k: v for k, v in full.items() if k != name}) == "missing-field"
    for name in shape.fields:
        assert fault(SHAPES, {**full, name: {"a": {}}}) == "bad-field"
        assert fault(SHAPES, {**full, name: float("nan")}) == "bad-field"


def test_golden_json() -> None:
    """A record's bytes are hashed: their form may only ever be added to."""
    written = {kind: canonical(sample(kind)).decode() for kind in sorted(CLASSES)}
    assert written == json.loads(GOLDEN.read_text()), "fields are only ever added"


def test_unknown_types_are_refused() -> None:
    assert fault(SHAPES, {"type": "run.paused"}) == "unknown-type"
    assert fault(SHAPES, {}) == "unknown-type"


def test_egress_cannot_pose_as_the_worker_nor_anyone_as_the_recorder() -> None:
    for kind in CLASSES:
        own = kind.startswith("log.") or kind == "run.lost"
        assert may_write("worker", kind) != own
    assert may_write("egress", "egress.refused")
    assert may_write("egress", "model.requested")
    assert may_write("egress", "tool.requested")
    for kind in (
        "model.moved",
        "breaker.changed",
        "tool.decided",
        "run.ended",
        "log.heartbeat",
        "sandbox.started",
        "patch.applied",
    ):
        assert not may_write("egress", kind)


def test_long_texts_are_cut_and_the_cut_shows() -> None:
    event = shortened({"type": "egress.refused", "target": "x" * 5000, "rule": "r" * MAX_TEXT})
    assert event["target"].startswith("x" * MAX_TEXT)
    assert event["target"].endswith("…[5000]")
    assert event["rule"] == "r" * MAX_TEXT


def test_canonical_json_is_ascii_and_sorted() -> None:
    body = canonical({"b": "\u202e\x1b[2J\ud800é", "a": 1})
    assert body == b'{"a":1,"b":"\\u202e\\u001b[2J\\ud800\\u00e9"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("inf")})
