"""Events that a caller sends, in the public shapes; and types of those that there are. PURE.

Refused by name: outcomes, threads, `user.tool_result` (of environments where the caller executes
the built-in tools), `system.message` (the agent's program takes none within a session), and
content that somebody would have to fetch: no URL of a caller's is opened for it.
"""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, model_validator

from ringfence.control.media import MOST_BLOCKS, is_what_it_says
from ringfence.control.shapes import Shape, unsupported

EventType = Literal[
    "user.message",
    "user.interrupt",
    "user.tool_confirmation",
    "user.custom_tool_result",
    "agent.custom_tool_use",
    "agent.message",
    "agent.thinking",
    "agent.mcp_tool_use",
    "agent.mcp_tool_result",
    "agent.tool_use",
    "agent.tool_result",
    "agent.thread_message_received",
    "agent.thread_message_sent",
    "agent.thread_context_compacted",
    "session.error",
    "session.status_rescheduled",
    "session.status_running",
    "session.status_idle",
    "session.status_terminated",
    "session.thread_created",
    "span.outcome_evaluation_start",
    "span.outcome_evaluation_end",
    "span.model_request_start",
    "span.model_request_end",
    "span.outcome_evaluation_ongoing",
    "user.define_outcome",
    "session.thread_status_running",
    "session.thread_status_idle",
    "session.thread_status_terminated",
    "user.tool_result",
    "session.thread_status_rescheduled",
    "session.updated",
    "system.message",
    "session.usage",
    "workflow_run.created",
    "workflow_run.status_running",
    "workflow_run.status_idle",
    "workflow_run.status_ended",
    "workflow_run.error",
    "workflow_run.phase_started",
    "workflow_run.phase_ended",
]
"""What a list can be filtered by, as the official client has it; not all of them happen here."""

EVENT_TYPES: tuple[str, ...] = get_args(EventType)
TOLD: frozenset[str] = frozenset(
    {
        "agent.message",
        "agent.thinking",
        "agent.tool_use",
        "agent.tool_result",
        "agent.mcp_tool_use",
        "agent.mcp_tool_result",
        "agent.custom_tool_use",
        "agent.thread_context_compacted",
        "session.error",
        "session.usage",
        "span.model_request_start",
        "span.model_request_end",
    }
)
"""What a worker tells of a turn. No worker speaks for its user, or moves a session by a word."""

MOVES: frozenset[str] = frozenset(
    {
        "session.status_running",
        "session.status_idle",
        "session.status_rescheduled",
        "session.status_terminated",
        "session.updated",
    }
)
"""What the control plane itself tells."""

DeltaType = Literal["agent.message", "agent.thinking"]

REFUSED = {
    "user.define_outcome": "an outcome (user.define_outcome)",
    "user.tool_result": "user.tool_result (the sandbox executes the built-in tools)",
    "system.message": "system.message",
}


def _base64(text: str) -> str:
    try:
        binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise ValueError("not base64") from None
    return text


class _Named(Shape):
    """A source that is called by its media type, in the event itself."""

    media_type: str
    data: str

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if not is_what_it_says(self.media_type, self.data):
            raise ValueError(f"data: not {self.media_type}")
        return self


Base64 = Annotated[str, StringConstraints(min_length=4), AfterValidator(_base64)]
Text = Annotated[str, StringConstraints(min_length=1)]


class TextBlock(Shape):
    """Text."""

    type: Literal["text"]
    text: Text


class FileSource(Shape):
    """A file that was uploaded; it is read when the turn begins."""

    type: Literal["file"]
    file_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class ImageSource(_Named):
    """An image, in the event itself."""

    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: Base64


class ImageBlock(Shape):
    """An image."""

    type: Literal["image"]
    source: Annotated[ImageSource | FileSource, Discriminator("type")]


class PdfSource(_Named):
    """A PDF, in the event itself."""

    type: Literal["base64"]
    media_type: Literal["application/pdf"]
    data: Base64


class PlainSource(Shape):
    """A text."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: Text


class DocumentBlock(Shape):
    """A document."""

    type: Literal["document"]
    source: Annotated[PdfSource | PlainSource | FileSource, Discriminator("type")]
    context: str | None = None
    title: str | None = None


class Citations(Shape):
    """Whether the model may cite it."""

    enabled: bool


class SearchResultBlock(Shape):
    """A hit of a search that a custom tool made."""

    type: Literal["search_result"]
    source: str
    title: str
    content: Annotated[list[TextBlock], Field(min_length=1, max_length=100)]
    citations: Citations


MessageBlock = Annotated[TextBlock | ImageBlock | DocumentBlock, Discriminator("type")]
ResultBlock = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock, Discriminator("type")
]
EventId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class UserMessage(Shape):
    """The user's turn."""

    type: Literal["user.message"]
    content: Annotated[list[MessageBlock], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _bounded(self) -> UserMessage:
        if sum(block.type != "text" for block in self.content) > MOST_BLOCKS:
            raise ValueError(f"content: at most {MOST_BLOCKS} images and documents")
        return self


class UserInterrupt(Shape):
    """Stop what is being done."""

    type: Literal["user.interrupt"]
    session_thread_id: None = None

    @model_validator(mode="before")
    @classmethod
    def _no_threads(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("session_thread_id") is not None:
            raise unsupported("session_thread_id (a session has one thread)")
        return value


class UserToolConfirmation(Shape):
    """Yes or no to a tool call. updated_input, ours: yes to the call with another input."""

    type: Literal["user.tool_confirmation"]
    tool_use_id: EventId
    result: Literal["allow", "deny"]
    deny_message: Annotated[str, StringConstraints(max_length=4096)] | None = None
    updated_input: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> UserToolConfirmation:
        if self.deny_message is not None and self.result != "deny":
            raise ValueError("deny_message is for the result `deny` alone")
        if self.updated_input is not None and self.result != "allow":
            raise ValueError("updated_input is for the result `allow` alone")
        return self


class UserCustomToolResult(Shape):
    """What a custom tool gave, executed by the caller."""

    type: Literal["user.custom_tool_result"]
    custom_tool_use_id: EventId
    content: Annotated[list[ResultBlock], Field(max_length=100)] | None = None
    is_error: bool | None = None


SENT = ("user.message", "user.interrupt", "user.tool_confirmation", "user.custom_tool_result")
SentEvent = Annotated[
    UserMessage | UserInterrupt | UserToolConfirmation | UserCustomToolResult,
    Discriminator("type"),
]


class SentEvents(Shape):
    """The body of a sending."""

    events: Annotated[list[SentEvent], Field(min_length=1, max_length=50)]

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        if isinstance(value, dict):
            refuse_events(value.get("events"))
        return value


def refuse_events(value: Any) -> None:
    """Raise ValueError for what the public shapes have and nothing here carries out, by name."""
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, dict):
            continue
        kind = item.get("type")
        if isinstance(kind, str) and kind in REFUSED:
            raise unsupported(REFUSED[kind])
        content = item.get("content")
        for block in content if isinstance(content, list) else ():
            _refuse_block(block)


def _refuse_block(block: Any) -> None:
    if not isinstance(block, dict):
        return
    if block.get("type") == "redacted":
        raise unsupported("a block of type `redacted`")
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "url":
        raise unsupported("a source of type `url` (send the content itself, or upload it)")


def body_of(event: Shape) -> dict[str, Any]:
    """What is stored of an event: all but its type."""
    return event.model_dump(mode="json", exclude={"type"}, exclude_none=True)
