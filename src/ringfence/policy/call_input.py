"""A tool call's input as two witnesses compare it: the wire, and the worker (requirement B). PURE.

`claude` does not pass on what the model wrote: it fills in defaults, mends types and field names,
makes paths absolute, strips the ends of lines, reads numbers as JavaScript does. So each side
brings its input into one form first, in which all that makes no difference, and what is left must
be the same. The list was read from CLI 2.1.330 and measured, tool by tool; what is not on it is a
difference. The form only ever removes distinctions that `claude` does not keep itself.

One thing cannot be removed: a relative path, or a leading `cd`, depends on a working directory
that only the sandbox knows. It is kept beside the digest, as `place`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ringfence.policy.paths import WORKSPACE, below, normal
from ringfence.policy.tools import canonical_tool, mcp_parts

_PATH_FIELDS = {
    "Read": "file_path",
    "Write": "file_path",
    "Edit": "file_path",
    "NotebookEdit": "notebook_path",
}
"""What `claude` makes absolute before it asks; a search's path stays as the model wrote it."""
_PATH_MAX = 4096  # Linux knows no longer one: it stays in the digest

_ALIASES = {
    "Write": {"path": "file_path", "file_text": "content", "file_content": "content"},
    "Edit": {"path": "file_path", "old_str": "old_string", "new_str": "new_string"},
}
_DROPPED = {
    "Write": frozenset({"description"}),
    # the plan is put in from a file of the sandbox, or left out
    "ExitPlanMode": frozenset({"plan", "planFilePath"}),
}
_KEPT = {
    "Task": frozenset(
        {
            *("description", "prompt", "subagent_type", "model", "effort", "isolation", "mode"),
            *("name", "team_name", "cwd"),
        }
    )
}
"""Where unknown fields are dropped and not refused."""
_DEFAULTS: dict[str, object] = {
    "replace_all": False,
    "persistent": False,
    "multiSelect": False,
    "run_in_background": False,
    "pages": "",
    "timeout_ms": 300_000.0,
    "max_results": 5.0,
}
"""Fields of built-in tools that say nothing when they hold this."""
_NUMBERS = frozenset({"offset", "limit", "timeout", "timeout_ms", "head_limit", "context"}) | {
    *("-A", "-B", "-C", "max_results", "cell_number")
}
_NUMERAL = re.compile(r"[-+]?\d+(?:\.\d+)?", re.ASCII)
_WORDS = frozenset(
    {
        *("command", "content", "old_string", "new_string", "new_source", "prompt", "pattern"),
        *("file_path", "notebook_path", "path", "glob", "query", "url", "description", "script"),
    }
)
"""Fields of built-in tools that are text whatever the text looks like."""

