"""What may be known about a transcript without trusting it. PURE.

Entries are opaque JSON that the `claude` inside wrote (any process beside it could have): nothing
here decides what an agent may do. Names and places that become paths are checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from ringfence.errors import DeniedError

PROJECT = "ringfence"
"""CLAUDE_CODE_PROJECT_DIR_NAME inside: pinned, so that a transcript resumes from any directory."""
MAX_ENTRY_BYTES = 8 << 20
_SUBPATH = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,7}"
)
_OF_ANOTHER_SESSION = ("teamName", "agentName", "slug", "sourceToolAssistantUUID")

Entry = dict[str, Any]
Key = Mapping[str, str]
"""The SDK's session key: project_key, session_id, and subpath where there is one."""


def check_subpath(subpath: str) -> str:
    """A relative path of plain names, at most eight deep.

    Raises:
        DeniedError: `session-frame-refused`.
    """
    if not _SUBPATH.fullmatch(subpath) or ".." in subpath:
        raise refused("a transcript frame named a bad path")
    return subpath


def refused(why: str) -> DeniedError:
    """The error of every frame that is not taken."""
    return DeniedError(
        "session-frame-refused",
        why,
        hint="something in the sandbox wrote what claude would not; the run must end",
    )


def encode_entry(entry: Entry) -> str:
    """One line of JSON, ASCII: it survives SQLite, UTF-8 and line ends, whatever it holds.

    Raises:
        DeniedError: `session-frame-refused` for what is no object, no JSON, or too large.
    """
    if not isinstance(entry, dict):
        raise refused("a transcript entry is not an object")
    try:
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise refused("a transcript entry is not JSON") from None
    if len(line) > MAX_ENTRY_BYTES:
        raise refused(f"a transcript entry is longer than {MAX_ENTRY_BYTES} bytes")
    return line


def entry_uuid(entry: Entry) -> str | None:
    """The entry's idempotency key, if it has one that every store can keep: an unpaired surrogate
    is no UTF-8, and PostgreSQL has no NUL.
    """
    value = entry.get("uuid")
    if not isinstance(value, str) or not 0 < len(value) <= 128:
        return None
    return value if value.isascii() and value.isprintable() else None


def tool_use_ids(entries: Iterable[Entry]) -> Iterator[str]:
    """Ids of the tool calls in a transcript, as they appear."""
    for block in _content(entries, "tool_use"):
        name = block.get("id")
        if isinstance(name, str):
            yield name


def _content(entries: Iterable[Entry], kind: str) -> Iterator[dict[str, Any]]:
    for entry in entries:
        message = entry.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and block.get("type") == kind:
                yield block


_DEFERRED = "hook_deferred_tool"
_BEGUN = "ringfence-begun"


def begun(tool_use_id: str) -> Entry:
    """An entry that says: a call that was deferred has been allowed, and runs. `claude` passes over
    types that it does not know, and over a deferred call whose id a later line names.
    """
    # no uuid: what has one is a link of the conversation, and this would break its chain
    return {"type": _BEGUN, "tool_use_id": tool_use_id}


def deferred_ids(entries: Iterable[Entry]) -> Iterator[str]:
    """Calls of which these entries say that they were deferred, as they appear."""
    for entry in entries:
        attachment = entry.get("attachment") if isinstance(entry, dict) else None
        if isinstance(attachment, dict) and attachment.get("type") == _DEFERRED:
            yield _storable(attachment.get("toolUseID"))


class Deferred(NamedTuple):
    """The call that a session stands at: whether `claude` takes it up when it is resumed, or was
    told to once already, and what came of it is not known.
    """

    tool_use_id: str
    begun: bool


def _storable(value: Any) -> str:
    """An id from inside; one that UTF-8 cannot write is none of a call's."""
    text = value if isinstance(value, str) else ""
    return text.encode(errors="replace").decode()


def deferred(lines: Iterable[bytes]) -> Deferred | None:
    """The last deferred call of a transcript that has no result; read as `claude` reads it.

    Its words decide nothing but how a turn begins: what may run is decided by those of the caller.
    """
    found: Deferred | None = None
    for line in lines:
        if _DEFERRED.encode() not in line and (
            found is None or found.tool_use_id.encode() not in line
        ):
            continue
        entry = _object(line)
        if (name := next(deferred_ids([entry]), None)) is not None:
            found = Deferred(name, begun=False)
        elif found is not None and found.tool_use_id in set(tool_results([entry])):
            found = None
        elif found is not None and entry == begun(found.tool_use_id):
            found = Deferred(found.tool_use_id, begun=True)
    return found


