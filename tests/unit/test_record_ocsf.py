"""Records as OCSF events: against the framework's own schema, a golden file, and any record.

After a change that is meant: `python tests/unit/test_record_ocsf.py write`.
"""

from __future__ import annotations

import functools
import json
import sys
import typing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema
from pydantic import BaseModel

from ringfence.record import events as catalogue
from ringfence.record import ocsf, ocsf_rows

GOLDEN = Path(__file__).parent / "golden" / "record_ocsf.json"
MODELS: dict[str, type[BaseModel]] = {
    value.model_fields["type"].default: value
    for value in vars(catalogue).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and "type" in value.model_fields
}
IDS = {
    "run_id": "run_1",
    "session_id": "11111111-2222-4333-8444-555555555555",
    "sandbox_id": "sb_1",
    "source": "egress",
    "time": "2026-11-25T10:20:30.123456Z",
}
LIKELY: dict[str, Any] = {
    "host": "api.example.com",
    "port": 443,
    "method": "GET",
    "path": "/v1/a",
    "status": 200,
    "address": "203.0.113.7",
    "target": "evil.example:443",
    "duration_ms": 12.7,
    "provider": "anthropic",
    "model": "claude-x",
    "name": "Bash",
    "count": 3,
    "opaque": False,
}


def record(kind: str, **more: Any) -> dict[str, Any]:
    """A likely record of a kind, with every field set."""
    values: dict[str, Any] = {"type": kind, **IDS}
    for name, field in MODELS[kind].model_fields.items():
        options = typing.get_args(field.annotation)
        if name in values:
            continue
        if name in LIKELY and not (name == "status" and field.annotation is str):
            values[name] = LIKELY[name]
        elif typing.get_origin(field.annotation) is typing.Literal:
            values[name] = options[0]
        else:
            values[name] = {
                str: f"a {name}",
                bool: True,
                int: 7,
                float: 1.5,
                list[str]: ["one"],
                dict[str, bool]: {"network": True},
            }.get(field.annotation, 1.5)
    return {**values, **more}


def told(entry: dict[str, Any], index: int = 5) -> dict[str, Any]:
    return ocsf.event(entry, index=index, leaf="ab" * 32, version="1.0")


@functools.cache
def validator(uid: int, profiles: tuple[str, ...]) -> Any:
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=ocsf.VERSION))
    name = schema.lookup_class_name_from_uid(class_uid=uid)
    return jsonschema.Draft202012Validator(schema.get_class_schema(name, list(profiles)))


def check(event: dict[str, Any]) -> None:
    """Against the class, with what the event says are its profiles; unknown keys are errors."""
    profiles = tuple(event["metadata"]["profiles"])
    found = list(validator(event["class_uid"], profiles).iter_errors(event))
    assert not found, [f"{list(error.path)}: {error.message}"[:300] for error in found]


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [one for inner in value.values() for one in leaves(inner)]
    if isinstance(value, list):
        return [one for inner in value for one in leaves(inner)]
    return [value]


def test_the_schema_refuses_what_is_wrong() -> None:
    event = told(record("egress.allowed"))
    check(event)
    with pytest.raises(AssertionError):
        check({**event, "extra": 1})
    with pytest.raises(AssertionError):
        check({name: value for name, value in event.items() if name != "severity_id"})
    with pytest.raises(AssertionError):
        check({**event, "activity_id": 77})


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_kind_of_the_catalogue_has_a_row_and_is_valid(kind: str) -> None:
    entry = record(kind)
    event = told(entry)
    assert kind in ocsf_rows.TABLE
    assert event["class_uid"] != 0
    check(event)
    assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
    assert event["metadata"]["event_code"] == kind
    assert event["metadata"]["sequence"] == 5
    assert event["time"] == 1764066030123 + 365 * 86_400_000
    bare = {"type": kind, **dict.fromkeys(IDS, ""), "time": IDS["time"]}
    check(told(bare))