_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_ESCAPE_PASSES = 8
_LINE_ENDS = re.compile(r"(\r\n|\n|\r)")
_BLANK = (
    "\t\v\f \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
"""Space as JavaScript's `\\s` has it (ECMA-262, 12.2 and 12.3)."""
_SANITISED = {
    "<fnr>": "<function_results>",
    "<n>": "<name>",
    "</n>": "</name>",
    "<o>": "<output>",
    "</o>": "</output>",
    "<e>": "<error>",
    "</e>": "</error>",
    "<s>": "<system>",
    "</s>": "</system>",
    "<r>": "<result>",
    "</r>": "</result>",
    "< META_START >": "<META_START>",
    "< META_END >": "<META_END>",
    "< EOT >": "<EOT>",
    "< META >": "<META>",
    "< SOS >": "<SOS>",
    "\n\nH:": "\n\nHuman:",
    "\n\nA:": "\n\nAssistant:",
}
"""What Edit reads for one another when the file holds the longer one."""
_BACKSLASHES = re.compile(r"(?<!\\)\\+;")
_CHANGE = re.compile(r"cd (/[^\s;&|<>$`\"'()\\*?~#!{}\[\]]*) && ")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallInput:
    """One input, ready to be compared.

    Attributes:
        digest: SHA-256 (hex) of everything that must be equal.
        place: a file tool's path, or the `cd …` that a command begins with; empty when there is
            neither. At most 4096 characters.
    """

    digest: str
    place: str = ""


def call_input(tool: str, value: Any) -> CallInput:
    """The form of `value`, the input of a call of `tool`; parsed JSON in, or what a hook got.

    Raises:
        ValueError: it is no object, or nested too deeply: no tool takes such an input.
    """
    if not isinstance(value, dict):
        raise ValueError("a tool's input is an object")  # noqa: TRY004  one error for all
    name = canonical_tool(tool)
    try:
        form = _value(value)
        form = _typed(form) if mcp_parts(name) else _built_in(name, form)
        place = _take_place(name, form)
        data = json.dumps([name, form], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except RecursionError:
        raise ValueError("a tool's input is nested too deeply") from None
    digest = hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()
    return CallInput(digest=digest, place=place)


def wire_input(tool: str, data: bytes) -> CallInput | None:
    """The form of an input as it was streamed; None when it is no input: `claude` never asks about
    a call whose input it cannot parse.
    """
    try:
        text = data.decode("utf-8", "surrogatepass").strip(" \t\r\n")
        value = json.loads(text or "{}", parse_int=_number, parse_constant=_refuse)
        return call_input(tool, value)
    except (ValueError, RecursionError):
        return None


def same_call(tool: str, asked: CallInput, told: CallInput) -> bool:
    """Whether `told`, what the worker was asked about, is the call that the model `asked` for."""
    if asked.digest != told.digest:
        return False
    if canonical_tool(tool) == "Bash":
        return _same_change(asked.place, told.place)
    return _same_path(asked.place.strip(), told.place)


def _same_path(asked: str, told: str) -> bool:
    """A relative path is made absolute in the sandbox, from a directory below the workspace."""
    if not asked or not told:
        return asked == told
    if not told.startswith("/") or normal(told) != told:
        return asked == told
    if asked.startswith(("/", "~/")) or asked == "~":
        return normal(asked) == told
    up, tail = 0, list[str]()
    for part in asked.split("/"):
        if part == ".." and tail:
            tail.pop()
        elif part == "..":
            up += 1
        elif part not in {"", "."}:
            tail.append(part)
    parts = told.split("/")[1:]
    if tail and parts[-len(tail) :] != tail:
        return False
    base = "/" + "/".join(parts[: len(parts) - len(tail)])
    return below(base.rstrip("/") or "/", WORKSPACE) or (up > 0 and below(WORKSPACE, base))


def _same_change(asked: str, told: str) -> bool:
    """`claude` leaves out one leading `cd` into the directory that it is in."""
    if asked == told:
        return True
    first = _CHANGE.match(asked)
    return first is not None and below(normal(first[1]), WORKSPACE) and asked[first.end() :] == told


def _take_place(name: str, form: dict[str, Any]) -> str:
    if name == "Bash" and isinstance(form.get("command"), str):
        command, end = form["command"], 0
        while (change := _CHANGE.match(command, end)) and change.end() <= _PATH_MAX:
            end = change.end()
        form["command"] = command[end:]
        return str(command[:end])
    field = _PATH_FIELDS.get(name, "")
    path = form.get(field)
    if not isinstance(path, str) or len(path) > _PATH_MAX:
        return ""
    del form[field]
    return path


def _built_in(name: str, form: dict[str, Any]) -> dict[str, Any]:
    aliases, dropped = _ALIASES.get(name, {}), _DROPPED.get(name, frozenset())
    kept = _KEPT.get(name)
    named: dict[str, Any] = {}
    for key, item in form.items():
        known = aliases.get(key, key)
        if known in dropped or (kept is not None and known not in kept):
            continue
        if known == key or known not in form:
            named[known] = item
    typed: dict[str, Any] = _without_defaults(_typed(named, words=_WORDS))
    for key, mend in _MENDED.get(name, {}).items():
        if isinstance(typed.get(key), str):
            typed[key] = mend(typed[key])
    return typed


def _typed(form: dict[str, Any], words: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Text that is the JSON of something else becomes it: models write `"[1]"` for `[1]`."""
    return {
        key: _unquoted(key, item) if isinstance(item, str) and key not in words else item
        for key, item in form.items()
    }


def _unquoted(key: str, text: str) -> Any:
    if key in _NUMBERS and _NUMERAL.fullmatch(text.strip()):
        return _number(text.strip())
    try:
        value = json.loads(text, parse_int=_number, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) or value is None else _value(value)


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_defaults(item)
            for key, item in value.items()
            if not (key in _DEFAULTS and type(item) is type(_DEFAULTS[key]))
            or item != _DEFAULTS[key]
        }
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _value(value: Any) -> Any:
    """JSON as JavaScript holds it: every number a double, no `__proto__`, escapes read twice."""
    if isinstance(value, str):
        return _unescaped(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a tool's input is JSON")
        return {key: _value(item) for key, item in value.items() if key != "__proto__"}
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    raise ValueError("a tool's input is JSON")


def _number(value: Any) -> float | None:
    """A double; what is beyond all doubles is null once it has been JSON again."""
    try:
        number = float(value)
    except OverflowError:
        return None
    if number != number or number in {float("inf"), float("-inf")}:  # noqa: PLR0124  not a number
        return None
    return number or 0.0


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _unescaped(text: str) -> str:
    """An escape such as u00e9 that stands in the text itself: `claude` takes it for one escape too
    many. Which of them it leaves alone does not matter when both sides read all.
    """
    for _ in range(_ESCAPE_PASSES):
        if "\\u" not in text:
            return text
        read = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
        if read == text:
            return text
        # two halves that were written apart are one character now
        text = read.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return text


def _stripped(text: str) -> str:
    """Without blanks at the ends of lines; a Markdown file keeps them, and that is not told apart
    here.
    """
    parts = _LINE_ENDS.split(text)
    return "".join(part if at % 2 else part.rstrip(_BLANK) for at, part in enumerate(parts))


def _expanded(text: str) -> str:
    for short, long in _SANITISED.items():
        text = text.replace(short, long)
    return text


_MENDED: dict[str, dict[str, Callable[[str], str]]] = {
    "Write": {"content": _stripped},
    "Edit": {"old_string": _expanded, "new_string": lambda text: _expanded(_stripped(text))},
    "Bash": {"command": lambda text: _BACKSLASHES.sub(r"\\;", text)},
}
