"""Text → plain values, for policies: a small, unambiguous part of YAML (requirement N). PURE.

YAML reads `no` as false, `010` as eight, `1:30` as ninety and `&a`/`*a` as a way to say a line
twice; two readers of one policy can then disagree about what it permits. Here a plain scalar is
text, or a value written as JSON writes it; whatever YAML 1.1 or 1.2 would read otherwise is
refused with its place and the mend. JSON documents load unchanged. So is a character that ends a
line for some readers only, or makes a person see another text than the one that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from ringfence.policy.problems import Place, PolicyInvalidError, Problem, dotted, show

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 10_000
"""Keys and items together: a mebibyte of them takes a minute to read and to judge."""

_Path = tuple[int | str, ...]

_INT = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]{0,18})(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,3})?")
_CONSTANTS: dict[str, Any] = {"null": None, "true": True, "false": False}
_ODD_CONSTANTS = re.compile(
    # the last two are numbers to Python's reader of JSON
    r"~|y|n|yes|no|on|off|true|false|null|[-+]?\.inf|\.nan|<<|=|nan|-?infinity",
    re.IGNORECASE,
)
_ODD_CHARACTERS = re.compile(
    # NEL, LS and PS end a line in YAML 1.1 and not in 1.2, a lone CR not in most editors: what is
    # a comment to one reader is a rule to the next. Direction controls show a person another text
    # (CVE-2021-42574); a byte order mark within the text is an invisible letter.
    r"[\x85\u2028\u2029\u202a-\u202e\u2066-\u2069]|\r(?!\n)|(?<=.)\ufeff",
    re.DOTALL,
)
_ODD_NUMBERS = re.compile(
    r"""[-+]?(?:0[0-7_]+|0o[0-7]+|0x[0-9a-f_]+|0b[01_]+   # other bases
    |[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?           # sexagesimal
    |(?:[0-9][0-9_]*)?\.[0-9_]+(?:e[-+]?[0-9]+)?           # .5, 1_0.0
    |[0-9][0-9_]*\.(?:e[-+]?[0-9]+)?                       # 1.
    |[0-9][0-9_]*(?:\.[0-9_]*)?(?:e[-+]?[0-9]+)?)          # 1_000, 007, +1, 1e9999
    |[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?            # timestamps""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """One document's value, and where each key and item of it stands.

    Attributes:
        value: mappings, lists, text, numbers, booleans and null.
        places: dotted path, as errors name it, to line and column (both from 1).
    """

    value: Any
    places: dict[str, Place] = field(default_factory=dict)


def parse(text: str | bytes) -> Any:
    """The value of one document.

    Raises:
        PolicyInvalidError: with its place, for anything that is not YAML or could be read in two
            ways; for more than 1 MiB, 32 levels or 10,000 keys and items.
    """
    return parse_with_places(text).value


def parse_with_places(text: str | bytes) -> Parsed:
    """The value of one document and its places. Raises as `parse` does."""
    events = _events(_decode(text))
    reader = _Reader(events)
    value = reader.document()
    _no_more(events)
    return Parsed(value=value, places=reader.places)


def _decode(text: str | bytes) -> str:
    size = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        _refuse(None, "a policy is at most 1 MiB")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(None, f"byte {error.start} is not UTF-8; save the file as UTF-8")
    odd = _ODD_CHARACTERS.search(text)
    if odd:
        before = text[: odd.start()]
        place = Place(before.count("\n") + 1, odd.start() - before.rfind("\n"))
        _refuse(place, f"U+{ord(odd[0]):04X} is read or shown in two ways; write it as an escape")
    return text


def _events(text: str) -> Iterator[yaml.Event]:
    """The parser's events; its own errors become ours."""
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        _refuse(error.problem_mark or error.context_mark, _one_line(error.problem or "not YAML"))
    except yaml.reader.ReaderError as error:
        reason = _one_line(error.reason)
        _refuse(None, f"character {error.position} cannot stand in YAML ({reason})")
    except yaml.YAMLError as error:
        _refuse(None, _one_line(str(error)))
    # the scanner has unguarded conversions: an escape past U+10FFFF, a directive's huge number
    except (ValueError, OverflowError, IndexError, TypeError, RecursionError) as error:
        _refuse(None, f"not YAML ({type(error).__name__})")


def _no_more(events: Iterator[yaml.Event]) -> None:
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            _refuse(event.start_mark, "a second document; a policy is one")


class _Reader:
    """Events of one document, read by recursive descent of bounded depth."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._nodes = 0
        self.places: dict[str, Place] = {}

    def document(self) -> Any:
        event = next(self._events)
        while not isinstance(event, yaml.DocumentStartEvent):
            if isinstance(event, yaml.StreamEndEvent):
                _refuse(None, "empty; the smallest policy is {version: 1}")
            event = next(self._events)
        if event.tags:
            _refuse(event.start_mark, "no %TAG directives")
        return self._value(next(self._events), ())

    def _value(self, event: yaml.Event, path: _Path) -> Any:
        if isinstance(event, yaml.AliasEvent):
            _refuse(event.start_mark, f"no aliases; write the value of *{event.anchor} out")
        assert isinstance(event, yaml.NodeEvent)  # noqa: S101  the grammar leaves no other
        if event.anchor is not None:
            _refuse(event.start_mark, f"no anchors; take &{event.anchor} away")
        tag = getattr(event, "tag", None)
        if tag is not None:
            _refuse(event.start_mark, f"no tags; take {show(tag)} away")
        if len(path) >= MAX_DEPTH:
            _refuse(event.start_mark, f"more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _note(self, path: _Path, event: yaml.Event) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            _refuse(event.start_mark, f"more than {MAX_NODES} keys and items")
        self.places[dotted(path)] = _place(event.start_mark)

    def _sequence(self, path: _Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            inner = (*path, len(items))
            self._note(inner, event)
            items.append(self._value(event, inner))
        return items

    def _mapping(self, path: _Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, (*path, ""))
            if not isinstance(key, str):
                _refuse(event.start_mark, f"a key is text; quote {show(key)}")
            if key in values:
                _refuse(event.start_mark, f"the key {show(key)} is given twice; write it once")
            inner = (*path, key)
            self._note(inner, event)
            values[key] = self._value(next(self._events), inner)
        return values


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = _joined(event)
    if event.style is not None:
        return text  # quoted or block: text, whatever it looks like
    if text == "":
        _refuse(event.start_mark, "no value; write null, or take the key away")
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and abs(value := float(text)) < float("inf"):
        return value
    if _ODD_CONSTANTS.fullmatch(text) or _ODD_NUMBERS.fullmatch(text):
        _refuse(
            event.start_mark,
            f"YAML readers disagree about {show(text)}; quote it if it is text, or write the value "
            "as JSON does",
        )
    return text


def _joined(event: yaml.ScalarEvent) -> str:
    """The text; JSON's escaped surrogate pairs are one character, and half a pair is none."""
    text: str = event.value
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse(event.start_mark, "half a surrogate pair is no character")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160].encode("ascii", "backslashreplace").decode()


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1)


def _refuse(mark: Any, message: str) -> NoReturn:
    place = _place(mark) if mark and not isinstance(mark, Place) else mark
    raise PolicyInvalidError((Problem(message=message, place=place),))
