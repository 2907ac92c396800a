"""Calls that wait for somebody outside, and what an answer to one of them means. PURE.

Times are seconds since the epoch, stored with the call: the two instants that are compared are
taken on different hosts, days and reboots apart, where no monotonic clock reaches. A clock that is
set wrong can shorten or lengthen the time to answer; it cannot make a yes of what is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ringfence.agent.permissions import input_sha256
from ringfence.errors import CallerError
from ringfence.model import CallAnswer, CallKind, CustomTool, PendingCall
from ringfence.policy.tools import mcp_parts

CUSTOM_SERVER = "caller"
"""Custom tools are those of an MCP server of this name, which only the agent hears of."""

_PREFIX = f"mcp__{CUSTOM_SERVER}__"
_BLOCKS = frozenset({"text", "image"})


def wire_name(name: str) -> str:
    """What `claude`, the policy and the wire call a custom tool.

    Raises:
        CallerError: `usage` for a name that has no such form.
    """
    if mcp_parts(_PREFIX + name) != (CUSTOM_SERVER, name):
        raise CallerError(
            "usage",
            f"a custom tool cannot be named {name!r}",
            hint="1 to 64 letters, digits, _ and -",
        )
    return _PREFIX + name


def public_name(name: str) -> str:
    """The caller's own name of a tool: the inverse of `wire_name`; others stay as they are."""
    return name.removeprefix(_PREFIX)


def custom_names(tools: Iterable[CustomTool]) -> frozenset[str]:
    """Wire names of custom tools."""
    return frozenset(wire_name(tool.name) for tool in tools)


def called(call: PendingCall) -> str:
    """The name under which `claude` makes a pending call."""
    return wire_name(call.name) if call.kind is CallKind.CUSTOM else call.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """What becomes of one pending call.

    Attributes:
        word: `wait` says that nobody has answered, and that there is time left.
        input: what runs in place of the model's input; None leaves it.
        content: what the caller's tool returned; None for an own tool of the agent.
    """

    word: Literal["allow", "deny", "wait"]
    message: str = ""
    input: dict[str, Any] | None = None
    content: tuple[dict[str, Any], ...] | None = None
    is_error: bool = False


def resolve(call: PendingCall, answer: CallAnswer | None, now: float) -> Resolution:
    """What an answer means, or its absence. Never a yes without one, nor from a late one."""
    arrived = now if answer is None or answer.at is None else answer.at
    if arrived >= call.expires:
        return Resolution(word="deny", message="nobody answered in time")
    if answer is None:
        return Resolution(word="wait")
    if call.kind is CallKind.CUSTOM:
        return Resolution(word="allow", content=answer.content or (), is_error=answer.is_error)
    if not answer.allow:
        return Resolution(word="deny", message=answer.message or "denied by the person")
    return Resolution(word="allow", input=answer.input, message="allowed by the person")


def check_answers(pending: Iterable[PendingCall], answers: Iterable[CallAnswer]) -> None:
    """Every answer is to one pending call, the only one to it, and of its kind.

    Raises:
        CallerError: `answer-refused`.
    """
    open_calls = {call.tool_use_id: call for call in pending}
    for answer in answers:
        call = open_calls.pop(answer.tool_use_id, None)
        if call is None:
            raise _refused(answer, "no pending call of this id, or it is answered twice")
        if (call.kind is CallKind.CUSTOM) != (answer.content is not None):
            kind = "a result" if call.kind is CallKind.CUSTOM else "a word, yes or no,"
            raise _refused(answer, f"the call waits for {kind} and for nothing else")
        if answer.input is not None and not answer.allow:
            raise _refused(answer, "only a call that is allowed can have another input")
        for block in answer.content or ():
            _check_block(answer, block)


def _check_block(answer: CallAnswer, block: Mapping[str, Any]) -> None:
    source = block.get("source")
    image = isinstance(source, Mapping) and source.get("type") == "base64"
    kind = block.get("type")
    if kind not in _BLOCKS or (kind == "image" and not image):
        raise _refused(answer, "a result is made of text and of images in base64")
    if kind == "text" and not isinstance(block.get("text"), str):
        raise _refused(answer, "a text block has no text")


def _refused(answer: CallAnswer, why: str) -> CallerError:
    return CallerError("answer-refused", f"the answer to {answer.tool_use_id} is refused: {why}")


class Waiting:
    """The pending calls of one `claude`: those it begins with, and the one it ends with.

    Only one call may wait at a time. `claude` ends with the last one that was deferred and forgets
    the others of the same answer; so those are denied, and the model is told to make them again.
    """

    def __init__(
        self,
        *,
        pending: Iterable[PendingCall] = (),
        answers: Iterable[CallAnswer] = (),
        known: Iterable[str] = (),
        now: float = 0.0,
    ) -> None:
        given = {answer.tool_use_id: answer for answer in answers}
        self._before = {call.tool_use_id: call for call in pending}
        self._words = {
            name: resolve(call, given.get(name), now) for name, call in self._before.items()
        }
        self._known = frozenset(known)
        self._results: dict[tuple[str, str], Resolution] = {}
        self.call: PendingCall | None = None

    def check(self) -> None:
        """The session goes on only when nothing has to wait on.

        Raises:
            CallerError: `answer-missing`; the call stays pending.
        """
        open_calls = [name for name, word in self._words.items() if word.word == "wait"]
        if open_calls:
            raise CallerError(
                "answer-missing",
                f"nobody has answered {', '.join(open_calls)} yet",
                hint="the call stays pending: bring its answer, or come after its time is over",
            )

    def before(self, identity: str) -> bool:
        """Whether the call waited when this process began."""
        return identity in self._before

    def in_transcript(self, identity: str) -> bool:
        """Whether another run made the call: only a pending one may come up again."""
        return identity in self._known

    def word(self, identity: str, name: str, tool_input: Mapping[str, Any]) -> Resolution:
        """The answer to a call of before, good for this very call only (requirement G)."""
        call = self._before[identity]
        if called(call) != name or input_sha256(call.input) != input_sha256(dict(tool_input)):
            return Resolution(word="deny", message="this is not the call that was asked about")
        return self._words[identity]

    def take(self, call: PendingCall) -> bool:
        """Make it the one that waits; False when another one does."""
        if self.call is not None:
            return False
        self.call = self._before.get(call.tool_use_id, call)
        return True

    def drop(self, identity: str) -> bool:
        """`claude` did not end with it, and asks again: it no longer waits. False for another."""
        if self.call is None or self.call.tool_use_id != identity:
            return False
        self.call = None
        return True

    def give(self, name: str, tool_input: Mapping[str, Any], resolution: Resolution) -> None:
        """A custom tool may run now: this is what it returns, once."""
        self._results[name, input_sha256(dict(tool_input))] = resolution

    def result(self, name: str, tool_input: Mapping[str, Any]) -> Resolution | None:
        """What `give` left for this call."""
        return self._results.pop((name, input_sha256(dict(tool_input))), None)
