"""Numbers without end, whole or not; escapes of a backslash; names with a colon."""

from __future__ import annotations

import json

import pytest

from ringfence.egress.model.strictjson import NotStrictError, parse
from ringfence.egress.redact import MARK, Needles, spellings
from ringfence.sandbox.hostfiles import classify
from ringfence.sandbox.protocol import Change, ChangeKind


def _added(path: str) -> Change:
    kind = ChangeKind.ADDED
    return Change(path=path, kind=kind, mode=0o100644, old_mode=0, before=None, after=b"x")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1e999"])
def test_a_number_that_is_infinite_to_one_parser_is_refused(number: str) -> None:
    with pytest.raises(NotStrictError):
        parse(f'{{"a": {number}}}'.encode())
    assert parse(b'{"a": 1000000, "b": 1.5}') == {"a": 1000000, "b": 1.5}


def test_a_value_with_a_backslash_is_found_as_json_writes_it() -> None:
    value = b'pass\\word"/<&>-long'
    needles = Needles(spellings(value))
    for written in (
        json.dumps(value.decode()),
        json.dumps(value.decode()).replace("/", "\\/"),
        "pass\\word&#34;/&lt;&amp;&gt;-long",
        'pass\\word"/&lt;&amp;&gt;-long',
    ):
        assert MARK in needles.marked(written.encode()), written


@pytest.mark.parametrize("name", ["a:b.desktop", "a:p.code-workspace", ".envrc:stream"])
def test_a_colon_hides_no_file_that_runs_later(name: str) -> None:
    found = classify(_added(name))
    assert found is not None
    assert found.held
    assert classify(_added("a:plain.txt")) is None
