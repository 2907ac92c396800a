"""Who says yes: the Approver protocol, and approvals that fit one call only (requirement G)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One call that a person must decide about.

    Attributes:
        input_sha256: of the canonical input; an answer is good for this input only.
    """

    session_id: str
    tool_use_id: str
    name: str
    input: dict[str, Any]
    input_sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The person's word. `message` is told to the agent when it is no."""

    allowed: bool
    for_this_run: bool = False
    message: str = "denied by the person"


class Approver(Protocol):
    """Asks somebody. Never raises: no answer in time is a denial."""

    async def ask(self, question: Question) -> Answer:
        """The answer to one question, used once."""
        ...


class ToolGate(Protocol):
    """Keeps calls from a tool that fails for many."""

    async def enter(self, tool_use_id: str, name: str, *, tries: bool = True) -> str | None:
        """None when the call may go; else why not, in words for the model. `tries` False: it only
        looks, as one does that will wait for somebody before it runs.
        """
        ...

    async def left(self, tool_use_id: str) -> None:
        """One that entered to try does not run: it was denied after all."""
        ...


class OpenGate:
    """Keeps none."""

    async def enter(
        self,
        tool_use_id: str,  # noqa: ARG002
        name: str,  # noqa: ARG002
        *,
        tries: bool = True,  # noqa: ARG002
    ) -> str | None:
        """See ToolGate."""
        return None

    async def left(self, tool_use_id: str) -> None:
        """See ToolGate."""


class DenyApprover:
    """Nobody is there: everything that must be asked about is denied."""

    async def ask(self, question: Question) -> Answer:
        """See Approver."""
        return Answer(
            allowed=False,
            message=f"{question.name} needs a person's approval and nobody can be asked "
            "(no terminal); grant it in the policy or choose another permission mode",
        )


def canonical_input(tool_input: Any) -> bytes:
    """A tool's input in the one form that is hashed: sorted keys, no spaces."""
    return json.dumps(
        tool_input, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str
    ).encode("utf-8", "surrogatepass")


def input_sha256(tool_input: Any) -> str:
    """SHA-256 (hex) of the canonical input."""
    return hashlib.sha256(canonical_input(tool_input)).hexdigest()