def test_rows_name_fields_of_the_catalogue_only() -> None:
    shared = {**ocsf_rows._RULE, **ocsf_rows._HOST, **ocsf_rows._SAID, **ocsf_rows._MODEL}
    for kind, row in ocsf_rows.TABLE.items():
        fields = MODELS[kind.partition(",")[0]].model_fields
        assert not {name for name in row.places if name not in fields and name not in shared}


def test_golden() -> None:
    assert golden() == json.loads(GOLDEN.read_text())


def golden() -> dict[str, Any]:
    found = {kind: told(record(kind)) for kind in sorted(MODELS)}
    return found | {"egress.allowed, opaque": told(record("egress.allowed", opaque=True))}


def test_outcomes_are_told() -> None:
    def of(kind: str, **more: Any) -> tuple[Any, ...]:
        event = told(record(kind, **more))
        check(event)
        names = ("activity_id", "action_id", "disposition_id", "status_id", "severity_id")
        return tuple(event.get(name) for name in names)

    assert of("tool.decided", outcome="allow")[1:3] == (1, 1)
    assert of("tool.decided", outcome="deny")[1:3] == (2, 2)
    assert of("tool.decided", outcome="defer")[1:3] == (99, 14)
    assert of("tool.finished", outcome="success")[3] == 1
    assert of("tool.finished", outcome="timeout")[3] == 2
    assert of("tool.finished", outcome="unknown")[3] == 0
    assert of("run.ended", status="succeeded")[3:] == (1, 1)
    assert of("run.ended", status="failed")[3:] == (2, 2)
    assert of("model.answered", status=200, reason="")[3] == 1
    assert of("model.answered", status=200, reason="tool-not-granted")[3] == 2
    assert of("model.answered", status=529, reason="")[3] == 2
    assert of("egress.refused")[:4] == (5, 2, 2, 2)
    assert of("egress.allowed", method="DELETE")[:2] == (2, 1)
    assert of("session.changed", action="deleted")[0] == 4
    assert of("witness.disagreed")[4] == 4


def test_what_does_not_fit_its_place_is_kept_beside_it() -> None:
    event = told(record("egress.allowed", host="a b", port=70_000, address="x", method="BREW"))
    check(event)
    kept = event["unmapped"]
    assert (kept["host"], kept["port"], kept["address"]) == ("a b", 70_000, "x")
    assert kept["method"] == "BREW"
    assert event["dst_endpoint"] == {"name": "unknown"}


def test_a_kind_of_a_newer_log_is_a_base_event() -> None:
    event = told({**IDS, "type": "volume.mounted", "size": 7})
    check(event)
    assert (event["class_uid"], event["unmapped"]) == (0, {"size": 7})


@pytest.mark.parametrize(
    "time", ["", "2026-13-01T00:00:00.000000Z", "0000-01-01T00:00:00.000000Z", 7]
)
def test_without_a_time_it_is_no_record(time: object) -> None:
    with pytest.raises(ValueError, match="no time"):
        told({**IDS, "type": "run.started", "time": time})


SCALARS = st.one_of(
    st.text(max_size=20),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.none(),
    st.lists(st.text(max_size=5), max_size=2),
    st.sampled_from(["deny", "200", "::1", "a.example", "GET", "unknown", "failed"]),
)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(MODELS)))
def test_any_record_is_told_whole_and_valid(data: st.DataObject, kind: str) -> None:
    names = [name for name in MODELS[kind].model_fields if name != "type"]
    values = data.draw(st.dictionaries(st.sampled_from([*names, "new_field"]), SCALARS))
    ids = {
        name: value if isinstance(value := values.pop(name, ""), str) else ""
        for name in ("run_id", "session_id", "sandbox_id")
    }
    entry = {**values, **ids, "type": kind, "time": IDS["time"], "source": "worker"}
    event = told(entry)
    check(event)
    json.dumps(event, allow_nan=False)
    seen = leaves(event)
    for name, value in values.items():
        if value in ("", None, [], {}):
            continue
        rounded = round(value) if name == "duration_ms" and isinstance(value, float) else value
        address = "::1" if value == "::1" else rounded
        assert all(one in seen for one in leaves(address)), (name, value)


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    GOLDEN.write_text(json.dumps(golden(), indent=1, sort_keys=True) + "\n")
