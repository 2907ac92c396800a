"""Two witnesses of every tool call: the wire, and the worker (requirement B). PURE.

One table: what a tool_result on the wire means in each state of its id. It proves what was asked
and reported, not what was executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ringfence.policy.call_input import CallInput, same_call
from ringfence.policy.tools import canonical_tool


class State(Enum):
    """What is known of one tool_use id."""

    NEVER_ASKED = "never-asked"
    ASKED = "asked"
    """An answer asked for it, and the worker has not spoken."""
    ALLOWED = "allowed"
    DENIED = "denied"
    KNOWN = "known"
    """It stands in the transcript that this run resumes from."""


class Report(Enum):
    """What a tool_result claims."""

    RESULT = "result"
    """The tool ran."""
    ERROR = "error"
    """is_error, in words of any kind."""
    NEVER_RAN = "never-ran"
    """is_error, in claude's own words for a call that did not run."""


class Verdict(Enum):
    """What it means."""

    FINE = "fine"
    UNHEARD = "unheard"
    """Benign: invalid input, an interrupted or cancelled sibling; noted."""
    NOT_ALLOWED = "tool-result-not-allowed"
    NEVER_ASKED = "tool-result-never-asked"


_F, _U, _N, _A = Verdict.FINE, Verdict.UNHEARD, Verdict.NOT_ALLOWED, Verdict.NEVER_ASKED

TABLE: dict[State, dict[Report, Verdict]] = {
    State.NEVER_ASKED: {Report.RESULT: _A, Report.ERROR: _A, Report.NEVER_RAN: _A},
    State.ASKED: {Report.RESULT: _N, Report.ERROR: _N, Report.NEVER_RAN: _U},
    State.ALLOWED: {Report.RESULT: _F, Report.ERROR: _F, Report.NEVER_RAN: _F},
    State.DENIED: {Report.RESULT: _N, Report.ERROR: _F, Report.NEVER_RAN: _F},
    State.KNOWN: {Report.RESULT: _F, Report.ERROR: _F, Report.NEVER_RAN: _F},
}

_NEVER_RAN_STARTS = (
    "<tool_use_error>",
    "[Request interrupted by user",
    "The user doesn't want to",
    "Error: No such tool available",
    "Tool permission request failed",
    "Cancelled: parallel tool call",
)
_NEVER_RAN_CAP = 8192
"""claude's own words are short; a long text in their disguise is a result."""


@dataclass(frozen=True, slots=True)
class Violation:
    """The wire and the worker disagree; the run ends."""

    reason: str
    tool_use_id: str


class ToolLedger:
    """States of all tool_use ids of one run. A state is set once; the worker's word is final."""

    def __init__(self, *, max_ids: int = 100_000) -> None:
        self._states: dict[str, State] = {}
        self._names: dict[str, str] = {}
        self._inputs: dict[str, CallInput | None] = {}
        self._max = max_ids

    def known(self, ids: Iterable[str]) -> None:
        """Ids of the transcript that the run resumes from."""
        for tool_use_id in ids:
            self._states[tool_use_id] = State.KNOWN

    def pending(self, tool_use_id: str, name: str, told: CallInput) -> None:
        """A call that an earlier run's wire asked for and nobody has decided: the worker may, for
        this name and this input only. Until then a result of it is a violation.
        """
        self._states[tool_use_id] = State.ASKED
        self._names[tool_use_id], self._inputs[tool_use_id] = name, told

    def asked(self, tool_use_id: str, name: str) -> None:
        """An answer on this wire asked for it."""
        if len(self._states) < self._max:
            self._states.setdefault(tool_use_id, State.ASKED)
            self._names.setdefault(tool_use_id, name)

    def asked_with(self, tool_use_id: str, told: CallInput | None) -> None:
        """The input that it asked with, when all of it has come; None for one that is none. An id
        that comes again with another input fits no decision any more.
        """
        if tool_use_id not in self._names:
            return
        known = self._inputs.setdefault(tool_use_id, told)
        if known != told:
            self._inputs[tool_use_id] = None

    def decided(
        self,
        tool_use_id: str,
        name: str,
        told: CallInput,
        *,
        allowed: bool,
        deferred: bool = False,
    ) -> Violation | None:
        """The worker spoke. A denial is never lifted: deny wins, and a deferred call is denied for
        this run.

        The worker was asked by a frame from inside. It may name a call that no answer asked for,
        a harmless tool in place of the one that the model called, or a harmless input: each ends
        the run, or the worker's yes to the one would cover the other.
        """
        state, asked = self.state(tool_use_id), self._names.get(tool_use_id, name)
        reason = ""
        if state is State.NEVER_ASKED:
            reason = "tool-never-asked"
        elif canonical_tool(asked) != canonical_tool(name):
            reason = "tool-name-differs"
        elif not self._asked_so(tool_use_id, name, told):
            reason = "tool-input-differs"
        if reason:
            self._states[tool_use_id] = State.DENIED
            return Violation(reason, tool_use_id) if allowed or deferred else None
        if state is not State.DENIED:
            self._states[tool_use_id] = State.ALLOWED if allowed else State.DENIED
        return None

    def _asked_so(self, tool_use_id: str, name: str, told: CallInput) -> bool:
        asked = self._inputs.get(tool_use_id)
        return asked is not None and same_call(name, asked, told)

    def state(self, tool_use_id: str) -> State:
        """What is known; an id that nobody spoke of was never asked."""
        return self._states.get(tool_use_id, State.NEVER_ASKED)

    def judge(self, tool_use_id: str, report: Report) -> Verdict:
        """Look it up in the table."""
        return TABLE[self.state(tool_use_id)][report]

    def check(self, results: Iterable[tuple[str, Report]]) -> Violation | None:
        """The first violation among a request's tool results."""
        for tool_use_id, report in results:
            verdict = self.judge(tool_use_id, report)
            if verdict in {Verdict.NOT_ALLOWED, Verdict.NEVER_ASKED}:
                return Violation(verdict.value, tool_use_id)
        return None


def report_of(block: dict[str, Any]) -> Report:
    """What a tool_result block claims. Anything unclear claims the most: that the tool ran."""
    if block.get("is_error") is not True:
        return Report.RESULT
    text = _text(block.get("content"))
    if text is not None and len(text) <= _NEVER_RAN_CAP and text.startswith(_NEVER_RAN_STARTS):
        return Report.NEVER_RAN
    return Report.ERROR


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        text = content[0].get("text")
        return text if isinstance(text, str) else None
    return None
