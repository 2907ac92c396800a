"""Scripts and scenarios: what the simulated model says. PURE.

A script is a list of steps, one an assistant turn. Which step is next follows from the
conversation alone (how many assistant turns there are since the prompt), so the server keeps no
state across resumes, retries and parallel sessions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringfence.errors import CallerError

_M = TypeVar("_M", bound=BaseModel)
_FENCE = re.compile(r"```ringfence-script[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(_Strict):
    """One tool_use block."""

    tool: str
    input: dict[str, Any] = Field(default_factory=dict)


class Step(_Strict):
    """One assistant turn, or a fault in its place.

    Attributes:
        text, thinking: content blocks. tool and input, or tools: tool calls, parallel ones in one
            turn.
        delay: seconds before the first byte. event_delay: seconds before every event.
        error: HTTP status in place of an answer, `times` times; retry_after in seconds.
        drop_after: close the connection after so many events.
        error_event: error type sent as an event in the middle of the stream.
        pings: ping events before the content.
        result_contains, then, otherwise: branch on the last tool result's text.
    """

    text: str | None = None
    thinking: str | None = None
    tool: str | None = None
    input: dict[str, Any] = Field(default_factory=dict)
    tools: list[ToolCall] = Field(default_factory=list)
    delay: float = Field(default=0, ge=0, le=3600)
    event_delay: float = Field(default=0, ge=0, le=60)
    error: int | None = Field(default=None, ge=400, le=599)
    error_type: str | None = None
    retry_after: float | None = None
    times: int = Field(default=1, ge=1)
    drop_after: int | None = Field(default=None, ge=0)
    error_event: str | None = None
    pings: int = Field(default=0, ge=0, le=1000)
    stop_reason: str | None = None
    input_tokens: int | None = Field(default=None, ge=0)
    output_tokens: int | None = Field(default=None, ge=0)
    result_contains: str | None = None
    then: list[Step] = Field(default_factory=list)
    otherwise: list[Step] = Field(default_factory=list)

    @property
    def calls(self) -> list[ToolCall]:
        """All tool calls of the turn."""
        own = [ToolCall(tool=self.tool, input=self.input)] if self.tool else []
        return own + self.tools

    @property
    def is_fault(self) -> bool:
        """Whether the turn is refused over HTTP instead of answered."""
        return self.error is not None


class Scene(_Strict):
    """Steps for prompts that match a regular expression."""

    match: str = ""
    steps: list[Step]


class Scenario(_Strict):
    """What a simulator plays; the first scene that matches, or `default`."""

    scenes: list[Scene] = Field(default_factory=list)
    default: list[Step] = Field(default_factory=lambda: [Step(text="OK.")])


def parse_scenario(text: str) -> Scenario:
    """A scenario file. Raises CallerError `scenario-invalid`."""
    return _validated(Scenario, _yaml(text))


def parse_steps(text: str) -> list[Step]:
    """A script inside a prompt. Raises CallerError `scenario-invalid`."""
    value = _yaml(text)
    if not isinstance(value, list):
        raise CallerError("scenario-invalid", "a script is a list of steps")
    return [_validated(Step, item) for item in value]


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CallerError("scenario-invalid", f"not YAML: {error}".replace("\n", " ")) from None


def _validated(model: type[_M], value: Any) -> _M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CallerError("scenario-invalid", f"{where}: {first['msg']}") from None


def next_step(scenario: Scenario, messages: Sequence[dict[str, Any]]) -> Step:
    """The turn that a conversation asks for now."""
    prompt, since = _prompt(messages)
    steps = _steps(scenario, prompt)
    turns = sum(1 for message in since if message.get("role") == "assistant")
    results = [text for message in since for text in _results(message)]
    flat = list(_flatten(steps, results))
    if not flat:
        return Step(text="OK.")
    return flat[min(turns, len(flat) - 1)] if turns < len(flat) else Step(text="Done.")


def _flatten(steps: Sequence[Step], results: Sequence[str]) -> Iterator[Step]:
    """Branches are decided on the result that stood when their turn came."""
    index = 0
    for step in steps:
        if step.result_contains is None:
            if not step.is_fault or step.times > 0:
                yield step
                index += 1
            continue
        last = results[min(index, len(results)) - 1] if results and index else ""
        branch = step.then if step.result_contains in last else step.otherwise
        for inner in _flatten(branch, results[index:]):
            yield inner
            index += 1


def _steps(scenario: Scenario, prompt: str) -> list[Step]:
    script = _FENCE.search(prompt)
    if script is not None:
        return parse_steps(script[1])
    for scene in scenario.scenes:
        if re.search(scene.match, prompt):
            return scene.steps
    return scenario.default


def _prompt(
    messages: Sequence[dict[str, Any]],
) -> tuple[str, Sequence[dict[str, Any]]]:
    """The last words of a person, and the messages after them."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.get("role") != "user":
            continue
        text = "\n".join(_texts(message))
        if text and not list(_results(message)):
            return text, messages[index + 1 :]
    return "", messages


def _texts(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "text":
            yield str(block.get("text", ""))


def _results(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_result":
            inner = block.get("content")
            if isinstance(inner, str):
                yield inner
            else:
                yield "\n".join(_texts({"content": inner}))