def _object(line: bytes | str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def tool_results(entries: Iterable[Entry]) -> Iterator[str]:
    """Ids of the tool calls that have a result in a transcript."""
    for block in _content(entries, "tool_result"):
        name = block.get("tool_use_id")
        if isinstance(name, str):
            yield name


def first_prompt(entries: Iterable[Entry]) -> str:
    """The first text of the person's, for lists; empty when there is none."""
    for entry in entries:
        message = entry.get("message")
        if entry.get("type") != "user" or entry.get("isMeta") or not isinstance(message, dict):
            continue
        text = _text(message.get("content"))
        if text:
            return text
    return ""


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "text":
            text = block.get("text")
            if isinstance(text, str) and text:
                return text
    return ""


def files_of(base: str, subpath: str, lines: Sequence[str]) -> dict[str, bytes]:
    """Files that `claude --resume` reads for one key, of its entries as stored: path to content.

    A subagent's stream carries its sidecar as entries of type `agent_metadata`, the last of which
    is the file `agent-….meta.json` (as the SDK materialises it). The main conversation goes without
    the pointers to where it stood once.
    """
    path = f"{base}/{check_subpath(subpath)}" if subpath else base
    kept, sidecar = list(lines), None
    if not subpath:
        kept = _without_old_ends(kept)
    else:
        sidecars = {line for line in lines if _is_sidecar(line)}
        sidecar = next((line for line in reversed(lines) if line in sidecars), None)
        kept = [line for line in lines if line not in sidecars]
    files = {}
    if kept:
        files[f"{path}.jsonl"] = "".join(f"{line}\n" for line in kept).encode()
    if sidecar is not None:
        value = {name: item for name, item in json.loads(sidecar).items() if name != "type"}
        files[f"{path}.meta.json"] = encode_entry(value).encode()
    return files


def _without_old_ends(lines: list[str]) -> list[str]:
    """The main conversation without each `last-prompt` that names no row at its end.

    `claude` goes on from the row that the last of them names, and writes one where a turn ends by
    itself: not when it is killed, nor after a deferred call of a resumed session. The result of
    such a call hangs on the call, beside what the older pointer names: all that came after it is
    then a branch that is not taken, with the calls that people have answered in it (CLI 2.1.330,
    measured). Without a pointer `claude` goes on from what was written last.
    """
    pointed = {at: row for at, line in enumerate(lines) if (row := _pointed(line)) is not None}
    if not pointed:
        return lines
    ends: set[str | None] = set()
    for line in reversed(lines):
        entry = _object(line)
        ends.add(entry_uuid(entry))
        if entry.get("type") in ("user", "assistant") and entry.get("isSidechain") is not True:
            break
    return [line for at, line in enumerate(lines) if at not in pointed or pointed[at] in ends]


def _pointed(line: str) -> str | None:
    """The row that a `last-prompt` names; None for every other entry."""
    entry = _object(line) if '"last-prompt"' in line else {}
    row = entry.get("leafUuid")
    return row if entry.get("type") == "last-prompt" and isinstance(row, str) else None


def _is_sidecar(line: str) -> bool:
    return '"agent_metadata"' in line and json.loads(line).get("type") == "agent_metadata"


def forked(
    streams: Mapping[str, Sequence[Entry]], old: str, new: str, fresh: Callable[[], str]
) -> dict[str, list[Entry]]:
    """The same conversation under another session id, with uuids of its own.

    As the SDK's fork does, and with the subagents' streams, which that leaves out. `fresh` makes
    a uuid. Every place that names an entry is renamed, wherever it lies.
    """
    names = {old: new}
    for entries in streams.values():
        for entry in entries:
            uuid = entry_uuid(entry)
            if uuid is not None and uuid not in names:
                names[uuid] = fresh()
    return {
        subpath: [_renamed(entry, old, names) for entry in entries]
        for subpath, entries in streams.items()
    }


def _renamed(entry: Entry, old: str, names: Mapping[str, str]) -> Entry:
    copy = _replace({k: v for k, v in entry.items() if k not in _OF_ANOTHER_SESSION}, names)
    if isinstance(copy, dict) and entry_uuid(entry) is not None:
        copy["forkedFrom"] = {"sessionId": old, "messageUuid": entry["uuid"]}
    return dict(copy)


def _replace(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_replace(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, names) for key, item in value.items()}
    return value


class Progress(StrEnum):
    """How far a transcript has come with one prompt."""

    ABSENT = "absent"
    """It does not hold the prompt."""
    BEGUN = "begun"
    DONE = "done"
    """The agent has said its last words on it."""


def progress(
    entries: Iterable[Entry], prompt_id: str, *, results: Iterable[str] = ()
) -> tuple[Progress, str]:
    """How far the main conversation has come with the prompt that has this UUID, or with what
    follows the result of one of these calls; and the last words when it is done. As all of a
    transcript it is the agent's own word: a forged end ends a turn that the agent could have ended
    as well.
    """
    found, words, stop, calls = Progress.ABSENT, "", None, frozenset(results)
    for entry in entries:
        if entry.get("uuid") == prompt_id or not calls.isdisjoint(tool_results([entry])):
            found, words, stop = Progress.BEGUN, "", None
        message = entry.get("message")
        if found is Progress.ABSENT or not isinstance(message, dict) or entry.get("isSidechain"):
            continue
        if entry.get("type") == "assistant":
            said = message.get("stop_reason")
            stop = said if isinstance(said, str) and said else stop
            words = _text(message.get("content")) or words
            if entry.get("isApiErrorMessage") is True:
                stop = None
        elif entry.get("type") == "user" and entry.get("uuid") != prompt_id:
            stop = None
    return (Progress.DONE, words) if stop in {"end_turn", "stop_sequence"} else (found, "")
