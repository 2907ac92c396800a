"""Whose work this is, and the trace that it belongs to: carried by the task, not by parameters.

W3C Trace Context, https://www.w3.org/TR/trace-context/ (level 1). A context is read from a caller's
request or made out here; what a sandbox says is never read as one.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Parent:
    """A span of this or another process. Ids in hex."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        """As a `traceparent` of version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parsed(text: str | None) -> Parent | None:
    """A `traceparent`; None for what is none. Of a version that is not known yet the known
    part counts, as the standard has it; one that goes on behind version 00 is none.
    """
    match = _FORM.fullmatch(text or "")
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & 1))


def detached() -> Parent:
    """A context that nothing of ours belongs to: for those who could say that their spans do."""
    return Parent(secrets.token_hex(16), secrets.token_hex(8), sampled=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whose:
    """What a worker has in hand.

    Attributes:
        turn: the run's name in the queue; attempt: its number there.
        agent, version, environment: ids of the platform.
        parent: of the spans that are made of it; empty starts a trace.
    """

    tenant: str = ""
    session: str = ""
    turn: str = ""
    attempt: int = 0
    agent: str = ""
    version: str = ""
    environment: str = ""
    parent: str = ""


IN_HAND: ContextVar[Whose | None] = ContextVar("ringfence_in_hand", default=None)
"""Set by who carries out a turn."""

ASKED: ContextVar[str] = ContextVar("ringfence_asked", default="")
"""`traceparent` of the gateway's request, set by the gateway alone: what is begun for it is its."""


def asked() -> str | None:
    """The request's context, to be kept with what it begins."""
    return ASKED.get() or None
