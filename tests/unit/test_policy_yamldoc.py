"""The YAML of policies: nothing that two readers could read in two ways (requirement N)."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.policy.problems import PolicyInvalidError
from ringfence.policy.yamldoc import MAX_BYTES, MAX_NODES, parse, parse_with_places


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", {"a": 1}),
        ("a: -1.5", {"a": -1.5}),
        ("a: 1e3", {"a": 1000.0}),
        ("a: true\nb: false\nc: null", {"a": True, "b": False, "c": None}),
        ("a: 'no'", {"a": "no"}),
        ('a: "010"', {"a": "010"}),
        ("a: [GET /x/**, b]", {"a": ["GET /x/**", "b"]}),
        ("a: api.anthropic.com", {"a": "api.anthropic.com"}),
        ("a: 1.2.3", {"a": "1.2.3"}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("# only a comment\n{}", {}),
        ("---\na: 1\n...\n", {"a": 1}),
        ("%YAML 1.2\n---\na: 1\n", {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ('{"a": [1, {"b": "\\u00e9"}]}', {"a": [1, {"b": "é"}]}),
        ("- 1\n- []\n", [1, []]),
    ],
)
def test_plain_values_load(text: str, value: object) -> None:
    assert parse(text) == value
    assert parse(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "place"),
    [
        *[
            (f"a: {word}", "1:4")
            for word in [
                *("NaN", "Infinity", "-Infinity"),
                *("no", "No", "off", "ON", "yes", "y", "N", "~", "True", "FALSE", "Null", "NULL"),
                *("010", "0o10", "0x1F", "0b1", "1_000", "+1", "1.", ".5", "1:30", "190:20:30.15"),
                *(
                    ".inf",
                    "-.Inf",
                    ".nan",
                    "2001-12-14",
                    "2001-12-14 21:59:43",
                    "1e999",
                    "00",
                    "-0_1",
                ),
                *("2001-12-14t21:59:43.10-05:00", "0777", "08", "9" * 400, "="),
            ]
        ],
        ("a: 1\na: 2", "2:1"),
        ("{a: {b: 1, b: 1}}", "1:12"),
        ('{"a": 1, "\\u0061": 2}', "1:10"),
        ("a: &x 1\nb: *x", "1:4"),
        ("a: *x", "1:4"),
        ("<<: {a: 1}", "1:1"),
        ("a: !!str 1", "1:4"),
        ("a: !!python/object/apply:os.system [ls]", "1:4"),
        ("a: !x {}", "1:4"),
        ("! a: 1", "1:1"),
        ("a:", "1:3"),
        ("a: 1\n---\nb: 1", "2:1"),
        ("1: a", "1:1"),
        ("null: a", "1:1"),
        ("[a]: b", "1:1"),
        ("? {a: 1}\n: b", "1:3"),
        ("a: [1", "1:6"),
        ("a: b: c", "1:5"),
        ("\ta: 1", "1:1"),
        ("%TAG ! tag:x,2000:\n---\na: 1", "1:1"),
    ],
)
def test_what_readers_disagree_about_is_refused_with_its_place(text: str, place: str) -> None:
    with pytest.raises(PolicyInvalidError) as caught:
        parse(text)
    assert caught.value.code == "policy-invalid"
    found = caught.value.problems[0].place
    assert found is not None
    assert f"{found.line}:{found.column}" == place
    assert caught.value.message.startswith(f"{place}: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        # a comment to a reader of YAML 1.2, a rule to one of 1.1 (YAML 1.2 §5.4)
        ("a: 1 # x\u2028b: 2", "1:9", "U+2028"),
        ("a: 1\n# x\u2029b: 2", "2:4", "U+2029"),
        ("a: 1\n# x\x85b: 2", "2:4", "U+0085"),
        ("a: 1 # x\rb: 2", "1:9", "U+000D"),
        ('{"a": "x\u2028"}', "1:9", "U+2028"),
        # another text to the eye
        ("a: 1 # \u202eb: 2", "1:8", "U+202E"),
        ("a: 'x\u2066'", "1:6", "U+2066"),
        ("\ufeff\ufeffa: 1", "1:2", "U+FEFF"),
        ("a\ufeff: 1", "1:2", "U+FEFF"),
    ],
)
def test_what_ends_a_line_for_some_or_deceives_the_eye_is_refused(
    text: str, place: str, name: str
) -> None:
    for data in (text, text.encode()):
        with pytest.raises(PolicyInvalidError, match=f"^{place}: .*{re.escape(name)}"):
            parse(data)


def test_the_same_characters_load_as_escapes_and_windows_lines_too() -> None:
    assert parse('{"a": "\\u2028\\ufeff"}') == {"a": "\u2028\ufeff"}
    assert parse("a: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


def test_every_key_and_item_has_its_place() -> None:
    parsed = parse_with_places("a:\n  b-c: 1\n  d e:\n  - x\n  - {f: 2}\n")
    assert parsed.places == {
        "a": (1, 1),
        "a.b-c": (2, 3),
        "a.'d e'": (3, 3),
        "a.'d e'[0]": (4, 5),
        "a.'d e'[1]": (5, 5),
        "a.'d e'[1].f": (5, 6),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        "---",
        b"\xff\xfe",
        b"a: \x00",
        "a: \x07",
        "\ud800",
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        "%YAML 9.9\n---\na",
    ],
)
def test_what_is_no_document_is_refused(text: str | bytes) -> None:
    with pytest.raises(PolicyInvalidError):
        parse(text)


def test_size_and_depth_are_bounded() -> None:
    assert parse("a: " + "x" * (MAX_BYTES - 3))
    with pytest.raises(PolicyInvalidError, match="1 MiB"):
        parse("a: " + "x" * MAX_BYTES)
    assert parse("[" * 31 + "]" * 31)
    assert len(parse("- a\n" * MAX_NODES)) == MAX_NODES
    for bomb in ("- a\n" * (MAX_NODES + 1), "\n".join(f"k{i}: 1" for i in range(MAX_NODES + 1))):
        with pytest.raises(PolicyInvalidError, match=f"^{MAX_NODES + 1}:.*keys and items"):
            parse(bomb)
    for bomb in ("[" * 33 + "]" * 33, "[" * 100_000, "{a: " * 100_000, "- " * 50_000):
        with pytest.raises(PolicyInvalidError):
            parse(bomb)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200))
@example(b"a: &a [*a]")
@example("%YAML " + "9" * 5000 + ".1\n---\n")
def test_any_bytes_are_a_value_or_one_error(data: bytes | str) -> None:
    error = _error(data)
    assert error is None or (error.code == "policy-invalid" and "\n" not in error.message)


def _error(data: bytes | str) -> CallerError | None:
    try:
        parse(data)
    except CallerError as error:
        return error
    return None


TOKENS = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            ": ",
            "- ",
            "\n",
            "  ",
            "{",
            "}",
            "[",
            "]",
            ",",
            "? ",
            "&x ",
            "*x",
            "!t ",
            "|",
            ">",
            "'",
            '"',
            "#",
            "%",
            "---",
            "no",
            "1_0",
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(TOKENS)
def test_what_loads_here_means_the_same_to_pyyaml(text: str) -> None:
    try:
        value = parse(text)
    except CallerError:
        return
    assert yaml.safe_load(text) == value


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.text(
        st.characters(
            codec="utf-8",
            exclude_categories=["Cc", "Cs"],
            exclude_characters="\u2028\u2029\ufeff\ufffe\uffff\x85",
        ),
        max_size=12,
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcdef", min_size=1, max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_json_is_a_subset(value: object) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=True, indent=1)) == value
